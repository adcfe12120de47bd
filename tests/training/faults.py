"""Makes every call of a save fail, one at a time. Run by test_checkpoint_crash.py as a process of its own.

`faults.py FOLDER WHAT ERRNO...` with faults.c loaded by LD_PRELOAD; WHAT is next, again or replica as in crashes.py.
A negative number stands for an error that stays, as on a disk that stays full. Prints one JSON line with what it
counted, or fails with an assertion.
"""

import ctypes
import errno
import json
import os
import sys
from pathlib import Path

from crashes import content, fresh, same
from made_tensors import save

from veritune.errors import CheckpointError
from veritune.training import checkpoint, replica

shim = ctypes.CDLL(None)
replica.WAITS = (0.0,)


def at_every_call(folder: Path, number: int, what: str, sticky: bool) -> dict[str, int]:
    local, drive, count, raised, warned = folder / "run", folder / "drive" / "run", 0, 0, 0
    remote = drive if what == "replica" else None
    while True:
        fresh(folder)
        drive.parent.mkdir()
        save(local, 1, content(1), {"tag": 1}, keep=1, replica=remote)
        step, told = 1 + (what != "again"), []
        shim.fault_arm(count, number, int(sticky))
        try:
            save(local, step, content(2), {"tag": 2}, keep=1, replica=remote, warn=told.append)
            failed = None
        except CheckpointError as error:
            failed = str(error)
        hits = shim.fault_hits()
        if hits == 0:
            assert failed is None, failed
            assert told == []
            return {"calls": count, "raised": raised, "warned": warned}
        saved = checkpoint.load_latest(local)
        if failed is not None:
            assert same(saved, 1), f"call {count}: the checkpoint before is not the one that is left"
            assert str(local / f"step-{step:08d}") in failed
            assert os.strerror(number) in failed
            assert ("Free at least" in failed) == (number in (errno.ENOSPC, errno.EDQUOT))
            assert [path.name for path in local.iterdir()] == ["step-00000001"], sorted(local.iterdir())
            assert told == []
            raised += 1
        else:
            assert same(saved, 2), f"call {count}: saved without an error, yet not there"
            warned += bool(told)
        if remote is not None:
            # The copy is whole or was told of; either way a whole one is there.
            copied = failed is None and not any("could not be copied" in text for text in told)
            there = checkpoint.load_latest(drive, warn=lambda text: None)
            assert same(there, 2 if copied else 1), (count, told)
        save(local, 3, content(3), {"tag": 3}, keep=1, replica=remote)
        assert same(checkpoint.load_latest(local), 3)
        if remote is not None:
            assert same(checkpoint.load_latest(drive), 3)
            assert [path.name for path in drive.iterdir()] == ["step-00000003"]
        assert [path.name for path in local.iterdir()] == ["step-00000003"]
        count += 1


if __name__ == "__main__":
    where, kind, *numbers = sys.argv[1:]
    print(json.dumps([at_every_call(Path(where), abs(int(it)), kind, it.startswith("-")) for it in numbers]))
