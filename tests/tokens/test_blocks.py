"""The lists of blocks hold each pair in which a token sees another once, and only those."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pad import made

from veritune.tokens.blocks import BLOCK, PIECE, blocks_of, room, widened
from veritune.tokens.pad import Size, pad


def pairs(until: np.ndarray) -> set[tuple[int, int]]:
    """The block that sees and the one that is seen, token by token."""
    i = np.arange(len(until))
    sees = (i[None, :] <= i[:, None]) & (i[:, None] < until[None, :])
    return {(int(a) // BLOCK, int(b) // BLOCK) for a, b in zip(*np.nonzero(sees), strict=True)}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_each_pair_is_gone_through_once_from_either_side(seed: int, rows: int) -> None:
    until = made(seed, rows).until
    found, wanted = blocks_of(until), pairs(until)
    assert all(array.dtype == np.int32 for array in found.arrays)
    own = range(len(found.starts) - 1)
    seen = [(a, int(b)) for a in own for b in found.seen[found.starts[a] : found.starts[a + 1]]]
    assert len(set(seen)) == len(seen)
    assert {*seen, *((a, a) for a in own)} == wanted
    at = [(int(a), int(b)) for b, first, last, _ in found.pieces for a in found.seers[first:last]]
    assert len(set(at)) == len(at)
    assert set(at) == wanted
    assert all(last - first <= PIECE for _, first, last, _ in found.pieces)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_the_parts_of_a_block_stand_beside_each_other_and_are_summed_once(seed: int, rows: int) -> None:
    found = blocks_of(made(seed, rows).until)
    numbers = [int(part) for *_, part in found.pieces if part >= 0]
    assert numbers == list(range(found.parts))
    of = {int(part): int(block) for block, _, _, part in found.pieces if part >= 0}
    assert {part: int(block) for block, first, last in found.sums for part in range(first, last)} == of
    assert all(last - first > 1 for _, first, last in found.sums)
    alone = [int(block) for block, *_, part in found.pieces if part < 0]
    assert sorted([*alone, *(int(block) for block, _, _ in found.sums)]) == list(range(len(found.starts) - 1))


def test_widened_lists_are_as_long_for_every_trie_of_a_size_and_say_the_same() -> None:
    tries = [made(seed, 30) for seed in range(4)]
    size = Size(-(-max(trie.tokens for trie in tries) // BLOCK) * BLOCK, 32)
    for trie in tries:
        until = pad(trie, size).until
        plain, wide = blocks_of(until), widened(blocks_of(until), size.tokens)
        assert wide is not None
        assert tuple(len(array) for array in wide.arrays) == room(size.tokens)[0]
        for short, long in zip(plain.arrays, wide.arrays, strict=True):
            assert (long[: len(short)] == short).all()
        assert (wide.pieces[len(plain.pieces) :] == (size.tokens // BLOCK, 0, 0, -1)).all()
        assert (wide.sums[len(plain.sums) :] == 0).all()


@pytest.mark.parametrize(("tokens", "fits"), [(2048, True), (8192, False)])
def test_one_row_alone_has_more_parts_than_are_provided_for_once_it_is_long(tokens: int, fits: bool) -> None:
    """All see all: 128 blocks have over a thousand parts."""
    assert (widened(blocks_of(np.full(tokens, tokens, dtype=np.int32)), tokens) is not None) == fits
