"""Attention along trie paths, inside transformers' own models.

Segment s has its own tokens as queries and its path as keys, causal from the bottom right. On CUDA in bf16 or fp16 that
is one gather of keys and values along all paths and one variable-length FlashAttention call; elsewhere plain products,
one segment after the other. Both stand behind one operator, `veritune::attend`, so that a compiled layer has no break.

The function is registered with transformers under the name `veritune`; the paths reach it as the keyword `paths` of the
model's forward. No mask is registered under that name, so transformers builds none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton
from transformers import AttentionInterface

from ..errors import ModelError
from ..tokens.trie import Trie

NAME = "veritune"
# What some families pass to their attention function and a path cannot express.
BEYOND_PATHS = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Paths:
    """A trie's segments and paths on the model's device; see `tokens.trie.Trie`."""

    segments: Tensor  # int32 [S + 1]
    path: Tensor  # int64 [P]
    paths: Tensor  # int32 [S + 1]
    order: Tensor  # int64 [P]: the path's entries, those of a token beside each other
    starts: Tensor  # int64 [T + 1]: where each token's begin in `order`
    ends: Tensor  # int64 [rows]
    longest_segment: int
    longest_path: int


def paths_of(trie: Trie, device: torch.device) -> Paths:
    """Moves a trie's paths to a device."""
    path = torch.from_numpy(trie.path).to(device, non_blocking=True)
    order, starts = uses(path, trie.tokens)
    return Paths(
        segments=torch.from_numpy(trie.segments).to(device, non_blocking=True),
        path=path,
        paths=torch.from_numpy(trie.paths).to(device, non_blocking=True),
        order=order,
        starts=starts,
        ends=torch.from_numpy(trie.ends).to(device, non_blocking=True),
        longest_segment=trie.longest_segment,
        longest_path=trie.longest_path,
    )


def uses(path: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """`Paths.order` and `Paths.starts` of a path [P]."""
    ordered, order = torch.sort(path, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(tokens + 1, device=path.device))


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
    if sliding_window is not None and sliding_window < paths.longest_path:
        raise ModelError(f"attention over a window of {sliding_window} tokens is shorter than a row")
    asked = [name for name in BEYOND_PATHS if extra.get(name) is not None]
    if asked or dropout:
        raise ModelError(f"its attention uses {', '.join(asked) or 'dropout'}")
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    out, _ = attend(
        q, k, v, paths.segments, paths.path, paths.paths, paths.order, paths.starts, paths.longest_segment,
        paths.longest_path, scale,
    )  # fmt: skip
    return out[None], None


@torch.library.custom_op("veritune::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    path: Tensor,
    paths: Tensor,
    order: Tensor,
    starts: Tensor,
    longest_segment: int,
    longest_path: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [T, heads, d], k and v [T, key heads, d] -> [T, heads, d], and the log of the softmax's sums [heads, T]."""
    if not _flash(q):
        return _by_segment(q, k, v, segments, path, paths, scale), q.new_empty(0)
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        q, k[path], v[path], segments, paths, longest_segment, longest_path, 0.0, False, False,
        scale=scale, window_size_left=-1, window_size_right=0,
    )  # fmt: skip
    return out, sums


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    sums = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32) if _flash(q) else q.new_empty(0)
    return torch.empty_like(q), sums


@torch.library.custom_op("veritune::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    segments: Tensor,
    path: Tensor,
    paths: Tensor,
    order: Tensor,
    starts: Tensor,
    longest_segment: int,
    longest_path: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Keys and values that many paths share sum theirs in float32: a bf16 sum over 64 to 256 paths would lose 1 to 2 %.
    """
    if not _flash(q):
        return _by_segment_backward(grad, q, k, v, out, segments, path, paths, scale)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q, k[path], v[path], out, sums, segments, paths, longest_segment, longest_path, 0.0, False,
        seed, unused, scale=scale, window_size_left=-1, window_size_right=0,
    )  # fmt: skip
    if _kernels_work():
        from .path_sum import sum_paths

        return dq, sum_paths(dk, order, starts, k), sum_paths(dv, order, starts, v)
    return dq, _sum_paths(dk, path, k), _sum_paths(dv, path, v)


@cache
def _kernels_work() -> bool:
    """Whether Triton is there and compiles a kernel, for which it needs a C compiler and Python's headers."""
    if not has_triton():
        return False
    from .path_sum import sum_paths

    one = torch.ones(1, 1, 16, device="cuda")
    try:
        return bool((sum_paths(one, *uses(torch.zeros(1, dtype=torch.int64, device="cuda"), 1), one) == 1).all())
    except Exception:  # whatever a compiler that is not there can raise
        return False


def _sum_paths(gathered: Tensor, path: Tensor, like: Tensor) -> Tensor:
    """The same without Triton."""
    total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return total.index_add_(0, path, gathered.float()).to(like.dtype)


@attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest_segment, ctx.longest_path, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, segments, path, paths, order, starts, out, sums = ctx.saved_tensors
    grads = attend_backward(
        grad, q, k, v, out, sums, segments, path, paths, order, starts, ctx.longest_segment, ctx.longest_path, ctx.scale
    )  # fmt: skip
    return *grads, *(None,) * 8


attend.register_autograd(_backward, setup_context=_setup)


def _flash(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def _slices(segments: Tensor, path: Tensor, paths: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Each segment's first token, last token + 1, and its path."""
    tokens, entries = segments.tolist(), paths.tolist()
    for s in range(len(tokens) - 1):
        yield tokens[s], tokens[s + 1], path[entries[s] : entries[s + 1]]


def _by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, path: Tensor, paths: Tensor, scale: float) -> Tensor:
    """In float32 or more: scores rounded to bf16 would be off by per cents."""
    queries, keys, values = _grouped(q, k.shape[1]), _wide(k), _wide(v)
    out = torch.empty_like(queries)
    for first, last, own in _slices(segments, path, paths):
        p = _probabilities(queries[:, :, first:last], keys[:, own], scale)
        out[:, :, first:last] = (p @ values[:, own]).view_as(out[:, :, first:last])
    return _ungrouped(out).to(q.dtype)


def _by_segment_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    segments: Tensor,
    path: Tensor,
    paths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The probabilities are computed again (Dao et al. 2022, section 3.1)."""
    heads = k.shape[1]
    queries, keys, values = _grouped(q, heads), _wide(k), _wide(v)
    grads = _grouped(grad, heads)
    # The softmax's own term: each query's gradient along its output.
    along = (grads * _grouped(out, heads)).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for first, last, own in _slices(segments, path, paths):
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
