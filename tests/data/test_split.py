"""Held out by question, balanced by dropping, ordered evenly by label, and all of it decided by the seed alone."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veritune.config import LARGEST, Prepare
from veritune.data.split import draw, split, true_share
from veritune.errors import ConfigError, DataError


def frame(count=4000, questions=200, true=0.7, seed=0):
    """Rows with questions of very different sizes."""
    numbers = np.random.default_rng(seed)
    qids = numbers.integers(1 << 62, 1 << 63, questions, dtype=np.uint64)
    sizes = numbers.integers(1, 60, questions)
    return pl.DataFrame(
        {
            "id": numbers.permutation(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)),
            "qid": numbers.choice(qids, count, p=sizes / sizes.sum()),
            "is_correct": numbers.random(count) < true,
        }
    )


def parts(rows, **kwargs):
    done = split(rows, Prepare(**kwargs))
    return rows[done.validation], rows[done.train], done


def test_a_question_is_on_one_side_only_and_every_row_is_accounted_for():
    rows = frame()
    validation, train, done = parts(rows, limit=900)
    assert len(validation) == 200
    assert not set(validation["qid"]) & set(train["qid"])
    assert validation.group_by("qid").len()["len"].max() <= 8
    out = done.with_validation_questions + done.for_balance + done.by_limit
    assert len(validation) + len(train) + out == len(rows)
    assert len(train) == 900
    assert rows.select("id").n_unique() == len(rows)


def test_validation_is_5000_rows_or_one_in_twenty():
    assert len(parts(frame(130_000, 5000))[0]) == 5000
    assert len(parts(frame(1990))[0]) == 100
    assert len(parts(frame(1990), validation_rows=70)[0]) == 70
    assert len(parts(frame(1990), validation_rows=0)[0]) == 0


def test_by_default_most_rows_stay_even_where_questions_are_few():
    rows = frame(4000, 40)
    validation = parts(rows)[0]
    held_out = rows.join(validation.select("qid").unique(), on="qid", how="semi")
    assert 0 < len(held_out) <= 1000
    assert len(parts(rows, validation_rows=200)[0]) == 200
    assert parts(frame(100, 2))[0]["qid"].n_unique() == 1


def test_a_question_gives_at_most_so_many_rows():
    validation = parts(frame(), validation_per_question=2)[0]
    assert validation.group_by("qid").len()["len"].max() == 2


def test_validation_keeps_the_labels_share_and_train_is_even():
    validation, train, _ = parts(frame(20_000, 2000, true=0.7), validation_rows=1500)
    assert validation["is_correct"].mean() == pytest.approx(0.7, abs=0.05)
    assert train["is_correct"].mean() == 0.5


def test_validation_can_be_balanced_at_the_same_size():
    validation = parts(frame(20_000, 2000, true=0.8), validation_rows=1001, balance_validation=True)[0]
    assert len(validation) == 1000
    assert validation["is_correct"].mean() == 0.5
    assert validation.group_by("qid").len()["len"].max() <= 8


@pytest.mark.parametrize(("balance", "share"), [("0.4", 0.4), ("0.9", 0.9), ("undersample", 0.5)])
def test_a_ratio_is_reached_by_dropping_from_one_label(balance, share):
    rows = frame(true=0.6)
    train, done = parts(rows, balance=balance)[1:]
    assert train["is_correct"].mean() == pytest.approx(share, abs=0.001)
    left = rows.join(rows[done.validation].select("qid").unique(), on="qid", how="anti")
    kept = [int((train["is_correct"] == label).sum()) for label in (True, False)]
    there = [int((left["is_correct"] == label).sum()) for label in (True, False)]
    assert kept[0] == there[0] or kept[1] == there[1]


def test_nothing_is_dropped_without_balance():
    done = parts(frame(), balance="none")[2]
    assert done.for_balance == 0


@pytest.mark.parametrize("text", ["half", "0", "1", "1.5", "nan", "-0.2"])
def test_other_balances_are_refused(text):
    with pytest.raises(ConfigError, match="balance"):
        true_share(text)


@pytest.mark.parametrize("balance", ["none", "undersample"])
def test_a_limit_keeps_the_shares_and_is_the_beginning_of_the_whole(balance):
    rows = frame(true=0.8)
    whole = parts(rows, balance=balance)[1]
    some = parts(rows, balance=balance, limit=501)[1]
    assert len(some) == 501
    assert some["is_correct"].mean() == pytest.approx(whole["is_correct"].mean(), abs=0.002)
    assert len(set(some["id"]) - set(whole["id"][:502])) <= 1
    assert len(parts(rows, balance=balance, limit=10**6)[1]) == len(whole)


@given(st.integers(0, LARGEST), st.floats(0.05, 0.95), st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_any_first_rows_hold_the_labels_evenly(seed, true, first):
    train = parts(frame(600, 50, true=true, seed=seed % 1000), seed=seed, balance="none")[1]
    share = train["is_correct"].mean()
    head = train["is_correct"][:first]
    assert abs(int(head.sum()) - share * len(head)) <= 1


@given(st.integers(0, 50), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_input_does_not_matter_and_the_seed_does(seed, random):
    rows = frame(500, 60)
    order = list(range(len(rows)))
    random.shuffle(order)
    first, second, other = parts(rows, seed=seed), parts(rows[order], seed=seed), parts(rows, seed=seed + 1)
    assert first[0].equals(second[0])
    assert first[1].equals(second[1])
    assert set(first[0]["id"]) != set(other[0]["id"])
    assert first[1]["id"].to_list() != other[1]["id"].to_list()


def test_one_row_more_moves_few_others():
    rows = frame()
    fewer = rows.filter(pl.int_range(pl.len()) != 5)
    first, second = (set(parts(these, validation_rows=200)[0]["id"]) for these in (rows, fewer))
    assert len(first ^ second) <= 2 * 8


def test_draws_are_even_and_differ_by_purpose():
    hashes = pl.Series(np.arange(20_000, dtype=np.uint64))
    first, second = draw(hashes, 0, 1).to_numpy() / 2**64, draw(hashes, 0, 2).to_numpy() / 2**64
    assert len(np.unique(first)) == len(hashes)
    for numbers in (first, second):
        assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx([2000] * 10, abs=200)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first, draw(hashes, 1, 1).to_numpy() / 2**64)[0, 1]) < 0.03


def test_draws_never_change():
    # A prepared folder is reproducible only as long as these stay.
    assert draw(pl.Series([0, 1, 2**64 - 1], dtype=pl.UInt64), 7, 2).to_list() == [
        2891354267581229779,
        2941290805190308231,
        4082351635129468616,
    ]


def test_rows_that_leave_nothing_to_train_on_are_refused():
    one_label = frame(true=1.1)
    with pytest.raises(DataError, match="--balance none"):
        parts(one_label)
    assert len(parts(one_label, balance="none")[1]) > 0
    with pytest.raises(DataError, match="1 questions"):
        parts(frame(20, 1))
