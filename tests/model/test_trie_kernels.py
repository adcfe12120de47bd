"""The attention kernels give the outputs and gradients of plain products in float64, and the same bits every time. Run
by Triton's interpreter where there is no GPU."""

import pytest
from interpreted import DEVICES, printed

CODE = """
import sys

import numpy as np
import torch

from veritune.model import attention, trie_kernels
from veritune.tokens.blocks import blocks_of
from veritune.tokens.pad import Size, pad
from veritune.tokens.trie import build

device = torch.device(sys.argv[1])
# The interpreter cuts bf16 results instead of rounding them: float32 there.
dtype, allowed = (torch.bfloat16, 0.02) if device.type == "cuda" else (torch.float32, 1e-5)
rng = np.random.default_rng(0)
draw = lambda n: rng.integers(5, 1000, n).astype(np.int32)
shapes = ((4, 2, 24, 2, 3), (3, 1, 32, 1, 1), (1, 1, 128, 1, 3), (1, 1, 8, 2, 20))
if device.type == "cuda":  # the interpreter takes seconds for each of these
    shapes += ((2, 2, 16, 3, 5), (4, 2, 24, 5, 4), (9, 3, 64, 2, 3), (2, 1, 128, 1, 40), (2, 1, 8, 2, 30))
for heads, key_heads, width, questions, each in shapes:
    head, rows = draw(21), []
    for _ in range(questions):
        question = np.concatenate((head, draw(int(rng.integers(9, 40)))))
        rows += [np.concatenate((question, draw(int(rng.integers(1, 60))))) for _ in range(each)]
    trie = build(rows)
    for trie, room in ((trie, False), (pad(trie, Size.of(trie).roomy()), True)):
        blocks = blocks_of(trie.until, room=room)
        until, table = (torch.from_numpy(array).to(device) for array in (trie.until, blocks.table))
        of = until, table, blocks.pieces, blocks.sums, blocks.parts
        torch.manual_seed(0)
        make = lambda n: torch.randn(trie.tokens, n, width, device=device).to(dtype)
        q, k, v, grad = make(heads), make(key_heads), make(key_heads), make(heads)
        out, logs = trie_kernels.forward(q, k, v, until, table, width**-0.5)
        found = (out, *trie_kernels.backward(grad, q, k, v, out, logs, *of, width**-0.5))
        exact = [x.double().requires_grad_(True) for x in (q, k, v)]
        wanted, _ = attention.attend(*exact, until, until[:0], 0, 0, 0, width**-0.5)
        wanted.backward(grad.double())
        for name, ours, right in zip("oqkv", found, (wanted.detach(), *(x.grad for x in exact)), strict=True):
            off = float((ours.double() - right).norm() / right.norm())
            assert off < allowed, f"{name} of {heads}/{key_heads} heads x {width}: off by {off:.1e}"
        again = trie_kernels.backward(grad, q, k, v, out, logs, *of, width**-0.5)
        assert all(torch.equal(x, y) for x, y in zip(found[1:], again, strict=True))
        print(trie.tokens, blocks.parts)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_they_give_the_outputs_and_gradients_of_plain_products(device: str) -> None:
    lines = printed(CODE, device)
    assert len(lines) == (8 if device == "cpu" else 18)
    assert any(int(line.split()[1]) > 2 for line in lines[::2])  # gradients that were summed from several parts
