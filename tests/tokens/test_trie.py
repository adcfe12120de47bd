"""A trie holds exactly its rows, each shared beginning once; cutting into micro-batches loses and repeats none."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veritune.tokens.trie import MIN_SHARED, Trie, build, order, shared, split

Rows = list[np.ndarray]


def row(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def rows_of_few_words() -> st.SearchStrategy[Rows]:
    """Rows over two letters: most share a beginning, many are beginnings of others or equal."""
    letters = st.lists(st.integers(0, 1), min_size=1, max_size=10)
    return st.lists(letters, min_size=1, max_size=12).map(lambda rows: [row(*ids) for ids in rows])


def rows_of_parts() -> st.SearchStrategy[Rows]:
    """Rows put together from a few long parts, as an instruction, questions and solutions are; ids of any size."""
    part = st.lists(st.sampled_from([0, 1, 127, 128, 255, 256, 49151, 151935, 2**31 - 1]), min_size=1, max_size=25)

    def joined(parts: list[list[int]]) -> st.SearchStrategy[Rows]:
        one = st.lists(st.sampled_from(parts), min_size=1, max_size=4).map(lambda chosen: row(*chain(*chosen)))
        return st.lists(one, min_size=1, max_size=12)

    return st.lists(part, min_size=1, max_size=5).flatmap(joined)


def some_rows() -> st.SearchStrategy[Rows]:
    return st.one_of(rows_of_few_words(), rows_of_parts())


def walk(trie: Trie, number: int) -> np.ndarray:
    """The token numbers that row `number` reads: what its last token sees."""
    end = int(trie.ends[number])
    return np.flatnonzero(trie.until[: end + 1] > end)


@settings(max_examples=150, deadline=None)
@given(some_rows(), st.integers(1, 12))
def test_every_row_reads_its_own_ids(rows: Rows, min_shared: int) -> None:
    trie = build(rows, min_shared)
    for number, expected in enumerate(rows):
        tokens = walk(trie, number)
        assert trie.ids[tokens].tolist() == expected.tolist()
        assert trie.positions[tokens].tolist() == list(range(len(expected)))
    assert trie.tokens <= sum(len(each) for each in rows)


@settings(max_examples=100, deadline=None)
@given(some_rows())
def test_with_any_sharing_it_is_the_radix_tree(rows: Rows) -> None:
    beginnings = {tuple(each[: n + 1].tolist()) for each in rows for n in range(len(each))}
    assert build(rows, min_shared=1).tokens == len(beginnings)


@settings(max_examples=100, deadline=None)
@given(some_rows(), st.integers(1, 12))
def test_arrays_are_what_attention_expects(rows: Rows, min_shared: int) -> None:
    trie = build(rows, min_shared)
    assert [a.dtype for a in (trie.ids, trie.positions, trie.ends)] == [np.dtype(np.int64)] * 3
    assert trie.until.dtype == np.int32
    assert len(trie.positions) == len(trie.until) == trie.tokens
    assert trie.longest == max(len(each) for each in rows)
    for i in range(trie.tokens):  # what a token sees counts up from the root to itself
        sees = np.flatnonzero(trie.until[: i + 1] > i)
        assert sees[-1] == i
        assert trie.positions[sees].tolist() == list(range(len(sees)))


@settings(max_examples=80, deadline=None)
@given(some_rows(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_change_the_trie(rows: Rows, random: object) -> None:
    shuffled = list(range(len(rows)))
    random.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]
    a, b = build(rows), build([rows[i] for i in shuffled])
    assert a.ids.tolist() == b.ids.tolist()
    assert a.until.tolist() == b.until.tolist()
    assert [walk(a, i).tolist() for i in shuffled] == [walk(b, i).tolist() for i in range(len(rows))]


def test_three_levels() -> None:
    head, questions = list(range(100, 120)), [list(range(200, 215)), list(range(300, 312))]
    rows = [row(*head, *question, *[n] * 9) for question in questions for n in (1, 2, 3)]
    trie = build(rows)
    assert trie.tokens == 20 + 15 + 12 + 6 * 9
    assert trie.longest == 44
    first, second = 20 + 15 + 3 * 9, 20 + 15 + 12 + 6 * 9
    ends = [second] * 20 + [first] * 15 + [35 + 9 * n for n in (1, 2, 3) for _ in range(9)]
    assert trie.until.tolist() == [*ends, *[second] * 12, *(74 + 9 * n for n in (1, 2, 3) for _ in range(9))]


def test_equal_rows_are_one_segment() -> None:
    trie = build([row(1, 2, 3)] * 5)
    assert trie.ids.tolist() == [1, 2, 3]
    assert trie.ends.tolist() == [2] * 5


def test_a_short_shared_beginning_is_not_worth_a_segment() -> None:
    head, alike = list(range(100, 120)), list(range(MIN_SHARED - 1))
    other = row(*head, 70, 71)
    assert build([other, row(*head, *alike, 50), row(*head, *alike, 60)]).tokens == 20 + 2 + 2 * MIN_SHARED
    assert build([other, row(*head, *alike, 9, 50), row(*head, *alike, 9, 60)]).tokens == 20 + 2 + MIN_SHARED + 2


def test_a_row_that_another_goes_on_from_shares_all_of_itself() -> None:
    trie = build([row(1, 2, 3), row(1, 2, 3, 4), row(1, 2)])
    assert trie.tokens == 4


@settings(max_examples=60, deadline=None)
@given(some_rows())
def test_order_is_that_of_the_ids(rows: Rows) -> None:
    assert [rows[i].tolist() for i in order(rows)] == sorted(each.tolist() for each in rows)


@settings(max_examples=60, deadline=None)
@given(rows_of_few_words())
def test_shared_is_the_common_beginning(rows: Rows) -> None:
    a, b = rows[0], rows[-1]
    n = shared(a, b)
    assert a[:n].tolist() == b[:n].tolist()
    assert n == min(len(a), len(b)) or a[n] != b[n]


@settings(max_examples=150, deadline=None)
@given(some_rows(), st.integers(1, 150))
def test_split_gives_each_row_once(rows: Rows, budget: int) -> None:
    parts = split(rows, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(rows)))
    assert all(parts)
    apart = split(rows, budget, sharing=False)
    assert sorted(i for part in apart for i in part) == list(range(len(rows)))
    assert all(len(part) == 1 or sum(len(rows[i]) for i in part) <= budget for part in apart)


def excess(rows: Rows, budget: int, slack: int = 0) -> int:
    """By how many tokens a micro-batch's trie is over the budget at most, with `slack` for each of its rows but the
    first; rows that alone are over it left out."""
    parts = [part for part in split(rows, budget) if len(part) > 1]
    return max((build([rows[i] for i in part]).tokens - budget - slack * (len(part) - 1) for part in parts), default=0)


@settings(max_examples=150, deadline=None)
@given(some_rows(), st.integers(10, 150))
def test_split_keeps_the_budget(rows: Rows, budget: int) -> None:
    """But for beginnings too short for a segment, which a row may share with the row before it and store again."""
    assert excess(rows, budget, slack=MIN_SHARED - 1) <= 0


def test_split_keeps_the_budget_of_rows_that_part_again_and_again() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        usual = rng.integers(0, 3, 40)
        rows = [
            np.concatenate((usual[: rng.integers(0, 30)], rng.integers(0, 3, rng.integers(1, 12)))).astype(np.int32)
            for _ in range(rng.integers(2, 30))
        ]
        assert excess(rows, int(rng.integers(40, 200)), slack=MIN_SHARED - 1) <= 0


def worked_rows(seed: int, questions: int, each: int) -> Rows:
    """An instruction of 60 tokens, questions of 20-120 and solutions of 30-300 that begin alike more or less."""
    rng = np.random.default_rng(seed)
    head, rows = rng.integers(0, 50_000, 60), []
    for _ in range(questions):
        asked, usual = rng.integers(0, 50_000, rng.integers(20, 120)), rng.integers(0, 50_000, 40)
        for _ in range(each):
            solution = rng.integers(0, 50_000, rng.integers(30, 300))
            rows.append(np.concatenate((head, asked, usual[: rng.integers(0, 40)], solution)).astype(np.int32))
    return rows


@pytest.mark.parametrize(("questions", "each"), [(1, 64), (8, 8), (64, 1)])
@pytest.mark.parametrize("budget", [512, 2048, 16384])
def test_split_on_rows_as_they_come(questions: int, each: int, budget: int) -> None:
    rows = worked_rows(questions, questions, each)
    assert excess(rows, budget) <= 0
    # As few as filling one after the other up to the real trie's size would make, or one more.
    filled: list[list[int]] = []
    for i in order(rows):
        if filled and build([rows[j] for j in filled[-1]] + [rows[i]]).tokens <= budget:
            filled[-1].append(i)
        else:
            filled.append([i])
    assert len(split(rows, budget)) <= len(filled) + 1


def test_a_row_over_the_budget_stands_alone() -> None:
    rows = [row(*range(10)), row(*range(100, 400)), row(*range(500, 510))]
    assert [1] in split(rows, 64)
