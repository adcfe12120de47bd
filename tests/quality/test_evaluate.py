"""Figures of labelled rows: right numbers, whole JSON, a readable table, and clear refusals of what has no meaning."""

import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fake_scorer import p_of
from sklearn.metrics import accuracy_score, roc_auc_score

from veritune.config import Columns
from veritune.data.sources import read_table
from veritune.errors import DataError, NonFiniteError
from veritune.quality import evaluate as ev

SHARED = Path(__file__).parents[2] / "../shared/data/validation.jsonl.gz"


def some_frame(rows=400, questions=60, seed=0):
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame(
        {
            "question": [f"Question {i}" for i in rng.integers(questions, size=rows)],
            "solution": [f"Solution {i}" for i in range(rows)],
            "is_correct": rng.random(rows) < 0.6,
            "solver": rng.choice(["a", "b[1]", "c"], size=rows, p=[0.2, 0.3, 0.5]),
        }
    )
    labels = frame["is_correct"].to_numpy()
    good = np.clip(0.5 + 0.25 * np.where(labels, 1, -1) + rng.normal(0, 0.25, rows), 0, 1)
    return frame, good, rng.random(rows)


def test_the_figures_are_those_of_the_rows(console):
    frame, good, base = some_frame()
    result = ev.evaluate(frame, good, base, by=["solver"], resamples=300)
    labels = frame["is_correct"].to_numpy()
    assert result["adapter"]["accuracy"] == pytest.approx(accuracy_score(labels, good >= 0.5))
    assert result["adapter"]["auroc"] == pytest.approx(roc_auc_score(labels, good))
    assert result["baseline"]["auroc"] == pytest.approx(roc_auc_score(labels, base))
    assert result["adapter"]["questions"] == frame["question"].n_unique()
    difference = result["difference"]["auroc"]
    assert difference["value"] == pytest.approx(result["adapter"]["auroc"] - result["baseline"]["auroc"])
    assert difference["interval"][0] > 0.2
    assert difference["p_value"] < 0.01
    by = result["by"]["solver"]
    assert [entry["value"] for entry in by] == ["c", "b[1]", "a"]
    assert sum(entry["rows"] for entry in by) == 400
    of_a = (frame["solver"] == "a").to_numpy()
    assert by[2]["accuracy"] == pytest.approx(accuracy_score(labels[of_a], good[of_a] >= 0.5))
    assert by[2]["baseline"]["auroc"] == pytest.approx(roc_auc_score(labels[of_a], base[of_a]))


def test_the_table_and_the_json_tell_the_same(tmp_path, console):
    frame, good, base = some_frame()
    result = ev.evaluate(frame, good, base, by=["solver"], resamples=100)
    ev.show(result, console)
    shown = console.file.getvalue()
    accuracy, (low, high) = result["adapter"]["accuracy"], result["adapter"]["accuracy_interval"]
    assert f"{accuracy:.4f} [{low:.4f}, {high:.4f}]" in shown
    assert "b[1]" in shown
    assert "400 rows of 60 questions" in shown
    path = tmp_path / "new" / "evaluation.json"
    ev.write(result, path)
    assert json.loads(path.read_text()) == result


@pytest.mark.parametrize(
    ("share", "trained", "meant", "hint"),
    [(None, 0.3, "30.0%", True), (None, 0.58, "58.0%", False), (0.6, 0.3, "60.0%", False), (None, None, None, False)],
)
def test_it_says_for_which_share_the_scores_are_meant(console, share, trained, meant, hint):
    frame, good, _ = some_frame()
    result = ev.evaluate(frame, good, share=share, train_share=trained, resamples=20)
    ev.show(result, console)
    shown = console.file.getvalue()
    assert (f"meant for rows of which {meant} are correct" in shown) == (meant is not None)
    own = result["adapter"]["share_true"]
    assert (f"--share {own:.2f} moves it to these" in shown) == hint


@pytest.mark.parametrize("label", [True, False])
def test_it_names_no_share_that_cannot_be_given(console, label):
    frame, good, _ = some_frame()
    frame = frame.with_columns(pl.Series("is_correct", [label] * 399 + [not label]))
    ev.show(ev.evaluate(frame, good, train_share=0.5, resamples=20), console)
    assert "--share" not in console.file.getvalue()


def test_a_value_with_one_label_has_a_dash_for_its_auroc_and_null_in_the_json(tmp_path, console):
    frame, good, _ = some_frame()
    kind = pl.when(pl.col("is_correct")).then(pl.lit("good")).otherwise(pl.lit(None))
    result = ev.evaluate(frame.with_columns(kind=kind), good, by=["kind"], resamples=50)
    assert [entry["value"] for entry in result["by"]["kind"]] == ["good", "(none)"]
    assert all(entry["auroc"] is entry["auroc_interval"] is None for entry in result["by"]["kind"])
    ev.show(result, console)
    line = next(line for line in console.file.getvalue().splitlines() if "good" in line)
    assert line.split("│")[-2].strip() == "-"
    ev.write(result, tmp_path / "e.json")
    assert "NaN" not in (tmp_path / "e.json").read_text()


def test_questions_that_differ_in_spaces_only_are_one(console):
    frame, good, _ = some_frame()
    spaced = frame.with_columns(
        question=pl.col("question").str.replace(" ", "  \n") + pl.col("solver").replace("a", " ")
    )
    same = frame.with_columns(question=pl.col("question") + pl.col("solver").replace("a", ""))
    a, b = (ev.evaluate(f, good, resamples=50)["adapter"] for f in (spaced, same))
    assert a == b


def test_rows_that_cannot_be_scored_are_counted_and_in_no_figure(scorer, console):
    frame, _, _ = some_frame(50)
    hole = pl.when(pl.int_range(pl.len()) == 3).then(pl.lit(" ")).otherwise(pl.col("solution"))
    frame = frame.with_columns(solution=hole)
    p = ev.score_frame(scorer, ev.check(frame), console)
    assert np.flatnonzero(np.isnan(p)).tolist() == [3]
    assert p[7] == p_of(frame["question"][7], frame["solution"][7])
    result = ev.evaluate(frame, p, resamples=50)
    assert (result["rows"], result["adapter"]["rows"], result["unscored"]) == (50, 49, {"empty solution": 1})
    ev.show(result, console)
    assert "1 more rows could not be scored (empty solution: 1)" in console.file.getvalue()
    p[5] = np.nan
    with pytest.raises(NonFiniteError, match="row 6"):
        ev.evaluate(frame, p)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([True] * 4, r"all 4 labels.*are True.*test set.*placeholder"),
        ([0, 0, 0, 0], r"all 4 labels.*are False"),
        ([None] * 4, "holds no labels"),
        (["?", "6", "", "12"], "holds no labels"),
        (["yes", "maybe", None, "no"], r"2 of 4 labels.*row 2 \('maybe'\), row 3 \(None\)"),
    ],
)
def test_labels_that_mean_nothing_are_refused(labels, message):
    frame = pl.DataFrame({"question": list("abcd"), "solution": list("abcd"), "is_correct": labels})
    with pytest.raises(DataError, match=message):
        ev.check(frame, where="test.parquet")


def test_missing_columns_and_unfit_by_columns_are_refused():
    frame, _, _ = some_frame()
    with pytest.raises(DataError, match="no column holds the label"):
        ev.check(frame.drop("is_correct"))
    with pytest.raises(DataError, match=r"--by solvr: no such column \(did you mean 'solver'\?\)"):
        ev.check(frame, by=["solvr"])
    with pytest.raises(DataError, match="has 400 values; figures are made for at most 200"):
        ev.check(frame, by=["solution"])
    with pytest.raises(DataError, match="no rows"):
        ev.check(frame.clear())
    with pytest.raises(DataError, match=r"no row can be scored: 400 rows: question is not text"):
        ev.check(frame.with_columns(question=pl.lit(1)))


def test_labels_in_words_and_columns_by_other_names(console):
    frame, good, _ = some_frame()
    words = frame.with_columns(grade=pl.col("is_correct").replace_strict({True: "yes", False: "NO"})).drop("is_correct")
    result = ev.evaluate(words, good, columns=Columns(label="grade"), resamples=50)
    assert result["adapter"] == ev.evaluate(frame, good, resamples=50)["adapter"]
    assert result["columns"]["label"] == "grade"


def test_few_questions_are_pointed_out(console):
    frame, good, _ = some_frame(questions=5)
    ev.show(ev.evaluate(frame, good, resamples=50), console)
    assert "Under 30 questions" in console.file.getvalue()


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_rows(tmp_path, scorer, console):
    with gzip.open(SHARED, "rb") as file, open(tmp_path / "rows.jsonl", "wb") as out:
        out.writelines(next(file) for _ in range(400))
    frame = read_table(tmp_path / "rows.jsonl")
    result = ev.evaluate(
        frame, ev.score_frame(scorer, ev.check(frame), console), by=["solver", "dataset"], resamples=200
    )
    low, high = result["adapter"]["auroc_interval"]
    assert low < 0.5 < high, "scores that know nothing"
    assert sum(entry["rows"] for entry in result["by"]["dataset"]) == 400
    ev.show(result, console)
