"""Rows in, usable rows out: a reason for each row that cannot be used, the numbers that say which rows are the same,
and what follows from those (exact duplicates, the same text with both labels).

Reasons are whole phrases, because they are what people read in the counts and in rejected.jsonl.
"""

import json
from typing import NamedTuple

import polars as pl

from .chunks import EXTRA, Chunk
from .lines import TOO_LARGE, Refused, clip
from .rows import NO_LABEL, digest, parse_labels, same_question, same_text

NO_QUESTION = "empty question"
NO_SOLUTION = "empty solution"
NUL = "NUL character in the text"
MISSING_LABEL = "no label"
BAD_LABEL = "label is neither true nor false"
CONTRADICTORY = "same question and solution with both labels"


class Same(NamedTuple):
    """What became of rows that are the same row: positions (UInt32) in the frame that was given."""

    kept: pl.Series
    contradictory: pl.Series
    duplicates: int


def check(chunk: Chunk, max_row_bytes: int) -> tuple[pl.DataFrame, list[Refused]]:
    """The chunk's usable rows, with a boolean `is_correct` for `label`, and everything refused, in the file's order."""
    question, solution = pl.col("question"), pl.col("solution")
    tidy = pl.col("label").str.strip_chars().str.to_lowercase()
    frame = chunk.frame.with_columns(parse_labels(chunk.frame["label"]).alias("is_correct"))
    frame = frame.with_columns(
        pl.when(question.is_null() | (question.str.strip_chars() == ""))
        .then(pl.lit(NO_QUESTION))
        .when(solution.is_null() | (solution.str.strip_chars() == ""))
        .then(pl.lit(NO_SOLUTION))
        .when(question.str.len_bytes() + solution.str.len_bytes() > max_row_bytes)
        .then(pl.lit(TOO_LARGE))
        .when(question.str.contains("\0", literal=True) | solution.str.contains("\0", literal=True))
        .then(pl.lit(NUL))
        .when(tidy.is_null() | tidy.is_in(NO_LABEL))
        .then(pl.lit(MISSING_LABEL))
        .when(pl.col("is_correct").is_null())
        .then(pl.lit(BAD_LABEL))
        .alias("reason")
    )
    bad = frame.filter(pl.col("reason").is_not_null())
    refused = chunk.refused + [_refused(row) for row in bad.iter_rows(named=True)]
    return frame.filter(pl.col("reason").is_null()).drop("reason", "label"), sorted(refused)


def identify(frame: pl.DataFrame) -> pl.DataFrame:
    """Adds three UInt64 columns: `qid` (rows that share it have the same question), `id` (rows that share it are
    the same) and `content` (every byte of the row: question, solution, label and all other columns that are not null).

    NUL separates the parts: `check` has let no question or solution with NUL pass.
    """
    extras = sorted(name for name in frame.columns if name.startswith(EXTRA))
    spelt = [
        pl.format("\0{}{}:{}", pl.lit(json.dumps(name)), pl.col(name).str.len_bytes(), pl.col(name)) for name in extras
    ]
    rest = frame.select(
        pl.concat_str([pl.col("is_correct").cast(pl.String), *spelt], ignore_nulls=True).alias("rest")
    ).to_series()
    texts = (frame["question"].to_list(), frame["solution"].to_list(), rest.to_list())
    known: dict[str, tuple[int, str]] = {}
    qids, ids, contents = [], [], []
    for question, solution, others in zip(*texts, strict=True):
        if question not in known:
            known[question] = digest(same_question(question)), same_text(question) + "\0"
        qid, same = known[question]
        qids.append(qid)
        ids.append(digest(same + same_text(solution)))
        contents.append(digest(f"{question}\0{solution}\0{others}"))
    numbers = {"qid": qids, "id": ids, "content": contents}
    return frame.with_columns(pl.Series(name, values, pl.UInt64) for name, values in numbers.items())


def find_same(frame: pl.DataFrame) -> Same:
    """Which rows of `frame` (columns `id`, `content`, `is_correct`) stay: one of each `id`, none where its rows have
    both labels.

    Of duplicates, the one with the smallest `content` stays, so the order of the input does not matter.
    """
    rows = frame.select("id", "content", "is_correct").with_row_index("row")
    both = rows.group_by("id").agg(pl.col("is_correct").n_unique().alias("labels")).filter(pl.col("labels") > 1)
    clear = rows.join(both, on="id", how="anti")
    kept = clear.sort("id", "content").unique("id", keep="first", maintain_order=True)["row"].sort()
    contradictory = rows.join(both, on="id", how="semi")["row"].sort()
    return Same(kept, contradictory, len(clear) - len(kept))


def _refused(row: dict) -> Refused:
    detail = f"label {row['label']!r}"[:100] if row["reason"] == BAD_LABEL else ""
    return Refused(row["line"], row["reason"], detail, describe(row))


def describe(row: dict) -> str:
    """The beginning of a row for rejected.jsonl."""
    parts = {name: row[name] for name in ("question", "solution", "label") if name in row}
    return clip(json.dumps(parts, ensure_ascii=False).encode())
