"""A run folder read for showing it, whether the run is done, goes on, or was killed half-way through a line."""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..durable import found as checkpoints
from ..durable import is_process
from ..errors import DataError, MissingError
from ..training import status as statuses
from ..training.runfolder import RUN

QUIET = 15 * 60
"""Seconds without a sign after which a run on another machine counts as killed."""
DEPTH = 6
"""Folders below the one searched that are looked into."""
STEP_KEYS = ("step", "loss", "lr", "grad_norm", "rows", "seconds")


@dataclass
class Metrics:
    """A metrics.jsonl, read as it grows; `update` takes in what came since."""

    path: Path
    steps: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in STEP_KEYS})
    """Column -> a value for each step."""
    validations: list[dict[str, Any]] = field(default_factory=list)
    """The figures of each validation (`training.measure.validate`), with their step."""
    _offset: int = 0
    _tail: bytes = b""

    def update(self) -> bool:
        """Reads what is new; from the start again if a resume has cut the file. Says whether anything was new."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, self._offset - len(self._tail)))
                if file.read(len(self._tail)) != self._tail:
                    self.steps, self.validations, self._offset = {key: [] for key in STEP_KEYS}, [], 0
                    file.seek(0)
                data = file.read()
        except OSError:
            return False
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._tail = (self._tail + whole)[-200:] if whole else self._tail
        for line in whole.splitlines():
            self._take(line)
        return bool(whole)

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, KeyError, TypeError):
            return
        if isinstance(values.get("validation"), dict):
            self.validations.append({"step": step, **values["validation"]})
        elif "loss" in values:
            for key in STEP_KEYS:
                value = values.get(key)
                self.steps[key].append(float(value) if isinstance(value, int | float) else float("nan"))

    @property
    def done(self) -> int:
        """Finished steps."""
        return int(self.steps["step"][-1]) if self.steps["step"] else 0

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation with the lowest loss, of those on as many rows as the last."""
        alike = [entry for entry in self.validations if entry.get("rows") == self.validations[-1].get("rows")]
        finite = [entry for entry in alike if isinstance(entry.get("loss"), int | float)]
        return min(finite, key=lambda entry: entry["loss"], default=None)


@dataclass
class RunFolder:
    """What a run folder holds, but for its tensors."""

    path: Path
    about: dict[str, Any]
    """run.json."""
    status: dict[str, Any]
    metrics: Metrics

    @property
    def settings(self) -> dict[str, Any]:
        return self.about["settings"]

    @property
    def steps(self) -> int | None:
        """Steps that the plan has."""
        return self.status["plan"]["steps"] if self.status["plan"] else None

    @property
    def phases(self) -> list[dict[str, Any]]:
        """The plan's phases: name, start, steps, rows."""
        return self.status["plan"]["phases"] if self.status["plan"] else []

    def phase(self) -> str:
        """The name of the phase that the run is in."""
        started = [phase["name"] for phase in self.phases if phase["start"] <= max(self.metrics.done - 1, 0)]
        return started[-1] if started else ""

    def state(self) -> tuple[str, str]:
        """ "running", "finished", "stopped", "failed" or "killed"; and the reason in words, "" where there is none."""
        sessions = self.status["sessions"]
        if not sessions:
            if (self.path / "evaluation.json").exists():
                return "finished", ""
            return ("running" if self._fresh() else "stopped"), ""
        last = sessions[-1]
        if last["state"] == "running" and not self._alive(last):
            return "killed", "ended without a word"
        return last["state"], last["reason"] or ""

    def _alive(self, session: dict[str, Any]) -> bool:
        if session["host"] == socket.gethostname():
            return is_process(session["pid"])
        return self._fresh()

    def _fresh(self) -> bool:
        return time.time() - self.seen() < QUIET

    def seen(self) -> float:
        """When the run last wrote something, in seconds since 1970."""
        files = (self.metrics.path, self.path / statuses.STATUS, self.path / RUN)
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)

    def seconds_left(self) -> float | None:
        """Until the last step, at the speed of this session so far; None before five steps of it."""
        sessions, steps, done = self.status["sessions"], self.steps, self.metrics.done
        if not sessions or steps is None:
            return None
        here = done - sessions[-1]["from_step"]
        if here < 5:
            return None
        elapsed = self.metrics.path.stat().st_mtime - datetime.fromisoformat(sessions[-1]["started"]).timestamp()
        return max(elapsed, 0.0) / here * (steps - done)

    def update(self) -> bool:
        """Reads again what may have changed, and says whether it has."""
        before = self.status
        self.status = statuses.read(self.path)
        return self.metrics.update() or self.status != before


def read(path: Path) -> RunFolder:
    """Reads a run folder. Raises MissingError where there is none and DataError where it is damaged."""
    if not (path / RUN).is_file():
        if copy := newest_copy(path):
            raise MissingError(f"{path}: a replica, no run folder; name the run in its newest copy, {copy}")
        what = "no such folder" if not path.exists() else f"no run folder (it holds no {RUN})"
        raise MissingError(f"{path}: {what}; `veritune runs` lists the runs under a folder")
    try:
        about = json.loads((path / RUN).read_text(encoding="utf-8"))
        if not isinstance(about["settings"], dict) or not isinstance(about["resolved"], dict):
            raise ValueError("no settings")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / RUN}: damaged ({error})") from None
    run = RunFolder(path, about, statuses.read(path), Metrics(path / "metrics.jsonl"))
    run.metrics.update()
    return run


def newest_copy(replica: Path) -> Path | None:
    """The run folder in a replica's newest copy that holds one; None: there is none, or this is no replica."""
    runs = [path / "run" for _, path in checkpoints(replica)]
    return next((path for path in reversed(runs) if (path / RUN).is_file()), None)


def find(root: Path) -> list[Path]:
    """The run folders under `root` (itself, if it is one), by name; of a replica, the run in its newest copy.
    Hidden folders are not looked into."""
    if not root.is_dir():
        raise MissingError(f"{root}: no such folder")
    found = []
    for at, names, files in os.walk(root):
        if RUN in files:
            found.append(Path(at))
            names.clear()
        elif copy := newest_copy(Path(at)):
            found.append(copy)
            names.clear()
        deep = len(Path(at).relative_to(root).parts) >= DEPTH
        names[:] = [] if deep else [name for name in names if not name.startswith(".")]
    return sorted(found)


def smooth(values: Sequence[float], keep: float | None = None) -> list[float]:
    """The exponential moving average, each value weighted as if the series had always been (Kingma & Ba 2015, 3).

    keep: the part of the average that stays at each value; by default 0.95, less for a series of under 200.
    """
    if keep is None:
        keep = min(0.95, 1 - 10 / max(len(values), 20))
    out: list[float] = []
    average = weight = 0.0
    for value in values:
        if value == value:  # a NaN is passed over
            average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(average / weight if weight else float("nan"))
    return out
