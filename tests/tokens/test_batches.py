"""Which rows stand in which step: each once an epoch, the same from anywhere, right and wrong of a question in one."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veritune.tokens.batches import Batches


def made(
    counts: list[tuple[int, int]], *, size: int = 16, per_question: int = 8, epochs: float = 1.0, seed: int = 0
) -> Batches:
    """Batches over questions with (right, wrong) rows each, in an order that has nothing to do with either."""
    questions = np.repeat(np.arange(len(counts)), [right + wrong for right, wrong in counts])
    labels = np.concatenate([[True] * right + [False] * wrong for right, wrong in counts]).astype(bool)
    mixed = np.random.default_rng(99).permutation(len(labels))
    return Batches(questions[mixed], labels[mixed], size, per_question, epochs, seed)


def uneven(questions: int = 40, seed: int = 3) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    return [(int(right), int(wrong)) for right, wrong in rng.integers(0, 30, (questions, 2))]


def flat(batches: Batches) -> np.ndarray:
    return np.concatenate([batches[step] for step in range(len(batches))])


@pytest.mark.parametrize("per_question", [1, 2, 8, 1000])
@pytest.mark.parametrize("size", [1, 7, 16, 10_000])
def test_every_epoch_shows_each_row_once(per_question: int, size: int) -> None:
    batches = made(uneven(), size=size, per_question=per_question, epochs=3)
    rows = len(batches.labels)
    order = flat(batches)
    assert len(order) == 3 * rows
    for epoch in range(3):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert len({tuple(order[epoch * rows : (epoch + 1) * rows]) for epoch in range(3)}) == 3


def test_all_steps_but_the_last_are_full() -> None:
    batches = made([(10, 13)] * 3, size=16, epochs=1)
    assert [len(batches[step]) for step in range(len(batches))] == [16, 16, 16, 16, 5]


@pytest.mark.parametrize(("epochs", "shown"), [(0.5, 50), (1.0, 100), (1.37, 137), (2.5, 250), (0.0001, 1)])
def test_a_part_of_an_epoch(epochs: float, shown: int) -> None:
    batches = made([(5, 5)] * 10, size=7, epochs=epochs)
    order = flat(batches)
    assert len(order) == batches.presentations == shown
    assert len(batches) == -(-shown // 7)
    assert max(Counter(order.tolist()).values()) == -(-shown // 100)


def test_more_epochs_begin_like_fewer() -> None:
    """So that a finished run can be given more."""
    short, long = flat(made(uneven(), epochs=1.5)), flat(made(uneven(), epochs=3))
    assert short.tolist() == long[: len(short)].tolist()


@pytest.mark.parametrize("per_question", [1, 8])
def test_a_step_is_the_same_from_anywhere(per_question: int) -> None:
    def fresh() -> Batches:
        return made(uneven(), size=13, per_question=per_question, epochs=3, seed=5)

    one = fresh()
    forwards = [one[step].tolist() for step in range(len(one))]
    steps = list(range(len(one)))
    np.random.default_rng(0).shuffle(steps)
    other = fresh()
    assert {step: other[step].tolist() for step in steps} == dict(enumerate(forwards))
    assert fresh()[17].tolist() == forwards[17]


def test_what_a_caller_does_to_a_step_stays_with_the_caller() -> None:
    batches = made(uneven())
    before = batches[1].copy()
    batches[1][:] = 0
    assert batches[1].tolist() == before.tolist()


@pytest.mark.parametrize("per_question", [1, 8])
def test_seeds_differ(per_question: int) -> None:
    orders = {tuple(flat(made(uneven(), per_question=per_question, seed=seed))) for seed in range(4)}
    assert len(orders) == 4


def test_there_is_no_step_beyond_the_last() -> None:
    batches = made([(4, 4)], size=8)
    for step in (-1, 1, 10**9):
        with pytest.raises(IndexError, match=f"step {step} of 1"):
            batches[step]


def runs(batches: Batches) -> list[np.ndarray]:
    """Rows of one question that stand side by side in an epoch: one group, or several that met by chance."""
    order = flat(batches)
    questions = batches.questions[order]
    return np.split(order, np.flatnonzero(questions[1:] != questions[:-1]) + 1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).filter(any), min_size=1, max_size=12),
    st.integers(2, 9),
    st.integers(0, 5),
)
def test_groups_hold_both_labels_wherever_counts_permit(
    counts: list[tuple[int, int]], per_question: int, seed: int
) -> None:
    batches = made(counts, per_question=per_question, seed=seed)
    found = runs(batches)
    of_question = Counter(int(batches.questions[run[0]]) for run in found)
    for run in found:
        question = int(batches.questions[run[0]])
        right, wrong = counts[question]
        groups = -(-(right + wrong) // per_question)
        assert len(run) >= (right + wrong) // groups
        has_right = int(batches.labels[run].sum())
        assert has_right >= right // groups
        assert len(run) - has_right >= wrong // groups
        if of_question[question] == groups:
            assert len(run) <= per_question
            assert has_right <= -(-right // groups)
            assert len(run) - has_right <= -(-wrong // groups)


def test_pairs_fill_every_step_with_one_right_and_one_wrong_of_each_question() -> None:
    batches = made([(2, 2)] * 200, size=16, per_question=2)
    for step in range(len(batches)):
        rows = batches[step]
        sums: Counter[int] = Counter()
        for row in rows:
            sums[int(batches.questions[row])] += 1 if batches.labels[row] else -1
        assert len(rows) == 16
        assert set(sums.values()) == {0}


def test_groups_of_a_question_are_spread_over_the_epoch() -> None:
    batches = made([(40, 40)] * 30, size=16, per_question=8)
    steps = [step for step in range(len(batches)) if (batches.questions[batches[step]] == 0).any()]
    assert len(steps) >= 8
    assert steps[-1] - steps[0] > len(batches) / 2


def test_rows_of_a_group_are_drawn_anew_in_each_epoch() -> None:
    batches = made([(16, 16)], size=8, per_question=8, epochs=2)
    first, second = ({frozenset(batches[step].tolist()) for step in steps} for steps in (range(4), range(4, 8)))
    assert first.isdisjoint(second)


def test_independent_rows_are_not_grouped() -> None:
    batches = made([(8, 8)] * 50, per_question=1)
    assert np.mean([len(run) for run in runs(batches)]) < 1.2


def test_labels_and_order_of_equal_questions_do_not_need_sorted_input() -> None:
    batches = made([(3, 3)] * 20, per_question=6, size=6)
    assert all(len(set(batches.questions[batches[step]].tolist())) == 1 for step in range(len(batches)))


def test_a_late_step_of_a_million_rows_is_found_at_once() -> None:
    """A resume pays this once, whatever step it goes on from."""
    rows = 1_000_000
    rng = np.random.default_rng(0)
    batches = Batches(rng.integers(0, 40_000, rows), rng.random(rows) < 0.4, 16, 8, 20.0, 0)
    started = time.perf_counter()
    late = batches[1_000_000]
    assert time.perf_counter() - started < 5
    assert len(set(late.tolist())) == 16
