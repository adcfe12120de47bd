"""What a run leaves to look at: `metrics.jsonl`, one strict JSON object a line, each with its step."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .durable import replace_file
from .quality.metrics import plain

LINE = re.compile(rb'\{"step": (\d+)(?:, ("validation"): |[,}])[^\n]*(?<=\})\n')


class Tracker:
    """Appends to a run's metrics.jsonl. A resumed run first drops what was logged after the step it goes on from,
    and validations after the step `validated`, which are made again.

    What stays is never written anew, unless lines between have to go: a kill at any moment loses nothing of it.
    """

    def __init__(self, path: Path, *, from_step: int, validated: int | None = None) -> None:
        if path.exists():
            _drop_after(path, from_step, from_step if validated is None else validated)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, **values: Any) -> None:
        """Writes one line; `step` counts finished steps. A figure that is NaN or infinite is written as null.

        Raises OSError.
        """
        with self._told():
            self._file.write(json.dumps({"step": step, **plain(values)}, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> int:
        """Returns when what was logged is on the disk, whatever happens to the machine: that many bytes. Raises
        OSError."""
        with self._told():
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = "Make room there; the same command then goes on from the last checkpoint"
            raise OSError(error.errno, f"{error.strerror}. {advice}", str(self._path)) from None

    def close(self) -> None:
        """Writes what `log` could not. Raises OSError."""
        with self._told():
            self._file.close()


def _drop_after(path: Path, step: int, validated: int) -> None:
    """Leaves the whole lines up to a step, validations up to `validated`. Half a million lines a second: none is
    parsed."""
    lines = path.read_bytes().splitlines(keepends=True)
    # A line that a kill left half written is none.
    found = [(line, match) for line in lines if (match := LINE.fullmatch(line))]
    kept = [line for line, match in found if int(match[1]) <= (validated if match[2] else step)]
    size, was = sum(map(len, kept)), path.stat()
    if kept == lines[: len(kept)]:
        os.truncate(path, size)
    else:
        replace_file(path, b"".join(kept))
    os.utime(path, (was.st_atime, was.st_mtime))  # when a session that was killed gave its last sign of life
