"""A session that ends: by the clock, by a signal, by a second one; whatever the process is doing."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from veritune.training import session as sessions
from veritune.training.launch import launch
from veritune.training.session import Session, Stop, age, session

pytestmark = pytest.mark.alone

HOUR = 3600


# The clock.


def test_without_a_limit_there_is_no_end() -> None:
    it = Session()
    it.took("step", 1e6)
    it.check("step")
    assert it.patience == HOUR


def test_work_begins_only_if_it_and_a_save_will_be_done_before_the_limit() -> None:
    """1,000 seconds are left: 10 of them are for the end of the process."""
    it = Session(hours=1, age=2600)
    it.took("save", 100)
    it.took("step", 500)
    it.took("step", 5)
    it.check("step")  # 1.25 x 600 and 10
    it.took("validation", 300)
    with pytest.raises(Stop, match="the limit of 1 hours"):
        it.check("step", "validation")
    with pytest.raises(Stop):  # once it is to stop, it is to stop
        it.check()


def test_a_save_that_was_never_seen_is_given_time_all_the_same() -> None:
    Session(hours=12, age=12 * HOUR - 120).check()
    with pytest.raises(Stop):
        Session(hours=12, age=12 * HOUR - 90).check()


def test_how_long_work_takes_is_measured() -> None:
    it = Session(hours=0.1)
    with it.timing("step"):
        time.sleep(0.05)
    with it.timing("step"):
        pass
    assert 0.05 <= it.needed("step") / 1.25 - it.needed() / 1.25 < 1


def test_the_clock_began_with_the_process() -> None:
    began = age()
    time.sleep(0.1)
    assert 0.05 < age() - began < 5


# Signals.


def send(number: int, after: float = 0.0) -> None:
    threading.Timer(after, os.kill, (os.getpid(), number)).start()


def idle(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)


def test_before_there_is_anything_to_save_a_signal_stops_at_once() -> None:
    def wait(number: int) -> None:
        with session():
            send(number)
            idle(10)

    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(Stop, match=signal.Signals(number).name):
            wait(number)


def test_while_it_trains_a_signal_waits_for_the_loop_to_ask() -> None:
    with session() as it:
        it.training = True
        send(signal.SIGTERM)
        idle(0.2)
        with pytest.raises(Stop, match="SIGTERM"):
            it.check()
        it.heard()
        assert 23 < it.patience < 25


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *unused: None], ids=["nohup", "terminal"])
def test_a_terminal_that_closes_asks_to_stop_unless_nohup_has_that_ignored(handler: Any) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with session() as it:
            it.training = True
            send(signal.SIGHUP)
            idle(0.2)
            with nullcontext() if handler is signal.SIG_IGN else pytest.raises(Stop, match="SIGHUP"):
                it.check()
            it.heard()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_several_processes_under_nohup_outlive_their_terminal() -> None:
    code = """
import os, signal, threading
from veritune.training.launch import launch
signal.signal(signal.SIGHUP, signal.SIG_IGN)
threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGHUP)).start()
raise SystemExit(launch(2, ["schema", "--out", os.devnull]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_several_processes_take_no_file_here_for_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('mine')")
    monkeypatch.chdir(tmp_path)
    assert launch(1, ["--version"]) == 0


def test_where_the_loop_does_not_ask_it_is_stopped_but_never_inside_a_whole_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "GRACE", 0.2)
    done = []

    def wait() -> None:
        with session() as it:
            it.training = True
            send(signal.SIGTERM)
            with it.whole():
                idle(1.5)
                done.append("whole")
            idle(10)
            done.append("not reached")

    with pytest.raises(Stop):
        wait()
    assert done == ["whole"]


def test_a_stop_that_a_library_swallows_comes_again_until_it_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "GRACE", 0.1)
    with session() as it:
        it.training = True
        send(signal.SIGTERM)
        for _ in range(2):
            with pytest.raises(Stop):
                idle(10)
        it.heard()
        idle(1.2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_was_swallowed_while_libraries_are_read_stops_the_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Swallows:
        def __del__(self) -> None:
            send(signal.SIGTERM)
            idle(0.1)

    monkeypatch.setattr(sessions, "_heard", [])
    before = signal.signal(signal.SIGTERM, sessions.interrupt)
    try:
        Swallows()
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"), session():
            pytest.fail("it begins")
        assert signal.getsignal(signal.SIGTERM) is sessions.interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_are_put_back_and_other_threads_have_none() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    with session():
        assert all(signal.getsignal(number) != was for number, was in zip(numbers, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before
    seen = []

    def work() -> None:
        with session(hours=1) as it:
            it.check()
            seen.append(it.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
