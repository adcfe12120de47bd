"""Tries of one size: a recorded step on a GPU repeats with other numbers in the same places, so every trie that it is
to compute must have as many tokens and rows.

Padding never touches a row. Its tokens see nothing but each other, nothing is read at their ends, and its rows weigh
nothing.
"""

from dataclasses import dataclass

import numpy as np

from .blocks import BLOCK
from .trie import Trie


@dataclass(frozen=True, order=True)
class Size:
    """The size of a trie batch."""

    tokens: int
    rows: int

    @staticmethod
    def of(trie: Trie) -> "Size":
        return Size(trie.tokens, len(trie.ends))

    def roomy(self) -> "Size":
        """A size with some room for tries like this one: 3 to 6 % more tokens, and more rows, which cost less."""
        return Size(_up(self.tokens * 1.03 + 1, BLOCK), _up(self.rows * 1.1, 8))

    def holds(self, other: "Size") -> bool:
        """Whether a trie of size `other` can be padded to this one without wasting much."""
        return 0.85 * self.tokens <= other.tokens <= self.tokens and other.rows <= self.rows


def pad(trie: Trie, size: Size) -> Trie:
    """The trie with padding up to `size`, which must hold it. Row i ends where it did; further rows end at token 0."""
    added = np.arange(trie.tokens, size.tokens)
    nothing = np.zeros(len(added), dtype=np.int64)
    block_ends = np.minimum((added // BLOCK + 1) * BLOCK, size.tokens)  # in blocks, for attention goes through blocks
    return Trie(
        ids=np.concatenate((trie.ids, nothing)),
        positions=np.concatenate((trie.positions, nothing)),
        until=np.concatenate((trie.until, block_ends.astype(np.int32))),
        ends=np.concatenate((trie.ends, np.zeros(size.rows - len(trie.ends), dtype=np.int64))),
    )


def _up(value: float, step: int) -> int:
    return int(-(-value // step)) * step
