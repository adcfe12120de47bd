"""When a run has to stop: after a signal, or before the time that it was given is over.

The loop asks (`Session.check`) before each part of its work and between small parts of it; the answer is a `Stop`,
after which it saves and ends. Where it does not ask in time, since a layer is being compiled or a file read, the Stop
is raised wherever it is, but never inside `Session.whole`. A second SIGINT ends the process at once: what is on the
disk is whole at any moment.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import ConfigError

GRACE = 8.0  # seconds after a signal in which the loop may come to a good end by itself
PATIENCE = 25.0  # seconds after a signal in which the run ends, if its disk lets it; a slow replica is not waited for
CAUTION = 1.25  # of the longest time that a kind of work has taken
_LOADED = time.monotonic()
_heard: list[str] = []  # signals that came outside a session


class Stop(KeyboardInterrupt):
    """The run has to save and stop; its text says why."""


class TooShort(Stop):
    """The limit came before the session had done anything, so the same command would get no further."""


class Session:
    """The time that a run has left, and whether it should stop."""

    def __init__(self, hours: float | None = None, age: float = 0.0) -> None:
        """hours: the limit, counted from `age` seconds ago."""
        self.asked: str | None = None
        """Why this process wants the run to stop, once it does."""
        self.reason: str | None = None
        """Why the run stops, once it is to: with several processes, once all have agreed."""
        self.alone = True
        """Whether this process need not agree with others."""
        self.training = False
        """Whether there is anything that a stop would have to save; without it a signal stops at once."""
        self._hours = hours
        self._seconds = math.inf if hours is None else hours * 3600
        self._end = time.monotonic() - age + self._seconds
        self._longest: dict[str, float] = {}
        self._whole = 0
        self._signalled: float | None = None

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._end - time.monotonic()

    def took(self, kind: str, seconds: float) -> None:
        """Teaches how long a kind of work takes: "step", "validation" or "save"."""
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds)

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """The same, for the block."""
        began = time.monotonic()
        yield
        self.took(kind, time.monotonic() - began)

    def needed(self, *kinds: str) -> float:
        """Seconds that these kinds of work may take, with a save and the end of the process after them.

        A save that was never seen is taken to last 2 % of the limit, at most a minute; other work nothing.
        """
        seen = {"save": min(60.0, 0.02 * self._seconds)} | self._longest
        ending = min(20.0, max(3.0, 0.01 * self._seconds))
        return CAUTION * sum(seen.get(kind, 0.0) for kind in (*kinds, "save")) + ending

    def check(self, *kinds: str) -> None:
        """Raises Stop if a signal came, or if these kinds of work and a save would not be done before the limit."""
        if self.asked is None and self._hours is not None and self.left < self.needed(*kinds):
            self.asked = f"the limit of {self._hours:g} hours"
        if self.alone:
            self.reason = self.asked
        if self.reason is not None:
            raise Stop(self.reason)

    @property
    def limited(self) -> bool:
        """Whether it is the limit for which this process wants the run to stop."""
        return self.asked is not None and self._signalled is None

    def too_short(self, loaded: float) -> TooShort:
        """What to raise where the limit left no time for anything, after a loading of so many seconds."""
        return TooShort(
            f"the limit of {self._seconds / 3600:g} hours before anything was done: of its {self._seconds:.0f} s, "
            f"loading took {loaded:.0f}, and saving and ending may take {self.needed():.0f}. Give it more hours"
        )

    def agree(self, wanted: bool) -> None:
        """After the processes have told each other whether any of them wants to stop."""
        if wanted:
            self.reason = self.asked or "a signal to another process"

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A block that no stop interrupts, since half of it would be worse than none. It has to be short."""
        self._whole += 1
        try:
            yield
        finally:
            self._whole -= 1

    def heard(self) -> None:
        """The Stop has reached the loop: what it does to end is not interrupted again."""
        if hasattr(signal, "setitimer") and self._signalled is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @property
    def patience(self) -> float:
        """Seconds that the end of the run may still wait for a slow drive."""
        if self._signalled is not None:
            return max(0.0, self._signalled + PATIENCE - time.monotonic())
        return max(0.0, min(self.left, 3600.0))

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._signalled is not None:
            if number == signal.SIGINT:
                quit_at_once()
            return
        self.asked, self._signalled = signal.Signals(number).name, time.monotonic()
        if hasattr(signal, "setitimer"):
            # Again and again: where a library swallows the exception, the next one gets through.
            signal.setitimer(signal.ITIMER_REAL, GRACE if self.training else 1.0, 1.0)
        self._insist(number, frame, at_once=not self.training)

    def _insist(self, number: int, frame: FrameType | None, at_once: bool = True) -> None:
        # Of several processes none may leave the others in the middle of a step; while they load, their launcher sees.
        if at_once and not self._whole and (self.alone or not self.training):
            self.reason = self.asked
            raise Stop(self.reason)


def asking() -> list[int]:
    """The signals that ask a run to save and stop; that of a terminal which closes too, unless nohup has it ignored."""
    asked: list[int] = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asked.append(signal.SIGHUP)
    return asked


def quit_at_once() -> None:
    """Ends the process without waiting for anything, and gives the terminal its cursor back."""
    with suppress(Exception):
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")
    os._exit(130)


@contextmanager
def session(hours: float | None = None) -> Iterator[Session]:
    """Watches for signals (in the main thread) and the clock; the handlers there were are put back at the end.

    hours: from the start of the process.
    """
    current = Session(hours, age())
    if threading.current_thread() is not threading.main_thread():
        yield current
        return
    handlers: dict[int, Any] = dict.fromkeys(asking(), current._ask)
    if hasattr(signal, "setitimer"):
        handlers[signal.SIGALRM] = current._insist
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        if _heard:  # and this process lives: a library has swallowed the exception
            raise KeyboardInterrupt(_heard[0])
        yield current
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of a signal outside a session."""
    _heard.append(signal.Signals(number).name)
    raise KeyboardInterrupt(_heard[-1])


def listen() -> None:
    """Has signals heard before and after a session, which has its own handlers."""
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as after a shell's `&`
        signal.signal(signal.SIGINT, interrupt)


@contextmanager
def explained(say: Callable[[str], None]) -> Iterator[None]:
    """Around a command that trains. Says what stopped it before its session began: libraries are read for seconds.
    Raises ConfigError for a session that was too short: a loop that gives the command again whenever it was stopped
    would never end."""
    try:
        yield
    except TooShort as reason:
        raise ConfigError(f"stopped by {reason}") from None
    except Stop:
        raise
    except KeyboardInterrupt as reason:
        say(f"stopped by {str(reason) or 'SIGINT'} before the first step; the same command goes on")
        raise


def age() -> float:
    """Seconds since this process began; where the system does not say, since this module was read."""
    since = time.monotonic() - _LOADED
    with suppress(OSError, ValueError, IndexError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        found = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        if since <= found < since + 600:  # some containers show another machine's clock
            return found
    return since
