"""Compiled decoder layers for a GPU, used only if they give the gradients, or the scores, that plain ones give."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch

from ..errors import first_line
from . import lora
from .load import layers
from .narrow import NarrowLayer

TOLERANCE = {"fp8": 0.7}
"""Of the norm of gradients or logits, on real rows; 0.25 in other precisions. bf16 against float32 was 7 % on SmolLM2,
compiled against plain 8 %; FP8, whose rounding falls otherwise where a compiler keeps more digits in between, was 48 %
on an 8B shape of random weights. What this is to find, such as the zero gradients of an autograd function that works in
place under torch 2.11, is 100 % off."""
MOST_SHAPES = 64
"""Graphs of the layers' one code, one for each shape and scaling of adapter: a sweep's later trials would run plain
beyond them."""


def tolerance(precision: str) -> float:
    """`TOLERANCE` of a base's precision."""
    return TOLERANCE.get(precision, 0.25)


def compile_layers(
    model: Any, compute: Callable[[], Tensor], what: str = "gradients", *, precision: str = "bf16"
) -> str | None:
    """Compiles each decoder layer of a model, once for every number of tokens.

    `compute` gives what must stay the same, as one tensor: the gradients of a loss of a few real rows (random ones will
    not do, since bf16 gradients are then mostly rounding), or their logits. Returns None, or why the layers stay plain:
    what compiling raised, how far `compute` is off, or that memory did not suffice to tell. Layers that an earlier run
    in this process has compiled are used as they are.
    """
    # The last layer is code of its own where it is narrow, and compiling that would take longer than it gains.
    alike = [layer for layer in layers(model) if not isinstance(layer, NarrowLayer)]
    if all(layer._compiled_call_impl is not None for layer in alike):
        return None
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    # A norm's epsilon or an adapter's scaling would else be an input on the CPU, with a kernel in C++ to convert it:
    # most of the time that compiling takes, and nothing compiled where there is no compiler for it.
    torch._dynamo.config.specialize_float = True
    # Outputs of norms and of an MLP's activation are computed again, though products of the backward pass take them:
    # a third less is kept.
    functorch.ban_recompute_materialized_backward = False
    options = None
    if (what, precision) == ("logits", "fp8"):
        # Rows that are scaled to FP8 are kept in a program's registers where that is faster, which is tried on the GPU,
        # in every process: torch fails to look up what was faster for kernels that an earlier process has compiled.
        options = {"triton.multi_kernel": 1}
        os.environ["TORCHINDUCTOR_DISABLE_MULTI_KERNEL_CACHE"] = "1"
    try:
        plain = compute()
        drawn = _off(compute(), plain) if _drops(model) else 0.0  # dropout draws others each time
    except torch.OutOfMemoryError as error:
        return f"they could not be compared with plain ones: {first_line(error)}"
    _take_gradients(model.get_input_embeddings())
    for layer in alike:
        layer.compile(dynamic=True, options=options)
    try:
        compiled = compute()
    except Exception as error:  # whatever a compiler of kernels can raise, plain layers still work
        reason = f"compiling failed: {_why(error)}"
    else:
        off = _off(compiled, plain)
        # Rounding leaves the part along the plain ones as it is, within some per cent; a wrong factor does not.
        along = float((compiled * plain).sum() / plain.square().sum())
        if off <= tolerance(precision) + drawn and 0.7 < along < 1.4:
            return None
        reason = f"compiled layers give {what} that are off by {off:.0%}"
    plain_layers(model)
    return reason


def _why(error: Exception) -> str:
    """torch's own errors say first which of its parts failed, and then why; one that a process of its compiler's met,
    in the traceback from there."""
    error = getattr(error, "inner_exception", error)
    there = re.search(r"^[\w.]+: .+", getattr(error, "details", "").rpartition("Traceback")[2], re.MULTILINE)
    return there[0] if there else first_line(error)


def _off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _drops(model: Any) -> bool:
    return any(isinstance(module, torch.nn.Dropout) and module.training for module in model.modules())


def _take_gradients(embeddings: torch.nn.Module) -> None:
    """Lets what a model's frozen embeddings give take part in gradients: the first layer is then the same code as the
    others and not compiled apart, for a product more of each of its q, k and v."""

    def hook(module: torch.nn.Module, inputs: Any, out: Tensor) -> None:
        if torch.is_grad_enabled() and not out.requires_grad:
            out.requires_grad_()

    if not embeddings._forward_hooks:
        embeddings.register_forward_hook(hook)


def plain_layers(model: Any) -> None:
    """Uses a model's decoder layers as they are."""
    for layer in layers(model):
        layer._compiled_call_impl = None


@contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Plain layers inside the block. Without gradients compiled layers would be compiled anew, which takes longer than
    a validation gains."""
    was = [(layer, layer._compiled_call_impl) for layer in layers(model)]
    plain_layers(model)
    try:
        yield
    finally:
        for layer, call in was:
            layer._compiled_call_impl = call


def gradients(model: Any, loss: Callable[[], Tensor]) -> Tensor:
    """The loss's gradient, all trained tensors in one vector. What had been summed up before is dropped."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    try:
        loss().backward()
        return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])
    finally:
        lora.forget(model)
        model.zero_grad(set_to_none=True)
