"""Attention of a trie on a GPU, in Triton: keys and values are read where they stand.

Programs work on blocks of tokens and go through the lists of `tokens.blocks`: a block's own tokens and those that it
sees (forward, and the queries' gradients), or its own and those by which it is seen (the gradients of keys and values).
Within a pair of blocks token i sees token j exactly if j <= i < until[j]. Nothing is gathered along paths; what many
rows share sums its gradients in float32, in a fixed order, without atomic additions. The arithmetic is that of
FlashAttention 2 (Dao 2023, section 3).
"""

# Triton's compiler reads the annotations of a kernel, and its launch takes more than a kernel's own arguments.
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tokens.blocks import BLOCK
from .kernels import padded

LOG2E = 1.4426950408889634
WARPS, STAGES = 4, 2
"""Warps of a program, and blocks that it has on their way at once: of six pairs on an H100 the fastest for heads of
128, and within 4 % of it for heads of 64 (benchmarks/attention.py)."""


@triton.jit
def _rows(array, i, tokens, heads: tl.constexpr, head, width: tl.constexpr, columns: tl.constexpr):
    """Rows i of [tokens, heads, width] at one head, zero where there are none."""
    d = tl.arange(0, columns)
    at = (i.to(tl.int64) * heads + head)[:, None] * width + d[None, :]
    return tl.load(array + at, mask=(i < tokens)[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def _earlier(array, i, heads: tl.constexpr, head, width: tl.constexpr, columns: tl.constexpr):
    """The same of rows that are all there."""
    d = tl.arange(0, columns)
    at = (i.to(tl.int64) * heads + head)[:, None] * width + d[None, :]
    return tl.load(array + at) if width == columns else tl.load(array + at, mask=(d < width)[None, :], other=0.0)


@triton.jit
def _keep(array, values, i, tokens, heads: tl.constexpr, head, width: tl.constexpr, columns: tl.constexpr):
    d = tl.arange(0, columns)
    at = (i.to(tl.int64) * heads + head)[:, None] * width + d[None, :]
    tl.store(array + at, values.to(array.dtype.element_ty), mask=(i < tokens)[:, None] & (d < width)[None, :])


@triton.jit
def _until(until, j, tokens):
    """What is past the end sees itself, so that no softmax is over nothing; it is kept nowhere."""
    return tl.load(until + j, mask=j < tokens, other=2147483647)


@triton.jit
def _weigh(query, key, value, sees, top, total, acc, scale):
    """A block of keys and values more in the softmax of queries: its largest score, its sum, and the values' sum."""
    s = tl.where(sees, tl.dot(query, tl.trans(key)), float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    p, less = tl.exp2(s * scale - (higher * scale)[:, None]), tl.exp2((top - higher) * scale)
    return higher, total * less + tl.sum(p, 1), tl.dot(p.to(value.dtype), value, acc * less[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    q, k, v, until, table, out, logs, tokens, scale, heads: tl.constexpr, group: tl.constexpr, width: tl.constexpr,
    columns: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    a, h = tl.program_id(0), tl.program_id(1)
    i = a * block + tl.arange(0, block)
    query = _rows(q, i, tokens, heads, h, width, columns)
    top = tl.full((block,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((block,), dtype=tl.float32)
    acc = tl.zeros((block, columns), dtype=tl.float32)
    # The block itself apart: of earlier ones all tokens are there, and none is later than a query.
    key = _rows(k, i, tokens, heads // group, h // group, width, columns)
    value = _rows(v, i, tokens, heads // group, h // group, width, columns)
    sees = (i[None, :] <= i[:, None]) & (i[:, None] < _until(until, i, tokens)[None, :])
    top, total, acc = _weigh(query, key, value, sees, top, total, acc, scale)
    for n in range(tl.load(table + a), tl.load(table + a + 1)):
        j = tl.load(table + n) * block + tl.arange(0, block)
        sees = i[:, None] < tl.load(until + j)[None, :]
        key = _earlier(k, j, heads // group, h // group, width, columns)
        value = _earlier(v, j, heads // group, h // group, width, columns)
        top, total, acc = _weigh(query, key, value, sees, top, total, acc, scale)
    _keep(out, acc / total[:, None], i, tokens, heads, h, width, columns)
    tl.store(logs + h * tokens + i, top * scale + tl.log2(total), mask=i < tokens)


@triton.jit
def _lean(query, g, key, value, sees, log, own, acc, scale):
    """A block of keys and values more in the gradients of queries."""
    p = tl.where(sees, tl.exp2(tl.dot(query, tl.trans(key)) * scale - log[:, None]), 0.0)
    dp = tl.dot(g, tl.trans(value))
    return tl.dot((p * (dp - own[:, None])).to(key.dtype), key, acc)


@triton.jit(do_not_specialize=["tokens"])
def _backward_queries(
    grad, q, k, v, out, logs, until, table, dq, along, tokens, scale, factor, heads: tl.constexpr, group: tl.constexpr,
    width: tl.constexpr, columns: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    a, h = tl.program_id(0), tl.program_id(1)
    i = a * block + tl.arange(0, block)
    query = _rows(q, i, tokens, heads, h, width, columns)
    g = _rows(grad, i, tokens, heads, h, width, columns)
    own = tl.sum(g.to(tl.float32) * _rows(out, i, tokens, heads, h, width, columns).to(tl.float32), 1)
    tl.store(along + h * tokens + i, own, mask=i < tokens)
    log = tl.load(logs + h * tokens + i, mask=i < tokens, other=0.0)
    acc = tl.zeros((block, columns), dtype=tl.float32)
    key = _rows(k, i, tokens, heads // group, h // group, width, columns)
    value = _rows(v, i, tokens, heads // group, h // group, width, columns)
    sees = (i[None, :] <= i[:, None]) & (i[:, None] < _until(until, i, tokens)[None, :])
    acc = _lean(query, g, key, value, sees, log, own, acc, scale)
    for n in range(tl.load(table + a), tl.load(table + a + 1)):
        j = tl.load(table + n) * block + tl.arange(0, block)
        sees = i[:, None] < tl.load(until + j)[None, :]
        key = _earlier(k, j, heads // group, h // group, width, columns)
        value = _earlier(v, j, heads // group, h // group, width, columns)
        acc = _lean(query, g, key, value, sees, log, own, acc, scale)
    _keep(dq, acc * factor, i, tokens, heads, h, width, columns)


@triton.jit(do_not_specialize=["at", "tokens", "parts"])
def _backward_keys(
    grad, q, k, v, logs, along, until, table, at, dk, dv, part_k, part_v, parts, tokens, scale, factor,
    heads: tl.constexpr, group: tl.constexpr, width: tl.constexpr, columns: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    piece, kh = table + at + 4 * tl.program_id(0), tl.program_id(1)
    b, first, last, part = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2), tl.load(piece + 3)
    j = b * block + tl.arange(0, block)
    key = _rows(k, j, tokens, heads // group, kh, width, columns)
    value = _rows(v, j, tokens, heads // group, kh, width, columns)
    end = _until(until, j, tokens)
    acc_k, acc_v = tl.zeros((block, columns), dtype=tl.float32), tl.zeros((block, columns), dtype=tl.float32)
    for n in range(first * group, last * group):
        i = tl.load(table + n // group) * block + tl.arange(0, block)
        h = kh * group + n % group
        query = _rows(q, i, tokens, heads, h, width, columns)
        g = _rows(grad, i, tokens, heads, h, width, columns)
        log = tl.load(logs + h * tokens + i, mask=i < tokens, other=0.0)
        own = tl.load(along + h * tokens + i, mask=i < tokens, other=0.0)
        s = tl.dot(key, tl.trans(query)) * scale  # [keys, queries]
        sees = (j[:, None] <= i[None, :]) & (i[None, :] < end[:, None])
        p = tl.where(sees, tl.exp2(s - log[None, :]), 0.0)
        acc_v = tl.dot(p.to(g.dtype), g, acc_v)
        dp = tl.dot(value, tl.trans(g))
        acc_k = tl.dot((p * (dp - own[None, :])).to(query.dtype), query, acc_k)
    acc_k *= factor
    if part >= 0:
        rows = part * block + tl.arange(0, block)
        _keep(part_k, acc_k, rows, parts * block, heads // group, kh, width, columns)
        _keep(part_v, acc_v, rows, parts * block, heads // group, kh, width, columns)
    else:
        _keep(dk, acc_k, j, tokens, heads // group, kh, width, columns)
        _keep(dv, acc_v, j, tokens, heads // group, kh, width, columns)


@triton.jit(do_not_specialize=["at", "tokens", "parts"])
def _sum_parts(
    part_k, part_v, table, at, dk, dv, parts, tokens, key_heads: tl.constexpr, width: tl.constexpr,
    columns: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    entry, kh = table + at + 3 * tl.program_id(0), tl.program_id(1)
    b, first, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    if last > first:
        acc_k, acc_v = tl.zeros((block, columns), dtype=tl.float32), tl.zeros((block, columns), dtype=tl.float32)
        for part in range(first, last):
            rows = part * block + tl.arange(0, block)
            acc_k += _rows(part_k, rows, parts * block, key_heads, kh, width, columns)
            acc_v += _rows(part_v, rows, parts * block, key_heads, kh, width, columns)
        j = b * block + tl.arange(0, block)
        _keep(dk, acc_k, j, tokens, key_heads, kh, width, columns)
        _keep(dv, acc_v, j, tokens, key_heads, kh, width, columns)


def forward(q: Tensor, k: Tensor, v: Tensor, until: Tensor, table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [T, heads, d], k and v [T, key heads, d], a trie's `until` and the table of its blocks -> [T, heads, d], and
    the logarithms to base 2 of the softmax's sums, float32 [heads, T]."""
    tokens, heads, width = q.shape
    out, logs = torch.empty_like(q), q.new_empty((heads, tokens), dtype=torch.float32)
    columns = padded(width)
    _forward[triton.cdiv(tokens, BLOCK), heads](
        q, k, v, until, table, out, logs, tokens, scale * LOG2E, heads, heads // k.shape[1], width, columns, BLOCK,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out, logs


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, until: Tensor, table: Tensor,
    pieces: int, sums: int, parts: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v. pieces, sums, parts: those of `tokens.blocks.Blocks`."""
    tokens, heads, width = q.shape
    key_heads, columns = k.shape[1], padded(width)
    blocks = triton.cdiv(tokens, BLOCK)
    sizes = heads, heads // key_heads, width, columns, BLOCK
    how = {"num_warps": WARPS, "num_stages": STAGES}
    dq, dk, dv, along = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(logs)
    part_k, part_v = (q.new_empty((parts * BLOCK, key_heads, width), dtype=torch.float32) for _ in range(2))
    _backward_queries[blocks, heads](
        grad, q, k, v, out, logs, until, table, dq, along, tokens, scale * LOG2E, scale, *sizes, **how
    )
    _backward_keys[pieces, key_heads](
        grad, q, k, v, logs, along, until, table, blocks + 1, dk, dv, part_k, part_v, parts, tokens, scale * LOG2E,
        scale, *sizes, **how,
    )  # fmt: skip
    _sum_parts[sums, key_heads](
        part_k, part_v, table, blocks + 1 + 4 * pieces, dk, dv, parts, tokens, key_heads, width, columns, BLOCK,
        num_warps=4,
    )  # fmt: skip
    return dq, dk, dv
