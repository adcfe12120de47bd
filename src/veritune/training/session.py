"""Signals: a first SIGINT or SIGTERM asks the run to save and stop, a second SIGINT quits at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Session:
    """Whether the run should stop at the end of the step it is in."""

    asked: str | None = None
    """The signal's name, once one came to this process."""
    reason: str | None = None
    """Why all processes of the run stop, once they have agreed to."""

    def agree(self, wanted: bool) -> None:
        """After the processes have told each other whether any of them was asked to stop."""
        if wanted:
            self.reason = self.asked or "a signal to another process"


@contextmanager
def session() -> Iterator[Session]:
    """Watches for signals while training; the handlers there were are put back at the end."""
    current = Session()

    def ask(number: int, frame: Any) -> None:
        if current.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        current.asked = signal.Signals(number).name

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield current
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
