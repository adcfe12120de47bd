"""What a run leaves about itself for those who look at it: `status.json`, and its scores on the validation rows.

`status.json` holds the plan (steps, phases), the number of trained parameters, and each session: when it began and
ended, at which step it began, on what machine, and how it ended. `scores-last.parquet` and `scores-best.parquet` hold
P(correct) of each validation row after the last and the best validation. Nothing here decides what is learnt, so a
failure to write it stops nothing.
"""

import io
import json
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..durable import replace_file
from ..redact import redact
from .plan import Plan

STATUS = "status.json"
SCORES = {"last": "scores-last.parquet", "best": "scores-best.parquet"}


@contextmanager
def running(folder: Path, plan: Plan, device: Any, *, step: int, parameters: int) -> Iterator[None]:
    """Says in `status.json` that the run goes on from `step` on a torch device, and how that ended if by an exception.

    A block that ends without one leaves the state at "running": `finished` changes it, once everything is written.
    """
    session = {
        "state": "running",
        "started": _now(),
        "ended": None,
        "from_step": step,
        "reason": None,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "machine": machine(device),
    }
    phases = [
        {"name": phase.name, "start": phase.start, "steps": phase.steps, "rows": len(phase.rows)}
        for phase in plan.phases
    ]
    values = {"plan": {"steps": len(plan), "phases": phases}, "parameters": parameters}
    _write(folder, values | {"sessions": [*_earlier(folder), session]})
    try:
        yield
    except KeyboardInterrupt as reason:
        end(folder, "stopped", f"stopped by {str(reason) or 'a signal'}")
        raise
    except BaseException as error:
        end(folder, "failed", redact(f"{type(error).__name__}: {error}"))
        raise


def finished(folder: Path) -> None:
    """Says that the run is done and everything of it written."""
    end(folder, "finished", None)


def end(folder: Path, state: str, reason: str | None) -> None:
    """Closes the last session: "finished", "stopped" or "failed", with a reason in words."""
    values = read(folder)
    if values["sessions"]:
        values["sessions"][-1] |= {"state": state, "ended": _now(), "reason": reason}
        _write(folder, values)


def read(folder: Path) -> dict[str, Any]:
    """What `status.json` holds; an empty list of sessions and no plan where there is none."""
    try:
        values = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        if not isinstance(values["sessions"], list) or not isinstance(values["plan"]["steps"], int):
            raise ValueError
        return values
    except (OSError, ValueError, KeyError, TypeError):
        return {"plan": None, "parameters": None, "sessions": []}


def machine(device: Any) -> dict[str, Any]:
    """The machine that a torch device stands for: names, versions, GiB."""
    import torch

    found = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    if device.type != "cuda":
        return {"device": _processor(), **found}
    about = torch.cuda.get_device_properties(device)
    return {
        "device": about.name,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        **found,
    }


def keep_scores(folder: Path, step: int, ids: Sequence[str], labels: np.ndarray, p: np.ndarray, *, best: bool) -> None:
    """Writes P(correct) of each validation row after `step`: as the last, and if it is the best so far as that too.

    ids: [rows]; labels: bool [rows]; p: float64 [rows].
    """
    import polars as pl  # here, since what only reads a status does without it

    frame = pl.DataFrame({"id": ids, "is_correct": labels, "p_correct": p.astype(np.float32)})
    buffer = io.BytesIO()
    frame.with_columns(step=pl.lit(step, pl.Int32)).write_parquet(buffer)
    for name in ("last", "best") if best else ("last",):
        _replace(folder / SCORES[name], buffer.getvalue())


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """The sessions before this one; one that a kill ended is taken to have lasted until its last line of metrics."""
    sessions = read(folder)["sessions"]
    if sessions and sessions[-1]["state"] == "running":
        log = folder / "metrics.jsonl"
        ended = datetime.fromtimestamp(log.stat().st_mtime, UTC).isoformat(timespec="seconds") if log.exists() else None
        sessions[-1] |= {"state": "killed", "ended": ended, "reason": "ended without a word"}
    return sessions


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(folder: Path, values: dict[str, Any]) -> None:
    _replace(folder / STATUS, json.dumps(values, indent=1, ensure_ascii=False).encode())


def _replace(path: Path, data: bytes) -> None:
    with suppress(OSError):
        replace_file(path, data)
