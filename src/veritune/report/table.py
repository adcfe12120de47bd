"""`veritune runs`: the runs under a folder, a line each."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import VerituneError
from . import folder
from .words import duration, number

COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "killed": "yellow", "stopped": "yellow"}
WIDE = 110  # columns of a terminal that hold all figures beside a name


def show_runs(root: Path, console: Console) -> None:
    """Prints state, phase, step, loss, best and time left of every run under `root`; on a narrow terminal, of the best
    validation the loss alone. Raises MissingError."""
    paths = folder.find(root)
    if not paths:
        console.out(f"no runs under {root}", highlight=False)
        return
    figures = ("loss", "auroc", "accuracy") if console.width >= WIDE else ("loss",)
    named = [str(path.relative_to(root)) if path != root else path.name for path in paths]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold", min_width=min(max(map(len, named)), 18))
    table.add_column("state", no_wrap=True)
    table.add_column("phase")
    for heading in ("step", "loss", "best: loss", "AUROC", "accuracy")[: 2 + len(figures)]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("time", no_wrap=True)
    reasons = []
    for name, path in zip(named, paths, strict=True):
        try:
            run = folder.read(path)
        except VerituneError as error:
            table.add_row(escape(name), "[red]damaged[/red]")
            reasons.append(str(error))
            continue
        state, reason = run.state()
        table.add_row(
            escape(name),
            f"[{COLOURS[state]}]{state}[/]",
            escape(run.phase()),
            f"{run.metrics.done:,}" + (f"/{run.steps:,}" if run.steps else ""),
            loss(run),
            *best(run, figures),
            when(run, state),
        )
        if state == "failed":
            reasons.append(f"{name}: {reason}")
    console.print(table, highlight=False)
    for reason in reasons:
        console.out(reason, style="red", highlight=False)


def loss(run: folder.RunFolder) -> str:
    """The training loss over the last steps, smoothed."""
    recent = folder.smooth(run.metrics.steps["loss"][-200:])
    return f"{recent[-1]:.3f}" if recent else "-"


def best(run: folder.RunFolder, figures: Sequence[str]) -> list[str]:
    """Figures of the best validation."""
    entry = run.metrics.best or {}
    return [number(entry.get(key)) for key in figures]


def when(run: folder.RunFolder, state: str) -> str:
    """The time left of a run that goes on; how long ago another one ended."""
    if state != "running":
        return f"{duration(time.time() - run.seen())} ago"
    left = run.seconds_left()
    return f"{duration(left)} left" if left is not None else ""
