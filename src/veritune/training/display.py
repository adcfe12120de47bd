"""What a person sees while a run trains: the plan before it, one moving line, a line for each validation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from .state import Training


@contextmanager
def unread(console: Console) -> Iterator[None]:
    """Around what prints while a run trains: where nobody can read it any more (a closed terminal, a pipe whose reader
    has ended), the console is silent from there on and the run goes on."""
    try:
        yield
    except (OSError, SystemExit):  # the latter is rich's, for a pipe
        console.quiet = True


def say(console: Console, text: str) -> None:
    """A plain line above the bar."""
    with unread(console):
        console.out(text, highlight=False)


def show_plan(console: Console, state: "Training", done: int) -> None:
    """Prints what will happen."""
    run, plan = state.run, state.plan
    trained = sum(p.numel() for p in state.parameters)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "model": f"{run.model.path}, {state.base.precision} on {state.base.device.type}"
        + (f", {state.world.size} processes" if state.world.size > 1 else ""),
        "adapter": f"rank {run.lora.rank}, alpha {run.lora.alpha:g}, {trained:,} trained parameters",
        "data": f"{run.data.path}: {len(state.train.labels):,} rows of {state.train.groups.max() + 1:,} questions, "
        f"{state.train.labels.mean():.0%} correct; {len(state.validation.labels):,} validation rows",
        "steps": f"{len(plan):,} of {run.train.batch_size * run.train.gradient_accumulation} examples "
        f"({plan.presentations:,} row presentations, {run.train.per_question} of a question together)",
        "phases": f"{'; '.join(phase.name for phase in plan.phases)} (slices of "
        f"{', '.join(f'{len(part.rows):,}' for part in state.source.slices)} rows)",
        "memory": str(state.planned),
        "learning": f"{run.train.optimizer}, lr {run.train.lr:g}, "
        + ", ".join(dict.fromkeys(phase.settings.schedule for phase in plan.phases)),
        "answers": " / ".join(state.encoder.frame.answers),
        "folder": f"{run.out}" + (f", going on after step {done:,}" if done else ""),
    }
    if not state.source.slices:
        del rows["phases"]
    if state.planned is None:
        del rows["memory"]
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)
    for note in state.source.notes:
        console.out(f"note: {note}", highlight=False)


class Display:
    """A progress bar with loss, speed and time left; it moves on a terminal, elsewhere a line is printed at times."""

    def __init__(self, console: Console, state: "Training", done: int) -> None:
        self._console = console
        self._steps = len(state.plan)
        self._loss: float | None = None
        self._speed: float | None = None
        self._bar = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=self._steps, completed=done, note="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        with unread(self._console):
            self._bar.stop()

    def step(self, done: int, loss: float, rows: int, seconds: float) -> None:
        """After each step: its loss, rows and time."""
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        speed = rows / max(seconds, 1e-9)
        self._speed = speed if self._speed is None else 0.9 * self._speed + 0.1 * speed
        note = f"loss {self._loss:.3f}  {self._speed:,.1f} rows/s"
        with unread(self._console):
            self._bar.update(self._task, completed=done, note=note)
            if not self._console.is_terminal and (done % 50 == 0 or done == self._steps):
                left = (self._steps - done) * rows / self._speed
                self._console.print(f"step {done:,}/{self._steps:,}  {note}  {left / 60:.1f} min left", highlight=False)

    def validation(self, done: int, quality: dict[str, Any]) -> None:
        """After each validation: its figures."""
        low_high = quality["accuracy_interval"]
        interval = f" ({low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else ""
        with unread(self._console):
            self._console.print(
                f"step {done:,}: on {quality['rows']:,} held-out rows accuracy {quality['accuracy']:.3f}{interval}, "
                f"AUROC {quality['auroc']:.3f}, loss {quality['loss']:.3f}",
                highlight=False,
            )

    def probes(self, found: dict[str, Any], forgetting: dict[str, Any]) -> None:
        """After each phase: what is left of each slice."""
        shown = [
            f"{name} {' '.join(f'{value:.3f}' for value in found[key]['accuracy'])}"
            for key, name in (("trained", "rows trained on"), ("held_out", "held-out questions"))
        ]
        left = forgetting["average_forgetting"]["trained"]
        told = "" if left is None else f"; forgotten on average {left:+.3f}"
        text = f"after {found['phase']}, accuracy by slice: {', '.join(shown)}{told}"
        with unread(self._console):
            self._console.out(text, highlight=False)

    def say(self, text: str) -> None:
        """A plain line above the bar."""
        say(self._console, text)
