"""Attention along trie paths, inside transformers' own models.

Segment s has its own tokens as queries and its path as keys, causal from the bottom right. On CUDA in bf16 or fp16 that
is one gather of keys and values along all paths and one `varlen_attn` call; elsewhere plain products, segment by segment.

The function is registered with transformers under the name `veritune`; the paths reach it as the keyword `paths` of the
model's forward. No mask is registered under that name, so transformers builds none.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from ..errors import ModelError
from ..tokens.trie import Trie

NAME = "veritune"
# torch 2.11 has no grouped-query flag and takes causality as a window; later ones want the flag set.
GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters
CAUSAL: dict[str, Any] = (
    {"is_causal": True} if "is_causal" in inspect.signature(varlen_attn).parameters else {"window_size": (-1, 0)}
)
# What some families pass to their attention function and a path cannot express.
BEYOND_PATHS = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Paths:
    """A trie's segments and paths on the model's device; see `tokens.trie.Trie`."""

    segments: Tensor  # int32 [S + 1]
    path: Tensor  # int64 [P]
    paths: Tensor  # int32 [S + 1]
    longest_segment: int
    longest_path: int
    bounds: tuple[tuple[int, int, int, int], ...]  # a segment's first and last token, its path's first and last entry


def paths_of(trie: Trie, device: torch.device) -> Paths:
    """Moves a trie's paths to a device."""
    tokens, entries = trie.segments.tolist(), trie.paths.tolist()
    return Paths(
        segments=torch.from_numpy(trie.segments).to(device, non_blocking=True),
        path=torch.from_numpy(trie.path).to(device, non_blocking=True),
        paths=torch.from_numpy(trie.paths).to(device, non_blocking=True),
        longest_segment=trie.longest_segment,
        longest_path=trie.longest_path,
        bounds=tuple(zip(tokens, tokens[1:], entries, entries[1:], strict=False)),
    )


class Gather(torch.autograd.Function):
    """`states[path]`, whose gradient sums in float32: a bf16 sum over 64-256 paths would lose 1-2 %."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, path: Tensor) -> Tensor:
        ctx.save_for_backward(path)
        ctx.tokens = states.shape[0]
        return states.index_select(0, path)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (path,) = ctx.saved_tensors
        (grad,) = grads
        total = torch.zeros((ctx.tokens, *grad.shape[1:]), dtype=torch.float32, device=grad.device)
        return total.index_add_(0, path, grad.float()).to(grad.dtype), None


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
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        k, v = Gather.apply(k, paths.path), Gather.apply(v, paths.path)
        return _varlen(q, k, v, paths, scale)[None], None
    wide = torch.promote_types(q.dtype, torch.float32)  # scores rounded to bf16 would be off by per cents
    return BySegment.apply(q.to(wide), k.to(wide), v.to(wide), paths, scale)[None].to(q.dtype), None


def _varlen(q: Tensor, k: Tensor, v: Tensor, paths: Paths, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    options = dict(CAUSAL)
    if groups > 1:
        if GROUPED:
            options["enable_gqa"] = True
        else:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), paths.segments, paths.paths,
        paths.longest_segment, paths.longest_path, scale=scale, **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


class BySegment(torch.autograd.Function):
    """Attention with q [T, heads, d], k and v [T, key heads, d] -> [T, heads, d], one segment after the other, in
    float32 or float64. The probabilities are computed again in the backward pass (Dao et al. 2022, section 3.1),
    which adds each segment's gradients straight into its path's tokens.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, paths: Paths, scale: float) -> Tensor:
        q, k, v = _grouped(q, k.shape[1]), k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
        out = torch.empty_like(q)
        for first, last, start, end in paths.bounds:
            path = paths.path[start:end]
            p = _probabilities(q[:, :, first:last], k[:, path], scale)
            out[:, :, first:last] = (p @ v[:, path]).view_as(out[:, :, first:last])
        ctx.save_for_backward(q, k, v, out)
        ctx.paths, ctx.scale = paths, scale
        return _ungrouped(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        grad = _grouped(grads[0], k.shape[0])
        # The softmax's own term: each query's gradient along its output.
        along = (grad * out).sum(-1, keepdim=True)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for first, last, start, end in ctx.paths.bounds:
            path = ctx.paths.path[start:end]
            queries, keys, values = q[:, :, first:last], k[:, path], v[:, path]
            g = grad[:, :, first:last].flatten(1, 2)
            p = _probabilities(queries, keys, ctx.scale)
            dv.index_add_(1, path, p.transpose(1, 2) @ g)
            ds = (g @ values.transpose(1, 2)).sub_(along[:, :, first:last].flatten(1, 2)).mul_(p).mul_(ctx.scale)
            dq[:, :, first:last] = (ds @ keys).view_as(queries)
            dk.index_add_(1, path, ds.transpose(1, 2) @ queries.flatten(1, 2))
        return _ungrouped(dq), dk.transpose(0, 1), dv.transpose(0, 1), None, None


def _grouped(states: Tensor, key_heads: int) -> Tensor:
    """[T, heads, d] -> [key heads, heads of each, T, d]."""
    tokens, heads, width = states.shape
    return states.view(tokens, key_heads, heads // key_heads, width).permute(1, 2, 0, 3).contiguous()


def _ungrouped(states: Tensor) -> Tensor:
    """[key heads, heads of each, T, d] -> [T, heads, d]."""
    return states.permute(2, 0, 1, 3).flatten(1, 2)


def _probabilities(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[g, r, n, d] and [g, k, d] -> [g, r n, k]; the last of n queries sees all k keys, the one before it one less."""
    n, k = queries.shape[2], keys.shape[1]
    scores = (queries.flatten(1, 2) @ keys.transpose(1, 2)).mul_(scale)
    own = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu_(1)
    scores.view(*queries.shape[:3], k)[..., k - n :].masked_fill_(own, float("-inf"))
    return torch.softmax(scores, -1)


AttentionInterface.register(NAME, path_attention)
