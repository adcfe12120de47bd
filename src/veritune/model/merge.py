"""Whether an adapter may become part of the weights under it: rounding must not take it, nor another layer get it."""

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear

KEPT = 0.95
"""The least part of an update that must be left. bf16 has 8 digits of two: what is under half the last one of a weight
is lost whole, so that of an update of 1e-5 on weights of 0.02 a third is left, of 1e-4 all but 1 %."""


def unmergeable(model: Any) -> str | None:
    """Why a PEFT model's adapter cannot be merged without loss, or None."""
    embedding = model.get_input_embeddings()
    along = whole = 0.0
    for module in model.modules():
        if isinstance(module, Linear4bit):
            return "its base is held in 4 bits, and rounding to those would take most of it"
        if not isinstance(module, Linear):
            continue
        layer: Any = module.get_base_layer()
        weight: Any = layer.weight
        if weight is getattr(embedding, "weight", None):
            return "it is on a layer that shares its weights with the embedding"
        for name in module.active_adapters:
            if module.lora_bias[name] and layer.bias is None:
                return "it has biases on layers without any"
            update = module.get_delta_weight(name).float()
            change = (weight.float() + update).to(weight.dtype).float() - weight.float()
            along += float(torch.sum(change * update))
            whole += float(update.square().sum())
    if whole and along / whole < KEPT:
        return f"rounding to the weights' precision would leave {along / whole:.0%} of it"
    return None
