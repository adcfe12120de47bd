"""One layer's attention of a trie on a GPU: the kernels of `model.trie_kernels` beside FlashAttention over the paths.

    python benchmarks/attention.py ROWS.npz --heads 9 3 64 --tokens 9000

ROWS.npz is made by workload.py. FlashAttention 2 (torch's) takes keys and values gathered along all paths, for segments
of any length, and the gradients of those entries are added up for each token in float32.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import workload
from torch import Tensor

from veritune.model import attention, trie_kernels
from veritune.tokens.blocks import blocks_of
from veritune.tokens.trie import Trie, build, split


def timed(compute: Callable[[], Any]) -> float:
    """Median milliseconds of ten, recorded as a graph, so that Python's part of starting them does not count."""
    for _ in range(3):
        compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def over_paths(trie: Trie, tensors: tuple[Tensor, ...]) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """FlashAttention's forward and backward pass, and the entries of all paths."""
    q, k, v, grad = tensors
    until = torch.from_numpy(trie.until).cuda()
    cut = [(first, last, own) for first, last, own in attention._segments(until)]
    path = torch.cat([own for *_, own in cut])
    segments = torch.tensor([0, *(last for _, last, _ in cut)], dtype=torch.int32, device="cuda")
    lengths = [0, *(len(own) for *_, own in cut)]
    paths = torch.tensor(np.cumsum(lengths), dtype=torch.int32, device="cuda")
    most = max(last - first for first, last, _ in cut), max(lengths)
    how = {"scale": q.shape[-1] ** -0.5, "window_size_left": -1, "window_size_right": 0}
    seed, unused = torch.zeros(2, dtype=torch.uint64, device="cuda"), torch.empty(0, device="cuda")

    def forward() -> Any:
        gathered = k[path], v[path]
        return torch.ops.aten._flash_attention_forward(q, *gathered, segments, paths, *most, 0.0, False, False, **how)

    out, sums, *_ = forward()

    def backward() -> Any:
        dq, *others = torch.ops.aten._flash_attention_backward(
            grad, q, k[path], v[path], out, sums, segments, paths, *most, 0.0, False, seed, unused, **how
        )
        totals = (torch.zeros(k.shape, device="cuda").index_add_(0, path, one.float()) for one in others)
        return dq, *(total.to(k.dtype) for total in totals)

    return forward, backward, len(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="made by workload.py")
    parser.add_argument("--heads", type=int, nargs=3, default=(9, 3, 64), metavar=("HEADS", "KEY_HEADS", "SIZE"))
    parser.add_argument("--tokens", type=int, default=9000)
    o = parser.parse_args()
    rows, (heads, key_heads, width) = workload.read(o.rows)[0][:4096], o.heads
    trie = build([rows[i] for i in split(rows, o.tokens)[0]])
    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(trie.tokens, n, width, device="cuda", dtype=torch.bfloat16)
        for n in (heads, key_heads, key_heads, heads)
    )
    flash, flash_back, entries = over_paths(trie, (q, k, v, grad))
    blocks = blocks_of(trie.until)
    print(f"{heads}/{key_heads} heads x {width}: {trie.tokens:,} tokens, {entries:,} path entries, "
          f"{blocks.pieces:,} pieces, {blocks.parts} parts")  # fmt: skip
    a, b = timed(flash), timed(flash_back)
    print(f"{'FlashAttention 2 over paths':28} forward {a:7.3f}  backward {b:7.3f}  both {a + b:7.3f} ms")
    until, table, scale = torch.from_numpy(trie.until).cuda(), torch.from_numpy(blocks.table).cuda(), width**-0.5
    of = until, table, blocks.pieces, blocks.sums, blocks.parts
    right = (flash()[0], *flash_back())
    for warps, stages in ((4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3)):
        with patch.multiple(trie_kernels, WARPS=warps, STAGES=stages):
            out, logs = trie_kernels.forward(q, k, v, until, table, scale)
            found = (out, *trie_kernels.backward(grad, q, k, v, out, logs, *of, scale))
            off = max(float((x - y).norm() / y.norm()) for x, y in zip(found, right, strict=True))
            a = timed(lambda: trie_kernels.forward(q, k, v, until, table, scale))
            b = timed(lambda: trie_kernels.backward(grad, q, k, v, out, logs, *of, scale))  # noqa: B023
        print(f"{f'{warps} warps, {stages} stages':28} forward {a:7.3f}  backward {b:7.3f}  both {a + b:7.3f} ms; "
              f"off by {off:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
