"""A file read for scoring comes back whole: every row, in order, every column with its type."""

import json
from pathlib import Path

import made_rows
import polars as pl
import pytest

from veritune.data.sources import read_table
from veritune.errors import DataError, MissingError


def test_jsonl_keeps_order_types_and_columns(tmp_path):
    rows = [
        {"b": "x", "n": 1, "f": 1.5, "t": True, "l": [1, 2], "mixed": 1},
        {"b": None, "n": None, "f": 2, "t": False, "l": [3], "mixed": "one", "late": "y"},
    ]
    table = read_table(made_rows.write(tmp_path / "a.jsonl", rows))
    assert table.columns == ["b", "n", "f", "t", "l", "mixed", "late"]
    assert table.rows() == [("x", 1, 1.5, True, [1, 2], "1", None), (None, None, 2.0, False, [3], "one", "y")]


def test_numbers_too_large_for_64_bits_are_not_lost(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 123456789012345678901234567890}\n{"n": 1}\n')
    assert read_table(path)["n"].to_list() in (
        ["123456789012345678901234567890", "1"],
        [123456789012345678901234567890, 1],
    )


def test_whole_numbers_beside_fractions_keep_every_digit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 9007199254740993}\n{"n": 9007199254740992}\n{"n": 0.5}\n{"n": null}\n')
    assert read_table(path)["n"].to_list() == ["9007199254740993", "9007199254740992", "0.5", None]
    path.write_text('{"n": 9007199254740992}\n{"n": 0.5}\n')
    assert read_table(path)["n"].to_list() == [2.0**53, 0.5]


@pytest.mark.parametrize("late", [{"b": 2}, {"a": 1, "b": 2}, [1.5]])
def test_nested_values_that_differ_late_keep_all_they_hold(tmp_path, late):
    first = [1] if isinstance(late, list) else {"a": 1}
    rows = [{"x": value} for value in [*[first] * 200, None, late]]
    table = read_table(made_rows.write(tmp_path / "a.jsonl", rows))
    assert table["x"].to_list() == [*[json.dumps(first)] * 200, None, json.dumps(late)]


def test_csv_is_text_and_empty_fields_are_null(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'ID,question\n007,"two\nlines"\n1,\n')
    assert read_table(path).to_dicts() == [{"ID": "007", "question": "two\nlines"}, {"ID": "1", "question": None}]


def test_parquet_comes_as_it_is(tmp_path):
    table = pl.DataFrame({"ID": [3, 1], "question": ["a", None], "x": [[1.0], []]})
    table.write_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").equals(table)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a":\n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n\xff\n', r"a\.jsonl:2: not valid UTF-8"),
        ("a.jsonl", b'{"a": "\\ud800"}\n', r"a\.jsonl:1: .*surrogate"),
        ("a.csv", b"a,b\n1,2\n1\n", r"a\.csv:3: wrong number of fields"),
        ("a.csv", b"a,b\n", "a header but no rows"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.jsonl", b"", "empty"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: cannot be read"),
        ("a.txt", b"x", "unknown kind"),
    ],
)
def test_a_row_that_cannot_be_read_is_an_error_with_its_line(tmp_path, name, data, problem):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=problem):
        read_table(tmp_path / name)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(MissingError):
        read_table(tmp_path / "none.csv")
    with pytest.raises(DataError, match="folder"):
        read_table(tmp_path)


def test_every_row_of_the_real_set_is_there():
    path = Path(__file__).parents[2] / "../shared/data/unseen_solvers.jsonl.gz"
    if not path.exists():
        pytest.skip("the shared data are not on this machine")
    table = read_table(path)
    assert len(table) == 1630
    assert table["is_correct"].dtype == pl.Boolean


def test_jsonl_goes_round(tmp_path):
    rows = made_rows.rows(50)
    table = read_table(made_rows.write(tmp_path / "a.jsonl.gz", rows))
    assert [json.loads(line) for line in table.write_ndjson().splitlines()] == rows
