"""Attention along trie paths, inside transformers' own models.

A token sees the tokens of its path, up to itself (`tokens.trie`). On CUDA in bf16 or fp16 kernels of our own read keys
and values where they stand (`trie_kernels`), if they work there, which `self_check` asks; elsewhere plain products, one
segment after the other. Both stand behind one operator, `veritune::attend`, so that a compiled layer has no break.

The function is registered with transformers under the name `veritune`; the paths reach it as the keyword `paths` of the
model's forward. No mask is registered under that name, so transformers builds none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from ..errors import ModelError
from ..tokens.blocks import blocks_of
from ..tokens.trie import Trie
from .kernels import why_not

NAME = "veritune"
# What some families pass to their attention function and a path cannot express.
BEYOND_PATHS = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Paths:
    """Who sees whom in a trie, on the model's device; see `tokens.trie.Trie` and `tokens.blocks.Blocks`."""

    until: Tensor  # int32 [T]
    ends: Tensor  # int64 [rows]
    longest: int  # tokens of the longest row
    table: Tensor  # int32: that of `Blocks`, for the kernels; empty where there is no GPU
    pieces: int
    sums: int
    parts: int


def paths_of(trie: Trie, device: torch.device) -> Paths:
    """Moves a trie's paths to a device."""
    move = lambda array: torch.from_numpy(array).to(device, non_blocking=True)  # noqa: E731
    until, ends = move(trie.until), move(trie.ends)
    if device.type != "cuda":
        return Paths(until, ends, trie.longest, until[:0], 0, 0, 0)
    blocks = blocks_of(trie.until)
    return Paths(until, ends, trie.longest, move(blocks.table), blocks.pieces, blocks.sums, blocks.parts)


def path_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    paths: Paths,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attention of a trie batch: query [1, heads, T, d], key and value [1, key heads, T, d] -> [1, T, heads, d].

    Raises ModelError if the model asks for attention that paths do not express.
    """
    if sliding_window is not None and sliding_window < paths.longest:
        raise ModelError(f"attention over a window of {sliding_window} tokens is shorter than a row")
    asked = [name for name in BEYOND_PATHS if extra.get(name) is not None]
    if asked or dropout:
        raise ModelError(f"its attention uses {', '.join(asked) or 'dropout'}")
    if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        raise ModelError("its values are not as wide as its queries")
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    out, _ = attend(q, k, v, paths.until, paths.table, paths.pieces, paths.sums, paths.parts, scale)
    return out[None], None


@torch.library.custom_op("veritune::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, until: Tensor, table: Tensor, pieces: int, sums: int, parts: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q [T, heads, d], k and v [T, key heads, d] -> [T, heads, d], and what the backward pass needs of the softmax."""
    if not _fast(q, table):
        return _by_segment(q, k, v, until, scale), q.new_empty(0)
    from . import trie_kernels

    return trie_kernels.forward(q, k, v, until, table, scale)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, until: Tensor, table: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    logs = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32) if _fast(q, table) else q.new_empty(0)
    return torch.empty_like(q), logs


@torch.library.custom_op("veritune::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, until: Tensor, table: Tensor,
    pieces: int, sums: int, parts: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v.

    Keys and values that many rows share sum theirs in float32: a bf16 sum over 64 to 256 rows would lose 1 to 2 %.
    """
    if not _fast(q, table):
        return _by_segment_backward(grad, q, k, v, out, until, scale)
    from . import trie_kernels

    grad = grad.contiguous()
    return trie_kernels.backward(grad, q, k, v, out, logs, until, table, pieces, sums, parts, scale)


@attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.pieces, ctx.sums, ctx.parts, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, until, table, out, logs = ctx.saved_tensors
    grads = attend_backward(grad, q, k, v, out, logs, until, table, ctx.pieces, ctx.sums, ctx.parts, ctx.scale)
    return *grads, *(None,) * 6


attend.register_autograd(_backward, setup_context=_setup)


def _fast(q: Tensor, table: Tensor) -> bool:
    return table.numel() > 0 and q.dtype in (torch.bfloat16, torch.float16)


@cache
def problem_of_kernels(heads: int, key_heads: int, width: int, dtype: torch.dtype) -> str | None:
    """Why a GPU's kernels do not work for a model's heads, tried forward and backward: see `kernels.why_not`; a wide
    head takes much shared memory. None: they do."""

    def attempt() -> str | None:
        from . import trie_kernels

        q, k = (torch.ones(1, n, width, device="cuda", dtype=dtype) for n in (heads, key_heads))
        alone = np.ones(1, dtype=np.int32)
        blocks, until = blocks_of(alone), torch.from_numpy(alone).cuda()
        table = torch.from_numpy(blocks.table).cuda()
        out, logs = trie_kernels.forward(q, k, k, until, table, 1.0)
        of = until, table, blocks.pieces, blocks.sums, blocks.parts
        dq, _, dv = trie_kernels.backward(q, q, k, k, out, logs, *of, 1.0)
        right = all(float((x - to).abs().max()) < 0.02 for x, to in ((out, 1), (dq, 0), (dv, heads // key_heads)))
        return None if right else "its kernels compute something else"

    return why_not(attempt)


def _segments(until: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Runs of tokens with the same path: the first, the last + 1, and the tokens of that path, themselves included."""
    cuts = ((until[1:] != until[:-1]).nonzero()[:, 0] + 1).tolist()
    for first, last in pairwise((0, *cuts, len(until))):
        before = (until[:first] > first).nonzero()[:, 0]
        yield first, last, torch.cat((before, torch.arange(first, last, device=until.device)))


def _by_segment(q: Tensor, k: Tensor, v: Tensor, until: Tensor, scale: float) -> Tensor:
    """In float32 or more: scores rounded to bf16 would be off by per cents."""
    queries, keys, values = _grouped(q, k.shape[1]), _wide(k), _wide(v)
    out = torch.empty_like(queries)
    for first, last, own in _segments(until):
        p = _probabilities(queries[:, :, first:last], keys[:, own], scale)
        out[:, :, first:last] = (p @ values[:, own]).view_as(out[:, :, first:last])
    return _ungrouped(out).to(q.dtype)


def _by_segment_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, until: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The probabilities are computed again (Dao et al. 2022, section 3.1)."""
    heads = k.shape[1]
    queries, keys, values = _grouped(q, heads), _wide(k), _wide(v)
    grads = _grouped(grad, heads)
    # The softmax's own term: each query's gradient along its output.
    along = (grads * _grouped(out, heads)).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for first, last, own in _segments(until):
        q_, k_, v_ = queries[:, :, first:last], keys[:, own], values[:, own]
        g = grads[:, :, first:last].flatten(1, 2)
        p = _probabilities(q_, k_, scale)
        dv.index_add_(1, own, p.transpose(1, 2) @ g)
        ds = (g @ v_.transpose(1, 2)).sub_(along[:, :, first:last].flatten(1, 2)).mul_(p).mul_(scale)
        dq[:, :, first:last] = (ds @ k_).view_as(q_)
        dk.index_add_(1, own, ds.transpose(1, 2) @ q_.flatten(1, 2))
    return (
        _ungrouped(dq).to(q.dtype),
        dk.transpose(0, 1).to(k.dtype).contiguous(),
        dv.transpose(0, 1).to(v.dtype).contiguous(),
    )


def _wide(states: Tensor) -> Tensor:
    """[T, heads, d] -> [heads, T, d] in float32 or more."""
    return states.transpose(0, 1).to(torch.promote_types(states.dtype, torch.float32)).contiguous()


def _grouped(states: Tensor, key_heads: int) -> Tensor:
    """[T, heads, d] -> [key heads, heads of each, T, d] in float32 or more."""
    tokens, heads, width = states.shape
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return states.view(tokens, key_heads, heads // key_heads, width).permute(1, 2, 0, 3).contiguous()


def _ungrouped(states: Tensor) -> Tensor:
    """[key heads, heads of each, T, d] -> [T, heads, d]."""
    return states.permute(2, 0, 1, 3).flatten(1, 2).contiguous()


def _probabilities(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[g, r, n, d] and [g, k, d] -> [g, r n, k]; the last of n queries sees all k keys, the one before it one less."""
    n, k = queries.shape[2], keys.shape[1]
    scores = (queries.flatten(1, 2) @ keys.transpose(1, 2)).mul_(scale)
    own = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu_(1)
    scores.view(*queries.shape[:3], k)[..., k - n :].masked_fill_(own, float("-inf"))
    return torch.softmax(scores, -1)


AttentionInterface.register(NAME, path_attention)


@contextmanager
def witness() -> Iterator[set[int]]:
    """The ids of the modules whose attention went along paths inside the block, as it fills."""
    seen: set[int] = set()

    def witnessed(module: torch.nn.Module, *inputs: Any, **options: Any) -> tuple[Tensor, None]:
        seen.add(id(module))
        return path_attention(module, *inputs, **options)

    AttentionInterface.register(NAME, witnessed)
    try:
        yield seen
    finally:
        AttentionInterface.register(NAME, path_attention)
