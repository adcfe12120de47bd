"""Copies of checkpoints on a mounted drive, which may be slow, full, late to show files, or gone.

Nothing is expected of such a drive but that bytes written and synced can be read back: a copy is written in place, read
back and compared by hash, and its manifest, which marks it complete, comes last. Whatever goes wrong is told through
`warn` and never raised. `Mirror` copies in a thread. A copy holds, under `run/`, what else the run folder held when the
checkpoint was saved (settings, metrics, adapters), so that `fetch` can bring back a run.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from ..durable import (
    MANIFEST,
    Damaged,
    check_files,
    entry_of,
    found,
    manifest,
    outlived,
    read_manifest,
    sync_folder,
    verify,
    write_file,
)

Warn = Callable[[str], None]
WAITS = (0.2, 1.0, 5.0)  # seconds before a copy that does not read back yet is read again
RUN = "run/"  # where in a copy the run folder's own files stand
ALONG = (".json", ".jsonl", ".parquet", ".safetensors", ".md")  # of them, those with such names
PLACES = ("*", "adapter/*", "best/*", "cooldowns/*/*")


class Along:
    """The run folder's own small files and its adapters, opened as they are now: what they become later is not read."""

    def __init__(self, folder: Path) -> None:
        with ExitStack() as files:
            self._open = {}
            for path in sorted(path for pattern in PLACES for path in folder.glob(pattern)):
                if not path.is_file() or path.name.startswith(".") or path.suffix not in ALONG:
                    continue
                with suppress(FileNotFoundError):  # someone has deleted it since it was listed
                    file = files.enter_context(open(path, "rb"))
                    self._open[RUN + str(path.relative_to(folder))] = (file, os.fstat(file.fileno()).st_size)
            self.files = files.pop_all()
        self.names = list(self._open)

    def read(self, name: str) -> bytes:
        file, size = self._open[name]
        file.seek(0)
        return file.read(size)


class Source:
    """An opened checkpoint and what goes along: it can be read to the end even if it is deleted meanwhile."""

    def __init__(self, path: Path, along: Along | None = None) -> None:
        body = read_manifest(path)
        self.path, self.step, self.entries, self.along = path, body["step"], body["files"], along
        with ExitStack() as files:
            if along is not None:
                files.enter_context(along.files)
            self._open = {name: files.enter_context(open(path / name, "rb")) for name in self.entries}
            self.files = files.pop_all()

    @property
    def names(self) -> list[str]:
        return [*self.entries, *(self.along.names if self.along is not None else ())]

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises Damaged where they are not what was saved."""
        if name not in self.entries:
            assert self.along is not None
            return self.along.read(name)
        self._open[name].seek(0)
        data = self._open[name].read()
        if entry_of(data) != self.entries[name]:
            raise Damaged(f"{name} is damaged in the local checkpoint")
        return data


class Mirror:
    """Copies checkpoints to `replica` in a thread, then deletes older copies but the newest `keep`; what went wrong is
    told at the next `send` or at `close`. The folder above `replica` must exist: where it does not, the drive is taken
    to be gone, so that its mount point is not filled instead."""

    def __init__(self, replica: Path, *, keep: int = 2, warn: Warn) -> None:
        self._replica, self._keep, self._warn = replica, keep, warn
        self._lock = threading.Lock()
        self._next: Source | None = None
        self._thread: threading.Thread | None = None
        self._messages: list[str] = []
        self.seconds = 0.0
        """The longest time that a copy has taken so far."""

    def send(self, checkpoint: Path, along: Along | None = None) -> None:
        """Has a checkpoint copied. One copy is made at a time; of those that wait, only the newest is made."""
        self._report()
        try:
            source = Source(checkpoint, along)
        except (OSError, Damaged) as error:
            self._warn(f"{checkpoint} could not be copied to {self._replica}: {error}")
            return
        with self._lock:
            if self._next is not None:
                self._next.files.close()
            self._next = source
            if self._thread is None:
                # A daemon: a drive that hangs must not keep the process from ending.
                self._thread = threading.Thread(target=self._work, name="veritune-replica", daemon=True)
                self._thread.start()

    def close(self, timeout: float | None = None) -> None:
        """Waits until all is copied, but at most `timeout` seconds."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        self._report()
        if thread is not None and thread.is_alive():
            self._warn(f"{self._replica}: still copying after {timeout} s; it may lack the newest checkpoint")

    def _work(self) -> None:
        while True:
            with self._lock:
                source, self._next = self._next, None
                if source is None:
                    self._thread = None
                    return
            began = time.monotonic()
            if _copy(source, self._replica, self._keep, self._messages.append):
                self.seconds = max(self.seconds, time.monotonic() - began)

    def _report(self) -> None:
        while self._messages:
            self._warn(self._messages.pop(0))


def _copy(source: Source, replica: Path, keep: int, warn: Warn) -> bool:
    """Returns False where the replica has it."""
    target = None
    with source.files:
        try:
            if not replica.parent.is_dir():
                raise Damaged(f"{replica.parent} is not there; mount the drive again, or make that folder")
            replica.mkdir(exist_ok=True)
            copies = [path for step, path in found(replica) if step == source.step]
            if copies and _is_copy(source, copies[-1]):
                newest = copies[-1]
            else:
                # Beside an earlier copy of the same step, never over it: that may be the only whole one.
                number = int(copies[-1].suffix[1:] or 0) + 1 if copies else 0
                newest = target = replica / f"step-{source.step:08d}{f'.{number}' if number else ''}"
                _write(source, target)
            outdated = outlived(newest, keep)
        except Exception as error:
            # Also what no file system should raise: the run is worth more than its copy.
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            warn(f"{source.path} could not be copied to {replica}: {reason}. The local checkpoint is whole.")
            if target is not None:
                with suppress(OSError):
                    _delete(target)
            return True
    for old in outdated:
        try:
            _delete(old)
        except OSError as error:
            warn(f"old copy {old} could not be deleted: {error.strerror}")
    return target is not None


def _delete(target: Path) -> None:
    (target / MANIFEST).unlink(missing_ok=True)  # first, so that what a cut-off leaves does not look complete
    shutil.rmtree(target)


def _is_copy(source: Source, target: Path) -> bool:
    try:
        verify(target)
        held = read_manifest(target)["files"]
        return source.entries.items() <= held.items()  # what goes along differs from session to session
    except (OSError, Damaged):
        return False


def _write(source: Source, target: Path) -> None:
    inner = {parent for name in source.names for parent in Path(name).parents}
    folders = [target / parent for parent in sorted(inner, key=lambda parent: len(parent.parts))]
    for folder in folders:
        folder.mkdir()  # never what is above: where the drive went away, its mount point must not be filled
    entries = {name: write_file(target / name, [source.read(name)]) for name in source.names}
    for folder in folders:
        sync_folder(folder)
    _patiently(lambda: check_files(target, entries))
    write_file(target / MANIFEST, [manifest(source.step, entries)])
    sync_folder(target)
    _patiently(lambda: verify(target))


def _patiently(check: Callable[[], None]) -> None:
    """Checks at once and once after each of WAITS: what was written may take a moment to be seen."""
    for wait in WAITS:
        try:
            return check()
        except Damaged:
            time.sleep(wait)
    check()
