"""What the user names becomes files, once each, and files of every format become the same chunks."""

import os

import made_rows
import polars as pl
import pytest

from veritune.config import Columns
from veritune.data import chunks
from veritune.data.sources import Source, find_files, read_chunks
from veritune.errors import DataError, MissingError


def read(path, limit=10**6, columns=None):
    """All chunks of a file as one: (frame, refused, notes, ticks)."""
    notes, ticks = [], []
    source = Source(str(path), path, path.stat().st_size)
    parts = list(read_chunks(source, columns or Columns(), limit, notes.append, ticks.append))
    frame = pl.concat([part.frame for part in parts], how="diagonal")
    return frame, [item for part in parts for item in part.refused], notes, ticks


def test_a_folder_stands_for_the_data_files_in_it(tmp_path):
    rows = made_rows.rows(10)
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "deep/a.csv", ".hidden.jsonl"):
        made_rows.write(tmp_path / name, rows)
    (tmp_path / "README.md").write_text("about")
    notes = []
    found = find_files([str(tmp_path), str(tmp_path / "b.jsonl")], notes.append)
    assert [source.name for source in found] == [str(tmp_path / "b.jsonl"), str(tmp_path / "deep/a.csv")]
    assert any("README.md" in note for note in notes)
    assert any("more than once" in note for note in notes)


def test_links_in_a_folder_are_read_or_named(tmp_path):
    (tmp_path / "named").mkdir()
    (tmp_path / "elsewhere").mkdir()
    made_rows.write(tmp_path / "elsewhere" / "a.csv", made_rows.rows(10))
    for link, target in (("part", "elsewhere"), ("a.csv", "elsewhere/a.csv"), ("gone.csv", "nowhere")):
        (tmp_path / "named" / link).symlink_to(tmp_path / target)
    notes = []
    assert [source.path.name for source in find_files([str(tmp_path / "named")], notes.append)] == ["a.csv"]
    assert any("part: left alone, a link to a folder" in note for note in notes)
    assert any("gone.csv: left alone, a link to a lost file" in note for note in notes)


def test_a_name_that_cannot_be_written_down_is_an_error_before_anything_is_read(tmp_path):
    (tmp_path / os.fsdecode(b"pr\xfcfung.csv")).write_text("question,solution,label\n1?,2,true\n")
    with pytest.raises(DataError, match=r"pr\\udcfcfung\.csv': the name is not UTF-8: rename"):
        find_files([str(tmp_path)], print)


def test_what_cannot_be_a_source(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"x\.json: unknown kind of file"):
        find_files([str(tmp_path / "x.json")], print)
    with pytest.raises(DataError, match="no data file"):
        find_files([str(tmp_path / "nothing")], print)
    with pytest.raises(MissingError):
        find_files([str(tmp_path / "none.csv")], print)
    with pytest.raises(DataError, match="no source"):
        find_files([], print)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_all_formats_give_the_same_chunks(tmp_path, name):
    rows = made_rows.rows(60)
    extra = [row | {"answer": str(n), "gold": None if n % 2 else "x"} for n, row in enumerate(rows)]
    frame, refused, notes, _ = read(made_rows.write(tmp_path / name, extra))
    assert not refused
    assert not notes
    assert frame["question"].to_list() == [row["question"] for row in rows]
    assert frame["solution"].to_list() == [row["solution"] for row in rows]
    assert [label.lower() for label in frame["label"]] == [str(row["is_correct"]).lower() for row in rows]
    assert frame["column:gold"].to_list() == [row["gold"] for row in extra]
    assert frame["column:answer"].to_list() == [row["answer"] for row in extra]


def test_other_values_become_text_as_json_writes_it(tmp_path):
    row = {"question": "q", "solution": "s", "is_correct": 1, "i": 7, "f": 0.5, "b": True, "l": [1, "a"], "n": None}
    for name in ("a.jsonl", "a.parquet"):
        row = row if name == "a.jsonl" else row | {"l": [1, 2]}
        frame = read(made_rows.write(tmp_path / name, [row]))[0]
        values = [frame[f"column:{key}"][0] for key in ("i", "f", "b", "l", "n")]
        assert values == ["7", "0.5", "true", '[1, "a"]' if name == "a.jsonl" else "[1, 2]", None]


def test_lines_are_counted_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 7)
    path = made_rows.write(tmp_path / "a.jsonl", made_rows.rows(50))
    path.write_bytes(path.read_bytes().replace(b'{"question"', b'{"question":}\n{"question"', 1))
    frame, refused, _, _ = read(path)
    assert [item.line for item in refused] == [1]
    assert frame["line"].to_list() == list(range(2, 52))
    frame = read(made_rows.write(tmp_path / "a.parquet", made_rows.rows(50)))[0]
    assert frame["line"].to_list() == list(range(1, 51))


def test_a_column_may_come_late_and_objects_may_lack_it(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 5)
    rows = made_rows.rows(12)
    rows[11]["hint"] = "look"
    del rows[7]["solution"]
    frame = read(made_rows.write(tmp_path / "a.jsonl", rows))[0]
    assert frame["column:hint"].to_list() == [None] * 11 + ["look"]
    assert frame["solution"].to_list()[7] is None


def test_a_question_that_is_no_text_is_refused(tmp_path):
    rows = made_rows.rows(10)
    rows[3]["question"] = ["a", "list"]
    rows[6]["solution"] = 5
    frame, refused, _, _ = read(made_rows.write(tmp_path / "a.jsonl", rows))
    assert [(item.line, item.reason) for item in refused] == [(4, chunks.NOT_TEXT), (7, chunks.NOT_TEXT)]
    assert "'question' is a list" in refused[0].detail
    assert len(frame) == 8


def test_a_parquet_column_of_another_type_is_an_error(tmp_path):
    pl.DataFrame({"question": [[1]], "solution": ["s"], "label": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'question' holds List"):
        read(tmp_path / "a.parquet")


def test_guessed_columns_are_said_and_flags_are_followed(tmp_path):
    rows = [{"problem": "q", "answer": "s", "is_right": "yes"}]
    path = made_rows.write(tmp_path / "a.csv", rows)
    frame, _, notes, _ = read(path, columns=Columns(solution="answer"))
    assert frame.rows() == [(2, "q", "s", "yes")]
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.csv", b"question,solution,is_correct\n", "no rows"),
        ("a.csv", b"a,b\n1,2\n", "no column holds the question"),
        ("a.jsonl", b'{"a": 1}\n', "no column holds the question"),
        ("a.jsonl", b"", "empty"),
        ("a.parquet", b"", "cannot be read"),
    ],
)
def test_a_file_without_usable_rows_is_an_error(tmp_path, name, data, problem):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=problem):
        read(tmp_path / name)


def test_progress_reaches_the_files_size(tmp_path):
    path = made_rows.write(tmp_path / "a.jsonl.gz", made_rows.rows(3000))
    ticks = read(path)[3]
    assert ticks == sorted(ticks)
    assert ticks[-1] == path.stat().st_size
