"""Tensors that follow from a number, saves that are waited for, and a look at the newest checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from veritune.durable import found, looks_whole
from veritune.training import checkpoint, replica


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


def save(
    folder: Path,
    step: int,
    tensors: Any,
    state: dict[str, Any],
    *,
    keep: int = 2,
    replica: Path | None = None,
    warn: Callable[[str], None] = print,
) -> Path:
    """A save as a run makes it, its copy too, waited for; returns its folder."""
    saver = checkpoint.Saver(folder, keep=keep, replica=replica, warn=warn)
    try:
        saver.save(step, tensors, state)
    finally:
        saver.close()
    return checkpoint.place(folder, step)


def copied(path: Path, drive: Path, keep: int, warn: Callable[[str], None] = print) -> bool:
    """Copies a checkpoint to a drive; whether nothing was warned of."""
    told: list[str] = []
    mirror = replica.Mirror(drive, keep=keep, warn=told.append)
    mirror.send(path)
    mirror.close()
    for text in told:
        warn(text)
    return not told


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that look complete, oldest first."""
    return [step for step, path in found(folder) if looks_whole(path)]
