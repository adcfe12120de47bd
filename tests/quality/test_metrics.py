"""The figures against scikit-learn, and what their intervals promise against simulated data whose truth is known."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from veritune.quality import metrics


def simulate(rng, questions=80, per_question=8, spread=1.0):
    """Labels and scores of whole questions; a question that is hard (its shift is low) is hard for all its rows."""
    groups = np.repeat(np.arange(questions), per_question)
    labels = rng.random(len(groups)) < 0.6
    shift = rng.normal(0, spread, questions)[groups]
    # Margin of the right answer: its sign says whether the verdict is right.
    margin = shift + rng.normal(1, 1, len(groups))
    return labels, 1 / (1 + np.exp(-np.where(labels, margin, -margin))), groups


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 300), st.sampled_from([2, 5, 11, 1000]))
def test_every_figure_is_scikit_learns_ties_included(seed, rows, levels):
    rng = np.random.default_rng(seed)
    labels = rng.random(rows) < rng.random()
    p = rng.integers(levels, size=rows) / (levels - 1)
    labels[0], labels[1] = True, False
    got, said = metrics.point(labels, p), p >= 0.5
    clipped = np.clip(p, metrics.CLIP, 1 - metrics.CLIP)
    expected = {
        "accuracy": sk.accuracy_score(labels, said),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, said),
        "f1": sk.f1_score(labels, said),
        "auroc": sk.roc_auc_score(labels, p),
        "brier": sk.brier_score_loss(labels, p),
        "log_loss": sk.log_loss(labels, clipped, labels=[False, True]),
    }
    assert got == pytest.approx(expected, abs=1e-12)
    table = metrics.confusion(labels, p)
    matrix = [[table["true_negative"], table["false_positive"]], [table["false_negative"], table["true_positive"]]]
    assert matrix == sk.confusion_matrix(labels, said, labels=[False, True]).tolist()


def test_log_loss_at_another_share_of_labels_is_that_of_rows_drawn_so():
    rng = np.random.default_rng(3)
    labels = rng.random(400) < 0.77
    p = np.clip(rng.normal(0.4 + 0.3 * labels, 0.2), 0.01, 0.99)
    right, wrong = (metrics.log_loss(labels[kind], p[kind]) for kind in (labels, ~labels))
    for share in (0.5, 0.2, 1.0):
        assert metrics.log_loss(labels, p, share) == pytest.approx(share * right + (1 - share) * wrong)
    assert metrics.log_loss(labels, p, labels.mean()) == pytest.approx(metrics.log_loss(labels, p))
    assert metrics.log_loss(labels[labels], p[labels], 0.5) == pytest.approx(right)
    assert np.isnan(metrics.log_loss(labels[:0], p[:0], 0.5))


def test_what_ranks_better_is_not_the_worse_for_another_share_of_labels():
    """Of 1,000 rows 77.6 % are correct: always to say so has the lower plain log loss, and knows nothing."""
    labels = np.arange(1000) < 776
    constant = np.full(1000, 0.776)
    knowing = np.where(labels, 0.55, 0.3) + np.random.default_rng(0).normal(0, 0.05, 1000)
    assert metrics.auroc(labels, knowing) > 0.9
    assert metrics.log_loss(labels, constant) < metrics.log_loss(labels, knowing)
    assert metrics.log_loss(labels, knowing, 0.5) < metrics.log_loss(labels, constant, 0.5) - 0.2


def test_figures_that_one_label_leaves_undefined_are_nan_and_certain_errors_stay_finite():
    got = metrics.point(np.array([True, True]), np.array([0.0, 1.0]))
    assert np.isnan(got["auroc"])
    assert np.isnan(got["balanced_accuracy"])
    assert got["log_loss"] == pytest.approx(-np.log(1e-7) / 2, rel=1e-6)
    assert np.isnan(metrics.f1(np.array([False]), np.array([0.1])))
    assert all(np.isnan(v) for v in metrics.point(np.zeros(0, bool), np.zeros(0)).values())
    none = metrics.measure(np.zeros(0, bool), np.zeros(0), np.zeros(0, np.int64))
    assert none["accuracy_interval"] is none["auroc_interval"] is None
    assert none["rows"] == none["questions"] == 0


def test_group_ids_number_keys_by_first_appearance():
    assert metrics.group_ids(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]


def test_the_draws_do_not_depend_on_how_many_are_made_at_once():
    groups = np.arange(40) % 7
    a = np.concatenate([counts for _, counts in metrics._draws(groups, 30, 5)])
    rng = np.random.default_rng(5)
    b = np.stack([np.bincount(rng.integers(7, size=7, dtype=np.int32), minlength=7) for _ in range(30)])
    assert a.sum(axis=1).tolist() == [7] * 30
    assert a.mean() == b.mean() == 1
    big = np.arange(150_000)
    starts = [counts[0, :50] for _, counts in metrics._draws(big, 15, 5)]
    assert len(starts) > 1
    assert not np.array_equal(starts[0], starts[1])


def test_a_weighted_auroc_is_the_auroc_of_the_repeated_rows():
    rng = np.random.default_rng(3)
    labels, p = rng.random(90) < 0.5, rng.integers(6, size=90) / 5
    weights = rng.integers(4, size=90)
    rows = np.repeat(np.arange(90), weights)
    got = metrics._Auroc(labels, p)(weights[None].astype(float))[0]
    assert got == pytest.approx(sk.roc_auc_score(labels[rows], p[rows]), abs=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    labels, p, _ = simulate(rng, questions=60_000)
    truth = {"accuracy": metrics.accuracy(labels, p), "auroc": metrics.auroc(labels, p)}
    held = {"accuracy": 0, "auroc": 0}
    times = 300
    for _ in range(times):
        for name, interval in metrics.intervals(*simulate(rng), resamples=400).items():
            assert interval
            held[name] += interval[0] <= truth[name] <= interval[1]
    for name, count in held.items():
        assert 0.90 <= count / times <= 0.985, name


def test_rows_of_one_question_that_agree_widen_the_interval():
    labels, p, groups = simulate(np.random.default_rng(1), spread=3.0)
    by_question = metrics.intervals(labels, p, groups)
    by_row = metrics.intervals(labels, p, np.arange(len(groups)))
    for name in ("accuracy", "auroc"):
        assert np.diff(by_question[name])[0] > 1.5 * np.diff(by_row[name])[0]


def test_independent_rows_get_the_textbook_interval():
    rng = np.random.default_rng(2)
    labels = rng.random(4000) < 0.5
    p = np.where(rng.random(4000) < 0.8, labels, ~labels).astype(float)
    low, high = metrics.intervals(labels, p, np.arange(4000))["accuracy"]
    value = metrics.accuracy(labels, p)
    half = 1.96 * np.sqrt(value * (1 - value) / 4000)
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.002)


def test_intervals_are_repeatable_and_follow_the_seed():
    data = simulate(np.random.default_rng(4), questions=20)
    assert metrics.intervals(*data, seed=1) == metrics.intervals(*data, seed=1)
    assert metrics.intervals(*data, seed=1) != metrics.intervals(*data, seed=2)


def test_no_interval_where_the_rows_allow_none_and_no_false_certainty():
    labels, p = np.array([True, False, True, True]), np.array([0.9, 0.1, 0.8, 0.2])
    assert metrics.intervals(labels, p, np.zeros(4, np.int64)) == {"accuracy": None, "auroc": None}
    perfect = np.where(labels, 0.9, 0.1)
    low, high = metrics.intervals(labels, perfect, np.arange(4))["accuracy"]
    assert (low, high) == (pytest.approx(0.025**0.25), 1.0)
    low, high = metrics.intervals(labels, 1 - perfect, np.arange(4))["accuracy"]
    assert (low, high) == (0.0, pytest.approx(1 - 0.025**0.25))
    assert metrics.intervals(labels[labels], p[labels], np.arange(3))["auroc"] is None


def test_paired_finds_a_real_difference_that_separate_intervals_would_miss():
    rng = np.random.default_rng(6)
    labels, first, groups = simulate(rng, spread=3.0)
    margin = np.where(labels, first, 1 - first)
    second = np.where(labels, np.clip(margin + 0.06, 0, 1), 1 - np.clip(margin + 0.06, 0, 1))
    result = metrics.paired(labels, first, second, groups)
    apart = [metrics.intervals(labels, p, groups)["accuracy"] for p in (first, second)]
    assert apart[0][1] > apart[1][0], "the separate intervals overlap"
    for name, difference in result.items():
        assert difference.value > 0
        assert difference.interval[0] > 0, name
        assert difference.p_value < 0.01, name
    back = metrics.paired(labels, second, first, groups)
    assert back["accuracy"].value == -result["accuracy"].value
    assert back["accuracy"].p_value == result["accuracy"].p_value


def test_paired_finds_nothing_where_nothing_is():
    labels, p, groups = simulate(np.random.default_rng(7))
    for difference in metrics.paired(labels, p, p.copy(), groups).values():
        assert (difference.value, difference.interval, difference.p_value) == (0.0, (0.0, 0.0), 1.0)
    alone = metrics.paired(labels, p, p, np.zeros(len(p), np.int64))["accuracy"]
    assert (alone.interval, alone.p_value) == (None, None)


def test_paired_calls_chance_a_difference_no_more_often_than_it_says():
    rng = np.random.default_rng(8)
    small = 0
    for _ in range(200):
        labels, first, groups = simulate(rng, questions=50)
        second = 1 / (1 + np.exp(-np.where(labels, 1, -1) * rng.normal(1, 1.4, len(labels))))
        # Which of the two is "first" is drawn by question, so neither is better.
        swap = (rng.random(50) < 0.5)[groups]
        first, second = np.where(swap, second, first), np.where(swap, first, second)
        small += metrics.paired(labels, first, second, groups, resamples=400)["accuracy"].p_value < 0.05
    assert small / 200 <= 0.1


def test_two_thousand_draws_of_100k_rows_take_seconds():
    rng = np.random.default_rng(9)
    labels, p, groups = simulate(rng, questions=12_500)
    started = time.process_time()
    metrics.measure(labels, p, groups)
    assert time.process_time() - started < 15


@pytest.mark.parametrize("better", [True, False])
def test_no_false_certainty_of_an_auroc_of_one_or_zero(better):
    """Three questions with a correct solution, five with an incorrect one: three pairs that share no question."""
    labels = np.array([True, True, True, False, True, False, False, False, False])
    groups = np.array([0, 0, 0, 0, 1, 2, 3, 4, 5])
    labels[-1] = True
    p = np.where(labels == better, 0.4, 0.3) + np.arange(9) / 100
    edge = 0.025 ** (1 / 3)
    assert metrics.auroc(labels, p) == better
    assert metrics.intervals(labels, p, groups)["auroc"] == pytest.approx((edge, 1) if better else (0, 1 - edge))


def test_intervals_of_ten_questions_hold_an_auroc_near_one():
    rng = np.random.default_rng(0)

    def some(questions):
        labels = rng.random(questions * 4) < 0.6
        groups = np.arange(questions * 4) // 4
        x = rng.normal(0, 0.7, questions)[groups] + 4.5 * labels + rng.normal(0, 1, len(labels))
        return labels, 1 / (1 + np.exp(2.2 - x)), groups

    truth = metrics.auroc(*some(40_000)[:2])
    found = [metrics.intervals(*some(10), resamples=100)["auroc"] for _ in range(200)]
    assert np.mean([low <= truth <= high for low, high in found]) > 0.9
