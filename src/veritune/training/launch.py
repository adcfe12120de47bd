"""`veritune train --gpus N`: starts N processes of the same command on this machine and watches over them.

Needs no torch, so that the processes can start at once. They find each other through a file, so no port is taken.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .session import asking

STORE = "VERITUNE_STORE"
"""The environment variable with the file through which the processes find each other."""
GRACE = 30.0
"""Seconds that the others get to end by themselves when one has failed. One that waits for a GPU cannot."""


def launch(count: int, arguments: Sequence[str]) -> int:
    """Runs `veritune ARGUMENTS` in `count` processes and returns the exit code of the run.

    A signal (SIGINT, SIGTERM, SIGHUP as SIGTERM unless it is ignored) is handed on to all. When a process fails, the
    others are ended; the code is that of the first to fail, or 2, with a line on standard error, if it was killed.
    """
    with tempfile.TemporaryDirectory(prefix="veritune-ranks-") as folder:
        ranks: list[subprocess.Popen[bytes]] = []
        asked: list[int] = []

        def hand_on(number: int, frame: Any) -> None:
            asked.append(signal.SIGTERM if number == signal.SIGHUP else number)
            for process in ranks:
                process.send_signal(asked[-1])

        before = {number: signal.signal(number, hand_on) for number in asking()}
        try:
            for rank in range(count):
                ranks.append(_start(rank, count, Path(folder) / "store", arguments))
                if asked:  # the one that was starting, and those after it, would hear nothing
                    return 130
            return _watch(ranks, asked)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)


def _start(rank: int, count: int, store: Path, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(cores // count, 1))
    shared = {name: threads for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS") if name not in os.environ}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, STORE: store}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "veritune", *arguments],  # -P: as the command itself, without what lies here
        env=os.environ | shared | {name: str(value) for name, value in place.items()},
        stdin=subprocess.PIPE,  # nothing is written: it ends when this process does, and so tells them
        start_new_session=True,  # a terminal's Ctrl-C then comes once, from `hand_on`
    )


def _watch(ranks: "Sequence[subprocess.Popen[bytes]]", asked: Sequence[int]) -> int:
    codes: dict[int, int] = {}  # by rank, in the order in which they ended
    since = 0.0
    while len(codes) < len(ranks):
        for rank, process in enumerate(ranks):
            if rank not in codes and process.poll() is not None:
                codes[rank] = process.returncode
        # A stop that a signal asked for, 130, is no failure: the first process may take its time to save.
        if not since and any(code not in (0, 130) for code in codes.values()):
            since = time.monotonic()
        if since and time.monotonic() > since + GRACE:
            break
        time.sleep(0.05)
    killed = next((rank for rank, code in codes.items() if code < 0), None)
    if killed is None:
        return next(filter(None, codes.values()), 0)
    if -codes[killed] in asked:  # it had not come so far as to save before it stops
        return 130
    name = signal.Signals(-codes[killed]).name
    print(
        f"veritune: rank {killed} of {len(ranks)} processes was ended by {name}"
        f"{' (out of memory?)' * (name == 'SIGKILL')}; the same command goes on from the last checkpoint",
        file=sys.stderr,
    )
    return 2
