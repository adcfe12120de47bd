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


def fetch(folder: Path, replica: Path, values: dict[str, Any], same_so_far: Same, warn: Warn) -> int | None:
    """Brings the run folder to where the replica is, if that is further than the folder's own newest whole checkpoint.

    values, same_so_far: as for `runfolder.start`, the latter given also how many steps are done; a replica or a folder
    of another run is refused before anything is written.
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
    wrong = []
    for step, copy in reversed(replicated(replica, warn)):
        if own is not None and step <= own:
            return None
        try:
            written, files = _files(copy)
        except Damaged as reason:
            wrong.append(f"{copy}: {reason}")
            warn(f"replica {wrong[-1]}. Trying the one before it.")
            continue
        runfolder.admit(folder, values, lambda earlier: same_so_far(earlier, own or 0))
        _bring(copy, written, files, folder, values, same_so_far)
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


def _files(copy: Path) -> tuple[int, dict[str, tuple[bytes, os.stat_result]]]:
    """A copy's step, and each file with its times, read once: a drive may show less the next moment. Raises Damaged."""
    body = read_manifest(copy)
    try:
        files = body["files"].items()
        return body["step"], {name: (read_file(copy / name, entry), (copy / name).stat()) for name, entry in files}
    except OSError as error:
        raise Damaged(f"{error.filename} cannot be read ({error.strerror})") from None


def _bring(
    copy: Path,
    step: int,
    files: dict[str, tuple[bytes, os.stat_result]],
    folder: Path,
    values: dict[str, Any],
    same_so_far: Same,
) -> None:
    of_run = {name.removeprefix(RUN): file for name, file in files.items() if name.startswith(RUN)}
    if runfolder.RUN in of_run:
        before, _ = of_run[runfolder.RUN]

        def same(earlier: config.Run) -> bool:
            return same_so_far(earlier, step)

        runfolder.check(copy / runfolder.RUN, before, values, same, "checkpoint.replica")
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
