"""Which blocks of a trie's tokens see which: the lists that the attention kernels of `model.trie_kernels` go by."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

BLOCK = 64
"""Tokens of a block."""
PIECE = 8
"""Blocks that see a block and are gone through one after the other. Of a block that more of them see, an instruction's,
each so many make a part of its gradients, and the parts are added up afterwards."""


@dataclass(frozen=True)
class Blocks:
    """Lists of a trie of B blocks. A block sees another if one of its tokens sees one of the other's.

    One array, so that a compiled layer has one size to expect; what points at places in it counts from its beginning:

        [B + 1]        for each block, where the earlier ones that it sees begin
        [pieces, 4]    a block, the first and last + 1 of those that see it, and its part; -1: this piece is all
        [sums, 3]      a block of several parts, its first part and its last + 1
        the rest       the blocks that each sees, then for each block itself and the later ones that see it
    """

    table: np.ndarray  # int32
    pieces: int
    sums: int
    parts: int
    over: bool
    """Whether it takes more than the room that every trie of so many tokens is given."""


def blocks_of(until: np.ndarray, *, room: bool = False) -> Blocks:
    """The lists of a trie; until: int32 [T]. With `room`, every trie of so many tokens has the same size, but for one
    that is `over` it, whose rows are so long (about 4,000 tokens) that more parts are needed."""
    count = -(-len(until) // BLOCK)
    furthest = np.zeros(count * BLOCK, dtype=np.int32)
    furthest[: len(until)] = until
    furthest = furthest.reshape(count, BLOCK).max(1)
    sees = np.tril(furthest[None, :] > BLOCK * np.arange(count)[:, None])  # [the one that sees, the one that is seen]
    earlier, numbers = np.tril(sees, -1), sees.sum(0)
    starts = np.concatenate(([0], np.cumsum(earlier.sum(1))))
    at = np.concatenate(([0], np.cumsum(numbers)))
    pieces, sums, parts = [], [], 0
    for block in np.argsort(-numbers, kind="stable"):  # the longest first, so that none is left running alone
        cuts = list(pairwise((*range(at[block], at[block + 1], PIECE), at[block + 1])))
        if len(cuts) == 1:
            pieces.append((block, *cuts[0], -1))
            continue
        pieces += [(block, *cut, parts + n) for n, cut in enumerate(cuts)]
        sums.append((block, parts, parts + len(cuts)))
        parts += len(cuts)
    # At least two of each, since compilers make special cases of none and one.
    fixed = (5 * count, count, 4 * count) if room else (0, 0, 0)
    needed = len(pieces), len(sums), parts
    least = [max(n, own, 2) for n, own in zip(fixed, needed, strict=True)]
    over = room and any(own > max(n, 2) for n, own in zip(fixed, needed, strict=True))
    # What is added is worked on by nobody: pieces of a block past the last, and sums over nothing.
    pieces += [(count, 0, 0, -1)] * (least[0] - len(pieces))
    sums += [(0, 0, 0)] * (least[1] - len(sums))
    lists = np.concatenate((np.nonzero(earlier)[1], np.nonzero(sees.T)[1]))
    head = count + 1 + 4 * least[0] + 3 * least[1]
    places = np.array(pieces) + (head + starts[-1]) * np.array([0, 1, 1, 0])  # of `lists`, after what blocks see
    table = np.concatenate((starts + head, places.ravel(), np.array(sums).ravel(), lists))
    table = np.pad(table, (0, head + count * count - len(table) if room else 0))
    return Blocks(table.astype(np.int32), *least, over=over)
