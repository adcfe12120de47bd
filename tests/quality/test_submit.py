"""Submissions: one row for each test row, checked against the sample before anything is scored."""

import json

import numpy as np
import polars as pl
import pytest
from fake_scorer import Recorder, p_of

from veritune.config import Columns
from veritune.errors import ConfigError, DataError, MissingError
from veritune.quality.score import open_scoring, score_file
from veritune.quality.submit import open_submission, submit


def write_test(path, ids=None, rows=30):
    frame = pl.DataFrame(
        {
            "question": [f"Q{i}" for i in range(rows)],
            "answer": ["1"] * rows,
            "solution": [f"S{i}" for i in range(rows)],
            "is_correct": [True] * rows,
        }
    )
    (frame if ids is None else frame.with_columns(pl.Series("id", ids))).write_parquet(path)
    return path


def write_sample(path, ids, header="ID,is_correct"):
    path.write_text(header + "\n" + "".join(f"{value},True\n" for value in ids))
    return path


def run(tmp_path, scorer, console, test, sample=None, **more):
    out = tmp_path / "submission.csv"
    plan = open_submission(test, out, Columns(), sample=sample, **more)
    return submit(scorer, plan, out, identity="x", console=console, chunk_rows=8)


def expected(order):
    return "ID,is_correct\n" + "".join(f"{name},{p_of(f'Q{i}', f'S{i}') >= 0.5}\n" for name, i in order)


def test_rows_are_numbered_from_0_and_agree_with_the_sample(tmp_path, scorer, console):
    test, sample = write_test(tmp_path / "test.parquet"), write_sample(tmp_path / "sample.csv", range(30))
    result = run(tmp_path, scorer, console, test, sample)
    assert (tmp_path / "submission.csv").read_text() == expected((i, i) for i in range(30))
    assert (result.rows, result.said_true) == (30, sum(p_of(f"Q{i}", f"S{i}") >= 0.5 for i in range(30)))
    assert not (tmp_path / "submission.csv.partial").exists()
    without = run(tmp_path, scorer, console, test, overwrite=True)
    assert without.said_true == result.said_true


def test_own_ids_are_used_in_the_samples_order(tmp_path, scorer, console):
    ids = [1000 + 7 * i for i in range(30)]
    test, sample = write_test(tmp_path / "test.parquet", ids), write_sample(tmp_path / "s.csv", reversed(ids))
    run(tmp_path, scorer, console, test, sample)
    order = [(ids[i], i) for i in reversed(range(30))]
    assert (tmp_path / "submission.csv").read_text() == expected(order)
    assert "in another order, which is kept" in console.file.getvalue()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (range(32), r"the sample has 32 rows, more than the test file's 30.*2 IDs have no row there, such as 30, 31"),
        (range(29), r"the sample has 29 rows, fewer than the test file's 30.*such as ID 29"),
        (range(1, 31), r"1 of its IDs are not in .*such as 30; that has 0 instead; .*row numbers from 0"),
        ([1, 0, *range(2, 30)], r"another order.*row 1 has ID '1', not '0'"),
        ([*range(29), 3], r"s.csv:31: ID '3' was there before, in line 5"),
        ([*range(29), ""], r"s.csv:31: has no ID"),
        ([], "header but no rows"),
    ],
)
def test_a_sample_of_something_else_is_refused(tmp_path, ids, message):
    test, sample = write_test(tmp_path / "test.parquet"), write_sample(tmp_path / "s.csv", ids)
    with pytest.raises(DataError, match=message):
        open_submission(test, tmp_path / "o.csv", Columns(), sample=sample)


@pytest.mark.parametrize("header", ["id,is_correct", "ID,is_correct,x", "is_correct,ID", "ID;is_correct"])
def test_a_sample_with_other_columns_is_refused(tmp_path, header):
    test, sample = write_test(tmp_path / "test.parquet"), write_sample(tmp_path / "s.csv", range(30), header)
    with pytest.raises(DataError, match=r"ID,is_correct|separated by commas|wrong number of fields"):
        open_submission(test, tmp_path / "o.csv", Columns(), sample=sample)


def test_ids_that_are_missing_or_repeated_in_the_test_file_are_refused(tmp_path):
    for ids, message in (([*range(29), 3], r"row 30: ID '3' was there before, at .*row 4"), ([None] * 30, "has no ID")):
        test = write_test(tmp_path / "test.parquet", pl.Series(ids, dtype=pl.Int64))
        with pytest.raises(DataError, match=message):
            open_submission(test, tmp_path / "o.csv", Columns())


def test_nothing_is_overwritten_or_missed(tmp_path):
    test = write_test(tmp_path / "test.parquet")
    sample = write_sample(tmp_path / "s.csv", range(30))
    with pytest.raises(ConfigError, match="is the input"):
        open_submission(test, sample, Columns(), sample=sample, overwrite=True)
    with pytest.raises(MissingError, match="no such file"):
        open_submission(test, tmp_path / "o.csv", Columns(), sample=tmp_path / "none.csv")
    (tmp_path / "o.csv").touch()
    with pytest.raises(ConfigError, match="is there already"):
        open_submission(test, tmp_path / "o.csv", Columns(), sample=sample)


def test_every_row_is_answered_even_one_without_a_solution(tmp_path, scorer, console):
    rows = [{"ID": f"a,{i}", "question": f"Q{i}", "solution": f"S{i}" if i != 2 else ""} for i in range(5)]
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(tmp_path, scorer, console, test)
    got = pl.read_csv(tmp_path / "submission.csv")
    assert got["ID"].to_list() == [row["ID"] for row in rows]
    assert got["is_correct"][2] is False
    assert result.unscorable == 1
    assert "False because they cannot be scored" in console.file.getvalue()


def test_a_stopped_submission_goes_on_and_agrees_with_the_scored_file(tmp_path, scorer, console):
    test = write_test(tmp_path / "test.parquet")

    class Stopping(Recorder):
        def __call__(self, *args):
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().__call__(*args)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Stopping(), console, test)
    assert run(tmp_path, scorer, console, test).resumed == 16
    assert scorer.rows == 14
    out = tmp_path / "scored.parquet"
    score_file(Recorder(), open_scoring(test, out, Columns()), out, identity="x", console=console)
    said = pl.read_csv(tmp_path / "submission.csv")["is_correct"].to_numpy()
    assert np.array_equal(said, pl.read_parquet(out)["verdict"].to_numpy())
