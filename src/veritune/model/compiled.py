"""Compiled decoder layers for a GPU, used only if they give the gradients that plain ones give."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .load import layers

TOLERANCE = 0.25
"""Of the gradient's norm, on real rows. bf16 against float32 was 7 % on SmolLM2, compiled against plain 8 %; what this
is to find, such as the zero gradients of an autograd function that works in place under torch 2.11, is 100 % off."""


def compile_layers(model: Any, loss: Callable[[], Tensor]) -> str | None:
    """Compiles each decoder layer of a model, once for every number of tokens.

    `loss` computes a loss of a few real rows; random ones will not do, since bf16 gradients are then mostly rounding.
    Returns None, or why the layers stay plain: what compiling raised, or how far the loss's gradients are off. Layers
    that an earlier run in this process has compiled are used as they are.
    """
    if all(layer._compiled_call_impl is not None for layer in layers(model)):
        return None
    plain = gradients(model, loss)
    for layer in layers(model):
        layer.compile(dynamic=True)
    try:
        compiled = gradients(model, loss)
    except Exception as error:  # whatever a compiler of kernels can raise, plain layers still work
        reason = f"compiling failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
    else:
        off = float((compiled - plain).norm() / plain.norm())
        if off <= TOLERANCE:
            return None
        reason = f"compiled layers give gradients that are off by {off:.0%}"
    plain_layers(model)
    return reason


def plain_layers(model: Any) -> None:
    """Uses a model's decoder layers as they are."""
    for layer in layers(model):
        layer._compiled_call_impl = None


def gradients(model: Any, loss: Callable[[], Tensor]) -> Tensor:
    """The loss's gradient, all trained tensors in one vector."""
    loss().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    out = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])
    model.zero_grad(set_to_none=True)
    return out
