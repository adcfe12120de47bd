"""PEFT's LoRA linear with a faster forward and backward.

A subclass of PEFT's own layer, put in place by changing an instance's class: the module's name, parameters and
therefore the saved adapter stay PEFT's. Base and update are one autograd function over the products of `precision`, for
one layer or for several that take the same input: q, k and v; gate and up. Nothing in it works in place: under torch
2.11's compiler that gave zero gradients.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from torch import Tensor

from .head import WideHead
from .narrow import NarrowLayer
from .precision import Kind, frozen_parts, plus, plus_back, single_absmax

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that take the same input, one after the other."""


class Parts(NamedTuple):
    """What a layer computes with."""

    kind: Kind
    scaling: float
    bias: Tensor | None
    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    frozen: tuple[Tensor, ...]  # the weight, as `precision.frozen_parts` gives it


class _LoraLinears(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T with a frozen W, for each of some layers. x: [T, in], W: [out, in]. The A's
    become one matrix, so that x is read once for all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Kind, scalings: tuple[float, ...], *flat: Tensor) -> tuple[Tensor, ...]:
        biases, a, b, frozen = apart(flat, len(scalings))
        wide = torch.cat(a) if len(a) > 1 else a[0]
        lows = [low * s for low, s in zip((x @ wide.t()).split([len(one) for one in a], 1), scalings, strict=True)]
        ctx.save_for_backward(x, wide, *lows, *b, *(tensor for each in frozen for tensor in each))
        ctx.scalings, ctx.kind, ctx.held = scalings, kind, len(frozen[0])
        return tuple(plus(kind, x, *each) for each in zip(frozen, biases, lows, b, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, wide, *others = ctx.saved_tensors
        n = len(ctx.scalings)
        lows, b, frozen = others[:n], others[n : 2 * n], others[2 * n :]
        grad_lows = [(grad @ up) * s for grad, up, s in zip(grads, b, ctx.scalings, strict=True)]
        grad_low = torch.cat(grad_lows, 1) if n > 1 else grad_lows[0]
        grad_x = None
        if ctx.needs_input_grad[0]:
            held = [frozen[i * ctx.held : (i + 1) * ctx.held] for i in range(n)]
            grad_x = plus_back(ctx.kind, grads, held, grad_low, wide.t())
        grad_a = (grad_low.t() @ x).split([low.shape[1] for low in lows])
        grad_b = [grad.t() @ low for grad, low in zip(grads, lows, strict=True)]
        return grad_x, None, None, *[None] * n, *grad_a, *grad_b, *[None] * len(frozen)


def apart(flat: tuple[Any, ...], n: int) -> tuple[Any, Any, Any, list[tuple[Tensor, ...]]]:
    """Biases, A's, B's and frozen tensors of n layers."""
    held = (len(flat) - 3 * n) // n
    frozen = [flat[3 * n + i * held : 3 * n + (i + 1) * held] for i in range(n)]
    return flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], frozen


def flat_of(parts: list[Parts]) -> tuple[Any, ...]:
    """What an autograd function of layers takes beside their input: the kind, the scalings, and what `apart` takes."""
    biases, a, b = ([getattr(part, name) for part in parts] for name in ("bias", "a", "b"))
    frozen = [tensor for part in parts for tensor in part.frozen]
    return parts[0].kind, tuple(part.scaling for part in parts), *biases, *a, *b, *frozen


def _part(layer: Any, dtype: torch.dtype) -> Parts | None:
    """None for a kind of base layer that `precision.plus` does not know, or dropout between the input and A."""
    (name,) = layer.active_adapters
    parts, dropout = frozen_parts(layer.base_layer), layer.lora_dropout[name]
    if parts is None or (dropout.training and not isinstance(dropout, torch.nn.Identity)):
        return None
    a, b = layer.lora_A[name].weight.to(dtype), layer.lora_B[name].weight.to(dtype)
    return Parts(parts[0], layer.scaling[name], layer.base_layer.bias, a, b, parts[1])


def parts_of(layers: Sequence[Any], dtype: torch.dtype) -> list[Parts] | None:
    """Those of layers that can be computed in one call; None if they cannot."""
    found = [_part(layer, dtype) for layer in layers if isinstance(layer, FAST) and _plain(layer)]
    parts = [part for part in found if part is not None]
    return parts if len(parts) == len(layers) and len({part.kind for part in parts}) == 1 else None


def _linears(x: Tensor, parts: list[Parts]) -> tuple[Tensor, ...]:
    """x [..., in] -> [..., out] of each layer."""
    found = _LoraLinears.apply(x.reshape(-1, x.shape[-1]), *flat_of(parts))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in found)


class _Group:
    """Layers that take the same input: the first that is called computes for all, and the others find theirs. Between
    two of them a pass may end in an error: `forget` then drops what is left."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.input: Tensor | None = None
        self.found: tuple[Tensor, ...] = ()

    def give(self, place: int, x: Tensor) -> Tensor | None:
        """The result for x of the layer at a place; None if it is to be computed by itself."""
        if place == 0:
            self.drop()
            parts = parts_of(self.layers, x.dtype)
            if parts is None:
                return None
            self.input, self.found = x, _linears(x, parts)
        elif x is not self.input:
            return None
        y = self.found[place]
        if place == len(self.found) - 1:
            self.drop()
        return y

    def drop(self) -> None:
        self.input, self.found = None, ()


def _plain(layer: Any) -> bool:
    """Whether PEFT's own forward would compute no more than one adapter of the usual kind."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return name not in layer.lora_variant and name in layer.lora_A and layer.lora_B[name].bias is None


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """The fast path, or None where PEFT's own forward must run."""
    if args or kwargs or not _plain(layer):
        return None
    group = getattr(layer, "group", None)
    if group is not None and torch.is_grad_enabled():
        y = group.give(layer.place, x)
        if y is not None:
            return y
    parts = _part(layer, x.dtype)
    if parts is not None and torch.is_grad_enabled():
        return _linears(x, [parts])[0]
    flat = x.reshape(-1, x.shape[-1])
    if parts is not None:
        # Torch's compiler takes the function's forward apart where nothing needs a gradient, and NF4's wrongly.
        y = plus(parts.kind, flat, parts.frozen, parts.bias, (flat @ parts.a.t()) * parts.scaling, parts.b)
    else:
        (name,) = layer.active_adapters
        a, b = layer.lora_A[name].weight.to(x.dtype), layer.lora_B[name].weight.to(x.dtype)
        low = (layer.lora_dropout[name](flat) @ a.t()) * layer.scaling[name]
        y = torch.addmm(layer.base_layer(flat), low, b.t())
    return y.view(*x.shape[:-1], y.shape[-1])


class FastLinear(Linear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = _forward(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


class FastLinear4bit(Linear4bit):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = _forward(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


FAST = FastLinear | FastLinear4bit


def speed_up(model: torch.nn.Module) -> None:
    """Gives every plain LoRA linear of a PEFT model the faster forward, but one on a head of float32 results; and those
    that take the same input, one for all: comes after `narrow`, by which the last layer's q takes another."""
    module: Any
    for module in model.modules():
        if type(module) is Linear and not isinstance(module.base_layer, WideHead):
            module.__class__ = FastLinear
        elif type(module) is Linear4bit:
            module.__class__ = FastLinear4bit
            single_absmax(module.base_layer)  # pyright: ignore[reportArgumentType]
    narrow = [module.self_attn for module in model.modules() if isinstance(module, NarrowLayer)]
    for module in model.modules():
        for names in TOGETHER:
            if module in narrow and names[0] == "q_proj":  # its queries are those of other tokens
                names = names[1:]
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, FAST) for layer in layers):
                group = _Group(layers)
                for place, layer in enumerate(layers):
                    layer.group, layer.place = group, place


def forget(model: torch.nn.Module) -> None:
    """Frees what a pass that ended in an error has left in layers that are computed together: results, and with them
    all that autograd kept up to there."""
    for module in model.modules():
        group = getattr(module, "group", None)
        if isinstance(group, _Group):
            group.drop()
