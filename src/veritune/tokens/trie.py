"""Rows that share a beginning share its tokens: many rows become one token trie.

A batch is a radix tree over the rows' ids, its tokens stored once each, depth first: a row is the path from the root to
its last token. A token sees the tokens of its path up to itself; in this order, token i sees token j exactly if
j <= i < until[j], where until[j] is one past the last token below j. Everything else in a transformer works token by
token and needs only `ids` and `positions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MIN_SHARED = 8  # fewer shared tokens than this are not worth a segment of their own


@dataclass(frozen=True)
class Trie:
    """A batch of rows as arrays: T tokens, N rows."""

    ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T]: how deep a token stands in its rows
    until: np.ndarray  # int32 [T]: one past the last token that sees this one
    ends: np.ndarray  # int64 [N]: each row's last token, in the order the rows were given

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.positions.max()) + 1


def order(rows: Sequence[np.ndarray]) -> list[int]:
    """Row numbers in the order of their ids, so that rows with a common beginning are neighbours."""
    keys = [row.astype(">u4").tobytes() for row in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)


def shared(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two rows."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def build(rows: Sequence[np.ndarray], min_shared: int = MIN_SHARED) -> Trie:
    """The trie of rows (int32 [length] each, none empty), in any order, repeats allowed."""
    by_ids = order(rows)
    common = [shared(rows[a], rows[b]) for a, b in pairwise(by_ids)]
    pieces: list[np.ndarray] = []
    depths: list[np.ndarray] = []
    untils: list[int] = []
    ends = np.zeros(len(rows), dtype=np.int64)
    size = 0
    # (first, last + 1) of a run of sorted rows, and the depth they share already; or a piece whose rows are all stored
    todo: list[tuple[int, int, int] | int] = [(0, len(rows), 0)]
    while todo:
        now = todo.pop()
        if isinstance(now, int):
            untils[now] = size
            continue
        low, high, depth = now
        row = rows[by_ids[low]]
        deep = min((*common[low : high - 1], len(row)))
        if deep > depth:
            todo.append(len(pieces))
            pieces.append(row[depth:deep])
            depths.append(np.arange(depth, deep))
            untils.append(0)
            size += deep - depth
        while low < high and len(rows[by_ids[low]]) == deep:
            ends[by_ids[low]] = size - 1
            low += 1
        start, children = low, []
        for i in range(low + 1, high + 1):
            if i == high or common[i - 1] < min(deep + min_shared, len(rows[by_ids[i - 1]]), len(rows[by_ids[i]])):
                children.append((start, i, deep))
                start = i
        todo += reversed(children)
    return Trie(
        ids=np.concatenate(pieces).astype(np.int64),
        positions=np.concatenate(depths).astype(np.int64),
        until=np.repeat(untils, [len(piece) for piece in pieces]).astype(np.int32),
        ends=ends,
    )


def split(rows: Sequence[np.ndarray], budget: int, *, sharing: bool = True) -> list[list[int]]:
    """Cuts rows into micro-batches of about equal size, none over `budget` tokens unless one row alone is. Tokens of a
    common beginning count once, if rows are `sharing` them; fewer than MIN_SHARED a row that are shared past a segment
    are stored again, and not counted.

    Row numbers come in trie order, so rows with a common beginning stay together where they can.
    """
    if not rows:
        return []
    by_ids = order(rows)
    fresh = [len(rows[by_ids[0]])]
    for a, b in pairwise(by_ids):
        common = shared(rows[a], rows[b])
        fresh.append(len(rows[b]) - (common if sharing and common >= MIN_SHARED else 0))
    # One batch more for each budget's worth: each begins again with what its first row shares with the one before.
    count = -(-sum(fresh) // budget)
    target = sum(fresh) / count
    out: list[list[int]] = []
    size, done = 0.0, 0.0
    for row, new in zip(by_ids, fresh, strict=True):
        full = size + new > budget or done + new / 2 > target * len(out)
        if not out or full:
            out.append([])
            size = len(rows[row])
        else:
            size += new
        done += new
        out[-1].append(row)
    return out
