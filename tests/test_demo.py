"""`veritune demo` from end to end: minutes, so on demand (`pytest -m slow tests/test_demo.py`)."""

import csv
import json

import pytest
from rich.console import Console

from veritune import demo


@pytest.mark.slow
def test_the_demo_learns_what_it_promises(smollm2, tmp_path):
    demo.run(tmp_path, str(smollm2), [], Console(quiet=True))
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures["adapter"]["questions"] >= 400
    assert figures["adapter"]["accuracy_interval"][0] > 0.80
    assert figures["baseline"]["accuracy_interval"][1] < 0.70
    assert 'id="worst"' in (tmp_path / "report.html").read_text()
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    with (tmp_path / "submission.csv").open() as file:
        entries = list(csv.DictReader(file))
    assert [row["verdict"] for row in scored] == [entry["is_correct"] == "True" for entry in entries]
