"""Dies at chosen points of a save and looks at what is left. Run by test_checkpoint_crash.py as a process of its own.

`crashes.py kill FOLDER COUNT SEED`: a child saves in a loop and is killed at a random moment, COUNT times.
`crashes.py calls FOLDER WHAT`: a child dies at its k-th call that changes the disk, for every k, in a save (WHAT =
next), a save of the same step (again), a publish, or a copy to a replica (replica). Each with keep 1 and 2, and each
once as a killed process and once as if the power went too, so that what was not synced is gone (contents of files,
names in folders, renames). Both print one JSON line with what they counted, or fail with an assertion.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from made_tensors import copied, save, steps

from veritune.training import checkpoint

torch.set_num_threads(1)  # a forked child has only its own thread
SIZE = 3000


def content(tag: int) -> dict[str, dict[str, torch.Tensor]]:
    make = torch.Generator().manual_seed(tag)
    return {
        "adapter": {name: torch.randn(SIZE, generator=make) for name in ("a", "b")},
        "optimizer": {"0.state1": torch.randint(0, 256, (SIZE,), generator=make).to(torch.uint8)},
    }


def same(saved: checkpoint.Saved | None, *tags: int) -> bool:
    """Whether `saved` is, bit for bit, what was saved under its own tag, and that is one of `tags`."""
    assert saved is not None, "no checkpoint at all"
    want = content(saved.state["tag"])
    assert all(torch.equal(want[group][name], it) for group, them in saved.tensors.items() for name, it in them.items())
    assert {group: set(them) for group, them in want.items()} == {g: set(t) for g, t in saved.tensors.items()}
    return saved.state["tag"] in tags


class Disk:
    """Counts the calls that change the disk and dies after the k-th (inside it, halfway, if it is a write)."""

    def __init__(self, die_at: int, power: bool) -> None:
        self.calls, self.die_at, self.power = 0, die_at, power
        self.dirty: dict[tuple[int, int], int] = {}  # inode -> a descriptor of it
        self.created: list[tuple[str, int]] = []  # (folder as it was named, descriptor)
        self.renamed: list[tuple[str, str]] = []
        self.real = {
            name: getattr(os, name) for name in ("write", "fsync", "rename", "open", "mkdir", "unlink", "rmdir")
        }
        for name in self.real:
            setattr(os, name, getattr(self, name, None) or self.plain(name))

    def plain(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = self.real[name](*args, **kwargs)
            self.count()
            return result

        return call

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.die_at:
            self.die()

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        file = self.real["open"](path, flags, *args, **kwargs)
        if flags & os.O_CREAT:
            self.created.append((os.path.dirname(path), os.dup(file)))
            self.count()
        return file

    def write(self, file: int, data: Any) -> int:
        status = os.fstat(file)
        self.dirty.setdefault((status.st_dev, status.st_ino), os.dup(file))
        if self.calls + 1 == self.die_at:
            self.real["write"](file, data[: len(data) // 2])
        else:
            self.real["write"](file, data)
        self.count()
        return len(data)

    def fsync(self, file: int) -> None:
        status, name = os.fstat(file), os.readlink(f"/proc/self/fd/{file}")
        self.real["fsync"](file)
        self.dirty.pop((status.st_dev, status.st_ino), None)
        self.created = [(folder, it) for folder, it in self.created if folder != name]
        self.renamed = [(a, b) for a, b in self.renamed if os.path.dirname(b) != name]
        self.count()

    def rename(self, source: Any, target: Any) -> None:
        self.real["rename"](source, target)
        self.renamed.append((os.fspath(source), os.fspath(target)))
        self.count()

    def die(self) -> None:
        if self.power:
            for file in self.dirty.values():
                os.ftruncate(file, 0)
            for source, target in reversed(self.renamed):
                if os.path.exists(target) and not os.path.exists(source):
                    self.real["rename"](target, source)
            for _, file in self.created:
                name = os.readlink(f"/proc/self/fd/{file}")
                if os.path.exists(name):
                    self.real["unlink"](name)
        os._exit(9)


def forked(work: Callable[[], None]) -> int:
    """The exit status of a child that does `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def at_every_call(folder: Path, keep: int, what: str, power: bool) -> int:
    local, drive, died = folder / "run", folder / "drive" / "run", 0
    quiet: list[str] = []
    while True:
        fresh(folder)
        drive.parent.mkdir()
        remote = drive if what == "replica" else None
        for step in range(1, keep + 1):
            save(local, step, content(step), {"tag": step}, keep=keep, replica=remote, warn=quiet.append)
        if what == "publish":
            checkpoint.publish(folder / "best", {"a.safetensors": content(1)["adapter"], "tag": b"1"})
        if what == "replica":
            save(local, keep + 1, content(99), {"tag": 99}, keep=keep)

        def work(die_at: int = died + 1) -> None:
            Disk(die_at, power)
            if what == "publish":
                checkpoint.publish(folder / "best", {"a.safetensors": content(99)["adapter"], "tag": b"99"})
            elif what == "replica":
                assert copied(local / f"step-{keep + 1:08d}", drive, keep=keep, warn=quiet.append)
            else:
                step = keep + (what == "next")
                save(local, step, content(99), {"tag": 99}, keep=keep)

        code = forked(work)
        assert code in (0, 9), f"the child failed at call {died + 1}"
        if what == "publish":
            checkpoint.settle(folder / "best")
            tag = int((folder / "best" / "tag").read_bytes())
            found = checkpoint.safetensors.torch.load_file(folder / "best" / "a.safetensors")
            assert tag in (1, 99), tag
            assert all(torch.equal(it, found[name]) for name, it in content(tag)["adapter"].items())
            assert tag == 99 or code == 9
            assert sorted(path.name for path in folder.iterdir()) == ["best", "drive", "run"]
        elif what == "replica":
            assert same(checkpoint.load_latest(drive, warn=quiet.append), keep, 99)
            assert copied(local / f"step-{keep + 1:08d}", drive, keep=keep, warn=quiet.append), quiet
            assert same(checkpoint.load_latest(drive, warn=quiet.append), 99)
            assert len(list(drive.iterdir())) == keep
        else:
            assert same(checkpoint.load_latest(local, warn=quiet.append), keep, 99), f"call {died + 1}"
            assert code == 9 or same(checkpoint.load_latest(local, warn=quiet.append), 99)
            save(local, keep + 1, content(98), {"tag": 98}, keep=keep)
            assert same(checkpoint.load_latest(local, warn=quiet.append), 98)
            assert len(list(local.iterdir())) == keep == len(steps(local)), sorted(local.iterdir())
        if code == 0:
            assert what == "replica" or not quiet, quiet
            return died
        died += 1


def at_random(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Kills while steps are saved, each of them twice (tags 2 x step and 2 x step + 1), with keep=1."""
    global SIZE
    SIZE = 100_000
    rng, at, lost = random.Random(seed), 0, 0
    fresh(folder)
    begin = time.perf_counter()
    for step in range(5):
        save(folder / "pace", step, content(step), {"tag": step})
    pace = (time.perf_counter() - begin) / 5
    shutil.rmtree(folder / "pace")
    for _ in range(count):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            tag = at
            while True:
                tag += 1
                os.write(writer, f"{tag}?".encode())
                save(folder, tag // 2, content(tag), {"tag": tag}, keep=1)
                os.write(writer, f"{tag}!".encode())
        os.close(writer)
        os.read(reader, 1)  # it has begun
        time.sleep(rng.uniform(0, 4 * pace))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        rest = b"?" + b"".join(iter(lambda: os.read(reader, 65536), b""))  # noqa: B023
        os.close(reader)
        done = at + rest.count(b"!")
        begun = at + max(1, rest.count(b"?") - 1)
        saved = checkpoint.load_latest(folder)
        if saved is None:
            assert done == 0
            continue
        assert same(saved, done, begun), (done, begun, saved.state)
        lost += saved.state["tag"] != done
        at = saved.state["tag"]
    save(folder, at, content(at), {"tag": at}, keep=1)
    assert len(list(folder.iterdir())) == 1, "a save after the kills leaves only its own checkpoint"
    return {"kills": count, "saves": at, "ahead": lost}


if __name__ == "__main__":
    mode, where, *rest = sys.argv[1:]
    if mode == "kill":
        print(json.dumps(at_random(Path(where), int(rest[0]), int(rest[1]))))
    else:
        died = [at_every_call(Path(where), keep, rest[0], power) for keep in (1, 2) for power in (False, True)]
        print(json.dumps({"died": died}))
