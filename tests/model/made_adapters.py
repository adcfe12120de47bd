"""Adapter folders as training leaves them, with random weights in place of learnt ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from veritune import config
from veritune.model import adapter, load, self_check
from veritune.model.verifier import Verifier
from veritune.tokens.prompt import render
from veritune.training.checkpoint import publish


def trained(model: Path, out: Path, *, seed: int = 3, max_length: int = 512, **lora: Any) -> Path:
    """Writes the adapter folder `out` for the model folder `model`."""
    base = load.load_base(config.Model(path=str(model), base="fp32", device="cpu"))
    self_check.check_paths(base, max_length)
    frame = render(config.Prompt(max_length=max_length), base.tokenizer)
    made = adapter.add_adapter(base, config.Lora(**{"rank": 8, **lora}), seed=1)
    generator = torch.Generator().manual_seed(seed)
    for name, value in made.named_parameters():
        if "lora_" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.05
    about = adapter.About(frame, str(model), "fp32", "the data's fingerprint", 0.5, base.weights)
    publish(out, adapter.files(made, about, "# Card"))
    return out


def loaded(path: Path, **options: Any) -> Verifier:
    """The verifier, on the CPU; nothing may be said while it loads."""
    warnings: list[str] = []
    found = Verifier.load(path, device="cpu", warn=warnings.append, **options)
    assert warnings == []
    return found


def values(name: str, **new: Any) -> Callable[[Path], Any]:
    """Changes values in a JSON file of an adapter folder."""
    return lambda it: (it / name).write_text(json.dumps({**json.loads((it / name).read_text()), **new}))
