"""Folders that are whole or absent, on disks that fill, fail and lose power.

`write_folder` writes a folder beside its place, syncs it, swaps it in by renaming, has it checked and only then lets
go of the folder that stood there; `settle` puts right what a killed process left. Beside a folder NAME can stand
`.NAME.new` (not finished), `.NAME.old` (the one being replaced) and `.NAME.trash` (being deleted); none of them is ever
read as NAME. `manifest` and `verify` say by size and hash whether a checkpoint is what was written, `found` lists the
checkpoints of a folder. `alone_in` keeps a folder for one process.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import BusyError, CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK = 8 << 20  # bytes in one write or read
# A second number tells copies of one step apart on a replica, where nothing is replaced in place.
STEP = re.compile(r"step-(\d{8,})(?:\.(\d+))?")

Parts = Sequence[bytes | memoryview]


class Damaged(Exception):
    """A folder is not what was written there; the message names the file and what is wrong with it."""


def write_file(path: Path, parts: Parts) -> dict[str, Any]:
    """Writes `parts` one after the other, syncs the file and returns its manifest entry (`bytes`, `sha256`).

    The hash is computed beside the writing, from memory, so that what reached the disk can be held against it.
    """
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(_digest, parts)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                while len(view):
                    view = view[os.write(file, view[:CHUNK]) :]
            os.fsync(file)
        finally:
            os.close(file)
        return {"bytes": sum(memoryview(part).nbytes for part in parts), "sha256": digest.result()}


def replace_file(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Puts a file in place of what stands there, whole or not at all. With `sync` a power cut does not take it. Raises
    OSError."""
    partial = path.with_name(f".{path.name}.tmp")
    if sync:
        write_file(partial, [data])
    else:
        partial.write_bytes(data)
    partial.replace(path)
    if sync:
        sync_folder(path.parent)


def entry_of(data: bytes) -> dict[str, Any]:
    """The manifest entry of a file with these bytes."""
    return {"bytes": len(data), "sha256": _digest([data])}


def _digest(parts: Parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable. File systems that cannot sync a folder (some mounted drives) are let be."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(file)


def is_process(pid: int) -> bool:
    """Whether a process of this machine lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, each name durable."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps it for this process; at the end it goes again if nothing was put into it.

    Raises BusyError if another process has it. Where a system or a drive has no locks, nothing is kept.
    """
    made = not folder.exists()
    make_folder(folder)
    held = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        try:
            if fcntl is not None and held is not None:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"another process works in {folder} at this moment: wait for it, stop it, or choose another `out`"
            ) from None
        except OSError:
            pass
        yield
    finally:
        if held is not None:
            os.close(held)
        if made:
            with suppress(OSError):
                folder.rmdir()


def manifest(step: int, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The manifest of a checkpoint as bytes: its step, each file's size and hash, and a hash of all this."""
    body: dict[str, Any] = {"format": FORMAT, "step": step, "files": files}
    body["sha256"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body, indent=1).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content. Raises Damaged if it is missing or a byte of it differs from what was written."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing, so it was not completed or not all of it is visible yet") from None
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error.strerror})") from None
    try:
        body = json.loads(data)
        if body["format"] != FORMAT:
            raise Damaged(f"{MANIFEST} has format {body['format']!r}; this version of veritune reads {FORMAT}")
        if manifest(body["step"], body["files"]) == data:
            return body
    except (ValueError, KeyError, TypeError):
        pass
    raise Damaged(f"{MANIFEST} is not what was written ({len(data)} bytes)")


def check_sizes(folder: Path) -> dict[str, Any]:
    """The quick check, without reading the files: manifest whole, every file there in its size. Raises Damaged."""
    body = read_manifest(folder)
    for name, entry in body["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise Damaged(f"{name} is missing ({error.strerror})") from None
        if size != entry["bytes"]:
            raise Damaged(f"{name} has {size} bytes, not {entry['bytes']}")
    return body


def read_file(path: Path, entry: Mapping[str, Any]) -> bytes:
    """The bytes of a file that must agree with its manifest entry. Raises Damaged."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from None
    if len(data) != entry["bytes"]:
        raise Damaged(f"{path.name} has {len(data)} bytes, not {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise Damaged(f"{path.name} differs from what was written (its hash is not the manifest's)")
    return data


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Reads a file back, from the disk rather than from memory where that can be asked for. Raises Damaged."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(min(CHUNK, entry["bytes"] + 1)))
    try:
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read back ({error.strerror})") from None
    if size != entry["bytes"]:
        raise Damaged(f"{path.name} has {size} bytes, not {entry['bytes']}")
    if digest.hexdigest() != entry["sha256"]:
        raise Damaged(f"{path.name} differs from what was written (its hash is not the manifest's)")


def verify(folder: Path) -> None:
    """The full check of a checkpoint: every file is read back and its hash compared. Raises Damaged."""
    check_files(folder, check_sizes(folder)["files"])


def check_files(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Reads files back and holds them against their manifest entries. Raises Damaged."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: check_file(folder / name, entries[name]), entries))


def looks_whole(folder: Path) -> bool:
    """Whether `check_sizes` finds nothing wrong."""
    try:
        check_sizes(folder)
    except Damaged:
        return False
    return True


def found(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints (step, path) in a folder, whole or not, the oldest step first. Raises OSError."""
    if not folder.is_dir():
        return []
    names = [(name, match) for name in os.listdir(folder) if (match := STEP.fullmatch(name))]
    ordered = sorted((int(match[1]), int(match[2] or 0), name) for name, match in names)
    return [(step, folder / name) for step, _, name in ordered]


def outlived(newest: Path, keep: int) -> list[Path]:
    """The checkpoints before `newest` in its folder, but for the last `keep` - 1 of them that look whole."""
    paths = [path for _, path in found(newest.parent)]
    older = paths[: paths.index(newest)]
    spared = [path for path in older if looks_whole(path)][-(keep - 1) :] if keep > 1 else []
    return [path for path in older if path not in spared]


def beside(place: Path, kind: str) -> Path:
    """`.NAME.new`, `.NAME.old` or `.NAME.trash` beside the folder NAME."""
    return place.with_name(f".{place.name}.{kind}")


def settle(place: Path) -> None:
    """Puts right what a killed process left beside `place`: the unfinished goes, the whole one of two stays."""
    old = beside(place, "old")
    if old.exists():
        if not _stands(place, like=old):
            discard(place)
            os.rename(old, place)
            sync_folder(place.parent)
        discard(old, trash=beside(place, "trash"))
    for kind in ("new", "trash"):
        shutil.rmtree(beside(place, kind), ignore_errors=True)


def _stands(place: Path, like: Path) -> bool:
    if (like / MANIFEST).exists():
        try:
            verify(place)
        except Damaged:
            return False
    return place.exists()


def discard(folder: Path, trash: Path | None = None) -> None:
    """Deletes a folder if it exists; should that be cut off, what remains no longer has its name."""
    trash = trash or beside(folder, "trash")
    if folder.exists():
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(folder, trash)
        shutil.rmtree(trash)


def write_folder(place: Path, files: Mapping[str, Parts], step: int | None = None) -> None:
    """Writes a folder at `place`, whole or not at all; with `step`, a manifest is written after its files.

    What stood there stays until the new one is in place, synced and read back. Raises CheckpointError when the disk is
    full or fails; then what stood there stands there still.
    """
    new, old, placed = beside(place, "new"), beside(place, "old"), False
    try:
        make_folder(place.parent)
        settle(place)
        new.mkdir()
        entries = {name: write_file(new / name, parts) for name, parts in files.items()}
        if step is not None:
            write_file(new / MANIFEST, [manifest(step, entries)])
        sync_folder(new)
        if place.exists():
            os.rename(place, old)
        os.rename(new, place)
        placed = True
        sync_folder(place.parent)
        check_files(place, entries)
        if step is not None:
            read_manifest(place)
    except BaseException as error:
        # Also for a KeyboardInterrupt. If undoing fails too, `settle` finishes it at the next start.
        with suppress(OSError):
            if placed:
                discard(place)
            if old.exists():
                os.rename(old, place)
            shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError | Damaged):
            raise CheckpointError(_advice(place, files, error)) from error
        raise
    with suppress(OSError):
        discard(old, trash=beside(place, "trash"))


def adopt_folder(place: Path) -> None:
    """Puts `.NAME.new`, which another library has written, in place with a manifest over its files, synced, instead of
    what stood there. Raises OSError; `looks_whole` tells whether it was done."""
    new = beside(place, "new")
    entries: dict[str, Any] = {}
    for path in sorted(new.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            entries[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    write_file(new / MANIFEST, [manifest(0, entries)])
    sync_folder(new)
    discard(place)
    os.rename(new, place)
    sync_folder(place.parent)


def _advice(place: Path, files: Mapping[str, Parts], error: OSError | Damaged) -> str:
    size = sum(memoryview(part).nbytes for parts in files.values() for part in parts)
    reason = str(error.strerror or error) if isinstance(error, OSError) else f"read back, {error}"
    text = f"{place} could not be written: {reason}. What was saved before is untouched. "
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return text + f"Free at least {math.ceil(size / 1e6):,} MB at {place.parent}, then give the same command again."
    return text + f"Check the disk that holds {place.parent}, or move the run folder, then give the same command again."
