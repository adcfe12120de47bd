"""Which rows are held out for validation, which are trained on, and in what order.

Every choice is a draw: each row or question has a number that depends on its hash, the seed and the purpose alone, and
the smallest are taken. So the same seed takes the same rows whatever the order of the input, and one more row in the
input moves few others. Rows are held out by question: a question is in validation or in train, never in both.
"""

from typing import NamedTuple

import numpy as np
import polars as pl

from ..config import Prepare
from ..errors import ConfigError, DataError

DEFAULT_ROWS, DEFAULT_PART, DEFAULT_COST = 5000, 20, 4
"""By default validation has 5,000 rows or one in 20 (rounded up), the smaller, of questions that together have at most
one row in 4: where questions are few and have many rows, one row in 20 would take most questions out of train."""


class Split(NamedTuple):
    """Positions (UInt32) in the frame that was given, in the order in which they are to be stored, and the rows that
    were left out of train, by the reason."""

    validation: pl.Series
    train: pl.Series
    with_validation_questions: int
    for_balance: int
    by_limit: int


def draw(hashes: pl.Series, seed: int, purpose: int) -> pl.Series:
    """A number for each 64-bit hash that looks random and depends on (hash, seed, purpose) alone; different hashes
    give different numbers, so there are never ties. (The finaliser of SplitMix64, Steele, Lea & Flood 2014.)"""
    start = np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(purpose)
    return pl.Series(_mix(hashes.to_numpy() ^ _mix(start)))


def split(rows: pl.DataFrame, settings: Prepare) -> Split:
    """Splits `rows` (columns `id`, `qid`: UInt64, `is_correct`: bool; `id` unique).

    Raises DataError if nothing would be left to train on.
    """
    if rows.is_empty():
        raise DataError("nothing is left to train on: every row has a copy with the other label")
    share = true_share(settings.balance)
    seed = settings.seed
    rows = rows.select("id", "qid", "is_correct").with_row_index("row")
    rows = rows.with_columns(
        draw(rows["qid"], seed, 1).alias("question_draw"),
        draw(rows["id"], seed, 2).alias("hold_out_draw"),
        draw(rows["id"], seed, 3).alias("train_draw"),
    )
    validation = hold_out(rows, settings)
    rest = rows.join(validation.select("qid").unique(), on="qid", how="anti")
    balanced = balance(rest, share)
    train = limit(balanced, settings.limit) if settings.limit else balanced
    if train.is_empty():
        raise DataError(
            f"nothing is left to train on: {len(rows)} usable rows of {rows['qid'].n_unique()} questions, "
            f"{int(rows['is_correct'].sum())} of them True; {len(validation)} rows were held out and "
            f"{len(rest)} left, {int(rest['is_correct'].sum())} of them True. Give more rows, hold out fewer "
            "(--validation-rows), or do not balance (--balance none)"
        )
    return Split(
        validation=validation.sort("qid", "id")["row"],
        train=interleave(train)["row"],
        with_validation_questions=len(rows) - len(validation) - len(rest),
        for_balance=len(rest) - len(balanced),
        by_limit=len(balanced) - len(train),
    )


def hold_out(rows: pl.DataFrame, settings: Prepare) -> pl.DataFrame:
    """The validation rows: questions in the order of their draw, at most `validation_per_question` rows of each, until
    there are enough. With `balance_validation`, until there are enough of each label, so the rows are as many."""
    wanted, cap = settings.validation_rows, settings.validation_per_question
    if wanted is None:
        wanted = min(DEFAULT_ROWS, -(-len(rows) // DEFAULT_PART))
        cost = rows.group_by("question_draw").len().sort("question_draw").with_columns(pl.col("len").cum_sum())
        few = cost.filter(pl.col("len") <= max(len(rows) // DEFAULT_COST, cost["len"][0]))
        rows = rows.join(few.select("question_draw"), on="question_draw", how="semi")
    if not settings.balance_validation:
        ranked = rows.sort("question_draw", "hold_out_draw")
        ranked = ranked.with_columns(pl.int_range(pl.len()).over("qid").alias("rank"))
        return ranked.filter(pl.col("rank") < cap).head(wanted)
    # Within a question the labels take turns, so that its rows are balanced too as far as it has both.
    ranked = rows.sort("question_draw", "hold_out_draw")
    ranked = ranked.with_columns(pl.int_range(pl.len()).over("qid", "is_correct").alias("turn"))
    ranked = ranked.sort("question_draw", "turn", "hold_out_draw")
    ranked = ranked.with_columns(pl.int_range(pl.len()).over("qid").alias("rank")).filter(pl.col("rank") < cap)
    ranked = ranked.with_columns(pl.int_range(pl.len()).over("is_correct").alias("of_label"))
    smaller = min(int(ranked["is_correct"].sum()), int((~ranked["is_correct"]).sum()))
    return ranked.filter(pl.col("of_label") < min(wanted // 2, smaller))


def balance(rows: pl.DataFrame, share: float | None) -> pl.DataFrame:
    """Drops rows of one label, by draw, until `share` of the rows is True (to the nearest row); None drops nothing."""
    if share is None:
        return rows
    true, false = int(rows["is_correct"].sum()), int((~rows["is_correct"]).sum())
    keep_true = min(true, round(false * share / (1 - share)))
    keep_false = min(false, round(true * (1 - share) / share))
    return _first_of_each(rows, keep_true, keep_false)


def limit(rows: pl.DataFrame, at_most: int) -> pl.DataFrame:
    """At most that many rows, by draw, with the labels' shares kept (to the nearest row)."""
    if len(rows) <= at_most:
        return rows
    keep_true = round(at_most * int(rows["is_correct"].sum()) / len(rows))
    return _first_of_each(rows, keep_true, at_most - keep_true)


def interleave(rows: pl.DataFrame) -> pl.DataFrame:
    """The order of train: random, but any first N rows hold each label's share of N to within one row."""
    ranked = rows.sort("train_draw").with_columns(
        pl.int_range(pl.len()).over("is_correct").alias("rank"), pl.len().over("is_correct").alias("count")
    )
    ranked = ranked.with_columns(((2 * pl.col("rank") + 1) / (2 * pl.col("count"))).alias("place"))
    return ranked.sort("place", "train_draw")


def true_share(text: str) -> float | None:
    """The share of True rows that `balance` asks for; None: as they come. Raises ConfigError."""
    if text == "none":
        return None
    if text == "undersample":
        return 0.5
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ConfigError(f"balance = {text!r}: must be none, undersample, or the share of True rows, between 0 and 1")
    return share


def _first_of_each(rows: pl.DataFrame, true: int, false: int) -> pl.DataFrame:
    ranked = rows.sort("train_draw").with_columns(pl.int_range(pl.len()).over("is_correct").alias("rank"))
    keep = pl.when(pl.col("is_correct")).then(pl.col("rank") < true).otherwise(pl.col("rank") < false)
    return ranked.filter(keep).drop("rank")


def _mix(numbers: np.ndarray) -> np.ndarray:
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
