"""A run brought back from its replica: to a new machine, or to one whose own folder is behind or damaged."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import config
from ..durable import (
    Damaged,
    found,
    make_folder,
    read_file,
    read_manifest,
    sync_folder,
    verify,
    write_file,
    write_folder,
)
from ..errors import CheckpointError, ConfigError
from . import runfolder
from .checkpoint import Warn, place, replicated, settled
from .replica import RUN

Same = Callable[[config.Run, int], bool]
Files = dict[str, tuple[bytes, os.stat_result]]
WHOSE = RUN + runfolder.RUN  # of a copy's files, the one that says of which run it is


def fetch(folder: Path, replica: Path, values: dict[str, Any], same_so_far: Same, warn: Warn) -> int | None:
    """Brings the run folder to where the replica is, if that is further than the folder's own newest whole checkpoint.

    values, same_so_far: as for `runfolder.start`, the latter given also how many steps are done; a replica or a folder
    of another run is refused before anything is written, also where nothing is to be brought.
    The checkpoint is put in place last, so that a fetch that was cut off is begun again. Returns the step that was
    brought, or None. Raises ConfigError and CheckpointError.
    """
    try:
        mounted, file = replica.parent.is_dir(), replica.exists() and not replica.is_dir()
    except OSError:  # a mount that does not answer, as `replicated` says
        mounted = file = False
    if file:
        raise ConfigError(f"checkpoint.replica = '{replica}': this is a file; name a folder")
    if replica.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"checkpoint.replica = '{replica}' lies in the run folder {folder}, with which it would be lost"
        )
    own = _newest_whole(folder / "checkpoints")
    if own is None and not mounted:
        raise ConfigError(
            f"checkpoint.replica = '{replica}': {replica.parent} is not there. Mount the drive, or make that folder: "
            f"{folder} has no checkpoint, so without the replica the run would start from its beginning"
        )
    runfolder.admit(folder, values, lambda earlier: same_so_far(earlier, own or 0))
    wrong = []
    for step, copy in reversed(replicated(replica, warn)):
        further = own is None or step > own
        try:
            written, files = _files(copy, whole=further)
        except Damaged as reason:
            if further:
                wrong.append(f"{copy}: {reason}")
                warn(f"replica {wrong[-1]}. Trying the one before it.")
            continue
        _check(copy, written, files, values, same_so_far)
        if not further:
            return None
        _bring(copy, written, files, folder)
        return step
    if own is None and wrong and not found(folder / "checkpoints"):
        raise CheckpointError(
            f"no checkpoint of the replica is whole: {'; '.join(wrong)}. Wait until the drive shows all of it, put "
            f"back a whole one, or delete the folder {replica} to start from the beginning."
        )
    return None


def _newest_whole(checkpoints: Path) -> int | None:
    for step, path in reversed(settled(checkpoints)):
        try:
            verify(path)
            return step
        except Damaged:
            continue  # told when it is loaded
    return None


def _files(copy: Path, *, whole: bool) -> tuple[int, Files]:
    """A copy's step, and each file (or only the one that says whose copy it is) with its times, read once: a drive may
    show less the next moment. Raises Damaged."""
    body = read_manifest(copy)
    files = [(name, entry) for name, entry in body["files"].items() if whole or name == WHOSE]
    try:
        return body["step"], {name: (read_file(copy / name, entry), (copy / name).stat()) for name, entry in files}
    except OSError as error:
        raise Damaged(f"{error.filename} cannot be read ({error.strerror})") from None


def _check(copy: Path, step: int, files: Files, values: dict[str, Any], same_so_far: Same) -> None:
    """Raises ConfigError for a copy of another run."""
    if WHOSE in files:
        before, _ = files[WHOSE]

        def same(earlier: config.Run) -> bool:
            return same_so_far(earlier, step)

        runfolder.check(copy / runfolder.RUN, before, values, same, "checkpoint.replica")


def _bring(copy: Path, step: int, files: Files, folder: Path) -> None:
    of_run = {name.removeprefix(RUN): file for name, file in files.items() if name.startswith(RUN)}
    make_folder(folder)
    groups: dict[str, dict[str, bytes]] = {}
    for name, (data, was) in sorted(of_run.items(), key=lambda item: item[0] != runfolder.RUN):  # it says whose it is
        inner, _, last = name.rpartition("/")
        if inner:
            groups.setdefault(inner, {})[last] = data
        else:
            partial = folder / f".{name}.tmp"
            write_file(partial, [data])
            os.utime(partial, (was.st_atime, was.st_mtime))  # a session that was killed ended when it wrote last
            partial.replace(folder / name)
    sync_folder(folder)
    for inner, them in groups.items():
        write_folder(folder / inner, {name: [data] for name, data in them.items()})
    core = {name: [data] for name, (data, _) in files.items() if not name.startswith(RUN)}
    write_folder(place(folder / "checkpoints", step), core, step)
