"""The training loop, and what it needs around it: rows, batches made ahead, validation, saving, resuming."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.console import Console
from torch import Tensor

from .. import config
from ..data import dataset
from ..errors import DataError, NonFiniteError
from ..model import adapter, load
from ..model.compiled import compile_layers
from ..model.verdict import label_logits, label_loss, rowwise_logits
from ..model.verifier import MICRO_BATCH_TOKENS, score_ids
from ..quality import metrics
from ..tokens import prompt
from ..tokens.encode import Encoder, encoder
from ..tokens.trie import Trie, build, split
from ..track import Tracker
from ..trackers.follow import check, following
from . import optimizer as optimizers
from . import plan as plans
from . import runfolder, status
from .checkpoint import Saver, load_latest, publish, settle
from .display import Display, show_plan
from .optimizer_state import optimizer_tensors, restore_optimizer
from .session import Session, session


@dataclass(frozen=True)
class Rows:
    """Rows to train or validate on, as columns of one length."""

    ids: list[str]
    questions: list[str]
    solutions: list[str]
    labels: np.ndarray  # bool [rows]
    groups: np.ndarray  # int64 [rows]: the number of each row's question

    @staticmethod
    def of(frame: pl.DataFrame) -> "Rows":
        return Rows(
            frame["id"].to_list(),
            frame["question"].to_list(),
            frame["solution"].to_list(),
            frame["is_correct"].to_numpy().astype(bool),
            metrics.group_ids(frame["qid"].to_list()),
        )


@dataclass(frozen=True)
class Micro:
    """A part of a step that is computed at once."""

    rows: list[np.ndarray]  # int32 ids each
    trie: Trie | None  # None: row by row
    labels: np.ndarray  # bool [rows]


@dataclass
class Training:
    """Everything one run holds while it trains."""

    run: config.Run
    plan: plans.Plan
    base: load.Base
    model: Any
    optimizer: torch.optim.Optimizer
    encoder: Encoder
    train: Rows
    validation: Rows
    shared: bool
    budget: int
    about: adapter.About

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


@dataclass
class At:
    """How far a run is; what a checkpoint holds besides tensors."""

    done: int = 0
    """Finished steps."""
    validated: int = 0
    """The step of the last validation."""
    best: float = math.inf
    """The lowest validation log loss."""
    truncated: int = 0
    """Row presentations that were too long."""
    quality: dict[str, Any] | None = None
    """The last validation's figures."""


class Stopped(Exception):
    """A signal came while validating."""


def train(run: config.Run, console: Console) -> dict[str, Any]:
    """Trains one run, or goes on with it, and returns the last validation's figures; see `quality.metrics.measure`.

    The run folder then holds `adapter/` (the last weights), `best/` (the lowest validation log loss), `metrics.jsonl`
    and `evaluation.json`. Raises the kinds in `errors`; a stop by signal saves first and raises KeyboardInterrupt.
    """
    folder = Path(run.out)
    for name in ("adapter", "best"):
        settle(folder / name)
    check(run.track)
    state = prepare(run, console)
    runfolder.start(folder, run, decisive(state))
    at = resume(state, folder, console)
    show_plan(console, state, at.done)
    tracker = Tracker(folder / "metrics.jsonl", from_step=at.done)
    saver = Saver(folder / "checkpoints", keep=run.checkpoint.keep, warn=console.out)
    try:
        trained = sum(p.numel() for p in state.parameters)
        about = status.running(folder, state.plan, state.base.device, step=at.done, parameters=trained)
        shown = following(run, folder, console.out)
        with about, shown, session() as stop, Display(console, state, at.done) as display:
            after_step(state, at, folder, tracker, saver, display, stop)
            for step, micros, cut in ahead(state, at.done):
                started = time.perf_counter()
                loss, norm = one_step(state, step, micros)
                seconds = time.perf_counter() - started
                at.done, at.truncated = step + 1, at.truncated + cut
                rows = sum(len(micro.labels) for micro in micros)
                tracker.log(at.done, loss=loss, lr=state.plan.lr(step), grad_norm=norm, rows=rows, seconds=seconds)
                display.step(at.done, loss, rows, seconds)
                after_step(state, at, folder, tracker, saver, display, stop)
    finally:
        saver.close()
        tracker.close()
    return finish(state, at, folder)


def after_step(
    state: Training, at: At, folder: Path, tracker: Tracker, saver: Saver, display: Display, stop: Session
) -> None:
    """What is due after a step, or again after a resume: validation, a checkpoint, the stop that a signal asked for.

    Raises KeyboardInterrupt for that stop, once everything is saved.
    """
    run, last = state.run, at.done == len(state.plan)
    if at.done and at.validated != at.done and (last or at.done % run.validation.every == 0):
        try:
            measured = validate(state, stop)
        except Stopped:
            measured = None
        if measured is not None:
            quality, p = measured
            at.validated, at.quality = at.done, quality
            tracker.log(at.done, validation=quality)
            display.validation(at.done, quality)
            held, better = state.validation, quality["log_loss"] < at.best
            status.keep_scores(folder, at.done, held.ids, held.labels, p, best=better)
            if better:
                at.best = quality["log_loss"]
                save_adapter(state, folder / "best", at.done, quality)
    stopping = stop.reason is not None and not (last and at.validated == at.done)
    if at.done and (last or stopping or at.done % run.checkpoint.every == 0):
        tracker.sync()  # a checkpoint must not outlive the lines that lead to it
        save_checkpoint(state, saver, at)
    if stopping:
        saver.wait()
        display.say(f"stopped by {stop.reason} after step {at.done:,}; the same command goes on from there")
        raise KeyboardInterrupt


def finish(state: Training, at: At, folder: Path) -> dict[str, Any]:
    """Writes the last adapter and evaluation.json, and returns the last validation's figures."""
    assert at.quality is not None, "the last step is validated before this"
    quality = at.quality
    save_adapter(state, folder / "adapter", at.done, quality)
    runfolder.write_json(folder / "evaluation.json", {"validation": quality, "truncated_rows": at.truncated})
    status.finished(folder)
    return quality


def prepare(run: config.Run, console: Console) -> Training:
    """Loads data, weights and adapter, checks them against each other, and makes the plan."""
    data = dataset.load(Path(run.data.path))
    frame = data.train if run.data.rows is None else data.train.head(run.data.rows)
    if frame.is_empty() or data.validation.is_empty():
        raise DataError(f"{run.data.path}: training needs rows in both train and validation")
    rows = Rows.of(frame)
    with console.status("loading the model"):
        base = load.load_base(run.model)
        load.check_length(base, run.prompt.max_length)
        words = prompt.render(run.prompt, base.tokenizer)
        rows_encoder = encoder(words, base.tokenizer)
        reason = load.check_paths(base, run.prompt.max_length)
    if reason:
        said = f"{run.model.path}: rows are computed one by one, slowly, because {reason}"
        console.print(said, style="yellow", markup=False)
    model = adapter.add_adapter(base, run.lora, seed=run.train.seed, start_from=run.train.start_from)
    load.set_training(model, checkpointing=run.train.gradient_checkpointing)
    parameters = [p for p in model.parameters() if p.requires_grad]
    state = Training(
        run=run,
        plan=plans.make(run.train, rows.groups, rows.labels),
        base=base,
        model=model,
        optimizer=optimizers.make(parameters, run.train),
        encoder=rows_encoder,
        train=rows,
        validation=Rows.of(whole_questions(data.validation, run.validation.rows)),
        shared=reason is None,
        budget=run.train.micro_batch_tokens or MICRO_BATCH_TOKENS[base.device.type],
        about=adapter.About(words, base.path, base.precision, data.fingerprint),
    )
    if run.train.compile and base.device.type == "cuda" and state.shared:
        _, (probe, *_), _ = micro_batches(state, 0)
        with console.status("compiling the layers"):
            problem = compile_layers(model, lambda: micro_loss(state, probe))
        if problem:
            console.print(f"layers are not compiled, which is slower: {problem}", style="yellow", markup=False)
    return state


def decisive(state: Training) -> dict[str, Any]:
    """What decides the mathematics besides the settings: see `runfolder.start`."""
    found: dict[str, Any] = {"fingerprint": state.about.data, "precision": state.base.precision}
    if state.run.lora.dropout:  # what is dropped depends on how a step is cut, and on what draws the random numbers
        device = state.base.device.type
        compiled = state.run.train.compile and device == "cuda"
        found |= {"train.micro_batch_tokens": state.budget, "model.device": device, "train.compile": compiled}
    return found


def whole_questions(frame: pl.DataFrame, rows: int | None) -> pl.DataFrame:
    """The first questions of a frame sorted by question, with at most `rows` rows but at least one question."""
    if rows is None or rows >= len(frame):
        return frame
    started = frame["qid"].rle_id()
    whole = started < started[rows]
    return frame.filter(whole if whole.any() else started == 0)


def micro_batches(state: Training, step: int) -> tuple[int, list[Micro], int]:
    """A step's rows, encoded and cut into what is computed at once; and how many of them were too long."""
    numbers = state.plan.rows(step)
    rows, cut = state.encoder.rows(
        [state.train.questions[i] for i in numbers], [state.train.solutions[i] for i in numbers]
    )
    labels = state.train.labels[numbers]
    micros = []
    for part in split(rows, state.budget):
        chosen = [rows[i] for i in part]
        micros.append(Micro(chosen, build(chosen) if state.shared else None, labels[part]))
    return step, micros, sum(cut)


def ahead(state: Training, first: int) -> Iterator[tuple[int, list[Micro], int]]:
    """The micro-batches of every step from `first`, the next step's made while this one runs."""
    with ThreadPoolExecutor(1, thread_name_prefix="veritune-batches") as pool:
        pending = [pool.submit(micro_batches, state, step) for step in range(first, min(first + 2, len(state.plan)))]
        for step in range(first, len(state.plan)):
            ready = pending.pop(0).result()
            if step + 2 < len(state.plan):
                pending.append(pool.submit(micro_batches, state, step + 2))
            yield ready


def one_step(state: Training, step: int, micros: list[Micro]) -> tuple[float, float]:
    """One optimiser step over all its micro-batches. Returns the mean loss and the gradient's norm before clipping.

    Raises NonFiniteError before anything is changed.
    """
    torch.manual_seed(state.run.train.seed * 1_000_003 + step)  # dropout is a function of the step, not of history
    size = sum(len(micro.labels) for micro in micros)
    total: float | Tensor = 0.0
    for micro in micros:
        loss = micro_loss(state, micro) / size
        loss.backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(state.parameters, state.run.train.max_grad_norm)
    loss_value, norm_value = torch.stack([torch.as_tensor(total, device=norm.device), norm]).tolist()
    if norm_value == 0 and loss_value > 0:  # a loss of exactly 0 has nothing left to teach
        raise NonFiniteError(f"step {step + 1:,}: the gradient is exactly zero, so nothing would be learnt")
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        ids = [state.train.ids[i] for i in state.plan.rows(step)]
        what = "loss" if not math.isfinite(loss_value) else "gradient"
        raise NonFiniteError(
            f"step {step + 1:,}: the {what} is not finite (loss {loss_value}, gradient norm {norm_value}). Nothing of "
            f"this step was kept. Rows: {', '.join(ids)}. Start another run (another `out`) with a lower train.lr, a "
            f"smaller train.max_grad_norm, or model.base = 'bf16' or 'fp32'; train.start_from = '{state.run.out}/best' "
            "goes on from the best adapter, once there is one"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = state.plan.lr(step)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return loss_value, norm_value


def micro_loss(state: Training, micro: Micro) -> Tensor:
    """The label loss of a micro-batch, summed over its rows."""
    device = state.base.device
    if micro.trie is not None:
        logits = label_logits(state.model, micro.trie, device)
    else:
        logits = rowwise_logits(state.model, micro.rows, device)
    labels = torch.from_numpy(micro.labels).to(device, non_blocking=True)
    return label_loss(logits, labels, state.encoder.frame.answer_ids)


def validate(state: Training, stop: Session) -> tuple[dict[str, Any], np.ndarray]:
    """Figures on the run's validation rows, and P(correct) of each. Raises Stopped when a signal comes."""

    def progress(rows: int) -> None:
        if stop.reason is not None:
            raise Stopped

    state.model.eval()
    held = state.validation
    ids, _ = state.encoder.rows(held.questions, held.solutions)
    p = score_ids(
        state.model, ids, state.encoder.frame.answer_ids, state.base.device, state.budget, state.shared, progress
    )
    load.set_training(state.model, checkpointing=state.run.train.gradient_checkpointing)
    return metrics.measure(held.labels, p, held.groups), p


def save_adapter(state: Training, folder: Path, step: int, quality: dict[str, Any]) -> None:
    """Writes an adapter folder, whole or not at all. Raises NonFiniteError and CheckpointError."""
    card = runfolder.card(state.run, state.base.path, state.about.data, step, quality)
    publish(folder, adapter.files(state.model, state.about, card))


def save_checkpoint(state: Training, saver: Saver, at: At) -> None:
    """Hands everything a resume needs to the saver, which writes it while training goes on."""
    tensors, settings = optimizer_tensors(state.optimizer)
    saver.save(
        at.done,
        {"adapter": adapter.weights(state.model), "optimizer": tensors},
        {"optimizer": settings, "at": metrics.plain(asdict(at))},
    )


def resume(state: Training, folder: Path, console: Console) -> At:
    """Puts back the newest whole checkpoint, if there is one, and says how far the run is."""
    saved = load_latest(folder / "checkpoints", warn=console.out)
    if saved is None:
        return At()
    adapter.set_weights(state.model, saved.tensors["adapter"])
    restore_optimizer(state.optimizer, saved.tensors["optimizer"], saved.state["optimizer"])
    at = At(**saved.state["at"])
    at.best, at.quality = math.inf if at.best is None else at.best, metrics.figures(at.quality)
    return at
