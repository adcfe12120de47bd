"""The gradients of keys and values, summed over the paths that share them: one Triton kernel in float32, in an order
that is always the same.

A gather of float32 copies and atomic additions, which torch offers, takes three times the memory traffic.
"""

import torch
import triton  # pyright: ignore
import triton.language as tl  # pyright: ignore
from torch import Tensor

AT_ONCE = 8
"""Entries that are read at once for a token: the prompt's first tokens are on every path."""


def sum_paths(gathered: Tensor, order: Tensor, starts: Tensor, like: Tensor) -> Tensor:
    """gathered [P, heads, d], one for each path entry -> [T, heads, d], like `like`: for each token the sum of its
    entries, `order[starts[t] : starts[t + 1]]`."""
    total = torch.empty_like(like, memory_format=torch.contiguous_format)
    width = like[0].numel()
    block = min(triton.next_power_of_2(width), 256)
    grid = len(like), triton.cdiv(width, block)
    _kernel[grid](gathered, order, starts, total, width, block, AT_ONCE, num_warps=1)  # pyright: ignore
    return total


@triton.jit
def _kernel(gathered, order, starts, total, width, block: tl.constexpr, at_once: tl.constexpr):
    token = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    first = tl.load(starts + token)
    last = tl.load(starts + token + 1)
    sums = tl.zeros((block,), dtype=tl.float32)
    for at in range(first, last, at_once):
        entries = at + tl.arange(0, at_once)
        rows = tl.load(order + entries, mask=entries < last, other=0)
        inside = (entries < last)[:, None] & (column < width)[None, :]
        values = tl.load(gathered + rows[:, None] * width + column[None, :], mask=inside, other=0.0)
        sums += tl.sum(values.to(tl.float32), axis=0)
    tl.store(total + token.to(tl.int64) * width + column, sums.to(total.dtype.element_ty), mask=column < width)
