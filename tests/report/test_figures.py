"""Curves and tables of scores against scikit-learn and by hand; charts that hold whatever values they are given."""

import math
import tracemalloc

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from veritune.report import figures, scale, svg
from veritune.report.svg import Series

RNG = np.random.default_rng(0)
LABELS = RNG.random(400) < 0.7
P = np.clip(np.round(RNG.normal(0.5 + 0.2 * LABELS, 0.2), 2), 0, 1)  # with ties
GROUPS = np.arange(400) // 8


def test_roc_is_scikit_learns() -> None:
    misses, hits = figures.roc(LABELS, P)
    assert np.trapezoid(hits, misses) == pytest.approx(reference.roc_auc_score(LABELS, P))
    theirs = reference.roc_curve(LABELS, P, drop_intermediate=False)
    assert misses == pytest.approx(theirs[0])
    assert hits == pytest.approx(theirs[1])


def test_thresholds_are_scikit_learns() -> None:
    at = figures.thresholds(LABELS, P)
    for i in (0, 30, 50, 75):
        said = at["threshold"][i] <= P
        assert at["accuracy"][i] == pytest.approx(reference.accuracy_score(LABELS, said))
        assert at["balanced"][i] == pytest.approx(reference.balanced_accuracy_score(LABELS, said))
        assert at["recall"][i] == pytest.approx(reference.recall_score(LABELS, said))
        assert at["precision"][i] == pytest.approx(reference.precision_score(LABELS, said))


def test_reliability_counts_every_row_once_and_its_interval_knows_questions() -> None:
    found = figures.reliability(LABELS, P, GROUPS)
    assert sum(count for *_, count in found) == 400
    assert sum(share * count for _, share, *_, count in found) == pytest.approx(LABELS.sum())
    assert all(0 <= low <= share <= high <= 1 for _, share, low, high, _ in found)
    same = np.repeat(LABELS[:50], 8)  # all rows of a question alike: eight rows tell no more than one
    p = np.full(400, 0.55)
    ((_, share, low, high, _),) = figures.reliability(same, p, GROUPS)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 49), rel=0.01)


def test_a_tenth_whose_labels_are_alike_is_not_certain() -> None:
    labels = np.array([True, True, True, False, True, False])
    p = np.array([0.95, 0.95, 0.95, 0.15, 0.55, 0.55])
    low, high = ([one[at] for one in figures.reliability(labels, p, np.array([0, 0, 1, 2, 3, 3]))] for at in (2, 3))
    assert low == pytest.approx([0, 0, 0.025**0.5])  # one incorrect; one question with both; correct ones of two
    assert high == pytest.approx([0.975, 1, 1])


def test_histograms_hold_every_row() -> None:
    edges, right, wrong = figures.histogram(LABELS, P)
    assert len(edges) == len(right) + 1
    assert (sum(right), sum(wrong)) == (LABELS.sum(), (~LABELS).sum())


def test_columns_that_tell_rows_apart() -> None:
    frame = pl.DataFrame(
        {
            "id": [str(i) for i in range(400)],
            "solution": ["x" * (1 + i) for i in range(400)],
            "source": [None if i % 4 == 0 else f"s{i % 4}" for i in range(400)],
            "many": [f"m{int(math.sqrt(i))}" if i < 300 else "big" for i in range(400)],
            "alike": ["one"] * 400,
            "different": [f"d{i}" for i in range(400)],
            "of one source": [f"d{i}" if i % 4 == 0 else None for i in range(400)],
        }
    )
    found = figures.by_column(frame, LABELS, P, GROUPS)
    assert list(found) == ["source", "many", "length of the solution"]
    assert {part.name for part in found["source"]} == {"(none)", "s1", "s2", "s3"}
    assert [sum(part.rows for part in parts) for parts in found.values()] == [400] * 3
    assert len(found["many"]) <= figures.MOST_VALUES + 1
    assert found["many"][0].name == "big"
    chosen = np.arange(400) % 4 == 1
    s1 = next(part for part in found["source"] if part.name == "s1")
    assert s1.figures["accuracy"] == pytest.approx(reference.accuracy_score(LABELS[chosen], P[chosen] >= 0.5))


def test_a_column_of_texts_takes_the_memory_of_its_texts() -> None:
    """One of 1 MB once took 4 MB for each row."""
    frame = pl.DataFrame({"trace": [f"kind {i % 3}" for i in range(399)] + ["y" * 1_000_000]})
    tracemalloc.start()
    found = figures.by_column(frame, LABELS, P, GROUPS, resamples=0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [part.rows for part in found["trace"]] == [133, 133, 133, 1]
    assert most < 50e6


def test_the_most_wrong_rows() -> None:
    labels, p = np.array([True, True, False, False, True]), np.array([0.1, 0.3, 0.9, 0.6, 0.8])
    assert figures.most_wrong(labels, p, 5) == ([2, 3], [0, 1])
    assert figures.most_wrong(labels, p, 1) == ([2], [0])


# Charts.

numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(st.lists(st.tuples(numbers, numbers), max_size=30), st.booleans(), st.booleans())
def test_a_plot_holds_any_values(points: list[tuple[float, float]], log_x: bool, log_y: bool) -> None:
    x, y = [a for a, _ in points], [b for _, b in points]
    drawn = str(svg.plot([Series(x, y, kind="both")], x_label="<x>", log_x=log_x, log_y=log_y))
    assert "nan" not in drawn
    assert "inf" not in drawn.replace("infi", "")
    assert "&lt;x&gt;" in drawn


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_ticks_lie_within_and_are_not_many(low: float, width: float) -> None:
    found = scale.ticks(low, low + width) if low + width > low else [low]
    assert len(found) <= 8
    assert all(low - width * 1e-6 - 1e-9 <= tick <= low + width + width * 1e-6 + 1e-9 for tick in found)


@pytest.mark.parametrize(("low", "high"), [(1e-6, 0.5), (0.01, 0.03), (1e-9, 1e9), (3.0, 4.0)])
def test_log_ticks(low: float, high: float) -> None:
    found = scale.ticks(low, high, log=True)
    assert len(found) <= 8
    assert all(low <= tick * 1.0001 for tick in found)
    assert all(tick <= high * 1.0001 for tick in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.25, "0.25"), (1500, "1,500"), (20_000, "20k"), (1e-4, "1e-4"), (-1.5e-4, "-1.5e-4"),
        (2.5e-10, "2.5e-10"), (2.5e6, "2.5M"), (1_234_567, "1.234567M"), (2.5e15, "2.5e15"),
    ],
)  # fmt: skip
def test_labels(value: float, text: str) -> None:
    assert scale.label(value) == text


def test_a_learning_rates_axis() -> None:
    assert [scale.label(value) for value in scale.ticks(0, 2e-4)] == ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]


@given(st.floats(-1e12, 1e12), st.floats(1e-15, 1e12))
def test_labels_are_their_ticks(low: float, width: float) -> None:
    found = scale.ticks(low, low + max(width, abs(low) * 1e-6))
    letters = str.maketrans({",": "", "k": "e3", "M": "e6", "G": "e9", "T": "e12"})
    labels = [scale.label(tick) for tick in found]
    assert len(set(labels)) == len(found)
    assert [float(text.translate(letters)) for text in labels] == pytest.approx(found, rel=1e-11)


def test_thinning_keeps_the_mean() -> None:
    x, y = scale.thin(list(range(10_000)), [float(i % 7) for i in range(10_000)])
    assert len(x) == scale.MOST_POINTS
    assert sum(y) / len(y) == pytest.approx(3, abs=0.01)
    assert x == sorted(x)
