"""`veritune demo` from end to end: on its own rows minutes, so on demand (`pytest -m slow tests/test_demo.py`)."""

import csv
import io
import json
import shlex

import pytest
from rich.console import Console

from veritune import demo
from veritune.data import generate


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


def test_few_rows_of_ones_own_in_a_folder_with_a_space(tiny_folder, tmp_path):
    out, rows, said = tmp_path / "my [demo]", tmp_path / "my rows.jsonl", io.StringIO()
    generate.write(rows, 20, seed=1)
    demo.run(out, str(tiny_folder), [str(rows)], Console(file=said, width=1000))
    text = said.getvalue()
    assert "On 1 questions it has never seen, accuracy went from " in text  # too few for an interval
    commands = [shlex.split(line)[1:] for line in text.splitlines() if ". veritune " in line]
    assert commands[0] == ["veritune", "prepare", str(rows), "--out", str(out / "prepared")]
    assert commands[-1] == ["veritune", "report", str(out / "run"), "--out", str(out / "report.html")]
    assert f"  {out / 'report.html'}  " in text
