"""Real processes, real signals: whatever a run is doing, it stops in time, and the same command goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import prepared

from veritune.data.generate import generate

HERE = Path(__file__).parent
pytestmark = [pytest.mark.alone, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
STAGES = ("loading", "compiling", "validating", "saving", "replica", "twice", "twice-saving")


@pytest.fixture(scope="module")
def stopped(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stops")
    data = prepared(generate(16, solutions_per_question=4, seed=1), folder / "d", 16)
    command = [sys.executable, str(HERE / "stops.py"), str(folder), str(tiny_folder), str(data), *STAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_is_clean_and_the_run_goes_on_to_the_same_end(stopped: dict[str, Any], stage: str) -> None:
    found = stopped[stage]
    assert found["code"] == 130, found["said"]
    assert "Traceback" not in found["said"]
    assert found["same"], found["said"]


@pytest.mark.parametrize(
    ("stage", "steps", "says"),
    [
        ("loading", [], "stopped by SIGTERM before the first step"),
        ("compiling", [1, 2, 3], "stopped by SIGTERM after step 3"),
        ("validating", [2, 3], "stopped by SIGINT after step 3"),
        ("saving", [1, 2], "stopped by SIGTERM after step"),
        ("replica", [1], "stopped by SIGTERM after step"),
    ],
)
def test_what_is_done_is_saved_and_said(stopped: dict[str, Any], stage: str, steps: list[int], says: str) -> None:
    assert says in stopped[stage]["said"]
    assert set(steps) & set(stopped[stage]["left"]) or not steps
    # The waits before a stop is forced, and for a drive that hangs, are 1 s and 3 s there instead of 8 s and 25 s.
    assert stopped[stage]["seconds"] < 10


def test_a_drive_that_hangs_is_named(stopped: dict[str, Any]) -> None:
    assert "still copying after" in stopped["replica"]["said"]


@pytest.mark.parametrize("stage", ["twice", "twice-saving"])
def test_a_second_interrupt_quits_at_once(stopped: dict[str, Any], stage: str) -> None:
    assert stopped[stage]["seconds"] < 1.5
