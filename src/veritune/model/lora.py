"""PEFT's LoRA linear with a faster forward.

A subclass of PEFT's own layer, put in place by changing an instance's class: the module's name, parameters and
therefore the saved adapter stay PEFT's. The update is added into the base layer's output by one fused product instead
of PEFT's three passes over it, and the scaling is applied to the [tokens, rank] side.
"""

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from torch import Tensor


class _AddUpdate(torch.autograd.Function):
    """y + (x A^T) B^T * scaling, x: [T, in], y: [T, out], A: [r, in], B: [out, r]. Overwrites y, which must be fresh."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        low = (x @ a.t()).mul_(scaling)
        ctx.save_for_backward(x, a, b, low)
        ctx.scaling = scaling
        ctx.mark_dirty(y)
        return y.addmm_(low, b.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        (grad,) = grads
        grad_low = (grad @ b).mul_(ctx.scaling)
        grad_x = grad_low @ a if ctx.needs_input_grad[1] else None
        return grad, grad_x, grad_low.t() @ x, grad.t() @ low, None


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """The fast path, or None where PEFT's own forward must run."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or args or kwargs:
        return None
    (name,) = layer.active_adapters
    if name in layer.lora_variant or name not in layer.lora_A:
        return None
    if layer.lora_B[name].bias is not None:
        return None
    flat = x.reshape(-1, x.shape[-1])
    y = layer.base_layer(flat)
    a, b = layer.lora_A[name].weight.to(y.dtype), layer.lora_B[name].weight.to(y.dtype)
    update = _AddUpdate.apply(y, layer.lora_dropout[name](flat).to(y.dtype), a, b, layer.scaling[name])
    return update.view(*x.shape[:-1], y.shape[-1])


class FastLinear(Linear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = _forward(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


class FastLinear4bit(Linear4bit):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = _forward(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


def speed_up(model: torch.nn.Module) -> None:
    """Gives every plain LoRA linear of a PEFT model the faster forward."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FastLinear
        elif type(module) is Linear4bit:
            module.__class__ = FastLinear4bit
