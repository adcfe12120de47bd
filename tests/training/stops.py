"""Sends real signals to training processes at chosen moments. Run by test_stops.py as a process of its own.

`stops.py FOLDER MODEL DATA STAGE...`: for each stage, a child trains and is slow there; once it is there it gets the
signals, and what it left is then trained to the end. Prints one JSON line: for each stage the exit code, the seconds
from the first signal to the end, the checkpoints it had left, what it printed, and whether the end is that of a run
that was never stopped.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_tensors
import torch

from veritune import cli
from veritune.training import checkpoint, measure, replica, session, trainer
from veritune.training import step as steps

torch.set_num_threads(1)  # a forked child has only its own thread

INT, TERM = signal.SIGINT, signal.SIGTERM
# Stage -> the signals, and seconds between them.
STAGES: dict[str, tuple[tuple[int, ...], float]] = {
    "loading": ((TERM,), 0),
    "compiling": ((TERM,), 0),
    "validating": ((INT,), 0),
    "saving": ((TERM,), 0),
    "replica": ((TERM,), 0),
    "twice": ((INT, INT), 0.5),
    "twice-saving": ((INT, INT), 0.1),
}


def wait(seconds: float = 60) -> None:
    """As a library does that asks nothing."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def arrange(stage: str, there: Callable[[], None]) -> None:
    """Makes this process slow at a stage, and say so when it is there. The waits of the product are shortened."""
    session.GRACE, session.PATIENCE = 1.0, 3.0
    calls = 0

    def slow(owner: Any, name: str, at: int, work: Callable[..., None]) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= at:
                there()
                work(*args, **named)
            return real(*args, **named)

        setattr(owner, name, call)

    if stage == "loading":
        slow(trainer.load, "load_base", 1, lambda *unused: wait())
    elif stage in ("compiling", "twice"):
        slow(steps, "label_logits", 4, lambda *unused: wait())
    elif stage == "validating":
        # Rows are scored, slowly, one part after the other.
        slow(measure, "score_ids", 1, lambda *args: [(wait(0.2), args[6](1)) for _ in range(300)])
    elif stage in ("saving", "twice-saving"):
        slow(checkpoint, "write_folder", 2, lambda *unused: wait(1.5))
    elif stage == "replica":
        slow(replica, "write_file", 1, lambda *unused: wait())


def child(stage: str, argv: list[str], output: Path) -> tuple[int, int]:
    """A process that trains with a slow stage; its id, and what to read the word from that it is there."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    arrange(stage, lambda: (os.write(writer, b"!"), None)[1])
    sys.exit(cli.run(argv))


def trained(folder: Path, model: str, data: str, out: str) -> list[str]:
    """The command line of a run of six steps, with a validation after the third."""
    file = folder / f"{out}.toml"
    (folder / "drive").mkdir(exist_ok=True)
    file.write_text(
        f"""out = "{folder / out}"
[data]
path = "{data}"
[model]
path = "{model}"
base = "fp32"
device = "cpu"
[prompt]
max_length = 512
[lora]
rank = 4
targets = ["q_proj", "v_proj"]
[train]
batch_size = 8
[validation]
every = 3
[checkpoint]
every = 1
keep = 9
replica = "{folder / "drive" / out}"
"""
    )
    return ["train", str(file)]


def main(folder: Path, model: str, data: str, stages: list[str]) -> None:
    # Nothing of polars may run here: its threads do not survive a fork.
    pid, _ = child("", trained(folder, model, data, "whole"), folder / "whole.txt")
    assert os.waitpid(pid, 0)[1] == 0, (folder / "whole.txt").read_text()
    want = (folder / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
    found = {}
    for stage in stages:
        argv, text = trained(folder, model, data, stage), folder / f"{stage}.txt"
        pid, reader = child(stage, argv, text)
        assert os.read(reader, 1) == b"!", text.read_text()
        signals, pause = STAGES[stage]
        began = time.monotonic()
        for number in signals:
            os.kill(pid, number)
            time.sleep(pause)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seconds = time.monotonic() - began
        left = made_tensors.steps(folder / stage / "checkpoints")
        said = text.read_text()
        pid, _ = child("", argv, folder / f"{stage}-again.txt")
        again = os.waitpid(pid, 0)[1] == 0
        end = (folder / stage / "adapter" / "adapter_model.safetensors").read_bytes() if again else b""
        found[stage] = {"code": code, "seconds": seconds, "left": left, "said": said, "same": end == want}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
