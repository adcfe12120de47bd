"""What was done is shown, in lines that can be copied."""

import io

import made_rows
from rich.console import Console

from veritune.config import Prepare
from veritune.data import dataset, summary


def test_what_was_done_is_shown(tmp_path):
    path = made_rows.write(tmp_path / "rows.jsonl", made_rows.rows(400))
    path.write_text(path.read_text().replace("is_correct", "label") + "broken\n")
    console = Console(width=80, record=True, file=io.StringIO())
    manifest = dataset.prepare([str(path)], tmp_path / "out", Prepare(limit=100), console)
    shown = console.export_text()
    for words in (
        f"source: {path}, 401 rows\n",
        f"note: {path}: column 'label' taken as the label\n",
        "not valid JSON",
        "400  rows of 40 questions",
        "over the limit of 100",
        "questions in both train and validation",
        manifest["fingerprint"],
        f"written to {tmp_path / 'out'}\n",
        f"{tmp_path / 'out/rejected.jsonl'}\n",
    ):
        assert words in shown


def test_that_nothing_was_held_out_is_shown(tmp_path):
    path = made_rows.write(tmp_path / "rows.jsonl", made_rows.rows(40))
    for rows in (0, 8):
        console = Console(width=80, record=True, file=io.StringIO())
        dataset.prepare([str(path)], tmp_path / "out", Prepare(validation_rows=rows), console)
        assert ("train and sweep need some (--validation-rows N)" in console.export_text()) == (rows == 0)


def test_of_many_sources_some_are_shown(tmp_path):
    for number in range(14):
        made_rows.write(tmp_path / f"{number:02}.jsonl", made_rows.rows(20, seed=number))
    console = Console(width=80, record=True, file=io.StringIO())
    dataset.prepare([str(tmp_path)], tmp_path / "out", Prepare(), console)
    shown = console.export_text()
    assert shown.count("source: ") == summary.SHOWN
    assert "and 4 more in manifest.json" in shown


def test_progress_is_drawn_on_a_terminal_alone():
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with summary.progress(terminal, 1000) as tick:
        tick(400)
        tick(1000)
    assert "splitting and writing" in terminal.file.getvalue()  # type: ignore[attr-defined]
    with summary.progress(None, 1000) as tick:
        tick(400)
