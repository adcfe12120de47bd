"""Rows that share a beginning share its tokens: many rows become one token trie.

A batch is a radix tree over the rows' ids. Each edge is a segment, stored once; a row is the path from the root to its
last token. A segment's tokens attend to its path: the tokens of its ancestors, then itself, causally. Everything else
in a transformer works token by token and needs only `ids` and `positions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MIN_SHARED = 8  # fewer shared tokens than this are not worth a segment of their own


@dataclass(frozen=True)
class Trie:
    """A batch of rows as arrays. T tokens, S segments, P = the sum of all path lengths, N rows.

    Segment s holds tokens `segments[s]:segments[s+1]` and attends to the tokens `path[paths[s]:paths[s+1]]`, whose last
    ones are its own.
    """

    ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T]: how deep a token stands in its rows
    segments: np.ndarray  # int32 [S + 1]
    path: np.ndarray  # int64 [P]
    paths: np.ndarray  # int32 [S + 1]
    ends: np.ndarray  # int64 [N]: each row's last token, in the order the rows were given
    longest_segment: int
    longest_path: int

    @property
    def tokens(self) -> int:
        return len(self.ids)


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
    path_of: list[np.ndarray] = []
    ends = np.zeros(len(rows), dtype=np.int64)
    size = 0
    # (first, last + 1) of a run of sorted rows, the depth they share already, and the tokens of that path
    todo: list[tuple[int, int, int, np.ndarray]] = [(0, len(rows), 0, np.zeros(0, dtype=np.int64))]
    while todo:
        low, high, depth, path = todo.pop()
        row = rows[by_ids[low]]
        until = min((*common[low : high - 1], len(row)))
        if until > depth:
            pieces.append(row[depth:until])
            depths.append(np.arange(depth, until))
            path = np.concatenate((path, np.arange(size, size + until - depth)))
            path_of.append(path)
            size += until - depth
        while low < high and len(rows[by_ids[low]]) == until:
            ends[by_ids[low]] = path[-1]
            low += 1
        start, children = low, []
        for i in range(low + 1, high + 1):
            if i == high or common[i - 1] < min(until + min_shared, len(rows[by_ids[i - 1]]), len(rows[by_ids[i]])):
                children.append((start, i, until, path))
                start = i
        todo += reversed(children)
    lengths = [len(piece) for piece in pieces]
    path_lengths = [len(path) for path in path_of]
    return Trie(
        ids=np.concatenate(pieces).astype(np.int64),
        positions=np.concatenate(depths).astype(np.int64),
        segments=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        path=np.concatenate(path_of),
        paths=np.concatenate(([0], np.cumsum(path_lengths))).astype(np.int32),
        ends=ends,
        longest_segment=max(lengths),
        longest_path=max(path_lengths),
    )


def split(rows: Sequence[np.ndarray], budget: int, *, sharing: bool = True) -> list[list[int]]:
    """Cuts rows into micro-batches of about equal size, none over `budget` tokens unless one row alone is. Tokens of a
    common beginning count once, if rows are `sharing` them.

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
