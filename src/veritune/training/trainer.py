"""The training loop, and what it needs around it: phases that begin and end, measuring, saving, resuming."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from .. import config
from ..data.sources import file_hash
from ..durable import alone_in
from ..errors import ConfigError, MissingError
from ..model import adapter, load
from ..track import Tracker
from ..trackers.follow import check, following
from . import distributed, runfolder, status
from . import plan as plans
from .checkpoint import Saved, Saver, load_latest, publish, settle
from .display import Display, say, show_plan
from .feed import ahead, read
from .fetch import fetch
from .measure import probe, validate, write_forgetting
from .progress import At, begin, copies, restore, save_checkpoint
from .session import Session, Stop, age, session
from .setup import begun_from_nothing, prepare
from .state import Training, Watch
from .step import deterministic, fitting, update

READ = 64
"""Held-out rows by which a tokenizer is known."""


def train(
    run: config.Run,
    console: Console,
    base: load.Base | None = None,
    then: Callable[[Training], None] | None = None,
    *,
    watch: Watch | None = None,
    adapters: bool = True,
) -> dict[str, Any]:
    """Trains one run, or goes on with it, and returns the last validation's figures; see `measure.validate`.

    The run folder then holds `adapter/` (the last weights), `best/` (the lowest validation loss), `metrics.jsonl`,
    `evaluation.json` and what a resume or a report needs; without `adapters`, not the first two. For many runs in one
    process: `base` is a model that is loaded already (the run's [model] is not read) and given back without adapter,
    its layers compiled; `then` gets the trained run before that. Raises the kinds in `errors`; a stop by signal saves
    first and raises KeyboardInterrupt.
    """
    folder = Path(run.out)
    if watch is None:
        runfolder.outside_sweeps(folder)
    with session(run.session.hours) as stop, distributed.join(run.model.device) as world, ExitStack() as kept:
        stop.alone = world.size == 1
        kept.enter_context(deterministic(run.train.deterministic))
        try:
            if world.first:
                kept.enter_context(alone_in(folder))
                for name in runfolder.ADAPTERS:
                    settle(folder / name)
            check(run.track)
            state = replace(prepare(run, console, base, world), watch=watch, adapters=adapters)
            quality = work(state, folder, console, stop)
            if then is not None:
                then(state)
        except Stop:
            if not stop.training:
                text = f"stopped by {stop.reason} before the first step; the same command goes on"
                console.out(text, highlight=False)
            raise
        finally:
            if base is not None:
                adapter.remove(base)
    return quality


def work(state: Training, folder: Path, console: Console, stop: Session) -> dict[str, Any]:
    """The steps of a run that are not done yet."""
    run, world, values = state.run, state.world, runfolder.described(state.run, decisive(state))
    replica = Path(run.checkpoint.replica).expanduser() if run.checkpoint.replica else None

    def same_so_far(earlier: config.Run, done: int) -> bool:
        # The rows are the same, wherever they lie by now: their fingerprint is compared too.
        return state.plan.agrees(read(replace(earlier, data=replace(earlier.data, path=run.data.path))).plan, done)

    def found() -> Saved | None:
        if replica is not None and (step := fetch(folder, replica, values, same_so_far, console.out)) is not None:
            console.out(f"brought back from {replica}, as it was after step {step:,}", highlight=False)
        saved = load_latest(folder / "checkpoints", warn=console.out)
        if saved is None and begun_from_nothing(run):
            raise MissingError(f"train.start_from = {run.train.start_from!r}: no such adapter folder")
        if saved is None and (folder / "adapter").exists():
            raise ConfigError(
                f"{folder} holds a finished run whose checkpoints are gone: it would be trained anew and its adapters "
                f"replaced. Move it away, or choose another `out` (train.start_from = '{folder}/adapter' trains on)"
            )
        runfolder.start(folder, values, lambda earlier: same_so_far(earlier, saved.step if saved else 0))
        return saved

    # The first process sends the checkpoint itself to the others, so they need not see its folder.
    saved = world.from_first(found)
    distributed.check_same(world, runfolder.mathematics(values))
    world.same(state.parameters)
    at = restore(state, saved) if saved else At()
    rows, before = len(state.validation.labels), (at.best_quality or {}).get("rows")
    if before not in (None, rows) and at.validated < len(state.plan):
        at.best = math.inf  # losses on other rows are not to be compared
        console.out(f"validation is on {rows:,} rows, before on {before:,}: the next one is the best", highlight=False)
    state.saved = (at.done, at.validated)
    show_plan(console, state, at.done)
    tell = partial(say, console)
    tracker: Any = distributed.Nobody()
    saver: Any = distributed.Nobody()
    about, shown = nullcontext(), nullcontext()
    if world.first:
        tracker = Tracker(folder / "metrics.jsonl", from_step=at.done, validated=at.validated)
        saver = Saver(folder / "checkpoints", keep=run.checkpoint.keep, replica=replica, run=folder, warn=tell)
        trained = sum(p.numel() for p in state.parameters)
        about = status.running(folder, state.plan, state.base.device, step=at.done, parameters=trained)
        shown = following(run, folder, tell)
    try:
        if at.best_quality:  # best/ may be missing, or of a step that a killed session had done since
            save_adapter(state, folder / "best", at.best_step, at.best_quality, state.best)
        if saved:  # the drive may have been away when it was made
            saver.copy(saved.path)
        with about, shown, Display(console, state, at.done) as display:
            stop.training, loaded, began = True, age(), state.saved
            try:
                after_step(state, at, folder, tracker, saver, display, stop)
                for step, micros, cut in ahead(state, at.done):
                    stop.check("step")
                    started = time.perf_counter()
                    with stop.whole():
                        begin(state, state.plan.begins(step))
                    loss, norm = fitting(state, step, micros, stop, display.say)
                    with stop.whole():
                        applied = update(state, at, step, loss, norm)
                        seconds = time.perf_counter() - started
                        stop.took("step", seconds)
                        if world.first and saver.seconds:
                            stop.took("save", saver.seconds)
                        at.truncated += cut
                        rows = len(state.plan.rows(step))
                        line = {"loss": loss, "lr": state.plan.lr(step), "grad_norm": norm, "rows": rows}
                        log(state, tracker, at.done, **line, seconds=seconds, **({} if applied else {"skipped": True}))
                    if applied:
                        display.step(at.done, loss, rows, seconds)
                    else:
                        display.say(f"step {at.done:,} is skipped: loss {loss}, gradient norm {norm}")
                    after_step(state, at, folder, tracker, saver, display, stop)
            except Stop:
                stop.heard()
                save(state, at, tracker, saver, stop)
                saver.wait()
                # All are waited for: a process that ended earlier would be taken for a failure.
                if any(world.gather(stop.limited)) and (at.done, at.validated) == began:
                    raise stop.too_short(loaded) from None
                where = f"after step {at.done:,}" if at.done else "before the first step"
                display.say(f"stopped by {stop.reason} {where}; the same command goes on from there")
                raise
        saver.wait()
        world.wait()  # not after the replica, which may take longer than the others would wait
    finally:
        try:
            saver.wait()
        finally:
            saver.close(stop.patience)
            tracker.close()
    assert at.quality is not None
    return at.quality


def after_step(
    state: Training, at: At, folder: Path, tracker: Any, saver: Any, display: Display, stop: Session
) -> None:
    """What is due after a step, or again after a resume: validation, the last files, a checkpoint. Raises Stop."""
    run, last = state.run, at.done == len(state.plan)
    ended = state.plan.ends(at.done)
    if at.done and at.validated != at.done and (ended or at.done % run.validation.every == 0):
        measure(state, at, ended, folder, tracker, display, stop)
        if state.ending is not None:
            save(state, at, tracker, saver, stop)
            raise state.ending
    if last and state.world.first:
        with stop.whole():
            finish(state, at, folder)
    if (ended and state.adapters) or at.done % run.checkpoint.every == 0:
        save(state, at, tracker, saver, stop)


def save(state: Training, at: At, tracker: Any, saver: Any, stop: Session) -> None:
    """Has a checkpoint written, unless it would be the one that there is. Raises NonFiniteError and CheckpointError."""
    if at.done == 0 or (at.done, at.validated) == state.saved:
        return
    with stop.whole():
        tracker.sync()  # a checkpoint must not outlive the lines that lead to it
        save_checkpoint(state, saver, at)
        state.saved = (at.done, at.validated)


def measure(
    state: Training, at: At, ended: plans.Phase | None, folder: Path, tracker: Any, display: Display, stop: Session
) -> None:
    """Validates; at the end of a phase, the probes of every slice too. Raises Stop, with nothing kept of it."""
    stop.check("validation")
    with stop.timing("validation"):
        quality, p = validate(state, stop)
        # Where a cooldown interrupts a phase, the phase is not over: that is no row of the forgetting matrix.
        over = ended if ended and ended.kind != "part" else None
        probes = probe(state, over, quality, stop) if over and state.probed else None
    with stop.whole():
        keep(state, at, ended, quality, p, probes, folder, tracker, display)


def keep(
    state: Training,
    at: At,
    ended: plans.Phase | None,
    quality: dict[str, Any],
    p: np.ndarray,
    probes: dict[str, Any] | None,
    folder: Path,
    tracker: Any,
    display: Display,
) -> None:
    """Writes down what was measured after a step, and the best adapter if it is that."""
    at.validated, at.quality = at.done, quality
    log(state, tracker, at.done, validation=quality, **({"probes": probes} if probes else {}))
    display.validation(at.done, quality)
    if probes and state.world.first:
        display.probes(probes, write_forgetting(state, folder))
    if ended and ended.kind == "cooldown":
        save_adapter(state, folder / "cooldowns" / f"step-{at.done:08d}", at.done, quality)
    better = quality["loss"] < at.best
    if state.world.first:
        status.keep_scores(folder, at.done, state.validation.ids, state.validation.labels, p, best=better)
    if better:
        at.best, at.best_step, at.best_quality = quality["loss"], at.done, quality
        state.best = copies(adapter.weights(state.model))
        save_adapter(state, folder / "best", at.done, quality, state.best)


def log(state: Training, tracker: Any, step: int, **values: Any) -> None:
    """One line of metrics.jsonl, told to who watches the run."""
    tracker.log(step, **values)
    if state.watch:
        state.ending = state.watch(state, step, values)


def finish(state: Training, at: At, folder: Path) -> None:
    """Writes the last adapter and evaluation.json."""
    assert at.quality is not None, "the last step is validated before this"
    save_adapter(state, folder / "adapter", at.done, at.quality)
    left = {"validation": at.quality, "truncated_rows": at.truncated, "skipped_steps": at.skipped}
    runfolder.write_json(folder / "evaluation.json", left)
    status.finished(folder)


def decisive(state: Training) -> dict[str, Any]:
    """What decides the mathematics besides the settings: see `runfolder.start`."""
    found: dict[str, Any] = {"fingerprint": state.about.data, "precision": state.base.precision}
    found[runfolder.WEIGHTS] = state.base.weights or state.base.path
    held = state.source.held
    found[runfolder.TOKENIZER] = state.encoder.fingerprint([*held.questions[:READ], *held.solutions[:READ]])
    start = state.run.train.start_from
    if start and (weights := Path(start).expanduser() / adapter.WEIGHTS).is_file():
        found[runfolder.START] = file_hash(weights)[:16]
    if state.run.lora.dropout:  # what is dropped depends on how a step is cut, and on what draws the random numbers
        device = state.base.device.type
        compiled = state.run.train.compile and device == "cuda"
        found |= {"train.micro_batch_tokens": state.budget, "model.device": device, "train.compile": compiled}
        found["processes"] = state.world.size
    return found


def save_adapter(
    state: Training, folder: Path, step: int, quality: dict[str, Any], weights: dict[str, Tensor] | None = None
) -> None:
    """Writes an adapter folder, whole or not at all; `weights` in place of those the model has now.

    Raises NonFiniteError and CheckpointError.
    """
    if not (state.adapters and state.world.first):
        return
    card = runfolder.card(state.run, state.base.path, state.about.data, step, quality)
    files = adapter.files(state.model, state.about, card)
    publish(folder, files | ({adapter.WEIGHTS: weights} if weights else {}))
