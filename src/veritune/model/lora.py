"""PEFT's LoRA linear with a faster forward and backward.

A subclass of PEFT's own layer, put in place by changing an instance's class: the module's name, parameters and
therefore the saved adapter stay PEFT's. Base and update are one autograd function over the products of `precision`.
Nothing in it works in place: under torch 2.11's compiler that gave zero gradients.
"""

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from torch import Tensor

from .head import WideHead
from .precision import Kind, frozen_parts, plus, plus_back, single_absmax


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T with a frozen W. x: [T, in], W: [out, in], A: [r, in], B: [out, r]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, kind: Kind, *frozen: Tensor
    ) -> Tensor:
        low = (x @ a.t()) * scaling
        ctx.save_for_backward(x, a, b, low, *frozen)
        ctx.scaling, ctx.kind = scaling, kind
        return plus(kind, x, frozen, bias, low, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low, *frozen = ctx.saved_tensors
        (grad,) = grads
        grad_low = (grad @ b) * ctx.scaling
        grad_x = plus_back(ctx.kind, grad, tuple(frozen), grad_low, a.t()) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_low.t() @ x, grad.t() @ low, None, None, *(None for _ in frozen)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """The fast path, or None where PEFT's own forward must run."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or args or kwargs:
        return None
    (name,) = layer.active_adapters
    if name in layer.lora_variant or name not in layer.lora_A or layer.lora_B[name].bias is not None:
        return None
    dropout, scaling = layer.lora_dropout[name], layer.scaling[name]
    flat = x.reshape(-1, x.shape[-1])
    a, b = layer.lora_A[name].weight.to(x.dtype), layer.lora_B[name].weight.to(x.dtype)
    base = layer.base_layer
    parts = frozen_parts(base)
    if parts is not None and (isinstance(dropout, torch.nn.Identity) or not dropout.training):
        if torch.is_grad_enabled():
            y = _LoraLinear.apply(flat, base.bias, a, b, scaling, parts[0], *parts[1])
        else:  # torch's compiler takes the function's forward apart where nothing needs a gradient, and NF4's wrongly
            y = plus(parts[0], flat, parts[1], base.bias, (flat @ a.t()) * scaling, b)
    else:  # dropout between the input and A
        y = torch.addmm(base(flat), (dropout(flat) @ a.t()) * scaling, b.t())
    return y.view(*x.shape[:-1], y.shape[-1])


class FastLinear(Linear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = _forward(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


class FastLinear4bit(Linear4bit):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = _forward(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


def speed_up(model: torch.nn.Module) -> None:
    """Gives every plain LoRA linear of a PEFT model the faster forward, but one on a head of float32 results."""
    module: Any
    for module in model.modules():
        if type(module) is Linear and not isinstance(module.base_layer, WideHead):
            module.__class__ = FastLinear
        elif type(module) is Linear4bit:
            module.__class__ = FastLinear4bit
            single_absmax(module.base_layer)  # pyright: ignore[reportArgumentType]
