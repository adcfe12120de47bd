"""`veritune runs`: the runs under a folder, a line each."""

import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import VerituneError
from . import folder
from .words import duration, number

COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "killed": "yellow", "stopped": "yellow"}


def show_runs(root: Path, console: Console) -> None:
    """Prints state, phase, step, loss, best and time left of every run under `root`. Raises MissingError."""
    paths = folder.find(root)
    if not paths:
        console.print(f"no runs under {root}", highlight=False, markup=False, soft_wrap=True)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("phase")
    for name in ("step", "loss", "best: loss", "AUROC", "accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("time", no_wrap=True)
    reasons = []
    for path in paths:
        name = str(path.relative_to(root)) if path != root else path.name
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
            *best(run),
            when(run, state),
        )
        if state == "failed":
            reasons.append(f"{name}: {reason}")
    console.print(table, highlight=False)
    for reason in reasons:
        console.print(reason, style="red", highlight=False, markup=False, soft_wrap=True)


def loss(run: folder.RunFolder) -> str:
    """The training loss over the last steps, smoothed."""
    recent = folder.smooth(run.metrics.steps["loss"][-200:])
    return f"{recent[-1]:.3f}" if recent else "-"


def best(run: folder.RunFolder) -> list[str]:
    """Loss, AUROC and accuracy of the best validation."""
    entry = run.metrics.best
    return [number(entry[key]) for key in ("loss", "auroc", "accuracy")] if entry else ["-"] * 3


def when(run: folder.RunFolder, state: str) -> str:
    """The time left of a run that goes on; how long ago another one ended."""
    if state != "running":
        return f"{duration(time.time() - run.seen())} ago"
    left = run.seconds_left()
    return f"{duration(left)} left" if left is not None else ""
