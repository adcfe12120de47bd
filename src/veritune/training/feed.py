"""The way of rows into the loop: columns of the dataset, and each step's micro-batches, made while the one before
runs."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from .. import config
from ..data import dataset
from ..errors import DataError
from ..quality import metrics
from ..tokens import prompt
from ..tokens.trie import Trie, build, split
from . import plan as plans
from .slices import Slice, Table, divide

if TYPE_CHECKING:
    from .state import Training


@dataclass(frozen=True)
class Rows:
    """Rows to train or validate on, as columns of one length."""

    ids: list[str]
    questions: list[str]
    solutions: list[str]
    labels: np.ndarray  # bool [rows]
    groups: np.ndarray  # int64 [rows]: the number of each row's question

    @staticmethod
    def of(frame: pl.DataFrame) -> "Rows":
        labels = labels_of(frame)
        return Rows(
            frame["id"].to_list(),
            frame["question"].to_list(),
            frame["solution"].to_list(),
            labels,
            metrics.group_ids(frame["qid"].to_list()),
        )

    def take(self, numbers: np.ndarray) -> "Rows":
        """Some of the rows, int64 [n]."""
        texts = (self.ids, self.questions, self.solutions)
        ids, questions, solutions = ([column[i] for i in numbers] for column in texts)
        return Rows(ids, questions, solutions, self.labels[numbers], metrics.group_ids(self.groups[numbers].tolist()))


@dataclass(frozen=True)
class Source:
    """What a run trains and is measured on, and in which order: all that is known without weights."""

    train: Rows
    held: Rows
    """Every row held out."""
    validation: Rows
    """Those that the run validates on."""
    slices: tuple[Slice, ...]
    plan: plans.Plan
    fingerprint: str
    notes: tuple[str, ...]
    """What its user should know of these rows."""


def labels_of(frame: pl.DataFrame) -> np.ndarray:
    """The rows' labels, bool [rows]. Raises DataError if one is missing."""
    labels = frame["is_correct"]
    if labels.dtype != pl.Boolean or labels.null_count():
        raise DataError("the column is_correct holds what is neither true nor false: prepare the data again")
    return labels.to_numpy().astype(bool)


def read(run: config.Run) -> Source:
    """Reads a run's prepared data and makes its plan. Raises MissingError, DataError and ConfigError, the last also for
    a prompt that no tokenizer takes."""
    prompt.filled(run.prompt)
    data = dataset.load(Path(run.data.path))
    frame = trainable(data, run.data.rows, run)
    train, held = Rows.of(frame), Rows.of(data.validation)
    column = run.strategy.column

    def table(rows: Rows, frame: pl.DataFrame) -> Table:
        values = None
        if column is not None and column in frame.columns:
            values = frame[column].cast(pl.String).fill_null("").to_numpy()
        return Table(rows.groups, rows.labels, values)

    validation = Rows.of(whole_questions(data.validation, run.validation.rows))
    slices = divide(run.strategy, run.phases, table(train, frame), table(held, data.validation), run.train.seed)
    stretches = [part.rows for part in slices]
    return Source(
        train=train,
        held=held,
        validation=validation,
        slices=slices,
        plan=plans.make(run.train, train.groups, train.labels, run.strategy, run.phases, stretches),
        fingerprint=data.fingerprint,
        notes=_notes(run, len(data.train), len(frame), validation.labels),
    )


def trainable(data: dataset.Prepared, rows: int | None, run: config.Run, key: str = "data.rows") -> pl.DataFrame:
    """The first `rows` train rows, as many as `key` says; None: all. Raises DataError if they teach nothing."""
    frame = data.train if rows is None else data.train.head(rows)
    if frame.is_empty() or data.validation.is_empty():
        raise DataError(
            f"{run.data.path}: training needs rows in both train and validation; prepare it with --validation-rows N"
        )
    labels = labels_of(frame)
    if labels.all() or not labels.any():
        raise DataError(
            f"{run.data.path}: all {len(frame):,} rows to train on are {bool(labels[0])}, so there is nothing to "
            f"tell apart. Prepare rows with both labels, or choose more of them ({key})"
        )
    return frame


def one_label(held: np.ndarray) -> list[str]:
    """What to know of validation rows, bool [rows] their labels, that cannot tell a good adapter from a bad one."""
    if len(set(held.tolist())) != 1:
        return []
    return [
        f"all {len(held):,} validation rows are {bool(held[0])}: there is no AUROC, and the best adapter is the one "
        "that says so of them the surest. Take more of them (validation.rows), or hold out more (--validation-rows)"
    ]


def _notes(run: config.Run, there: int, chosen: int, held: np.ndarray) -> tuple[str, ...]:
    """What the settings name beyond the rows (data.rows of those there are, phases of those that it chose), and what
    to know of validation rows with labels `held`."""
    out = one_label(held)
    if run.data.rows and run.data.rows > there:
        out.append(f"data.rows = {run.data.rows:,}: there are {there:,}")
    for number, phase in enumerate(run.phases, 1):
        if phase.rows[1] > chosen:
            out.append(f"phase {number}: rows = {list(phase.rows)}: there are {chosen:,}")
    return tuple(out)


@dataclass(frozen=True)
class Micro:
    """A part of a step that is computed at once."""

    rows: list[np.ndarray]  # int32 ids each
    trie: Trie | None  # None: through the model's own attention
    labels: np.ndarray  # bool [rows]
    budget: int  # tokens of a part, at most


def micro_batches(state: "Training", step: int, budget: int | None = None) -> tuple[int, list[Micro], int]:
    """This rank's share of a step's rows, cut into what is computed at once (`budget` tokens, by default the run's);
    and how many of all were too long."""
    numbers, budget = state.plan.rows(step), budget or state.budget
    rows, cut = state.encoder.rows(
        [state.train.questions[i] for i in numbers], [state.train.solutions[i] for i in numbers]
    )
    share = state.world.share(rows)
    rows, labels = [rows[i] for i in share], state.train.labels[numbers[share]]
    micros = []
    for part in split(rows, budget, sharing=state.way == "paths"):
        chosen = [rows[i] for i in part]
        micros.append(Micro(chosen, build(chosen) if state.way == "paths" else None, labels[part], budget))
    return step, micros, sum(cut)


def ahead(state: "Training", first: int) -> Iterator[tuple[int, list[Micro], int]]:
    """The micro-batches of every step from `first`, the next step's made while this one runs."""
    with ThreadPoolExecutor(1, thread_name_prefix="veritune-batches") as pool:
        pending = [pool.submit(micro_batches, state, step) for step in range(first, min(first + 2, len(state.plan)))]
        for step in range(first, len(state.plan)):
            ready = pending.pop(0).result()
            if step + 2 < len(state.plan):
                pending.append(pool.submit(micro_batches, state, step + 2))
            yield ready


def whole_questions(frame: pl.DataFrame, rows: int | None) -> pl.DataFrame:
    """The first questions of a frame sorted by question, with at most `rows` rows but at least one question."""
    if rows is None or rows >= len(frame):
        return frame
    started = frame["qid"].rle_id()
    whole = started < started[rows]
    return frame.filter(whole if whole.any() else started == 0)
