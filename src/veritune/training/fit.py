"""The choice that memory leaves: how many tokens are computed at once, and how many layers compute their activations
again in the backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from .. import config
from ..model.shape import Shape
from ..tokens.trie import build, split
from .memory import CONTEXT, GIB, SLACK, Batch, Job, Peak, peak
from .speed import CARDS, Card, seconds

MOST_TOKENS = 32768
"""Tokens of a micro-batch, at most. On an H200 one of 20,000 was 2.5 to 4.5 % faster than two; more were not tried."""
STEPS = 16
"""Steps that are looked at to know what micro-batches will hold."""
SPREAD = 1.05
"""Parts of a step are about equal, not quite; and steps that were not looked at may be a little larger."""


@dataclass(frozen=True)
class Mix:
    """What a run's steps are made of."""

    tokens: int
    """Of the largest step, shared ones once."""
    longest: int
    """Tokens of the longest row, which is never cut."""
    reach: float
    """Tokens that a token sees, on average."""
    parts: float
    """See `tokens.blocks.Blocks`; these and the rows for each token of a micro-batch."""
    rows: float


@dataclass(frozen=True)
class Fit:
    """How a step is computed."""

    budget: int
    """Tokens of a micro-batch."""
    recomputed: int
    """Layers, from the first, whose activations are computed again in the backward pass."""
    peak: Peak
    room: float
    """Bytes there are for it."""
    seconds: float
    """Of a step on `card`."""
    card: Card

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.room


def looked_at(count: int) -> list[int]:
    """The numbers of the steps that are looked at, evenly over a run of `count` steps."""
    return np.unique(np.linspace(0, count - 1, STEPS).astype(int)).tolist()


def mix(steps: Sequence[Sequence[np.ndarray]], *, shared: bool = True) -> Mix:
    """Measures some steps' rows (int32 [length] each)."""
    longest = max(len(row) for rows in steps for row in rows)
    if not shared:
        tokens = max(sum(map(len, rows)) for rows in steps)
        return Mix(tokens, longest, reach=longest / 2, parts=0, rows=1 / longest)
    parts = [[build([rows[i] for i in part]) for part in split(rows, MOST_TOKENS)] for rows in steps]
    sizes = [Batch.of(trie) for trie in chain.from_iterable(parts)]
    return Mix(
        tokens=max(sum(trie.tokens for trie in part) for part in parts),
        longest=longest,
        reach=max(size.reach for size in sizes),
        parts=max(size.parts / size.tokens for size in sizes),
        rows=max(size.rows / size.tokens for size in sizes),
    )


def room_of(bytes_free: float, cap_gib: float | None) -> float:
    """Bytes for tensors out of those a GPU has free (CUDA being there) or of `train.memory_gib`, if that is less: what
    the allocator wastes is taken off, and from the latter what CUDA takes."""
    return min(bytes_free, cap_gib * GIB - CONTEXT if cap_gib else bytes_free) / (1 + SLACK)


def choose(shape: Shape, job: Job, settings: config.Train, of: Mix, room: float, card: Card | None = None) -> Fit:
    """The fastest way to compute a step in `room` bytes; if there is none, the one that takes least.

    What the settings fix is not chosen. Without a `card`, ways are compared as on an H100.
    """
    card = card or CARDS["h100"]
    counts = {"auto": range(shape.layers + 1), "off": range(1), "on": range(shape.layers, shape.layers + 1)}
    ways = []
    for parts, budget in _budgets(settings, of):
        usual = _batch(of, min(budget, -(-of.tokens // parts)))
        for recomputed in counts[settings.gradient_checkpointing]:
            took = peak(shape, job, _batch(of, budget), recomputed)
            time = parts * seconds(shape, job, usual, recomputed, card)
            ways.append(Fit(budget, recomputed, took, room, time, card))
            if took.total <= room:
                break
    fitting = [way for way in ways if way.fits]
    if fitting:
        return min(fitting, key=lambda way: way.seconds)
    return min(ways, key=lambda way: way.peak.total)


def unpacked(now: Fit, shape: Shape, job: Job, settings: config.Train, of: Mix) -> Fit | None:
    """The way for an NF4 base held as bf16, if steps are foreseen to be no slower so than `now`, smaller micro-batches
    and recomputation included: the same numbers, and no unpacking at every product."""
    if job.precision != "nf4":
        return None
    found = choose(shape, replace(job, precision="bf16"), settings, of, now.room, now.card)
    return found if found.fits and found.seconds <= now.seconds else None


def cheaper(shape: Shape, job: Job, settings: config.Train, of: Mix, now: Fit) -> Fit | None:
    """What to fall back to when `now` did not fit after all: the fastest way that takes an eighth less, whatever the
    settings say of recomputing and of micro-batches; None if nothing takes less."""
    freed = replace(settings, gradient_checkpointing="auto", micro_batch_tokens=None)
    found = choose(shape, job, freed, of, min(now.room, 0.875 * now.peak.total), now.card)
    return found if found.peak.total < now.peak.total else None


def _budgets(settings: config.Train, of: Mix) -> list[tuple[int, int]]:
    """Into how many parts a step may be cut, and the tokens of each."""
    if settings.micro_batch_tokens:
        budget = max(settings.micro_batch_tokens, of.longest)
        return [(-(-of.tokens // budget), min(budget, _even(of, 1)))]
    parts, out = -(-of.tokens // MOST_TOKENS), []
    while True:
        budget = max(min(_even(of, parts), MOST_TOKENS), of.longest)
        out.append((parts, budget))
        if budget == of.longest:
            return out
        parts = max(parts + 1, parts * 9 // 8)


def _even(of: Mix, parts: int) -> int:
    return int(SPREAD * of.tokens / parts) + 1


def _batch(of: Mix, tokens: int) -> Batch:
    return Batch(tokens, of.reach, int(of.parts * tokens) + 1, int(of.rows * tokens) + 1)
