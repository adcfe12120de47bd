"""Killed, out of power, out of space: at every call of a save, at random moments, and with the real disk errors."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_tensors import save, steps, tensors

from veritune.errors import CheckpointError
from veritune.training import checkpoint, replica

HERE = Path(__file__).parent


def run(script: str, *args: object, preload: Path | None = None) -> Any:
    environment = {**os.environ, **({"LD_PRELOAD": str(preload)} if preload else {})}
    command = [sys.executable, str(HERE / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs on a busy disk take minutes and show nothing more."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


needs_fork = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs fork and /proc (Linux)")


@needs_fork
@pytest.mark.parametrize("what", ["next", "again", "publish", "replica"])
def test_death_after_every_call_leaves_a_whole_checkpoint(scratch, what):
    # Files opened, written and synced; folder, renames, syncs, deletions: as many calls as there are to die at.
    assert min(run("crashes.py", "calls", scratch / "x", what)["died"]) >= 15


@needs_fork
def test_kill_at_random_moments_leaves_a_whole_checkpoint(scratch):
    counted = run("crashes.py", "kill", scratch / "x", 20, 0)
    assert counted["saves"] > 5


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kill_at_200_random_moments_leaves_a_whole_checkpoint(scratch, seed):
    counted = run("crashes.py", "kill", scratch / "x", 200, seed)
    assert counted["saves"] > 20


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD (Linux)")
    built = tmp_path_factory.mktemp("shim") / "faults.so"
    made = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", built, HERE / "faults.c", "-ldl"], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"faults.c could not be compiled: {made.stderr.decode()[-300:]}")
    return built


@pytest.mark.parametrize("what", ["next", "again", "replica"])
def test_a_disk_error_at_every_call_leaves_the_previous_checkpoint(scratch, shim, what):
    numbers = [-errno.ENOSPC, errno.EIO, -errno.EDQUOT]
    for counted in run("faults.py", scratch / "x", what, *numbers, preload=shim):
        assert counted["raised"] >= 18
        assert what != "replica" or counted["warned"] >= 15


@pytest.mark.slow
@pytest.mark.parametrize("what", ["next", "again", "replica"])
def test_a_disk_error_that_comes_once_or_stays_leaves_the_previous_checkpoint(scratch, shim, what):
    numbers = [errno.ENOSPC, -errno.EIO, errno.EDQUOT, errno.EROFS, -errno.ENOTCONN, errno.ESTALE]
    for counted in run("faults.py", scratch / "x", what, *numbers, preload=shim):
        assert counted["raised"] >= 18


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def big(count: int) -> dict:
    return {"adapter": {"w": tensors()["adapter"]["a"].repeat(count // 32, 1)}}


def test_a_full_disk(small_disk):
    folder = small_disk / "run"
    save(folder, 1, big(20_000), {}, keep=1)
    with pytest.raises(CheckpointError, match=f"No space left on device.*Free at least .* MB at {folder}"):
        save(folder, 2, big(200_000), {}, keep=1)
    assert os.listdir(folder) == ["step-00000001"]
    saved = checkpoint.load_latest(folder)
    assert saved is not None
    assert saved.step == 1
    save(folder, 2, big(20_000), {}, keep=1)
    assert steps(folder) == [2]


def test_a_full_replica_is_a_warning(tmp_path, small_disk, monkeypatch):
    monkeypatch.setattr(replica, "WAITS", (0.0,))
    drive, warned = small_disk / "run", []
    save(tmp_path / "run", 1, big(20_000), {}, replica=drive, warn=warned.append)
    assert warned == []
    save(tmp_path / "run", 2, big(200_000), {}, replica=drive, warn=warned.append)
    assert len(warned) == 1
    assert "No space left on device" in warned[0]
    assert os.listdir(drive) == ["step-00000001"]
    assert steps(tmp_path / "run") == [1, 2]
