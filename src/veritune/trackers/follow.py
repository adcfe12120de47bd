"""Trackers beside a run: `following` starts a process for each, which reads what the run writes anyway.

So a tracker that hangs, fails, fills its disk or loses its network cannot touch the run: its process is told when the
run ends and has DEADLINE seconds to finish.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import config
from ..errors import ConfigError
from ..redact import redact

DEADLINE = 60.0
STOPPED = 10.0  # the same after a signal, or at the session's limit: the run has 30 s in all
FOLDER = "trackers"
failures: dict[str, str] = {}
"""Trackers that failed a run of this process, and how: for its later runs, such as trials, they have STOPPED."""


class Ended(Exception):
    """Who watches a run has ended it early: a result, not a failure."""


def check(track: config.Track) -> None:
    """Raises ConfigError if a tracker's package is not installed."""
    for name in track.to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"track.to = {name!r}: it is not installed; pip install 'veritune[{name}]'")


@contextmanager
def following(run: config.Run, folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, what is added to the folder's metrics.jsonl is shown on each tracker of `run.track`."""
    with ExitStack() as stack:
        for name in run.track.to:
            stack.enter_context(_one(name, run, folder, warn))
        yield


@contextmanager
def _one(name: str, run: config.Run, folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    spec = {
        "service": name,
        "run": str(folder.resolve()),
        "folder": str(folder.resolve() / FOLDER / name),
        "project": run.track.project,
        "name": run.track.name or folder.resolve().name,
        "group": run.track.group,
        "settings": {key: _plain(value) for key, value in config.flat(config.as_dict(run)).items()},
        "deadline": DEADLINE + 5,
    }
    command = [sys.executable, "-P", "-m", f"{__package__}.worker"]
    # Its own process group: a Ctrl-C is the run's, and the group can be killed with all that the tracker started.
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
        cwd=folder,
        env=_environment(),
    )
    told = threading.Thread(target=_pass_on, args=(process.stdout, name, warn), daemon=True)
    told.start()
    _write(process, json.dumps(spec) + "\n")
    done, deadline = "", STOPPED if name in failures else DEADLINE
    try:
        yield
        done = "done"
    except KeyboardInterrupt:
        done, deadline = "done", STOPPED  # stopped by a signal is no failure
        raise
    except Ended:
        done = "done"
        raise
    finally:
        _write(process, done, close=True)
        try:
            code = process.wait(deadline)
        except subprocess.TimeoutExpired:
            code = None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        told.join(1)
        if code != 0:
            why = f"had not finished after {deadline:g} s" if code is None else "failed"
            failures[name] = why
            warn(f"{name}: {why}; the run is whole in {folder}/metrics.jsonl, and the same command sends the rest")


def _environment() -> dict[str, str]:
    """The worker imports this same package, wherever it stands."""
    source = str(Path(__file__).resolve().parents[2])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _write(process: subprocess.Popen[str], text: str, *, close: bool = False) -> None:
    with suppress(OSError, ValueError):  # a worker that is gone
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close() if close else process.stdin.flush()


def _pass_on(lines: Any, name: str, warn: Callable[[str], None]) -> None:
    for line in lines:
        warn(f"{name}: {redact(line.rstrip())}")


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value)
