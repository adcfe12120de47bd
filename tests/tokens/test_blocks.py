"""The lists of blocks hold each pair in which a token sees another once, and only those."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pad import made

from veritune.tokens.blocks import BLOCK, PIECE, Blocks, blocks_of
from veritune.tokens.pad import Size, pad


def pairs(until: np.ndarray) -> set[tuple[int, int]]:
    """The block that sees and the one that is seen, token by token."""
    i = np.arange(len(until))
    sees = (i[None, :] <= i[:, None]) & (i[:, None] < until[None, :])
    return {(int(a) // BLOCK, int(b) // BLOCK) for a, b in zip(*np.nonzero(sees), strict=True)}


def read(blocks: Blocks, tokens: int) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """The pairs in which a block sees an earlier one, the pieces, and the sums."""
    count, table = -(-tokens // BLOCK), blocks.table
    ends = count + 1 + 4 * blocks.pieces, count + 1 + 4 * blocks.pieces + 3 * blocks.sums
    seen = [(a, int(b)) for a in range(count) for b in table[table[a] : table[a + 1]]]
    return seen, table[count + 1 : ends[0]].reshape(-1, 4), table[ends[0] : ends[1]].reshape(-1, 3)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 60), st.booleans())
def test_each_pair_is_gone_through_once_from_either_side(seed: int, rows: int, room: bool) -> None:
    until = made(seed, rows).until
    found, wanted = blocks_of(until, room=room), pairs(until)
    assert found.table.dtype == np.int32
    seen, pieces, _ = read(found, len(until))
    assert len(set(seen)) == len(seen)
    assert {*seen, *((a, a) for a, _ in wanted)} == wanted
    at = [(int(a), int(b)) for b, first, last, _ in pieces for a in found.table[first:last]]
    assert len(set(at)) == len(at)
    assert set(at) == wanted
    assert all(last - first <= PIECE for _, first, last, _ in pieces)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 60), st.booleans())
def test_the_parts_of_a_block_stand_beside_each_other_and_are_summed_once(seed: int, rows: int, room: bool) -> None:
    until = made(seed, rows).until
    count, found = -(-len(until) // BLOCK), blocks_of(until, room=room)
    _, pieces, sums = read(found, len(until))
    of = {int(part): int(block) for block, _, _, part in pieces if part >= 0}
    assert sorted(of) == list(range(len(of)))
    assert len(of) <= found.parts
    assert {part: int(block) for block, first, last in sums for part in range(first, last)} == of
    alone = [int(block) for block, first, last, part in pieces if part < 0 and first < last]
    assert sorted([*alone, *(int(block) for block, first, last in sums if first < last)]) == list(range(count))
    idle = [(int(block), int(part)) for block, first, last, part in pieces if first == last]
    assert set(idle) <= {(count, -1)}


def size_of(blocks: Blocks) -> tuple[int, ...]:
    return len(blocks.table), blocks.pieces, blocks.sums, blocks.parts


def test_tries_of_one_size_have_lists_of_one_size() -> None:
    tries = [made(seed, 30) for seed in range(6)]
    size = Size(-(-max(trie.tokens for trie in tries) // BLOCK) * BLOCK, 32)
    found = [blocks_of(pad(trie, size).until, room=True) for trie in tries]
    one_row = blocks_of(np.full(size.tokens, size.tokens, dtype=np.int32), room=True)
    assert len({size_of(it) for it in (*found, one_row)}) == 1
    assert not any(it.over for it in (*found, one_row, blocks_of(np.ones(1, dtype=np.int32), room=True)))
    long = np.full(8192, 8192, dtype=np.int32)  # 128 blocks that all see all before them: over a thousand parts
    assert blocks_of(long, room=True).parts > 4 * 128
    assert blocks_of(long, room=True).over


def test_there_are_at_least_two_of_each() -> None:
    assert min(size_of(blocks_of(np.ones(1, dtype=np.int32)))) >= 2
