"""`veritune watch`: one run, followed in the terminal.

On a terminal a picture that is drawn anew only when something changed, so that a slow connection carries it; elsewhere
lines, until the run ends.
"""

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..quality.score import say
from . import folder, table
from .braille import curve
from .words import between, number

PAUSE = 2.0
"""Seconds between two looks."""
SHOWN = 5
"""Validations that are listed."""


def watch(path: Path, console: Console) -> None:
    """Follows a run until `q` or Ctrl-C, or without a terminal until it ends. Raises what `folder.read` raises."""
    run = folder.read(path)
    if not console.is_terminal:
        follow(run, console)
        return
    with (
        suppress(KeyboardInterrupt),
        keys() as pressed,
        Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False) as live,
    ):
        shown = None
        while True:
            now = (run.state(), console.size)
            if run.update() or now != shown:
                live.update(picture(run, *console.size), refresh=True)
                shown = now
            if pressed(PAUSE):
                return


def follow(run: folder.RunFolder, console: Console) -> None:
    """Prints a line for each validation, one a minute between them, and how the run ended."""
    told, said_at = 0, -float("inf")
    while True:
        state, reason = run.state()  # before the lines are read: those written until then are not missed
        run.update()
        for entry in run.metrics.validations[told:]:
            say(console, f"step {entry['step']:,}: validation {validation_line(entry)}")
        if len(run.metrics.validations) < told:  # a resume went back
            told = 0
            continue
        told = len(run.metrics.validations)
        if state != "running":
            say(console, f"{line(run, state)}" + (f" ({reason})" if reason else ""))
            return
        if time.monotonic() - said_at >= 60:
            say(console, line(run, state))
            said_at = time.monotonic()
        time.sleep(PAUSE)


def line(run: folder.RunFolder, state: str) -> str:
    """Where a run is, in a line."""
    of = f"/{run.steps:,}" if run.steps else ""
    return f"{state}: step {run.metrics.done:,}{of}  loss {table.loss(run)}  {table.when(run, state)}"


def validation_line(entry: dict[str, Any]) -> str:
    """The figures of a validation, in a line."""
    interval = between(entry.get("accuracy_interval"))
    accuracy = number(entry.get("accuracy")) + (f" ({interval})" if interval else "")
    return f"accuracy {accuracy}  AUROC {number(entry.get('auroc'))}  loss {number(entry.get('loss'))}"


def picture(run: folder.RunFolder, width: int, height: int) -> Group:
    """The whole screen, `width` letters by `height` lines."""
    state, reason = run.state()
    head = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    of = f"/{run.steps:,}" if run.steps else ""
    head.add_row("[bold]run[/]", escape(str(run.path)))
    colour = table.COLOURS[state]
    head.add_row("[bold]state[/]", f"[{colour}]{state}[/]  {escape(reason)}  {table.when(run, state)}")
    phase = f"  phase {run.phase()}" if len(run.phases) > 1 else ""
    head.add_row("[bold]step[/]", f"{run.metrics.done:,}{of}{escape(phase)}  {speed(run)}")
    listed = run.metrics.validations[-SHOWN:]
    best = run.metrics.best
    lines = [
        Text(
            f"step {entry['step']:,}: {validation_line(entry)}" + ("  best" if entry is best else ""),
            style="green" if entry is best else "",
            overflow="ellipsis",
            no_wrap=True,
        )
        for entry in listed
    ]
    losses = folder.smooth(run.metrics.steps["loss"], 0.9)
    curves = [("training loss (smoothed)", losses), ("learning rate", run.metrics.steps["lr"])]
    if len(run.metrics.validations) > 1:
        found = [entry.get("loss") for entry in run.metrics.validations]
        curves.append(("validation loss", [float("nan") if value is None else value for value in found]))
    space = height - 3 - len(lines) - 2 - len(curves)
    each = max(2, space // len(curves))
    parts = []
    for name, values in curves[: max(1, space // 2)]:
        parts.append(Text(name, style="bold"))
        parts += [Text(text, style="cyan", no_wrap=True) for text in curve(values, width - 1, each)]
    return Group(head, *parts, *lines, Text("q or Ctrl-C ends; the run goes on", style="dim"))


def speed(run: folder.RunFolder) -> str:
    """Rows a second over the last steps."""
    rows, seconds = run.metrics.steps["rows"][-50:], run.metrics.steps["seconds"][-50:]
    total = sum(seconds)
    return f"{sum(rows) / total:,.1f} rows/s" if total > 0 else ""


@contextmanager
def keys() -> Iterator[Callable[[float], bool | None]]:
    """Gives a function that waits up to so many seconds and says whether `q` was pressed."""
    try:
        import termios
        import tty
    except ImportError:  # Windows: Ctrl-C ends
        termios = tty = None
    if termios is None or tty is None or not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds)
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)

    def pressed(seconds: float) -> bool:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        typed = os.read(sys.stdin.fileno(), 64) if ready else b"-"
        return not typed or b"q" in typed.lower()  # nothing typed though ready: the terminal is gone

    try:
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
