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
    """Lists of blocks, int32. A block sees another if one of its tokens sees one of the other's."""

    seen: np.ndarray  # [pairs]: for each block the earlier ones that it sees
    starts: np.ndarray  # [blocks + 1]: where each block's begin in `seen`
    seers: np.ndarray  # [pairs + blocks]: for each block itself and the later ones that see it
    pieces: np.ndarray  # [pieces, 4]: a block, the first and last + 1 of its `seers`, its part; -1: it is the only one
    sums: np.ndarray  # [sums, 3]: a block of several parts, its first part and its last + 1
    parts: int

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.seen, self.starts, self.seers, self.pieces, self.sums


def blocks_of(until: np.ndarray) -> Blocks:
    """The lists of a trie; until: int32 [T]."""
    count = -(-len(until) // BLOCK)
    furthest = np.zeros(count * BLOCK, dtype=np.int32)
    furthest[: len(until)] = until
    furthest = furthest.reshape(count, BLOCK).max(1)
    sees = np.tril(furthest[None, :] > BLOCK * np.arange(count)[:, None])  # [the one that sees, the one that is seen]
    numbers = sees.sum(0)
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
    earlier = np.tril(sees, -1)
    return Blocks(
        seen=np.nonzero(earlier)[1].astype(np.int32),
        starts=np.concatenate(([0], np.cumsum(earlier.sum(1)))).astype(np.int32),
        seers=np.nonzero(sees.T)[1].astype(np.int32),
        pieces=np.array(pieces, dtype=np.int32),
        sums=np.array(sums, dtype=np.int32).reshape(-1, 3),
        parts=parts,
    )


def room(tokens: int) -> tuple[tuple[int, ...], int]:
    """How long the lists of a trie of so many tokens can be, in their order above, and how many parts are provided for:
    enough for rows of 3,500 tokens."""
    count = -(-tokens // BLOCK)
    pairs, parts = count * (count - 1) // 2, 4 * count
    return (pairs, count + 1, pairs + count, parts + count, count), parts


def widened(blocks: Blocks, tokens: int) -> Blocks | None:
    """The same in lists of that length, for kernels that are to work on others in the same places; None if there are
    more parts. What is added is worked on by nobody: pieces of a block past the last, and sums over nothing."""
    lengths, parts = room(tokens)
    if blocks.parts > parts:
        return None
    none = np.array((-(-tokens // BLOCK), 0, 0, -1), dtype=np.int32)
    seen, starts, seers, pieces, sums = lengths
    return Blocks(
        seen=np.pad(blocks.seen, (0, seen - len(blocks.seen))),
        starts=np.pad(blocks.starts, (0, starts - len(blocks.starts))),
        seers=np.pad(blocks.seers, (0, seers - len(blocks.seers))),
        pieces=np.concatenate((blocks.pieces, np.tile(none, (pieces - len(blocks.pieces), 1)))),
        sums=np.pad(blocks.sums, ((0, sums - len(blocks.sums)), (0, 0))),
        parts=parts,
    )
