"""`veritune plan`: what a run will do, before any weights are loaded."""

import math
import statistics
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import config
from ..errors import MissingError
from . import folder
from .braille import curve
from .words import duration

if TYPE_CHECKING:
    from ..training.feed import Source

SCORING = 0.4
"""Of the time that training on a row takes, what scoring one takes: 0.33 (float32) and 0.42 (bf16) were measured on
SmolLM2-135M (docs/results.md)."""
WIDTH, HEIGHT = 78, 6
HOURS = 12.0
"""Of a session, where nothing tells."""


@dataclass(frozen=True, kw_only=True, config=config.STRICT)
class Planned(config.Run):
    """A run and what its plan reckons with."""

    rows_per_second: Annotated[float | None, Field(gt=0)] = None
    """The speed, by default that of the run folder, if it has steps."""
    like: str | None = None
    """A run folder whose speed it is to be."""
    price: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    """What an hour costs."""
    gpu: str | None = None
    """The card to plan memory and speed for, such as h100, 4090 or t4; by default the one here."""
    gpu_memory: Annotated[float | None, Field(ge=1)] = None
    """GiB of memory to plan for, in place of that card's."""


def speed(told: Planned, expected: float | None = None) -> float | None:
    """Rows a second to reckon with, None if nothing tells; `expected`: on the card that is foreseen, which counts if it
    was named or nothing was measured. Raises MissingError for a --like that has none."""
    if told.rows_per_second is not None or told.like is not None:
        return told.rows_per_second or (speed_of(Path(told.like)) if told.like else None)
    if expected is not None and (told.gpu or told.gpu_memory):
        return expected
    with suppress(MissingError):
        return speed_of(Path(told.out))
    return expected


def show_plan(run: Planned, source: "Source", console: Console, rows_per_second: float | None) -> None:
    """Prints phases, learning rate, and time, sessions and cost where a speed is known."""
    plan, slices = source.plan, source.slices
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("phase", "rows", "shown", "steps", "highest lr", "optimiser", "weights", "training"):
        table.add_column(
            name, justify="left" if name in ("phase", "optimiser", "weights") else "right", no_wrap=name != "phase"
        )
    for phase in plan.phases:
        first = phase is plan.phases[0]
        table.add_row(
            escape(phase.name),
            f"{len(phase.rows):,}",
            f"{phase.presentations:,}",
            f"{phase.steps:,}",
            f"{max(plan.lr(step) for step in range(phase.start, phase.end)):.3g}",
            "new" if first or phase.optimizer_state == "reset" else "kept",
            ("given" if run.train.start_from else "new") if first else phase.start_from,
            duration(phase.presentations / rows_per_second) if rows_per_second else "",
        )
    console.print(table)
    rates = [plan.lr(step) for step in range(len(plan))]
    console.print(f"\nlearning rate over {len(rates):,} steps ({run.train.optimizer})", highlight=False)
    for line in curve(rates, min(WIDTH, console.width - 1), HEIGHT):
        console.out(line, highlight=False)
    if slices:
        console.print(f"\n{len(slices)} slice{'s' if len(slices) > 1 else ''}:", highlight=False)
    for number, part in enumerate(slices, 1):
        rows, share = part.rows, source.train.labels[part.rows].mean()
        console.out(
            f"  {number}: {part.name}: {len(rows):,} rows, {share:.0%} correct; probes of {len(part.trained):,} rows "
            f"trained on and {len(source.validation.labels if part.held_out is None else part.held_out):,} held out",
            highlight=False,
        )
    ends, have = run.strategy.ends or (), len(source.train.labels)
    if beyond := sum(end > have for end in ends):
        console.out(f"  {beyond} of {len(ends)} strategy.ends lie beyond the {have:,} rows: cut off", highlight=False)
    for note in source.notes:
        console.out(f"note: {note}", highlight=False)
    shown, scored = plan.presentations, _scored(run, source)
    times = shown / len(source.train.labels)
    console.out(
        f"\nin all {len(plan):,} steps, {shown:,} row presentations ({times:.2f} times the "
        f"{len(source.train.labels):,} rows), {scored:,} rows scored by validations and probes",
        highlight=False,
    )
    if rows_per_second is None:
        console.out(
            "time: not known; tell --rows-per-second N, --gpu NAME, or --like RUN, a run folder with its speed",
            highlight=False,
        )
        return
    seconds = (shown + SCORING * scored) / rows_per_second
    hours = run.session.hours or HOURS
    sessions = max(math.ceil(seconds / 3600 / hours), 1)
    rate = f"{rows_per_second:,.1f}" if rows_per_second >= 1 else f"{rows_per_second:.2g}"
    line = f"time: {duration(seconds)} at {rate} rows/s, beside loading and saving; "
    line += f"{sessions} session{'s' if sessions > 1 else ''} of {hours:g} h"
    if run.price is not None:
        line += f"; cost {seconds / 3600 * run.price:,.2f} at {run.price:g} an hour"
    console.out(line, highlight=False)


def speed_of(path: Path) -> float:
    """The median rows a second of a run's steps, without those in which it warmed up. Raises MissingError."""
    steps = folder.read(path).metrics.steps
    pairs = list(zip(steps["rows"], steps["seconds"], strict=True))
    rates = [rows / seconds for rows, seconds in pairs[min(10, len(pairs) // 2) :] if seconds > 0]
    if not rates:
        raise MissingError(f"{path}: no step of this run has ended, so its speed is not known")
    return statistics.median(rates)


def _scored(run: config.Run, source: "Source") -> int:
    """Rows that validations and probes score."""
    plan, every = source.plan, run.validation.every
    at = {*range(every, len(plan) + 1, every), *(phase.end for phase in plan.phases)}
    probes = 0
    if run.strategy.probe_rows:
        each = sum(len(it.trained) + (0 if it.held_out is None else len(it.held_out)) for it in source.slices)
        probes = each * sum(phase.kind != "part" for phase in plan.phases)
    return len(at) * len(source.validation.labels) + probes
