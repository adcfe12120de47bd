"""SwiGLU under LoRA on a GPU, in Triton: the updates of gate and up are added where their products are read.

Forward, a program takes some tokens and goes along columns; backward it takes some columns and goes down the tokens.
Block after block it adds the low-rank updates to the base's products and multiplies what it gives with the narrow
matrix that would read all of it once more: h with A of the layer after; the gradients of gate and up, and h, for those
of B and A. Each program's part of those sums is added up afterwards, in a fixed order.
"""

# Triton's compiler reads the annotations of a kernel, and its launch takes more than a kernel's own arguments.
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import padded

FORWARD, BACKWARD, BACKWARD_WIDE = (64, 64, 8, 4, 3), (32, 64, 16, 2, 1), (64, 64, 16, 4, 1)
"""Tokens and columns of a block, the blocks of a program, its warps, and blocks that it has on their way at once: the
fastest of benchmarks/swiglu.py, or near it; backward, at ranks up to 16 and above."""


@triton.jit
def _narrow(array, i, r, count, rank: tl.constexpr):
    """Rows i of [count, rank], zero where there are none."""
    at = i.to(tl.int64)[:, None] * rank + r[None, :]
    return tl.load(array + at, mask=(i < count)[:, None] & (r < rank)[None, :], other=0.0)


@triton.jit
def _across(array, r, n, rank: tl.constexpr, width: tl.constexpr):
    """Columns n of [rank, width]."""
    at = r[:, None] * width + n[None, :]
    return tl.load(array + at, mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)


@triton.jit
def _wide(array, i, n, tokens, width: tl.constexpr, policy: tl.constexpr):
    """Rows i and columns n of [tokens, width]."""
    at = i.to(tl.int64)[:, None] * width + n[None, :]
    there = (i < tokens)[:, None] & (n < width)[None, :]
    return tl.load(array + at, mask=there, other=0.0, eviction_policy=policy)


@triton.jit
def _keep(array, values, i, n, tokens, width: tl.constexpr):
    at = i.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(array + at, values.to(array.dtype.element_ty), mask=(i < tokens)[:, None] & (n < width)[None, :])


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))  # by -log2(e)


@triton.jit(do_not_specialize=["tokens"])
def _swiglu(
    gate, up, low_gate, low_up, b_gate, b_up, a, out, parts, tokens, width: tl.constexpr, rank: tl.constexpr,
    ranks: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, run: tl.constexpr,
):  # fmt: skip
    i, r = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, ranks)
    low_g, low_u = _narrow(low_gate, i, r, tokens, rank), _narrow(low_up, i, r, tokens, rank)
    acc = tl.zeros((rows, ranks), dtype=tl.float32)
    for block in range(run):
        n = (tl.program_id(1) * run + block) * columns + tl.arange(0, columns)
        b_g, b_u = _narrow(b_gate, n, r, width, rank), _narrow(b_up, n, r, width, rank)
        g = _wide(gate, i, n, tokens, width, "evict_first") + tl.dot(low_g, tl.trans(b_g))
        u = _wide(up, i, n, tokens, width, "evict_first") + tl.dot(low_u, tl.trans(b_u))
        h = (g * _sigmoid(g) * u).to(out.dtype.element_ty)
        _keep(out, h, i, n, tokens, width)
        acc = tl.dot(h, tl.trans(_across(a, r, n, rank, width)), acc)
    _keep(parts + tl.program_id(1).to(tl.int64) * tokens * rank, acc, i, r, tokens, rank)


@triton.jit(do_not_specialize=["tokens"])
def _swiglu_backward(
    grad, grad_low, gate, up, low_gate, low_up, b_gate, b_up, a, grad_gate, grad_up, parts, tokens,
    width: tl.constexpr, rank: tl.constexpr, ranks: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    run: tl.constexpr,
):  # fmt: skip
    n, r = tl.program_id(0) * columns + tl.arange(0, columns), tl.arange(0, ranks)
    b_g, b_u = tl.trans(_narrow(b_gate, n, r, width, rank)), tl.trans(_narrow(b_up, n, r, width, rank))
    a_h = _across(a, r, n, rank, width)
    acc_g = tl.zeros((columns, ranks), dtype=tl.float32)
    acc_u, acc_h = tl.zeros((columns, ranks), dtype=tl.float32), tl.zeros((columns, ranks), dtype=tl.float32)
    for block in range(run):
        i = (tl.program_id(1) * run + block) * rows + tl.arange(0, rows)
        low_g, low_u = _narrow(low_gate, i, r, tokens, rank), _narrow(low_up, i, r, tokens, rank)
        low_h = _narrow(grad_low, i, r, tokens, rank)
        g = _wide(gate, i, n, tokens, width, "") + tl.dot(low_g, b_g)
        u = _wide(up, i, n, tokens, width, "") + tl.dot(low_u, b_u)
        dh = _wide(grad, i, n, tokens, width, "") + tl.dot(low_h, a_h)
        s = _sigmoid(g)
        silu = g * s
        du = (dh * silu).to(grad_up.dtype.element_ty)
        dg = (dh * u * (s + silu * (1.0 - s))).to(grad_gate.dtype.element_ty)
        h = (silu * u).to(gate.dtype.element_ty)
        _keep(grad_up, du, i, n, tokens, width)
        acc_u = tl.dot(tl.trans(du), low_u, acc_u)
        _keep(grad_gate, dg, i, n, tokens, width)
        acc_g = tl.dot(tl.trans(dg), low_g, acc_g)
        acc_h = tl.dot(tl.trans(h), low_h, acc_h)
    part = parts + tl.program_id(1).to(tl.int64) * 3 * width * rank
    _keep(part, acc_g, n, r, width, rank)
    _keep(part + width * rank, acc_u, n, r, width, rank)
    _keep(part + 2 * width * rank, acc_h, n, r, width, rank)


def forward_parts(width: int) -> int:
    """Among how many programs a token's columns are divided."""
    _, columns, run, _, _ = FORWARD
    return int(triton.cdiv(width, columns * run))


def forward(
    gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor, b_gate: Tensor, b_up: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    """gate and up [T, n], low [T, r], B [n, r], A [r, n], contiguous -> h [T, n] and the parts of h A^T, float32
    [parts, T, r]."""
    (tokens, width), rank = gate.shape, len(a)
    rows, columns, run, warps, stages = FORWARD
    out, parts = torch.empty_like(gate), gate.new_empty(forward_parts(width), tokens, rank, dtype=torch.float32)
    _swiglu[triton.cdiv(tokens, rows), len(parts)](
        gate, up, low_gate, low_up, b_gate, b_up, a, out, parts, tokens, width, rank, padded(rank), rows, columns, run,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, parts


def backward(
    grad: Tensor, grad_low: Tensor, gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor, b_gate: Tensor,
    b_up: Tensor, a: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of h is grad [T, n] + grad_low A, grad_low [T, r] -> the gradients of gate and up [T, n], and those
    of B of gate, of B of up and of A^T, float32 [3, n, r]."""
    (tokens, width), rank = gate.shape, len(a)
    rows, columns, run, warps, stages = BACKWARD if rank <= 16 else BACKWARD_WIDE
    grid = triton.cdiv(width, columns), triton.cdiv(tokens, rows * run)
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(gate)
    parts = gate.new_empty(grid[1], 3, width, rank, dtype=torch.float32)
    _swiglu_backward[grid](
        grad, grad_low, gate, up, low_gate, low_up, b_gate, b_up, a, grad_gate, grad_up, parts, tokens, width, rank,
        padded(rank), rows, columns, run, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return grad_gate, grad_up, parts.sum(0)
