"""`veritune sweep`: workers that take trials from a board until none is left, here and on any number of machines."""

import multiprocessing
import os
import shlex
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial
from rich.console import Console

from .. import config
from ..data import dataset
from ..errors import ConfigError, VerituneError
from ..model import adapter, load
from ..tokens.encode import encoder
from ..tokens.prompt import render
from ..training import feed
from ..training.session import Session, age
from . import asha, result, space
from .board import Board, open_board
from .trial import Desk, NoMemory, lives_with, run_trial

PAUSE = 1.0
"""Seconds between two looks at what others do."""
NO_MEMORY = 75
"""The exit code of a worker that found no room beside the others."""
STOPPED = 130
"""The exit code of one that was stopped."""
SAME_FAILURE = 3
"""So many failures alike, and nothing else, and the sweep stops."""


def sweep(
    run: config.Run, settings: config.Sweep, axes: list[space.Axis], console: Console, *, worker: bool = False
) -> dict[str, Any] | None:
    """Searches around a run's settings, or goes on with that, and returns the best trial's line of trials.jsonl.

    axes: what is searched. worker: join a sweep that is there; whoever started it shows what came of it. Raises the
    kinds in `errors` before anything starts if something cannot be right, ConfigError if all trials have failed, and
    KeyboardInterrupt once a signal or `session.hours` has ended it.
    """
    data = dataset.load(Path(run.data.path))
    wanted = min(settings.rows or len(data.train), run.data.rows or len(data.train))
    rows = len(feed.trainable(data, wanted, run, "sweep.rows"))
    held = feed.labels_of(feed.whole_questions(data.validation, run.validation.rows))
    if settings.pruner != "none" and settings.validations == 1:
        raise ConfigError(
            f"sweep.pruner = {settings.pruner!r} with sweep.validations = 1: a trial's only validation is at its end, "
            "so none could be stopped before; set sweep.validations to 2 or more, or sweep.pruner to 'none'"
        )
    folder = Path(settings.out or f"{run.out.rstrip('/')}-sweep")
    folder = folder if folder.name else folder.resolve()  # "." has no name, by which the study and trials go
    shared = {axis.key: axis.as_json() for axis in axes}
    same = result.agreed(run, settings, shared, data.fingerprint, rows)
    text = f"{folder}: {settings.trials:,} trials of {rows:,} rows each; searched: {', '.join(shared)}"
    console.out(text, highlight=False)
    for note in feed.one_label(held):
        console.out(f"note: {note}", highlight=False)
    desk = Desk()
    if settings.at_once == 1 and not folder.exists():  # with several workers each loads a model, and this process none
        check(desk.loaded(run.model), run, shared)
    board = open_board(settings, axes, folder, same, join=worker)
    try:
        progress = Progress(board, run, rows, console)
        result.write(board, run, rows)
        if settings.at_once == 1:
            with stoppable():
                work(board, run, rows, desk, lambda: None, progress.look, alone=True)
        else:
            many(board, run, rows, same, progress)
        trials = result.write(board, run, rows)
        best = result.best_of(trials)
        if not worker:
            result.show(board, trials, console)
    except KeyboardInterrupt:
        result.write(board, run, rows)
        console.print("stopped: trials under way are saved and given back; the same command goes on", highlight=False)
        raise
    finally:
        board.close()
    if trials and all(trial["state"] == "failed" for trial in trials):
        raise ConfigError(
            f"all {len(trials)} trials have failed; mend this and choose another sweep.out: {trials[0]['error']}"
        )
    said = (
        f"next: veritune train {shlex.quote(str(folder / 'best.toml'))}"
        if best
        else "no trial was completed, so there is no best.toml"
    )
    if not worker:
        console.out(said, highlight=False)
    return best


def check(base: load.Base, run: config.Run, searched: Collection[str]) -> None:
    """Raises ConfigError and ModelError for what every trial would fail with, since no trial has another value."""
    if not any(key.startswith("prompt.") for key in searched):
        encoder(render(run.prompt, base.tokenizer), base.tokenizer)
    if "prompt.max_length" not in searched:
        load.check_length(base, run.prompt.max_length)
    if "lora.targets" not in searched:
        adapter.add_adapter(base, run.lora, seed=0)
        adapter.remove(base)


class Progress:
    """Tells of trials as they pause or end, and keeps the sweep's files up to date."""

    def __init__(self, board: Board, run: config.Run, rows: int, console: Console) -> None:
        self._board, self._run, self._rows, self.console = board, run, rows, console
        known = board.trials()
        self._told = news(known)
        self._warned: set[str] = set()
        if count := sum(trial.state.is_finished() for trial in known):
            wanted = board.settings.trials
            enough = f"; sweep.trials = {wanted:,} begins no other" if len(known) > wanted else ""
            console.print(f"going on after {count:,} of {max(wanted, len(known)):,} trials{enough}", highlight=False)

    def look(self) -> None:
        """Call now and then. Raises ConfigError if the first trials have all failed alike."""
        known = self._board.trials()
        new = news(known) - self._told
        if not new:
            return
        trials = result.write(self._board, self._run, self._rows)
        for number, _ in sorted(new):
            result.tell(result.line(known[number]), result.best_of(trials), self.console)
            self.warn(known[number].user_attrs.get("info", {}).get("trackers", {}))
        self._told |= new
        # One that has validated works, though it is under way or, with asha, pauses; one before them may still do so.
        judged = [result.line(t) for t in known if t.state.is_finished() or "curve" in t.user_attrs]
        first = [trial["trial"] for trial in judged[:SAME_FAILURE]] == [*range(SAME_FAILURE)]
        errors = {trial["error"] for trial in judged if trial["state"] == "failed"}
        if first and len(errors) == 1 and all(trial["state"] == "failed" for trial in judged):
            count = len(judged)
            raise ConfigError(
                f"the first {count} trials have all failed; mend this and choose another sweep.out: {errors.pop()}"
            )

    def warn(self, trackers: dict[str, str]) -> None:
        """Says once of each tracker that it failed a trial; each trial's log does too."""
        for name in trackers.keys() - self._warned:
            place = f"{self._board.folder}/trials"
            text = f"{name} {trackers[name]} and may lack trials, now and later; all are whole in {place}"
            self.console.out(text, style="yellow", highlight=False)
        self._warned |= trackers.keys()


def news(trials: list[FrozenTrial]) -> set[tuple[int, int]]:
    """What there is to tell: the number of each trial that has ended, or with its rung of each that pauses there."""
    known = [it for it in map(asha.standing, trials) if it.state != "under way"]
    return {(it.number, len(it.reached) if it.state in ("paused", "pruned") else 0) for it in known}


def work(
    board: Board,
    run: config.Run,
    rows: int,
    desk: Desk,
    alive: Callable[[], None],
    look: Callable[[], None],
    *,
    alone: bool,
) -> None:
    """Runs trials until none is left; the base model is loaded once. `alone`: no other worker is on the device."""
    limit = Session(run.session.hours, age())
    while (taken := board.take()) is not False:
        if taken is True:
            limit.check()
            time.sleep(PAUSE)
            alive()
        else:
            run_trial(board, taken, run, rows, desk, alive, alone=alone)
        look()


def many(board: Board, run: config.Run, rows: int, same: dict[str, Any], progress: Progress) -> None:
    """Runs `settings.at_once` workers as processes of this machine, and waits for them."""
    context, count = multiprocessing.get_context("spawn"), one_or_more(board)
    one = replace(board.settings, at_once=1)
    arguments = (shared_out(run, count), one, board.axes, board.folder, same, rows, os.getpid())
    workers = [context.Process(target=child, args=arguments, name=f"worker {i}") for i in range(count)]
    with stoppable():
        try:
            for process in workers:
                process.start()
            ended: list[Any] = []
            while any(process.is_alive() for process in workers):
                time.sleep(PAUSE)
                progress.look()
                for process in workers:
                    if process.exitcode not in (None, 0) and process not in ended:
                        ended.append(process)
                        why = "found no memory" if process.exitcode == NO_MEMORY else f"ended ({process.exitcode})"
                        text = f"a worker {why}; {len(workers) - len(ended)} go on"
                        progress.console.print(text, style="yellow", highlight=False)
        finally:
            for process in workers:
                if process.is_alive():
                    process.terminate()  # a first signal: it saves, gives its trial back and ends
            for process in workers:
                if process.pid:
                    process.join()
    progress.look()
    trials = board.trials()
    if any(not trial.state.is_finished() for trial in trials) or len(trials) < board.settings.trials:
        if any(process.exitcode == NO_MEMORY for process in workers):  # alone on the device, or not at all
            work(board, run, rows, Desk(), lambda: None, progress.look, alone=True)
        elif all(process.exitcode == STOPPED for process in workers):  # each by a signal
            raise KeyboardInterrupt
        else:
            raise VerituneError(
                f"{board.folder}: all workers have ended before the sweep had; trials/*.log say why. The same command "
                "goes on with it"
            )


def shared_out(run: config.Run, workers: int) -> config.Run:
    """The run with its part of the GPU's free memory, unless `train.memory_gib` says how much a trial may take: each
    worker would plan with all of it. From three workers on without recorded passes: so many keep a GPU busy, and every
    trial would record each of its sizes for half a second."""
    if load.pick_device(run.model.device).type == "cpu":
        return run
    train = replace(run.train, cuda_graphs=run.train.cuda_graphs and workers < 3)
    if train.memory_gib is None:
        free = torch.cuda.mem_get_info()[0] / 2**30
        train = replace(train, memory_gib=max(1.0, 0.95 * free / workers))
    return replace(run, train=train)


def one_or_more(board: Board) -> int:
    """Workers to start: no more than there are trials left."""
    done = sum(trial.state.is_finished() for trial in board.trials())
    return max(1, min(board.settings.at_once, board.settings.trials - done))


def child(
    run: config.Run,
    settings: config.Sweep,
    axes: list[space.Axis],
    folder: Path,
    same: dict[str, Any],
    rows: int,
    parent: int,
) -> None:
    """A worker process; it ends when its parent does."""
    try:
        board = open_board(settings, axes, folder, same, join=True)
        with stoppable():
            work(board, run, rows, Desk(), lives_with(parent), lambda: None, alone=False)
        board.close()
    except NoMemory:
        raise SystemExit(NO_MEMORY) from None
    except KeyboardInterrupt:
        raise SystemExit(STOPPED) from None
    except VerituneError as error:
        (folder / "trials").mkdir(exist_ok=True)
        with (folder / "trials" / f"worker-{os.getpid()}.log").open("w", encoding="utf-8") as log:
            log.write(f"{error}\n")
        raise SystemExit(2) from None


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends a block as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = None
    with suppress(ValueError):  # not in the main thread: then whoever runs it there decides
        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
