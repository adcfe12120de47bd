"""One trial of a sweep: a short training run that is watched, and what came of it."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from .. import config
from ..errors import (
    ConfigError,
    DataError,
    ModelError,
    NoneWholeError,
    NonFiniteError,
    OtherWayError,
    RoomError,
    first_line,
)
from ..model import load
from ..trackers import follow
from ..training import status
from ..training.trainer import train
from . import asha
from .board import Board, Lost, State, Taken
from .space import apply

FIRST = 3  # steps whose mean loss is the start's
OVER = 1.1  # times the start's loss
FEWEST = 5  # steps that tell a divergence from a bad batch


class Pruned(follow.Ended):
    """Other trials are better."""


class Paused(follow.Ended):
    """Whether the trial goes on depends on others."""


class Diverged(follow.Ended):
    """The loss grows instead of falling."""


class NoMemory(Exception):
    """The trial does not fit beside what else is on the device."""


@dataclass
class Losses:
    """Tells a loss that stays over the start's. `limit`: so many steps in a row, smoothed, are too many."""

    limit: int
    first: list[float] = field(default_factory=list)
    smooth: float = 0.0
    over: int = 0

    def add(self, loss: float) -> None:
        """Takes a step's loss. Raises Diverged."""
        if not math.isfinite(loss):
            raise Diverged(f"the loss is not finite: {loss}")
        if len(self.first) < FIRST:
            self.first.append(loss)
            self.smooth = sum(self.first) / len(self.first)
            return
        start = sum(self.first) / FIRST
        self.smooth = 0.8 * self.smooth + 0.2 * loss
        self.over = self.over + 1 if self.smooth > OVER * start else 0
        if self.over >= self.limit:
            raise Diverged(f"the loss was over {OVER} times the start's {start:.3g} for {self.over} steps: {loss:.3g}")


@dataclass
class Watcher:
    """Follows a trial's run: keeps its curve on the board, and ends what has diverged or fallen behind."""

    board: Board
    taken: Taken
    before: list[dict[str, Any]]
    """Lines of metrics.jsonl that an earlier worker left."""
    alive: Callable[[], None]
    """Raises if this process is to end."""
    losses: Losses | None = None
    rows: int = 0
    seconds: float = 0.0
    mark: float = 0.0

    def __call__(self, state: Any, step: int, values: dict[str, Any]) -> Paused | None:
        self.alive()
        now, settings, steps = time.perf_counter(), self.board.settings, len(state.plan)
        if self.losses is None:
            self.losses = Losses(max(FEWEST, math.ceil(settings.patience * steps)))
            self.go_on(step, step - 1 if "loss" in values else step)
            self.mark = now - values.get("seconds", 0.0)
        self.seconds += now - self.mark
        self.mark = now
        info = self.taken.info
        if "loss" in values:
            self.rows += values["rows"]
            info |= {"steps": steps, "steps_done": step, "rows_done": self.rows, "seconds": round(self.seconds, 3)}
            self.losses.add(values["loss"])
            if values.get("skipped"):
                raise Diverged(f"the gradient is not finite: its norm is {values['grad_norm']}")
        elif "validation" in values:
            found = {key: values["validation"][key] for key in ("loss", "auroc", "accuracy")}
            info |= {"steps": steps, "steps_done": step, "rows_done": self.rows, "seconds": round(self.seconds, 3)}
            if not math.isfinite(found["loss"]):
                raise Diverged(f"the validation's loss is {found['loss']}")
            entry = {"step": step, "rows": self.rows, "seconds": round(self.seconds, 3), **found}
            rung = asha.validated(step, steps, settings.validations)
            became = self.board.report(self.taken, entry, rung, last=step == steps)
            if became == "pruned":
                raise Pruned(f"after {step} of {steps} steps")
            if became == "paused":
                return Paused(f"after {step} of {steps} steps")
        return None

    def go_on(self, step: int, done: int) -> None:
        """Takes up what was there before this attempt: `done` steps, and the validations before `step`."""
        assert self.losses is not None
        for line in self.before:
            if "loss" in line and line["step"] <= done:
                self.rows += line["rows"]
                self.seconds += line["seconds"]
                self.losses.add(line["loss"])
        self.taken.curve = [point for point in self.taken.curve if point["step"] < step]
        if self.taken.curve:
            self.seconds = max(self.seconds, self.taken.curve[-1]["seconds"])


@dataclass
class Desk:
    """What a worker keeps from trial to trial: the base model, and with it the token ids of every row seen."""

    base: load.Base | None = None

    def loaded(self, model: config.Model) -> load.Base:
        """The base model, loaded once."""
        if self.base is None:
            self.base = load.load_base(model)
            self.base.ids = {}
        return self.base


def settings_of(run: config.Run, settings: config.Sweep, params: dict[str, Any], rows: int, out: Path) -> config.Run:
    """The run of a trial: `rows` rows in one phase, `settings.validations` evenly spaced validations."""
    values = config.as_dict(apply(run, params))
    chosen = values["train"]
    shown = max(round(chosen["epochs"] * rows), 1)
    steps = -(-shown // (chosen["batch_size"] * chosen["gradient_accumulation"]))
    values["phases"], values["strategy"] = (), config.as_dict(config.Strategy())  # a trial is one plain phase
    values["checkpoint"]["replica"] = None  # it is of the run, not of every trial
    chosen["non_finite"] = "skip"  # whoever watches ends it there: a trial that diverges has not failed
    values["out"], values["data"]["rows"] = str(out), rows
    values["validation"]["every"] = -(-steps // settings.validations)
    values["track"]["group"] = values["track"]["group"] or out.parent.parent.name
    values["track"]["name"] = run.track.name and f"{run.track.name}-{out.name}"  # or the folder's alone
    return config.build(config.Run, values, "sweep")


def run_trial(
    board: Board,
    taken: Taken,
    run: config.Run,
    rows: int,
    desk: Desk,
    alive: Callable[[], None],
    *,
    alone: bool,
) -> None:
    """Runs a trial to where it ends or pauses, and records that; too little memory is its failure if it is `alone`.

    Raises NoMemory, KeyboardInterrupt and whatever else is no result of the trial's, once the trial is given back.
    """
    folder = board.folder / "trials" / f"{taken.number:04d}"
    folder.parent.mkdir(exist_ok=True)
    watcher = Watcher(board, taken, earlier(folder / "metrics.jsonl"), alive)
    with (folder.parent / f"{folder.name}.log").open("a", encoding="utf-8") as log, board.living(taken):
        try:
            base = desk.loaded(run.model)
            board.agree(base.weights)
            state, reason = outcome(board, taken, run, rows, base, watcher, folder, Console(file=log, width=120))
            taken.info["trackers"] = dict(follow.failures)
            if state == "paused":
                board.release(taken)
                return
            board.finish(taken, state, reason)
        except Lost as error:
            log.write(f"{error}\n")
            return
        except (RuntimeError, RoomError) as error:
            of_memory = isinstance(error, torch.OutOfMemoryError | RoomError) or "out of memory" in str(error).lower()
            if not of_memory:
                board.release(taken, broken=not isinstance(error, ModelError))
                raise
            reason = first_line(error)
            if not alone:
                board.release(taken)
                raise NoMemory(reason) from None
            board.finish(taken, "failed", reason)
        except BaseException:
            board.release(taken)
            raise
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def outcome(
    board: Board,
    taken: Taken,
    run: config.Run,
    rows: int,
    base: load.Base,
    watcher: Watcher,
    folder: Path,
    console: Console,
) -> tuple[State | Literal["paused"], str | None]:
    """Trains, and says how that ended and, if it did not go to its end, why."""
    try:
        its = settings_of(run, board.settings, taken.params, rows, folder)
        go = partial(train, its, console, base, watch=watcher, adapters=False)
        try:
            go()
        except (NoneWholeError, OtherWayError) as error:  # an earlier worker's: a trial is short, nobody need mend it
            console.out(f"{error}\nThis trial begins again.", style="yellow", highlight=False)
            shutil.rmtree(folder / "checkpoints")
            go()
    except Pruned as reason:
        status.end(folder, "stopped", f"pruned {reason}")
        return "pruned", None
    except Paused as reason:
        status.end(folder, "stopped", f"paused {reason}")
        return "paused", None
    except (Diverged, NonFiniteError) as error:
        status.end(folder, "stopped", f"diverged: {error}")
        return "diverged", str(error)
    except (ConfigError, ModelError, DataError) as error:
        if "out of memory" in str(error).lower():
            raise
        return "failed", str(error)
    return "complete", None


def earlier(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, if it is there."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def lives_with(parent: int) -> Callable[[], None]:
    """For a child process: a check that raises KeyboardInterrupt once its parent is gone."""

    def check() -> None:
        if os.getppid() != parent:
            raise KeyboardInterrupt

    return check
