"""The slices that a strategy trains on one after another, and the two fixed probes that tell what is left of each.

A slice is a stretch of the training order, or the rows with some values of a column. Everything here is a pure function
of the settings and the dataset's labels, questions and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from .. import config
from ..errors import ConfigError

SLICES = 4
"""Slices where a strategy says nothing of their number or size."""
HELD_OUT_PART = 0.1
"""At most this part of a slice's rows is its probe, where that is held out of training; whole questions are."""
NAMED, LETTERS = 8, 40
"""Values that the name of a slice holds, and letters of each: a column may have thousands."""
CUT = ("slices", "ends", "slice_rows", "column", "presentations")
READ = {
    "plain": (),
    "sequential": (*CUT, "optimizer_state", "start_from"),
    "cumulative": (*CUT, "optimizer_state", "start_from"),
    "replay": (*CUT, "optimizer_state", "start_from", "replay_ratio"),
    "stream": (*CUT, "cooldowns"),
}
"""The settings that each kind of strategy goes by."""


@dataclass(frozen=True)
class Slice:
    """Rows that arrive together. Row numbers are int64 and ascending."""

    name: str
    rows: np.ndarray
    """Rows of the training set."""
    trained: np.ndarray
    """The probe of what is remembered: some of `rows`."""
    held_out: np.ndarray | None
    """The probe of what was learnt: rows of the slice's kind whose questions are never trained on. None: the run's own
    validation rows, which are of every slice's kind."""
    held_out_from: str
    """`validation` or `train`: the table whose rows `held_out` numbers."""


@dataclass(frozen=True)
class Table:
    """What slices are made of: columns of a dataset's table, of one length."""

    questions: np.ndarray  # int64: equal numbers are the same question
    labels: np.ndarray  # bool
    values: np.ndarray | None  # str: the strategy's column


def divide(
    strategy: config.Strategy, phases: Sequence[config.Phase], train: Table, validation: Table, seed: int
) -> tuple[Slice, ...]:
    """The slices of a run in the order they arrive; none for a plain run.

    The slices of listed phases are the rows that each brings for the first time. Raises ConfigError for settings that
    contradict each other or make no slice.
    """
    if phases and strategy.kind != "plain":
        raise ConfigError(f"[[phases]] and strategy.kind = {strategy.kind!r} exclude each other: keep one of them")
    default = config.Strategy()
    for key in (field.name for field in fields(strategy)):
        idle = key not in ("kind", "probe_rows", *READ[strategy.kind])
        if idle and getattr(strategy, key) != getattr(default, key):
            kinds = ", ".join(kind for kind, read in READ.items() if key in read)
            beside = "[[phases]]" if phases else f"strategy.kind = {strategy.kind!r}"
            raise ConfigError(f"strategy.{key} does nothing beside {beside}: drop it; it is for the kinds {kinds}")
    if phases:
        return _stretches(_new_rows(phases, len(train.labels)), train, strategy, seed)
    if strategy.kind == "plain":
        return ()
    if strategy.ends and (strategy.slices or strategy.slice_rows or strategy.column):
        raise ConfigError("strategy.ends stands alone: drop it, or strategy.slices, slice_rows and column")
    if strategy.column is not None:
        return _by_column(strategy, train, validation, seed)
    return _stretches(_cut(strategy, len(train.labels)), train, strategy, seed)


def draw_evenly(rows: np.ndarray, cells: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of `rows` (all, if there are fewer), as evenly as there are from each cell; ascending.

    cells: int64 [rows], equal numbers are one cell. Each cell gives one row in turn until it has no more.
    """
    shuffled = rng.permutation(len(rows))
    by_cell = np.argsort(cells[shuffled], kind="stable")
    sizes = np.unique(cells, return_counts=True)[1]
    turn = np.empty(len(rows), np.int64)
    turn[by_cell] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(rows[shuffled[np.argsort(turn, kind="stable")[:count]]])


def _cut(strategy: config.Strategy, rows: int) -> list[tuple[int, int]]:
    """Stretches of the training order, from and to."""
    if strategy.ends:
        ends = list(strategy.ends)
        if any(a >= b for a, b in pairwise(ends)):
            raise ConfigError(f"strategy.ends = {ends}: must rise")
        ends = [end for end in ends if end < rows] + ([rows] if ends[-1] >= rows else [])
        return list(pairwise([0, *ends]))
    size = strategy.slice_rows
    count = strategy.slices or (SLICES if size is None else -(-rows // size))
    if size is None or count * size > rows:
        if count > rows:
            raise ConfigError(f"strategy.slices = {count}: there are only {rows:,} rows")
        bounds = [round(i * rows / count) for i in range(count + 1)]
        if size is not None and not strategy.slices:
            bounds = [min(i * size, rows) for i in range(count + 1)]
    else:
        bounds = [i * size for i in range(count + 1)]
    return list(pairwise(bounds))


def _new_rows(phases: Sequence[config.Phase], rows: int) -> list[tuple[int, int]]:
    """What each phase brings that none before it had."""
    out, seen = [], 0
    for number, phase in enumerate(phases, 1):
        first, last = phase.rows[0], min(phase.rows[1], rows)
        if first >= last:
            raise ConfigError(f"phase {number}: rows = {list(phase.rows)} holds none of the {rows:,} training rows")
        if first > seen:
            raise ConfigError(
                f"phase {number}: rows = {list(phase.rows)} leaves out the rows from {seen:,}, where those before end"
            )
        if last > seen:
            out.append((seen, last))
            seen = last
    return out


def _stretches(bounds: list[tuple[int, int]], train: Table, strategy: config.Strategy, seed: int) -> tuple[Slice, ...]:
    out = []
    for first, last in bounds:
        rows = np.arange(first, last)
        probe = _probe(rows, train.labels, strategy.probe_rows, (seed, 1, len(out)))
        out.append(Slice(f"rows {first:,} to {last:,}", rows, probe, None, "validation"))
    return tuple(out)


def _probe(rows: np.ndarray, labels: np.ndarray, count: int, seed: tuple[int, ...]) -> np.ndarray:
    return draw_evenly(rows, labels[rows].astype(np.int64), count, np.random.default_rng(seed))


def _by_column(strategy: config.Strategy, train: Table, validation: Table, seed: int) -> tuple[Slice, ...]:
    if train.values is None:
        raise ConfigError(f"strategy.column = {strategy.column!r}: the prepared rows have no such column")
    groups = _grouped(train.values, strategy.slices or SLICES)
    members = [np.isin(train.values, group) for group in groups]
    held = []
    kept = np.ones(len(train.labels), bool)
    for number, (group, member) in enumerate(zip(groups, members, strict=True)):
        there = np.array([], np.int64)
        if validation.values is not None:
            there = np.flatnonzero(np.isin(validation.values, group))
        if len(there) >= strategy.probe_rows:
            held.append((_probe(there, validation.labels, strategy.probe_rows, (seed, 2, number)), "validation"))
            continue
        own = np.flatnonzero(member)
        wanted = min(strategy.probe_rows, round(HELD_OUT_PART * len(own)))
        asked, counts = np.unique(train.questions[own], return_counts=True)
        order = np.random.default_rng((seed, 3, number)).permutation(len(asked))
        enough = int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1 if wanted else 0
        chosen = np.isin(train.questions, asked[order[:enough]])
        # No slice may train on these questions: another solver's solution gives much of the answer away.
        kept &= ~chosen
        held.append((_probe(np.flatnonzero(chosen & member), train.labels, wanted, (seed, 2, number)), "train"))
    out = []
    for number, (group, member) in enumerate(zip(groups, members, strict=True)):
        rows = np.flatnonzero(member & kept)[: strategy.slice_rows]
        if not len(rows):
            raise ConfigError(
                f"strategy.column = {strategy.column!r}: nothing is left to train on of {named(group)}; choose "
                "fewer slices or a smaller strategy.probe_rows"
            )
        probe = _probe(rows, train.labels, strategy.probe_rows, (seed, 1, number))
        out.append(Slice(named(group), rows, probe, *held[number]))
    return tuple(out)


def named(values: Sequence[str]) -> str:
    """A column's values for people to read: the first of them, and how many more there are."""
    shown = [(value if len(value) <= LETTERS else f"{value[: LETTERS - 1]}…") or "(none)" for value in values[:NAMED]]
    more = f" and {len(values) - NAMED:,} others" if len(values) > NAMED else ""
    return ", ".join(shown) + more


def _grouped(values: np.ndarray, count: int) -> list[list[str]]:
    """Values in `count` groups of about as many rows: the most frequent first, each to the group that has fewest."""
    names, counts = np.unique(values, return_counts=True)
    if len(names) < count:
        there = named(names.tolist())
        raise ConfigError(f"strategy.slices = {count}: the column has only {len(names)} values: {there}")
    groups: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for place in np.argsort(-counts, kind="stable"):
        least = sizes.index(min(sizes))
        groups[least].append(str(names[place]))
        sizes[least] += int(counts[place])
    return groups
