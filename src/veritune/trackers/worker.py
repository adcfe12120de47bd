"""The process that shows a run on one tracker: `python -m veritune.trackers.worker`, started by `follow`.

It reads what to do as a line of JSON on standard input, then follows metrics.jsonl until its input ends, sends the
rest and finishes. How far it came is kept in RECORD, so that another session of the run sends no line twice. What a
person should know goes to standard output, a line each; what libraries print goes nowhere.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..durable import replace_file
from ..redact import redact
from .picture import heat_map
from .services import SERVICES, Service, Spec

POLL = 0.5  # seconds between two looks at metrics.jsonl
GIVE_UP = 20  # failures in a row


class Record:
    """How much of metrics.jsonl a tracker has: all lines before `step`, and `lines` of that step's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step, self.lines, self.identity = 0, 0, os.urandom(4).hex()
        with suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(path.read_bytes())
            self.step, self.lines, self.identity = values["step"], values["lines"], values["identity"]

    def write(self) -> None:
        values = {"identity": self.identity, "step": self.step, "lines": self.lines}
        replace_file(self.path, json.dumps(values).encode())


def main() -> None:
    spec = json.loads(sys.stdin.readline())
    say = _quiet()
    deadline = spec["deadline"]
    ended = threading.Event()

    def until_the_end() -> None:
        rest = sys.stdin.read()
        failed.append(rest.strip() != "done")
        ended.set()
        time.sleep(deadline)
        os.killpg(0, signal.SIGKILL)  # this process and those that the tracker's library started

    failed: list[bool] = []
    threading.Thread(target=until_the_end, daemon=True).start()
    folder = Path(spec["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # a killed session's worker may still be at work
        try:
            follow(spec, folder, ended, failed, say)
        except Exception as error:
            say(redact(f"{type(error).__name__}: {error}".splitlines()[0]))
            os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # libraries' own exit handlers may hang


def follow(
    spec: dict[str, Any], folder: Path, ended: threading.Event, failed: list[bool], say: Callable[[str], None]
) -> None:
    """Sends the lines of metrics.jsonl as they come, until `ended`."""
    record = Record(folder / "sent.json")
    record.write()
    service = SERVICES[spec["service"]](
        Spec(str(folder), spec["project"], spec["name"], spec["group"], record.identity, spec["settings"])
    )
    if service.note:
        say(service.note)
    log = Path(spec["run"]) / "metrics.jsonl"
    last: dict[str, Any] = {}
    step, at_step, bad = -1, 0, 0
    start = (record.step, record.lines)
    for lines in _new_lines(log, ended):
        for values in lines:
            at_step = at_step + 1 if values["step"] == step else 1
            step = values["step"]
            last |= values
            if (step, at_step) <= start:
                continue
            try:
                service.log(step, numbers(values))
                bad = 0
            except Exception as error:
                bad += 1
                if bad == 1:
                    say(redact(f"step {step:,}: {type(error).__name__}: {error}".splitlines()[0]))
                if bad > GIVE_UP:
                    raise
                continue
            record.step, record.lines = step, at_step
        service.flush()
        with suppress(OSError):
            record.write()
    try:
        _tables(service, Path(spec["run"]), max(step, 0), last)
    except Exception as error:
        say(redact(f"no tables: {type(error).__name__}: {error}".splitlines()[0]))
    service.close(failed=bool(failed and failed[0]))
    with suppress(OSError):
        record.write()


def _new_lines(log: Path, ended: threading.Event) -> Iterator[list[dict[str, Any]]]:
    """The whole lines that were added since the last time, parsed; once more after `ended`."""
    position, rest = 0, b""
    while True:
        done = ended.wait(POLL)
        with suppress(FileNotFoundError), log.open("rb") as file:
            file.seek(position)
            data = file.read()
            position += len(data)
            *whole, rest = (rest + data).split(b"\n")
            lines = []
            for line in whole:
                with suppress(ValueError):
                    values = json.loads(line)
                    if isinstance(values, dict) and isinstance(values.get("step"), int):
                        lines.append(values)
            if lines:
                yield lines
        if done:
            return


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by flat names: `validation/accuracy`, `validation/accuracy_interval/0`, `loss`."""
    out: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}/{key}" if name else key, item)
        elif isinstance(value, list):
            for at, item in enumerate(value):
                add(f"{name}/{at}", item)
        elif isinstance(value, int | float) and name != "step":
            out[name] = float(value)

    add("", values)
    return out


def _tables(service: Service, run: Path, step: int, last: dict[str, Any]) -> None:
    """The last validation's confusion table and the forgetting matrix, if there is one, as tables and as images."""

    def show(name: str, columns: Sequence[str], rows: list[tuple[Any, ...]]) -> None:
        service.table(step, name, columns, rows)
        service.picture(step, f"{name}/picture", heat_map(columns, rows))

    found = (last.get("validation") or {}).get("confusion")
    if found:
        show(
            "confusion",
            ("solution is", "called correct", "called incorrect"),
            [
                ("correct", found["true_positive"], found["false_negative"]),
                ("incorrect", found["false_positive"], found["true_negative"]),
            ],
        )
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads((run / "forgetting.json").read_bytes())
        names = [item["name"] for item in kept["slices"]]
        for probe, matrix in kept["accuracy"].items():
            rows = [(phase["name"], *row) for phase, row in zip(kept["phases"], matrix, strict=True)]
            show(f"forgetting/{probe}", ("accuracy after phase", *names), rows)


def _quiet() -> Callable[[str], None]:
    """Sends all that is printed nowhere, and gives what prints to the process that started this one."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def say(text: str) -> None:
        with suppress(OSError):
            out.write(text.replace("\n", " ") + "\n")
            out.flush()

    return say


if __name__ == "__main__":
    main()
