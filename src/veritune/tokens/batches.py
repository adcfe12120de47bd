"""Which rows stand in which step: arithmetic, not state.

`Batches[step]` is a pure function of the labels, the questions, the seed and the step. Finding the place again after a
stop takes one integer and skips nothing.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, eq=False)
class Batches:
    """Row numbers of each step. Every epoch shows each row once; the last one may be a part of an epoch.

    With `per_question` k > 1 the rows of a question come in groups of k, each with both labels as far as the question
    has them, so that right and wrong solutions of one question stand in one step.
    """

    questions: np.ndarray  # int64 [rows]: equal numbers are the same question
    labels: np.ndarray  # bool [rows]
    size: int
    """Rows in a step; the last step may have fewer."""
    per_question: int
    epochs: float
    seed: int

    @property
    def presentations(self) -> int:
        """Rows shown in all, repeats counted."""
        return max(round(self.epochs * len(self.labels)), 1)

    def __len__(self) -> int:
        return -(-self.presentations // self.size)

    def __getitem__(self, step: int) -> np.ndarray:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        at, end = step * self.size, min((step + 1) * self.size, self.presentations)
        rows = len(self.labels)
        parts = []
        while at < end:
            epoch, first = divmod(at, rows)
            last = min(rows, first + end - at)
            parts.append(_epoch(self, epoch)[first:last])
            at += last - first
        return np.concatenate(parts)


@lru_cache(maxsize=4)
def _epoch(batches: Batches, epoch: int) -> np.ndarray:
    rng = np.random.default_rng((batches.seed, epoch))
    if batches.per_question == 1:
        return rng.permutation(len(batches.labels))
    return grouped(batches.questions, batches.labels, batches.per_question, rng)


def grouped(questions: np.ndarray, labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random order of all rows in which a question's rows come in groups of at most `size`, its rarer label dealt
    evenly over its groups. Groups of different questions are shuffled among each other. int64 [rows]."""
    shuffled = rng.permutation(len(labels))
    q, wrong = questions[shuffled], ~labels[shuffled]
    # A question's rows side by side, right ones first, each kind in random order.
    by_label = np.lexsort((wrong, q))
    shuffled, q = shuffled[by_label], q[by_label]
    starts = np.flatnonzero(np.r_[True, q[1:] != q[:-1]])
    counts = np.diff(np.r_[starts, len(q)])
    place = np.arange(len(q)) - np.repeat(starts, counts)
    groups = -(-counts // size)
    # Dealing them out like cards gives every group its share of both kinds, and sizes that differ by one at most.
    group = place % np.repeat(groups, counts) + np.repeat(np.cumsum(groups) - groups, counts)
    rank = rng.permutation(int(groups.sum()))
    return shuffled[np.argsort(rank[group], kind="stable")]
