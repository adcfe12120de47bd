"""A run whose machine is gone goes on from its replica alone, with all that the run folder held."""

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_tensors import latest, tensors
from runs import assert_same, checkpoints, metrics, prepared, settings, trained

from veritune import config, durable
from veritune.data.generate import generate
from veritune.errors import CheckpointError, ConfigError
from veritune.training import checkpoint, replica, runfolder
from veritune.training.fetch import fetch


def described(**train: Any) -> dict[str, Any]:
    return runfolder.described(config.build(config.Run, {"out": "x", "train": train}, "test"), {})


VALUES = described(lr=0.1)


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(replica, "WAITS", (0.01, 0.01))
    (tmp_path / "drive").mkdir()
    return tmp_path / "drive" / "run"


def session(out: Path, drive: Path, *steps: int, keep: int = 9) -> None:
    """Saves at steps, with a line of metrics for each and a best adapter that says after which step it was."""
    (out / "best").mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(VALUES))
    saver = checkpoint.Saver(out / "checkpoints", keep=keep, replica=drive, run=out, warn=pytest.fail)
    for step in steps:
        with (out / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {step}}}\n')
        (out / "best" / "README.md").write_text(f"{step}")
        saver.save(step, tensors(step), {"step": step})
        saver.close()  # the copy of each, not only of the last
        with (out / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {step + 1}}}\n')  # after the save: not of it


def replaced(copy: Path, name: str, data: bytes) -> None:
    """Puts other bytes into a copy, as if they had been saved."""
    (copy / name).write_bytes(data)
    body = durable.read_manifest(copy)
    entries = body["files"] | {name: durable.entry_of(data)}
    (copy / "manifest.json").write_bytes(durable.manifest(body["step"], entries))


def seen(out: Path) -> tuple[str, str, int]:
    return (
        (out / "metrics.jsonl").read_text(),
        (out / "best" / "README.md").read_text(),
        latest(out / "checkpoints").step,
    )


def bring(out: Path, drive: Path, values: dict[str, Any] = VALUES, warned: list[str] | None = None) -> int | None:
    return fetch(out, drive, values, lambda *unused: False, pytest.fail if warned is None else warned.append)


def test_a_new_machine_gets_everything_as_it_was_at_the_save(tmp_path: Path, drive: Path) -> None:
    session(tmp_path / "a", drive, 1, 2)
    assert bring(tmp_path / "b", drive) == 2
    assert seen(tmp_path / "b") == ('{"step": 1}\n{"step": 2}\n{"step": 2}\n', "2", 2)
    assert json.loads((tmp_path / "b" / "run.json").read_text()) == VALUES
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "best",
        "checkpoints",
        "metrics.jsonl",
        "run.json",
    ]
    assert bring(tmp_path / "b", drive) is None


def test_a_machine_that_is_behind_is_brought_up_and_one_that_is_ahead_left_alone(tmp_path: Path, drive: Path) -> None:
    session(tmp_path / "a", drive, 1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    session(tmp_path / "b", drive, 2)
    assert bring(tmp_path / "a", drive) == 2
    assert seen(tmp_path / "a")[1:] == ("2", 2)
    (tmp_path / "other").mkdir()
    session(tmp_path / "a", tmp_path / "other" / "run", 3)
    before = seen(tmp_path / "a")
    assert bring(tmp_path / "a", drive) is None
    assert seen(tmp_path / "a") == before


def test_a_damaged_local_checkpoint_comes_from_the_replica(tmp_path: Path, drive: Path) -> None:
    session(tmp_path / "a", drive, 1, 2)
    file = tmp_path / "a" / "checkpoints" / "step-00000002" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert bring(tmp_path / "a", drive) == 2
    assert seen(tmp_path / "a")[1:] == ("2", 2)


@pytest.mark.parametrize("form", ["hidden", "empty", "flipped"])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "run/metrics.jsonl", "run/best/README.md"])
def test_files_that_are_late_or_damaged_lead_to_the_copy_before(
    tmp_path: Path, drive: Path, name: str, form: str
) -> None:
    session(tmp_path / "a", drive, 1, 2)
    rng = random.Random(name)
    for path in drive.rglob("*"):
        age = rng.randrange(10**9)
        os.utime(path, (age, age))
    file = drive / "step-00000002" / name
    data = file.read_bytes()
    if form == "hidden":
        file.unlink()
    else:
        file.write_bytes(b"" if form == "empty" else bytes([data[0] ^ 1]) + data[1:])
    warned: list[str] = []
    assert bring(tmp_path / "b", drive, warned=warned) == 1
    assert seen(tmp_path / "b")[1:] == ("1", 1)
    assert len(warned) == 1
    assert "step-00000002: " in warned[0]
    assert Path(name).name in warned[0]
    shutil.rmtree(drive / "step-00000001")
    with pytest.raises(CheckpointError, match="no checkpoint of the replica is whole"):
        bring(tmp_path / "c", drive, warned=warned)
    assert not (tmp_path / "c").exists()


def test_the_replica_of_another_run_is_refused_before_anything_is_written(tmp_path: Path, drive: Path) -> None:
    session(tmp_path / "a", drive, 1)
    with pytest.raises(ConfigError, match=r"other settings: train\.lr was 0\.1, is 0\.2"):
        bring(tmp_path / "b", drive, described(lr=0.2))
    assert not (tmp_path / "b").exists()


def test_the_replica_of_another_run_is_refused_where_it_is_behind_too(tmp_path: Path, drive: Path) -> None:
    """Training on would delete the other run's copies."""
    session(tmp_path / "a", drive, 1, 2)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "other").mkdir()
    session(tmp_path / "a", tmp_path / "other" / "run", 3)
    for copy in drive.iterdir():
        replaced(copy, "run/run.json", json.dumps(described(lr=0.2)).encode())
    refusal = r"step-00000002 holds a run with other settings: train\.lr was 0\.2, is 0\.1.*`checkpoint\.replica`"
    with pytest.raises(ConfigError, match=refusal):
        bring(tmp_path / "a", drive)
    # What cannot be read says nothing; the copy before it does.
    (drive / "step-00000002" / "run" / "run.json").write_bytes(b"")
    with pytest.raises(ConfigError, match="step-00000001 holds a run with other settings"):
        bring(tmp_path / "a", drive)
    (drive / "step-00000001" / "manifest.json").unlink()
    assert bring(tmp_path / "a", drive) is None


def test_a_folder_that_holds_something_else_is_left_as_it_is(tmp_path: Path, drive: Path) -> None:
    session(tmp_path / "a", drive, 1, 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000002")
    (tmp_path / "b" / "run.json").write_text(json.dumps(described(lr=0.2)))
    before = seen(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"b holds a run with other settings: train\.lr was 0\.2, is 0\.1"):
        bring(tmp_path / "b", drive)
    assert seen(tmp_path / "b") == before
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="c is not empty and holds no run"):
        bring(tmp_path / "c", drive)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["README.md"]
    with pytest.raises(ConfigError, match="this is a file"):
        bring(tmp_path / "d", tmp_path / "c" / "README.md")
    with pytest.raises(ConfigError, match="lies in the run folder"):
        bring(tmp_path / "a", tmp_path / "a" / "copies")


def test_a_drive_that_is_not_mounted_at_the_start(tmp_path: Path, drive: Path) -> None:
    session(tmp_path / "a", drive, 1)
    shutil.rmtree(drive.parent)
    with pytest.raises(ConfigError, match=r"drive is not there\. Mount the drive"):
        bring(tmp_path / "b", drive)
    warned: list[str] = []
    assert bring(tmp_path / "a", drive, warned=warned) is None
    assert "is the drive mounted?" in warned[0]


def test_a_file_that_is_gone_when_it_is_read_leads_to_the_copy_before(
    tmp_path: Path, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session(tmp_path / "a", drive, 1, 2)
    read = durable.read_file

    def flaky(path: Path, entry: Any) -> bytes:
        if path.match("step-00000002/state.json"):
            path.unlink()
        return read(path, entry)

    monkeypatch.setattr("veritune.training.fetch.read_file", flaky)
    warned: list[str] = []
    assert bring(tmp_path / "b", drive, warned=warned) == 1
    assert "state.json cannot be read" in warned[0]


def test_a_mount_that_does_not_answer_stops_no_run_that_has_a_checkpoint(
    tmp_path: Path, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session(tmp_path / "a", drive, 1)
    stat = Path.stat

    def dead(path: Path, **how: Any) -> os.stat_result:
        if path.is_relative_to(drive.parent):
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", dead)
    warned: list[str] = []
    assert bring(tmp_path / "a", drive, warned=warned) is None
    assert all("Transport endpoint is not connected" in line for line in warned)
    with pytest.raises(ConfigError, match="Mount the drive"):
        bring(tmp_path / "b", drive, warned=warned)


def test_a_fetch_that_is_cut_off_is_begun_again(tmp_path: Path, drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session(tmp_path / "a", drive, 1, 2)
    real, calls = os.fsync, 0
    while True:
        left = calls = calls + 1

        def fsync(file: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            real(file)

        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                bring(tmp_path / "b", drive)
                break
            except KeyboardInterrupt:
                pass
        assert bring(tmp_path / "b", drive) in (2, None)
        assert seen(tmp_path / "b") == ('{"step": 1}\n{"step": 2}\n{"step": 2}\n', "2", 2)
    assert calls > 10


def test_training_goes_on_from_the_replica_alone(tiny_folder: Path, tmp_path: Path, drive: Path) -> None:
    data = prepared(generate(12, solutions_per_question=4, seed=1), tmp_path / "d", 8)

    def run(name: str, model: Path = tiny_folder) -> config.Run:
        it = {"every": 1, "keep": 9, "replica": str(drive)}
        return settings(tmp_path / name, data, model, validation={"every": 2}, checkpoint=it)

    trained(run("a"))
    copies = sorted(path.name for path in drive.iterdir())
    assert copies[-1] == checkpoints(tmp_path / "a")[-1].name
    model = Path(shutil.copytree(tiny_folder, tmp_path / "elsewhere"))  # where this machine has it
    kept = [name for name in copies if name <= "step-00000003"]  # of copies that wait, only the newest is made
    for name in copies[len(kept) :]:
        shutil.rmtree(drive / name)
    printed = trained(run("b", model))[1]
    assert "brought back from" in printed
    assert f"going on after step {int(kept[-1].removeprefix('step-'))}" in printed
    assert metrics(tmp_path / "b")[0]["step"] == 1
    for name in ("adapter_config.json", "veritune.json"):
        file = tmp_path / "b" / "adapter" / name
        assert str(model) in file.read_text()
        file.write_text(file.read_text().replace(str(model), str(tiny_folder)))
    assert_same(tmp_path / "a", tmp_path / "b")
    # And a drive that goes away while it trains stops nothing.
    shutil.rmtree(drive.parent)
    drive.parent.mkdir()
    real = checkpoint.Saver.save

    def save(self: checkpoint.Saver, step: int, *args: Any) -> None:
        shutil.rmtree(drive.parent, ignore_errors=True)
        real(self, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Saver, "save", save)
        printed = trained(run("c"))[1]
    assert "mount the drive again" in printed
    assert_same(tmp_path / "a", tmp_path / "c")


def test_a_replica_that_missed_copies_gets_the_newest_when_the_command_is_given_again(
    tiny_folder: Path, tmp_path: Path, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared(generate(12, solutions_per_question=4, seed=1), tmp_path / "d", 8)
    run = settings(tmp_path / "run", data, tiny_folder, checkpoint={"every": 2, "replica": str(drive)})
    real = replica._write

    def write(source: replica.Source, target: Path) -> None:
        real(source, target)
        if source.step == 2:
            drive.parent.rename(tmp_path / "away")

    with monkeypatch.context() as patch:
        patch.setattr(replica, "_write", write)
        said = trained(run)[1]
    assert "could not be copied" in said
    (tmp_path / "away").rename(drive.parent)
    assert [path.name for path in drive.iterdir()] == ["step-00000002"]
    trained(run)  # which has no step left to do
    last = checkpoints(tmp_path / "run")[-1]
    assert sorted(path.name for path in drive.iterdir()) == ["step-00000002", last.name]
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl", "evaluation.json"):
        assert (drive / last.name / "run" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    before = (drive / last.name / "manifest.json").stat().st_mtime_ns
    trained(run)  # and once it is there, it stays as it is
    assert (drive / last.name / "manifest.json").stat().st_mtime_ns == before
    assert len(list(drive.iterdir())) == 2
    # The same where the run goes on, before its next checkpoint.
    shutil.rmtree(drive)
    for path in checkpoints(tmp_path / "run")[1:]:
        shutil.rmtree(path)
    copied = []
    monkeypatch.setattr(replica, "_write", lambda source, target: (copied.append(source.step), real(source, target)))
    trained(run)
    assert copied[0] == 4
