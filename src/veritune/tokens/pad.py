"""Tries of one size: a recorded step on a GPU repeats with other numbers in the same places, so every trie that it is
to compute must have as many tokens, segments, path entries and rows.

Padding never touches a row. Its tokens form segments of their own, at whose ends nothing is read, and its rows weigh
nothing.
"""

from dataclasses import dataclass

import numpy as np

from .trie import Trie


@dataclass(frozen=True, order=True)
class Size:
    """The size of a trie batch; see `trie.Trie`."""

    tokens: int
    path: int
    segments: int
    rows: int
    longest_segment: int
    longest_path: int

    @staticmethod
    def of(trie: Trie) -> "Size":
        return Size(
            trie.tokens, len(trie.path), len(trie.segments) - 1, len(trie.ends), trie.longest_segment, trie.longest_path
        )

    def roomy(self) -> "Size":
        """A size with some room for tries like this one: 3 to 6 % more tokens, more of what costs less."""
        tokens = _up(self.tokens * 1.03 + 1, 64)
        return Size(
            tokens,
            _up(self.path * 1.1 + tokens - self.tokens, 256),
            _up(self.segments * 1.2 + 8, 16),
            _up(self.rows * 1.1, 8),
            max(_power_of_two(self.longest_segment), 64),
            max(_power_of_two(self.longest_path), 256),
        )

    def holds(self, other: "Size") -> bool:
        """Whether a trie of size `other` can be padded to this one without wasting much."""
        tokens, path = self.tokens - other.tokens, self.path - other.path
        segments = min(self.segments - other.segments, tokens)
        return (
            0 < tokens <= 0.15 * self.tokens
            and path >= tokens
            and segments > 0
            and other.rows <= self.rows
            and max(other.longest_segment, -(-tokens // segments)) <= self.longest_segment
            and max(other.longest_path, -(-path // segments) + 2) <= self.longest_path
        )


def pad(trie: Trie, size: Size) -> Trie:
    """The trie with padding up to `size`, which must hold it. Row i ends where it did; further rows end at token 0."""
    mine = Size.of(trie)
    tokens, path = size.tokens - mine.tokens, size.path - mine.path
    count = min(size.segments - mine.segments, tokens)
    own = np.diff(np.linspace(0, tokens, count + 1).astype(np.int64))
    # Each padding segment sees the first padding token so often that all path entries belong to some segment: what no
    # segment owns, the backward pass of the attention would leave unwritten.
    seen = np.diff(np.linspace(0, path - tokens, count + 1).astype(np.int64)) + own
    starts = mine.tokens + np.cumsum(own) - own
    pieces = [
        np.concatenate((np.full(n - k, mine.tokens), np.arange(a, a + k)))
        for a, k, n in zip(starts, own, seen, strict=True)
    ]
    empty = np.zeros(size.segments - mine.segments - count, dtype=np.int64)
    return Trie(
        ids=np.concatenate((trie.ids, np.zeros(tokens, dtype=np.int64))),
        positions=np.concatenate((trie.positions, np.zeros(tokens, dtype=np.int64))),
        segments=_ends(trie.segments, np.concatenate((own, empty))),
        path=np.concatenate((trie.path, *pieces)),
        paths=_ends(trie.paths, np.concatenate((seen, empty))),
        ends=np.concatenate((trie.ends, np.zeros(size.rows - mine.rows, dtype=np.int64))),
        longest_segment=size.longest_segment,
        longest_path=size.longest_path,
    )


def _ends(before: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.concatenate((before, before[-1] + np.cumsum(lengths))).astype(np.int32)


def _up(value: float, step: int) -> int:
    return int(-(-value // step)) * step


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
