"""Tensors that follow from a number, and a look at the newest checkpoint that holds them to it."""

from pathlib import Path

import torch

from veritune.training import checkpoint


def tensors(tag: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    make = torch.Generator().manual_seed(tag)
    return {"adapter": {"a": torch.randn(8, 4, generator=make), "b": torch.randn(5, generator=make)}}


def latest(folder: Path, warned: list[str] | None = None) -> checkpoint.Saved:
    """The newest checkpoint, which was saved from `tensors(step)`; what was warned of goes to `warned`."""
    saved = checkpoint.load_latest(folder, warn=(warned if warned is not None else []).append)
    assert saved is not None
    want = tensors(saved.step)["adapter"]
    assert all(torch.equal(want[name], it) for name, it in saved.tensors["adapter"].items())
    return saved
