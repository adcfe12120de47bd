"""metrics.jsonl: every line there once, whatever was written after the step that a run goes on from."""

import json
import math
from pathlib import Path

import pytest

from veritune.track import Tracker


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Five steps, validated at 2 and 4."""
    path = tmp_path / "metrics.jsonl"
    tracker = Tracker(path, from_step=0)
    for step in range(1, 6):
        tracker.log(step, loss=1 / step)
        if step % 2 == 0:
            tracker.log(step, validation={"accuracy": step / 10})
    tracker.close()
    return path


def test_lines_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "metrics.jsonl", from_step=0)
    tracker.log(1, loss=0.5, name="é")
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "name": "é"}]
    tracker.close()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 5])
def test_what_came_after_the_step_is_dropped_and_the_rest_stays(log: Path, step: int) -> None:
    before = lines(log)
    tracker = Tracker(log, from_step=step)
    assert lines(log) == [line for line in before if int(str(line["step"])) <= step]
    tracker.log(step + 1, loss=7)
    tracker.close()
    assert lines(log)[-1] == {"step": step + 1, "loss": 7}


def test_a_validation_that_is_measured_again_is_dropped_too(log: Path) -> None:
    before = lines(log)
    Tracker(log, from_step=4, validated=2).close()
    assert lines(log) == [line for line in before if (line["step"], "validation" in line) < (4, True)]


@pytest.mark.parametrize(
    "torn",
    [
        b'{"step": 6, "lo',
        b'{"step": 3, "loss": 0.1}',
        b"\x00\x00\x00\x00",
        b"\xff\xfe",
        b"[1]\n",
        b"7\n",
        b'{"a": 1}\n',
    ],
)
def test_a_line_that_is_none_is_dropped(log: Path, torn: bytes) -> None:
    before = lines(log)
    log.write_bytes(log.read_bytes() + torn)
    tracker = Tracker(log, from_step=5)
    tracker.log(6, loss=7)
    tracker.close()
    assert lines(log) == [*before, {"step": 6, "loss": 7}]


def test_a_torn_line_between_whole_ones_costs_only_itself(log: Path) -> None:
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*whole[:3], b'{"step": 2, "lo\n', *whole[3:]]))
    Tracker(log, from_step=99).close()
    assert log.read_bytes() == b"".join(whole)


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    """What other readers of JSON take: no NaN, no Infinity."""
    tracker = Tracker(tmp_path / "metrics.jsonl", from_step=0)
    tracker.log(1, loss=math.nan, validation={"auroc": math.nan, "auroc_interval": None, "range": (0.5, -math.inf)})
    assert tracker.sync() == (tmp_path / "metrics.jsonl").stat().st_size
    tracker.close()
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "validation": {"auroc": None, "auroc_interval": None, "range": [0.5, None]}}
    ]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_what_stays_is_not_written_anew(log: Path) -> None:
    """A kill while the file is being written would lose it."""
    place = log.stat().st_ino
    Tracker(log, from_step=3).close()
    assert log.stat().st_ino == place
    assert len(lines(log)) == 4


def test_a_full_disk_is_told_with_the_file_and_what_to_do(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "metrics.jsonl", from_step=0)
    tracker.close()
    tracker._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device\. Make room there") as error:
        tracker.log(1, loss=0.5)
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    # The end of the run tries again: its error is what the user sees.
    with pytest.raises(OSError, match=r"No space left on device\. Make room there") as error:
        tracker.close()
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    tracker.close()
