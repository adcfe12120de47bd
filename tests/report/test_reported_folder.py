"""Reading a run folder: while it grows, after a resume has cut it, whatever state it is in."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from veritune import config
from veritune.errors import DataError, MissingError
from veritune.report import folder
from veritune.report.words import duration
from veritune.track import Tracker
from veritune.training import plan, runfolder, status

PLAN = plan.make(config.Train(batch_size=2, per_question=1), np.arange(40), np.arange(40) % 2 == 0)  # 20 steps


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A run folder as training makes it, before the first step."""
    out = tmp_path / "run"
    runfolder.start(out, runfolder.described(config.Run(out=str(out)), {"fingerprint": "f", "precision": "fp32"}))
    return out


def running(out: Path, step: int = 0):
    return status.running(out, PLAN, torch.device("cpu"), step=step, parameters=7)


def test_a_real_run(finished: Path) -> None:
    run = folder.read(finished)
    assert run.state() == ("finished", "")
    assert (run.metrics.done, run.steps, run.phase()) == (6, 6, "all")
    assert [entry["step"] for entry in run.metrics.validations] == [2, 4, 6]
    assert run.metrics.best == min(run.metrics.validations, key=lambda entry: entry["loss"])
    assert {len(values) for values in run.metrics.steps.values()} == {6}
    assert run.settings["train"]["lr"] == 1e-3


def test_lines_are_taken_as_they_come_and_again_after_a_resume(fresh: Path) -> None:
    path = fresh / "metrics.jsonl"
    tracker = Tracker(path, from_step=0)
    metrics = folder.Metrics(path)
    assert not metrics.update()
    for step in range(1, 200):
        tracker.log(step, loss=1 / step, lr=0.1, grad_norm=1.0, rows=2, seconds=0.5)
        if step % 50 == 0:
            tracker.log(step, validation={"loss": step})
        if step % 7 == 0:
            assert metrics.update()
            assert metrics.done == step
    tracker.close()
    with path.open("a") as file:
        file.write('{"step": 200, "lo')
    assert metrics.update()
    assert not metrics.update()
    assert (metrics.done, len(metrics.validations)) == (199, 3)

    tracker = Tracker(path, from_step=100)  # what a resume does
    for step in range(101, 200):  # other values, until the file is as long as it was
        tracker.log(step, loss=2 / step, lr=0.1, grad_norm=1.0, rows=2, seconds=0.5)
    assert metrics.update()
    assert metrics.steps["step"] == [float(step) for step in range(1, 200)]
    assert metrics.steps["loss"][100:] == [2 / step for step in range(101, 200)]
    assert [entry["step"] for entry in metrics.validations] == [50, 100]


def test_a_nan_is_a_value_and_a_broken_line_is_none(fresh: Path) -> None:
    lines = ['{"step": 1, "loss": NaN}', "[1]", "{", '{"step": "x"}', "\x00", '{"step": 2, "loss": 1, "lr": null}', ""]
    (fresh / "metrics.jsonl").write_text("\n".join(lines))
    metrics = folder.read(fresh).metrics
    assert metrics.steps["step"] == [1, 2]
    assert math.isnan(metrics.steps["loss"][0])
    assert math.isnan(metrics.steps["lr"][1])


def test_states(fresh: Path) -> None:
    with running(fresh):
        assert folder.read(fresh).state()[0] == "running"
    status.finished(fresh)
    assert folder.read(fresh).state()[0] == "finished"
    with pytest.raises(KeyboardInterrupt), running(fresh, 3):
        raise KeyboardInterrupt
    assert folder.read(fresh).state() == ("stopped", "stopped by a signal")
    with pytest.raises(ZeroDivisionError), running(fresh, 3):
        raise ZeroDivisionError("why")
    assert folder.read(fresh).state() == ("failed", "ZeroDivisionError: why")


def change(out: Path, **values: object) -> None:
    about = json.loads((out / "status.json").read_text())
    about["sessions"][-1] |= values
    (out / "status.json").write_text(json.dumps(about))


def test_a_process_that_is_gone_was_killed(fresh: Path) -> None:
    with running(fresh):
        pass
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    change(fresh, pid=gone.pid, host=socket.gethostname())
    assert folder.read(fresh).state()[0] == "killed"


def test_on_another_machine_silence_tells(fresh: Path) -> None:
    with running(fresh):
        pass
    change(fresh, host="elsewhere")
    assert folder.read(fresh).state()[0] == "running"
    long_ago = time.time() - folder.QUIET - 60
    for file in fresh.iterdir():
        os.utime(file, (long_ago, long_ago))
    assert folder.read(fresh).state()[0] == "killed"


def test_a_folder_without_a_status_is_told_by_what_is_there(finished: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    (old / "status.json").unlink()
    assert folder.read(old).state()[0] == "finished"
    assert folder.read(old).steps is None
    (old / "evaluation.json").unlink()
    for file in old.iterdir():
        os.utime(file, (1e9, 1e9))
    assert folder.read(old).state()[0] == "stopped"


def test_time_left_counts_this_session_alone(fresh: Path) -> None:
    with running(fresh, step=4):
        change(fresh, started="2026-01-01T00:00:00+00:00")
        tracker = Tracker(fresh / "metrics.jsonl", from_step=0)
        for step in range(1, 15):
            tracker.log(step, loss=1.0)
        tracker.close()
        began = folder.datetime.fromisoformat("2026-01-01T00:00:00+00:00").timestamp()
        os.utime(fresh / "metrics.jsonl", (began + 100, began + 100))  # ten steps in 100 s
        assert folder.read(fresh).seconds_left() == pytest.approx(60)


def test_runs_are_found_and_what_is_in_them_is_not(finished: Path, tmp_path: Path) -> None:
    for place in ("b", "a/deep/run", ".hidden/run", "a/deep/run/inner"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "run.json").write_text("{}")
    assert folder.find(tmp_path) == [tmp_path / "a/deep/run", tmp_path / "b"]
    assert folder.find(finished) == [finished]
    for step in ("step-00000008", "step-00000009", "step-00000009.1"):
        (tmp_path / "drive" / step / "run").mkdir(parents=True)
        (tmp_path / "drive" / step / "run" / "run.json").write_text("{}")
    assert folder.find(tmp_path / "drive") == [tmp_path / "drive/step-00000009.1/run"]
    with pytest.raises(MissingError, match="no such folder"):
        folder.find(tmp_path / "none")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 1}', '{"settings": {}}', "\x00"])
def test_a_damaged_run_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"run\.json: damaged"):
        folder.read(tmp_path)


def test_a_folder_of_other_things_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no run folder"):
        folder.read(tmp_path)


def test_a_replica_is_told_the_run_in_its_newest_copy(fresh: Path, tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    for step in (8, 12):
        shutil.copytree(fresh, drive / f"step-{step:08d}" / "run")
    (drive / "step-00000016").mkdir()  # under way: nothing of the run is in it yet
    with pytest.raises(MissingError, match=rf"{drive}: a replica, .* {drive}/step-00000012/run$"):
        folder.read(drive)


def test_smoothing_starts_at_the_first_value_and_passes_over_nan() -> None:
    assert folder.smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert folder.smooth([1.0, float("nan"), 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    assert folder.smooth([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])
    long = [0.0] * 300 + [1.0]
    assert folder.smooth(long)[-1] == pytest.approx(0.05)
    assert folder.smooth(long[-20:])[-1] == pytest.approx(0.5)


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (120, "2 min"), (7200, "2.0 h"), (3 * 86400, "3.0 days")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
