"""Signals: a first SIGINT or SIGTERM asks the run to save and stop, a second SIGINT quits at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Session:
    """Whether the run should stop at the end of the step it is in."""

    reason: str | None = None
    """The signal's name, once one came."""


@contextmanager
def session() -> Iterator[Session]:
    """Watches for signals while training; the handlers there were are put back at the end."""
    current = Session()

    def ask(number: int, frame: Any) -> None:
        if current.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        current.reason = signal.Signals(number).name

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield current
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
