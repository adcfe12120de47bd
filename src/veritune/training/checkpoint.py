"""Checkpoints: atomic, verified, exact.

A checkpoint is the folder `step-00001200` with one safetensors file for each group of tensors, `state.json` and
`manifest.json`; `durable` puts it there whole or not at all, `replica` copies it to a mounted drive. `Saver` writes
while training goes on, `load_latest` gives back the newest that is whole. `publish` writes any other folder (`best/`,
`adapter/`) the same way. Order is by step, never by file time; nothing is pickled.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..durable import (
    Damaged,
    Parts,
    discard,
    found,
    outlived,
    read_file,
    read_manifest,
    settle,
    write_folder,
)
from ..errors import NoneWholeError
from . import replica as replicas
from .pack import STATE, SUFFIX, Groups, pack, safetensors_parts

Warn = Callable[[str], None]

_warn = logging.getLogger(__name__).warning


@dataclass(frozen=True)
class Saved:
    """A whole, verified checkpoint, loaded."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    """Group -> name -> tensor, on the CPU."""
    state: dict[str, Any]
    path: Path


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step-{step:08d}"


def load_latest(folder: Path, *, warn: Warn = _warn) -> Saved | None:
    """The newest whole checkpoint of a folder, or None if there is none at all.

    Every damaged one on the way is named through `warn`. Raises NoneWholeError if there are some and none is whole.
    """
    wrong = []
    for step, path in reversed(settled(folder)):
        try:
            return _load(path, step)
        except Damaged as reason:
            wrong.append(f"{path}: {reason}")
            warn(f"checkpoint {wrong[-1]}. Trying the one before it.")
    if wrong:
        raise NoneWholeError(
            "no checkpoint is whole: " + "; ".join(wrong) + ". Put back a whole one (from a replica or a backup), "
            f"or delete the folder {folder} to start from the beginning."
        )
    return None


def publish(folder: Path, files: Mapping[str, bytes | Mapping[str, torch.Tensor]]) -> None:
    """Writes a folder of files (bytes, or tensors as safetensors) so that it is the old one or the new one, whole.

    Where a process was killed between the two, `settle(folder)` (the next `publish` does it too) puts one in place.
    Raises NonFiniteError and CheckpointError.
    """
    write_folder(
        folder,
        {name: [it] if isinstance(it, bytes) else safetensors_parts(it, name) for name, it in files.items()},
    )


class Saver:
    """Saves while training goes on: the loop pays for a copy of the tensors, threads do the writing. What was written
    is read back, then all but the newest `keep` are deleted. A checkpoint of the same step is replaced; those of later
    steps are left alone.

    At most one save is under way; what went wrong with it is raised at the next `save` or at `close`. The replica is
    copied in a thread of its own, so that a slow drive delays neither the training nor the next save.
    """

    def __init__(
        self, folder: Path, *, keep: int = 2, replica: Path | None = None, run: Path | None = None, warn: Warn = _warn
    ) -> None:
        """run: the run folder, whose own files go to the replica with each checkpoint."""
        self._folder, self._keep, self._run, self._warn = folder, keep, run, warn
        self._messages: list[str] = []  # from the threads, told to `warn` in the caller's
        self._mirror = None
        if replica is not None:
            self._mirror = replicas.Mirror(replica, keep=keep, warn=self._messages.append)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """The longest time that a save has taken so far until it was whole on the disk, and on the replica; 0 as long
        as none has come so far."""
        if self._mirror is None:
            return self._seconds
        return self._seconds + self._mirror.seconds if self._seconds and self._mirror.seconds else 0.0

    def save(self, step: int, tensors: Groups, state: dict[str, Any]) -> None:
        """Takes a copy of everything and starts to write it.

        Raises NonFiniteError for a tensor or a number in `state` that is NaN or infinite; and CheckpointError where the
        last save met a disk that is full or fails: what was saved before that is untouched.
        """
        began = time.monotonic()
        files = pack(tensors, state, copy=True)
        took = time.monotonic() - began
        self.wait()
        along = replicas.Along(self._run) if self._mirror is not None and self._run is not None else None
        self._thread = threading.Thread(target=self._work, args=(step, files, along, took), name="veritune-save")
        self._thread.start()

    def copy(self, checkpoint: Path) -> None:
        """Has a checkpoint of an earlier session copied, where the replica lacks it."""
        if self._mirror is not None and self._run is not None:
            self._mirror.send(checkpoint, replicas.Along(self._run))

    def wait(self) -> None:
        """Returns when the last save is on the local disk. Raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        self._tell()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self, timeout: float | None = None) -> None:
        """Waits for the last save, and up to `timeout` seconds for the replica."""
        try:
            self.wait()
        finally:
            if self._mirror is not None:
                self._mirror.close(timeout)
            self._tell()

    def _tell(self) -> None:
        while self._messages:
            self._warn(self._messages.pop(0))

    def _work(self, step: int, files: dict[str, Parts], along: replicas.Along | None, took: float) -> None:
        began = time.monotonic()
        try:
            path = _write(self._folder, step, files, self._keep, self._messages.append)
            self._seconds = max(self._seconds, took + time.monotonic() - began)
            if self._mirror is not None:
                self._mirror.send(path, along)
        except Exception as error:  # handed to the loop, which decides
            self._error = error


def _write(folder: Path, step: int, files: Mapping[str, Parts], keep: int, warn: Warn) -> Path:
    settled(folder)
    path = place(folder, step)
    write_folder(path, files, step)
    for old in outlived(path, keep):
        try:
            discard(old)
        except OSError as error:
            warn(f"old checkpoint {old} could not be deleted: {error.strerror}")
    return path


def settled(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints (step, path) in a folder, whole or not, once what a killed process left is put right."""
    if folder.is_dir():
        for name in os.listdir(folder):
            if match := re.fullmatch(r"\.(step-\d{8,})\.(new|old|trash)", name):
                with suppress(OSError):
                    settle(folder / match[1])
    return found(folder)


def replicated(replica: Path, warn: Warn) -> list[tuple[int, Path]]:
    """The copies (step, path) on a replica, whole or not; none, and a warning, where it cannot be read."""
    try:
        if replica.parent.is_dir():
            return found(replica)
        reason = f"{replica.parent} is not there: is the drive mounted?"
    except OSError as error:
        reason = error.strerror
    warn(f"replica {replica} cannot be read ({reason}); only local checkpoints are considered")
    return []


def _load(path: Path, step: int) -> Saved:
    body, name = read_manifest(path), ""
    if body["step"] != step:
        raise Damaged(f"the manifest is that of step {body['step']}")
    tensors, state = {}, {}
    try:
        for name, entry in body["files"].items():
            if name.startswith(replicas.RUN):
                continue  # a replica's: not of the checkpoint
            data = read_file(path / name, entry)
            if name == STATE:
                state = json.loads(data)
            else:
                tensors[name.removesuffix(SUFFIX)] = safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        raise Damaged(f"{name} cannot be understood: {error}") from None
    return Saved(step=step, tensors=tensors, state=state, path=path)
