"""What a run leaves to look at: `metrics.jsonl`, one JSON object a line, each with its step."""

import json
import os
from pathlib import Path
from typing import Any


class Tracker:
    """Appends to a run's metrics.jsonl. A resumed run first drops what was logged after the step it goes on from."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    at = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a kill left half written
                if at <= from_step and line.endswith(b"\n"):
                    kept.append(line)
        path.write_bytes(b"".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, **values: Any) -> None:
        """Writes one line; `step` counts finished steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when what was logged is on the disk, whatever happens to the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def last_validation(path: Path) -> dict[str, Any]:
    """The figures of the last validation that a metrics.jsonl holds."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [entry["validation"] for entry in found if "validation" in entry][-1]
