"""An attention of our own for tries, tried beside the one in use: keys are read where they stand.

    python benchmarks/trie_attention.py --check                                 # Triton's interpreter, on a CPU
    python benchmarks/trie_attention.py ROWS.npz --heads 9 3 64 --tokens 9000   # a GPU: times, and how far off

A trie's tokens stand depth first, so token i sees token j exactly if j <= i < until[j], one past the last token below
j's segment. Nothing is gathered along paths and nothing summed over their entries. For blocks of tokens, tables say
which blocks a block sees and by which it is seen; a key block that many see is cut in pieces, whose sums are added in a
fixed order. Forward and backward as in FlashAttention 2 (Dao 2023), without atomic additions.

In use now (`model/attention.py`): keys and values gathered along all paths, FlashAttention over segments of any length,
gradients summed over the paths that share them.
"""

import argparse
import os
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from veritune.model import attention
from veritune.tokens.trie import Trie, build, split

PIECE = 8
"""Query blocks of a piece."""
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Tables:
    """Which blocks of tokens see which; see `tables`."""

    until: Tensor  # int32 [T]
    seen: Tensor  # int32 [pairs]: for each block the earlier ones that it sees
    starts: Tensor  # int32 [blocks + 1]: where each block's begin in `seen`
    seers: Tensor  # int32 [pairs + blocks]: for each block itself and the later ones that see it
    pieces: Tensor  # int32 [pieces, 4]: a key block, the first and last + 1 of its `seers`, and how many pieces it has
    # (0 but for its first); blocks of several pieces come first
    slots: int  # pieces of these
    block: int


def until_of(trie: Trie) -> np.ndarray:
    """One past the last token that sees each token, int32 [T]."""
    first = trie.segments[:-1]
    depth = trie.positions[first]
    ends = np.full(len(first), trie.tokens, dtype=np.int32)
    above: list[int] = []
    for s, d in enumerate(depth):
        while above and depth[above[-1]] >= d:
            ends[above.pop()] = first[s]
        above.append(s)
    return np.repeat(ends, np.diff(trie.segments))


def tables(until: np.ndarray, block: int, device: torch.device) -> Tables:
    count = -(-len(until) // block)
    furthest = np.zeros(count * block, dtype=np.int32)
    furthest[: len(until)] = until
    furthest = furthest.reshape(count, block).max(1)
    sees = np.tril(furthest[None, :] > (np.arange(count) * block)[:, None])  # [query block, key block]
    earlier = sees & ~np.eye(count, dtype=bool)
    seers, numbers = np.nonzero(sees.T)[1], sees.sum(0)
    at = np.concatenate(([0], np.cumsum(numbers)))
    several, alone = [], []
    for b, n in enumerate(numbers):
        cuts = [*range(0, n, PIECE), n]
        own = [[b, at[b] + x, at[b] + y, 0] for x, y in pairwise(cuts)]
        own[0][3] = len(own)
        (several if len(own) > 1 else alone).extend(own)
    move = lambda values: torch.from_numpy(np.asarray(values, dtype=np.int32)).to(device)  # noqa: E731
    return Tables(
        until=move(until),
        seen=move(np.nonzero(earlier)[1]),
        starts=move(np.concatenate(([0], np.cumsum(earlier.sum(1))))),
        seers=move(seers),
        pieces=move(several + alone),
        slots=len(several),
        block=block,
    )


@triton.jit
def _rows(array, i, tokens, heads: tl.constexpr, head, width: tl.constexpr, D: tl.constexpr):
    """Rows i of [tokens, heads, width] at one head, zero where there are none."""
    d = tl.arange(0, D)
    at = (i.to(tl.int64) * heads + head)[:, None] * width + d[None, :]
    return tl.load(array + at, mask=(i < tokens)[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def _keep(array, values, i, tokens, heads: tl.constexpr, head, width: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, D)
    at = (i.to(tl.int64) * heads + head)[:, None] * width + d[None, :]
    tl.store(array + at, values.to(array.dtype.element_ty), mask=(i < tokens)[:, None] & (d < width)[None, :])


@triton.jit
def _until(until, j, tokens):
    """What is past the end sees itself, so that no softmax is over nothing; it is kept nowhere."""
    return tl.load(until + j, mask=j < tokens, other=2147483647)


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    q, k, v, until, seen, starts, out, sums, tokens, scale, heads: tl.constexpr,
    group: tl.constexpr, width: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    a, h = tl.program_id(0), tl.program_id(1)
    i = a * B + tl.arange(0, B)
    query = _rows(q, i, tokens, heads, h, width, D)
    top = tl.full((B,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((B,), dtype=tl.float32)
    acc = tl.zeros((B, D), dtype=tl.float32)
    first, last = tl.load(starts + a), tl.load(starts + a + 1)
    for n in range(first - 1, last):  # the block itself first: every token then sees at least one
        j = tl.load(seen + n, mask=n >= first, other=a) * B + tl.arange(0, B)
        key = _rows(k, j, tokens, heads // group, h // group, width, D)
        s = tl.dot(query, tl.trans(key)) * scale
        s = tl.where((j[None, :] <= i[:, None]) & (i[:, None] < _until(until, j, tokens)[None, :]), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p, less = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
        total = total * less + tl.sum(p, 1)
        value = _rows(v, j, tokens, heads // group, h // group, width, D)
        acc = tl.dot(p.to(value.dtype), value, acc * less[:, None])
        top = higher
    _keep(out, acc / total[:, None], i, tokens, heads, h, width, D)
    tl.store(sums + h * tokens + i, top + tl.log2(total), mask=i < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _backward_q(
    grad, q, k, v, out, sums, until, seen, starts, dq, along, tokens, scale, factor,
    heads: tl.constexpr, group: tl.constexpr, width: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    a, h = tl.program_id(0), tl.program_id(1)
    i = a * B + tl.arange(0, B)
    query = _rows(q, i, tokens, heads, h, width, D)
    g = _rows(grad, i, tokens, heads, h, width, D)
    own = tl.sum(g.to(tl.float32) * _rows(out, i, tokens, heads, h, width, D).to(tl.float32), 1)
    tl.store(along + h * tokens + i, own, mask=i < tokens)
    total = tl.load(sums + h * tokens + i, mask=i < tokens, other=0.0)
    acc = tl.zeros((B, D), dtype=tl.float32)
    first, last = tl.load(starts + a), tl.load(starts + a + 1)
    for n in range(first - 1, last):
        j = tl.load(seen + n, mask=n >= first, other=a) * B + tl.arange(0, B)
        key = _rows(k, j, tokens, heads // group, h // group, width, D)
        s = tl.dot(query, tl.trans(key)) * scale
        sees = (j[None, :] <= i[:, None]) & (i[:, None] < _until(until, j, tokens)[None, :])
        p = tl.where(sees, tl.exp2(s - total[:, None]), 0.0)
        dp = tl.dot(g, tl.trans(_rows(v, j, tokens, heads // group, h // group, width, D)))
        acc = tl.dot((p * (dp - own[:, None])).to(key.dtype), key, acc)
    _keep(dq, acc * factor, i, tokens, heads, h, width, D)


@triton.jit(do_not_specialize=["tokens", "slots"])
def _backward_kv(
    grad, q, k, v, sums, along, until, seers, pieces, dk, dv, part_k, part_v, slots, tokens, scale, factor,
    heads: tl.constexpr, group: tl.constexpr, width: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    c, kh = tl.program_id(0), tl.program_id(1)
    b = tl.load(pieces + 4 * c)
    first, last = tl.load(pieces + 4 * c + 1), tl.load(pieces + 4 * c + 2)
    j = b * B + tl.arange(0, B)
    key = _rows(k, j, tokens, heads // group, kh, width, D)
    value = _rows(v, j, tokens, heads // group, kh, width, D)
    end = _until(until, j, tokens)
    acc_k, acc_v = tl.zeros((B, D), dtype=tl.float32), tl.zeros((B, D), dtype=tl.float32)
    for n in range(first * group, last * group):
        i = tl.load(seers + n // group) * B + tl.arange(0, B)
        h = kh * group + n % group
        query = _rows(q, i, tokens, heads, h, width, D)
        g = _rows(grad, i, tokens, heads, h, width, D)
        total = tl.load(sums + h * tokens + i, mask=i < tokens, other=0.0)
        own = tl.load(along + h * tokens + i, mask=i < tokens, other=0.0)
        s = tl.dot(key, tl.trans(query)) * scale  # [keys, queries]
        sees = (j[:, None] <= i[None, :]) & (i[None, :] < end[:, None])
        p = tl.where(sees, tl.exp2(s - total[None, :]), 0.0)
        acc_v = tl.dot(p.to(g.dtype), g, acc_v)
        dp = tl.dot(value, tl.trans(g))
        acc_k = tl.dot((p * (dp - own[None, :])).to(query.dtype), query, acc_k)
    acc_k *= factor
    if c < slots:
        rows = c * B + tl.arange(0, B)
        _keep(part_k, acc_k, rows, slots * B, heads // group, kh, width, D)
        _keep(part_v, acc_v, rows, slots * B, heads // group, kh, width, D)
    else:
        _keep(dk, acc_k, j, tokens, heads // group, kh, width, D)
        _keep(dv, acc_v, j, tokens, heads // group, kh, width, D)


@triton.jit(do_not_specialize=["tokens", "slots"])
def _add(
    part_k, part_v, pieces, dk, dv, slots, tokens, key_heads: tl.constexpr, width: tl.constexpr, D: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """The sums of a block's pieces, in their order."""
    c, kh = tl.program_id(0), tl.program_id(1)
    count = tl.load(pieces + 4 * c + 3)
    if count > 0:
        acc_k, acc_v = tl.zeros((B, D), dtype=tl.float32), tl.zeros((B, D), dtype=tl.float32)
        for n in range(c, c + count):
            rows = n * B + tl.arange(0, B)
            acc_k += _rows(part_k, rows, slots * B, key_heads, kh, width, D)
            acc_v += _rows(part_v, rows, slots * B, key_heads, kh, width, D)
        j = tl.load(pieces + 4 * c) * B + tl.arange(0, B)
        _keep(dk, acc_k, j, tokens, key_heads, kh, width, D)
        _keep(dv, acc_v, j, tokens, key_heads, kh, width, D)


def forward(q: Tensor, k: Tensor, v: Tensor, to: Tables, **how: int) -> tuple[Tensor, Tensor]:
    """q [T, heads, d], k and v [T, key heads, d] -> [T, heads, d], and the softmax's sums' logarithms to base 2."""
    tokens, heads, width = q.shape
    out, sums = torch.empty_like(q), q.new_empty((heads, tokens), dtype=torch.float32)
    grid = (len(to.starts) - 1, heads)
    _forward[grid](
        q, k, v, to.until, to.seen, to.starts, out, sums, tokens, width**-0.5 * LOG2E, heads, heads // k.shape[1],
        width, triton.next_power_of_2(width), to.block, **how,
    )  # fmt: skip
    return out, sums


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, to: Tables, **how: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    tokens, heads, width = q.shape
    key_heads, factor = k.shape[1], width**-0.5
    D, sizes = triton.next_power_of_2(width), (heads, heads // k.shape[1], width)
    dq, dk, dv, along = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(sums)
    part_k, part_v = (
        q.new_empty((to.slots * to.block, key_heads, width), dtype=torch.float32) for _ in range(2)
    )  # fmt: skip
    _backward_q[len(to.starts) - 1, heads](
        grad, q, k, v, out, sums, to.until, to.seen, to.starts, dq, along, tokens, factor * LOG2E, factor, *sizes, D,
        to.block, **how,
    )  # fmt: skip
    _backward_kv[len(to.pieces), key_heads](
        grad, q, k, v, sums, along, to.until, to.seers, to.pieces, dk, dv, part_k, part_v, to.slots, tokens,
        factor * LOG2E, factor, *sizes, D, to.block, **how,
    )  # fmt: skip
    if to.slots:
        _add[to.slots, key_heads](
            part_k, part_v, to.pieces, dk, dv, to.slots, tokens, key_heads, width, D, to.block, num_warps=4
        )
    return dq, dk, dv


def in_use(trie: Trie, device: torch.device, width: int) -> tuple[Any, ...]:
    """What `attention.attend` takes after q, k and v."""
    along = attention.paths_of(trie, device)
    return (
        along.segments, along.path, along.paths, along.order, along.starts, along.longest_segment, along.longest_path,
        width**-0.5,
    )  # fmt: skip


def check(device: torch.device, dtype: torch.dtype, allowed: float) -> None:
    """Compares outputs and gradients with those in use, plain products in float64 here, on some tries."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(5, 1000, n).astype(np.int32)  # noqa: E731
    for heads, key_heads, width, block, questions, each in (
        (2, 2, 16, 16, 3, 5), (4, 2, 24, 16, 5, 4), (9, 3, 64, 64, 2, 3), (3, 1, 32, 32, 1, 1), (2, 1, 16, 16, 1, 40),
    ):  # fmt: skip
        head, rows = draw(21), []
        for _ in range(questions):
            question = np.concatenate((head, draw(int(rng.integers(9, 40)))))
            rows += [np.concatenate((question, draw(int(rng.integers(1, 60))))) for _ in range(each)]
        trie = build(rows)
        to = tables(until_of(trie), block, device)
        torch.manual_seed(0)
        make = lambda n: torch.randn(trie.tokens, n, width, device=device).to(dtype)  # noqa: B023, E731
        q, k, v, grad = make(heads), make(key_heads), make(key_heads), make(heads)
        out, sums = forward(q, k, v, to)
        found = (out, *backward(grad, q, k, v, out, sums, to))
        exact = [x.double().requires_grad_(True) for x in (q, k, v)]
        wanted, _ = attention.attend(*exact, *in_use(trie, device, width))
        wanted.backward(grad.double())
        for name, ours, right in zip("oqkv", found, (wanted, *(x.grad for x in exact)), strict=True):
            off = float((ours.double() - right).norm() / right.norm())
            assert off < allowed, f"{name} of {heads}/{key_heads} heads x {width}: off by {off:.1e}"
        again = backward(grad, q, k, v, out, sums, to)
        assert all(torch.equal(x, y) for x, y in zip(found[1:], again, strict=True))
        print(f"{heads}/{key_heads} heads x {width}, {trie.tokens} tokens, {to.slots} of {len(to.pieces)} pieces")


def timed(compute: Any) -> float:
    """Median milliseconds of ten."""
    for _ in range(3):
        compute()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        compute()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def compare(file: Path, heads: int, key_heads: int, width: int, tokens: int) -> None:
    """Times of one layer's attention on real rows, both ways."""
    device, saved = torch.device("cuda"), np.load(file)
    offsets = saved["offsets"]
    rows = [saved["ids"][a:b] for a, b in pairwise(offsets[:4097])]
    trie = build([rows[i] for i in split(rows, tokens)[0]])
    torch.manual_seed(0)
    make = lambda n: torch.randn(trie.tokens, n, width, device=device, dtype=torch.bfloat16)  # noqa: E731
    q, k, v, grad = make(heads), make(key_heads), make(key_heads), make(heads)
    given = in_use(trie, device, width)
    was, its = attention.attend(q, k, v, *given)
    old = attention.attend_backward(grad, q, k, v, was, its, *given)
    print(f"{heads}/{key_heads} heads x {width}: {trie.tokens:,} tokens, {len(trie.path):,} path entries, "
          f"{len(trie.segments) - 1} segments")  # fmt: skip
    a = timed(lambda: attention.attend(q, k, v, *given))
    b = timed(lambda: attention.attend_backward(grad, q, k, v, was, its, *given))
    print(f"{'in use':32} forward {a:7.3f}  backward {b:7.3f}  both {a + b:7.3f} ms")
    for block, warps, stages in ((64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 2), (128, 4, 2)):
        to = tables(until_of(trie), block, device)
        how = {"num_warps": warps, "num_stages": stages}
        try:
            out, sums = forward(q, k, v, to, **how)
            new = backward(grad, q, k, v, out, sums, to, **how)
            off = [float((x - y).norm() / y.norm()) for x, y in zip((out, *new), (was, *old), strict=True)]
            a = timed(lambda: forward(q, k, v, to, **how))  # noqa: B023
            b = timed(lambda: backward(grad, q, k, v, out, sums, to, **how))  # noqa: B023
        except Exception as error:  # too much shared memory, say
            print(f"blocks of {block}, {warps} warps, {stages} stages: {str(error).splitlines()[0][:80]}")
            continue
        print(f"{f'blocks of {block}, {warps} warps, {stages} stages':32} forward {a:7.3f}  backward {b:7.3f}  both "
              f"{a + b:7.3f} ms; off by {', '.join(f'{x:.1e}' for x in off)}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="?", help="made by workload.py")
    parser.add_argument("--heads", type=int, nargs=3, default=(9, 3, 64), metavar=("HEADS", "KEY_HEADS", "SIZE"))
    parser.add_argument("--tokens", type=int, default=9000)
    parser.add_argument("--check", action="store_true", help="only compare with plain products")
    o = parser.parse_args()
    gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    check(torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32, 0.02 if gpu else 1e-5)
    if not o.check:
        compare(o.rows, *o.heads, o.tokens)


if __name__ == "__main__":
    main()
