"""A mounted drive may be slow, late, full or gone: training never notices, and a new machine resumes from it alone."""

import os
import random
import shutil
import threading
import time
from pathlib import Path

import made_tensors
import pytest
import torch
from made_tensors import latest, tensors

from veritune.errors import CheckpointError
from veritune.training import checkpoint, replica

pytestmark = pytest.mark.alone


def save(local: Path, drive: Path, *steps: int, keep: int = 2) -> list[str]:
    warned = []
    for step in steps:
        made_tensors.save(local, step, tensors(step), {"step": step}, keep=keep, replica=drive, warn=warned.append)
    return warned


@pytest.fixture
def drive(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(replica, "WAITS", (0.01, 0.01))
    (tmp_path / "drive").mkdir()
    return tmp_path / "drive" / "run"


def test_a_new_machine_resumes_from_the_replica_alone(tmp_path, drive):
    assert save(tmp_path / "run", drive, 1, 2, 3) == []
    assert sorted(os.listdir(drive)) == ["step-00000002", "step-00000003"]
    shutil.rmtree(tmp_path / "run")
    saved = checkpoint.load_latest(drive)
    assert saved is not None
    assert (saved.step, saved.path) == (3, drive / "step-00000003")
    assert torch.equal(saved.tensors["adapter"]["a"], tensors(3)["adapter"]["a"])


def test_shuffled_file_times_and_files_not_visible_yet(tmp_path, drive):
    rng = random.Random(0)
    save(tmp_path / "run", drive, 1, 2)
    names = ["adapter.safetensors", "state.json", "manifest.json"]
    for hidden in (["adapter.safetensors"], ["state.json"], ["manifest.json"], names[:2], names[1:], names):
        for form in ("hidden", "empty", "partial"):
            seen = tmp_path / f"seen-{len(hidden)}-{hidden[0]}-{form}"
            shutil.copytree(drive, seen)
            for name in hidden:
                path = seen / "step-00000002" / name
                data = path.read_bytes()
                path.unlink()
                if form != "hidden":
                    path.write_bytes(data[: len(data) // 2] if form == "partial" else b"")
            for path in seen.rglob("*"):
                age = rng.randrange(10**9)
                os.utime(path, (age, age))
            warned = []
            assert latest(seen, warned).step == 1
            assert len(warned) == 1
            assert "step-00000002" in warned[0]


def test_a_replica_with_nothing_whole_does_not_start_over_in_silence(tmp_path, drive):
    save(tmp_path / "run", drive, 1)
    (drive / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not all of it is visible yet"):
        checkpoint.load_latest(drive, warn=lambda text: None)


def test_nothing_is_renamed_on_the_drive(tmp_path, drive, monkeypatch):
    real = os.rename

    def rename(source, target):
        assert "drive" not in (Path(source).parent.parent.name, Path(target).parent.parent.name)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert save(tmp_path / "run", drive, 1, 2, 3, 3) == []
    assert latest(drive).step == 3


def test_the_mark_comes_after_every_file_was_written(tmp_path, drive, monkeypatch):
    order, real = [], replica.write_file

    def write_file(path, parts):
        order.append(path.name)
        return real(path, parts)

    monkeypatch.setattr(replica, "write_file", write_file)
    save(tmp_path / "run", drive, 1)
    assert order == ["adapter.safetensors", "state.json", "manifest.json"]


def test_a_step_saved_again_does_not_touch_the_copy_before_the_new_one_is_whole(tmp_path, drive, monkeypatch):
    save(tmp_path / "run", drive, 1, keep=1)
    assert made_tensors.copied(tmp_path / "run" / "step-00000001", drive, keep=1, warn=pytest.fail), "already there"
    assert os.listdir(drive) == ["step-00000001"]
    real, seen = replica.write_file, []

    def write_file(path, parts):
        seen.append(checkpoint.load_latest(drive, warn=lambda text: None).state)
        return real(path, parts)

    monkeypatch.setattr(replica, "write_file", write_file)
    made_tensors.save(tmp_path / "run", 1, tensors(9), {"again": 1}, keep=1, replica=drive, warn=pytest.fail)
    assert seen == [{"step": 1}] * 3
    assert os.listdir(drive) == ["step-00000001.1"]
    assert checkpoint.load_latest(drive).state == {"again": 1}
    save(tmp_path / "run", drive, 2, keep=1)
    assert os.listdir(drive) == ["step-00000002"]


def test_a_drive_that_vanished_is_a_warning_and_its_mount_point_is_not_filled(tmp_path, drive):
    save(tmp_path / "run", drive, 1)
    shutil.rmtree(drive.parent)
    warned = save(tmp_path / "run", drive, 2)
    assert len(warned) == 1
    assert "is not there; mount the drive again" in warned[0]
    assert not drive.parent.exists()
    assert made_tensors.steps(tmp_path / "run") == [1, 2]
    drive.parent.mkdir()
    assert save(tmp_path / "run", drive, 3) == []
    assert checkpoint.load_latest(drive).step == 3


def test_a_drive_that_vanishes_during_the_copy(tmp_path, drive, monkeypatch):
    real = replica.write_file

    def write_file(path, parts):
        entry = real(path, parts)
        if path.name == "state.json":
            shutil.rmtree(drive.parent)
        return entry

    monkeypatch.setattr(replica, "write_file", write_file)
    warned = save(tmp_path / "run", drive, 1)
    assert len(warned) == 1
    assert "could not be copied" in warned[0]
    assert latest(tmp_path / "run").step == 1


def test_a_drive_that_shows_files_late_is_given_time(tmp_path, drive, monkeypatch):
    monkeypatch.setattr(replica, "WAITS", (0.3, 1.0, 5.0))
    real = replica.write_file

    def write_file(path, parts):
        entry = real(path, parts)
        if path.name == "adapter.safetensors":
            os.rename(path, path.with_suffix(".late"))
            threading.Timer(0.2, os.rename, (path.with_suffix(".late"), path)).start()
        return entry

    monkeypatch.setattr(replica, "write_file", write_file)
    assert save(tmp_path / "run", drive, 1) == []
    assert latest(drive).step == 1


def test_a_local_checkpoint_that_rotted_is_not_copied_over_a_whole_one(tmp_path, drive):
    save(tmp_path / "run", drive, 1)
    path = made_tensors.save(tmp_path / "run", 2, tensors(2), {})
    (path / "state.json").write_bytes(b"[]")
    warned = []
    assert not made_tensors.copied(path, drive, keep=1, warn=warned.append)
    assert "state.json is damaged in the local checkpoint" in warned[0]
    assert os.listdir(drive) == ["step-00000001"]


def slow_drive(monkeypatch, seconds: float) -> threading.Event:
    real, begun = replica.write_file, threading.Event()

    def write_file(path, parts):
        begun.set()
        time.sleep(seconds)
        return real(path, parts)

    monkeypatch.setattr(replica, "write_file", write_file)
    return begun


def test_a_slow_drive_delays_neither_training_nor_the_next_save(tmp_path, drive, monkeypatch):
    begun, warned = slow_drive(monkeypatch, 0.5), []
    saver = checkpoint.Saver(tmp_path / "run", keep=1, replica=drive, warn=warned.append)
    begin = time.perf_counter()
    saver.save(1, tensors(1), {"step": 1})
    assert begun.wait(10)
    for step in range(2, 6):  # step 1 is deleted locally while it is copied
        saver.save(step, tensors(step), {"step": step})
    saver.wait()
    assert time.perf_counter() - begin < 1.5, "a copy takes at least 1.5 s"
    assert made_tensors.steps(tmp_path / "run") == [5]
    saver.close()
    assert warned == []
    assert os.listdir(drive) == ["step-00000005"]
    assert latest(drive).step == 5


def test_a_drive_that_hangs_does_not_keep_the_run_from_ending(tmp_path, drive, monkeypatch):
    slow_drive(monkeypatch, 2.0)
    warned = []
    saver = checkpoint.Saver(tmp_path / "run", replica=drive, warn=warned.append)
    saver.save(1, tensors(1), {})
    begin = time.perf_counter()
    saver.close(timeout=0.2)
    assert time.perf_counter() - begin < 1.5
    assert len(warned) == 1
    assert "still copying after 0.2 s" in warned[0]


def test_what_goes_wrong_in_the_thread_is_told_at_the_next_save(tmp_path, drive):
    warned: list[tuple[str, str]] = []
    saver = checkpoint.Saver(
        tmp_path / "run", replica=drive, warn=lambda text: warned.append((threading.current_thread().name, text))
    )
    shutil.rmtree(drive.parent)
    for step in (1, 2):
        saver.save(step, tensors(step), {})
        saver.wait()
        time.sleep(0.2)
    saver.close()
    assert [thread for thread, _ in warned] == ["MainThread", "MainThread"]
    assert "step-00000001 could not be copied" in warned[0][1]
    assert "step-00000002 could not be copied" in warned[1][1]
