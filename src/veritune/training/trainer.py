"""The training loop, and what it needs around it: setting up, phases that begin and end, saving, resuming."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .. import config
from ..errors import NonFiniteError, RoomError
from ..model import adapter, load
from ..model.compiled import compile_layers, plain_layers
from ..model.graphs import Graphs, launch_bound, own_stream, record
from ..model.verdict import label_logits, label_loss, rowwise_logits
from ..model.verifier import MICRO_BATCH_TOKENS
from ..tokens import prompt
from ..tokens.encode import Encoder, encoder
from ..track import Tracker
from ..trackers.follow import check, following
from . import distributed, room, runfolder, status
from . import optimizer as optimizers
from . import plan as plans
from .checkpoint import Saver, load_latest, publish, settle
from .display import Display, show_plan
from .feed import Micro, Rows, Source, ahead, micro_batches, read
from .measure import Stopped, probe, validate, write_forgetting
from .progress import At, Point, begin, copies, restore, save_checkpoint
from .session import Session, session


@dataclass
class Training:
    """Everything one run holds while it trains."""

    run: config.Run
    source: Source
    base: load.Base
    model: Any
    optimizer: torch.optim.Optimizer
    encoder: Encoder
    shared: bool
    budget: int
    """Tokens computed at once."""
    about: adapter.About
    recomputed: int = 0
    """Layers, from the first, whose activations are computed again in the backward pass."""
    planned: room.Planned | None = None
    """What these two were chosen from, on a GPU."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The adapter of the lowest validation log loss so far, on the CPU."""
    graphs: Graphs | None = None
    """Recorded passes, for a small model on a GPU."""
    fork: Point | None = None
    """In a cooldown, where it left the main line."""
    world: distributed.World = distributed.ALONE

    @property
    def plan(self) -> plans.Plan:
        return self.source.plan

    @property
    def train(self) -> Rows:
        return self.source.train

    @property
    def validation(self) -> Rows:
        return self.source.validation

    @property
    def probed(self) -> bool:
        """Whether each slice is measured after each phase."""
        return bool(self.source.slices) and self.run.strategy.probe_rows > 0

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def train(
    run: config.Run,
    console: Console,
    base: load.Base | None = None,
    then: Callable[[Training], None] | None = None,
) -> dict[str, Any]:
    """Trains one run, or goes on with it, and returns the last validation's figures; see `quality.metrics.measure`.

    The run folder then holds `adapter/` (the last weights), `best/` (the lowest validation log loss), `metrics.jsonl`
    and `evaluation.json`. For many runs in one process: `base` is a model that is loaded already (the run's [model] is
    not read) and given back without adapter, its layers compiled; `then` gets the trained run before that. Raises the
    kinds in `errors`; a stop by signal saves first and raises KeyboardInterrupt.
    """
    folder = Path(run.out)
    with distributed.join(run.model.device) as world:
        if world.first:
            for name in ("adapter", "best"):
                settle(folder / name)
        check(run.track)
        state = prepare(run, console, base, world)
        try:
            quality = work(state, folder, console)
            if then is not None:
                then(state)
        finally:
            if base is not None:
                adapter.remove(state.model)
    return quality


def work(state: Training, folder: Path, console: Console) -> dict[str, Any]:
    """The steps of a run that are not done yet."""
    run, world, resolved = state.run, state.world, decisive(state)
    # The first process sends the checkpoint itself to the others, so they need not see its folder.
    saved = world.from_first(lambda: load_latest(folder / "checkpoints", warn=console.out))
    done = saved.step if saved else 0

    def same_so_far(earlier: config.Run) -> bool:
        return state.plan.agrees(read(earlier).plan, done)

    world.from_first(lambda: runfolder.start(folder, run, resolved, same_so_far))
    distributed.check_same(world, runfolder.mathematics({"settings": config.as_dict(run), "resolved": resolved}))
    world.same(state.parameters)
    at = restore(state, saved) if saved else At()
    show_plan(console, state, at.done)
    tracker: Any = distributed.Nobody()
    saver: Any = distributed.Nobody()
    about, shown = nullcontext(), nullcontext()
    if world.first:
        tracker = Tracker(folder / "metrics.jsonl", from_step=at.done)
        saver = Saver(folder / "checkpoints", keep=run.checkpoint.keep, warn=console.out)
        trained = sum(p.numel() for p in state.parameters)
        about = status.running(folder, state.plan, state.base.device, step=at.done, parameters=trained)
        shown = following(run, folder, console.out)
    try:
        if at.best_quality:  # best/ may be missing, or of a step that a killed session had done since
            save_adapter(state, folder / "best", at.best_step, at.best_quality, state.best)
        with about, shown, session() as stop, Display(console, state, at.done) as display:
            after_step(state, at, folder, tracker, saver, display, stop)
            for step, micros, cut in ahead(state, at.done):
                begin(state, state.plan.begins(step))
                started = time.perf_counter()
                loss, norm = fitting_step(state, step, micros, stop, display.say)
                seconds = time.perf_counter() - started
                at.done, at.truncated = step + 1, at.truncated + cut
                rows = len(state.plan.rows(step))
                tracker.log(at.done, loss=loss, lr=state.plan.lr(step), grad_norm=norm, rows=rows, seconds=seconds)
                display.step(at.done, loss, rows, seconds)
                after_step(state, at, folder, tracker, saver, display, stop)
    finally:
        saver.close()
        tracker.close()
    return world.from_first(lambda: finish(state, at, folder))


def after_step(
    state: Training, at: At, folder: Path, tracker: Any, saver: Any, display: Display, stop: Session
) -> None:
    """What is due after a step, or again after a resume: validation, a checkpoint, the stop that a signal asked for.

    Raises KeyboardInterrupt for that stop, once everything is saved.
    """
    run, last = state.run, at.done == len(state.plan)
    ended = state.plan.ends(at.done)
    if at.done and at.validated != at.done and (ended or at.done % run.validation.every == 0):
        with suppress(Stopped):
            measure(state, at, ended, folder, tracker, display, stop)
    stopping = stop.reason is not None and not (last and at.validated == at.done)
    if at.done and (ended or stopping or at.done % run.checkpoint.every == 0):
        tracker.sync()  # a checkpoint must not outlive the lines that lead to it
        save_checkpoint(state, saver, at)
    if stopping:
        saver.wait()
        state.world.wait()  # a process that ended earlier would be taken for a failure
        display.say(f"stopped by {stop.reason} after step {at.done:,}; the same command goes on from there")
        raise KeyboardInterrupt


def measure(
    state: Training, at: At, ended: plans.Phase | None, folder: Path, tracker: Any, display: Display, stop: Session
) -> None:
    """Validates; at the end of a phase, the probes of every slice too. Raises Stopped, with nothing kept of it."""
    quality, p = validate(state, stop)
    probes = probe(state, ended, quality, stop) if ended and state.probed else None
    at.validated, at.quality = at.done, quality
    tracker.log(at.done, validation=quality, **({"probes": probes} if probes else {}))
    display.validation(at.done, quality)
    if probes and state.world.first:
        display.probes(probes, write_forgetting(state, folder))
    if ended and ended.kind == "cooldown":
        save_adapter(state, folder / "cooldowns" / f"step-{at.done:08d}", at.done, quality)
    better = quality["log_loss"] < at.best
    if state.world.first:
        status.keep_scores(folder, at.done, state.validation.ids, state.validation.labels, p, best=better)
    if better:
        at.best, at.best_step, at.best_quality = quality["log_loss"], at.done, quality
        state.best = copies(adapter.weights(state.model))
        save_adapter(state, folder / "best", at.done, quality, state.best)


def finish(state: Training, at: At, folder: Path) -> dict[str, Any]:
    """Writes the last adapter and evaluation.json, and returns the last validation's figures."""
    assert at.quality is not None, "the last step is validated before this"
    quality = at.quality
    save_adapter(state, folder / "adapter", at.done, quality)
    runfolder.write_json(folder / "evaluation.json", {"validation": quality, "truncated_rows": at.truncated})
    status.finished(folder)
    return quality


def prepare(
    run: config.Run, console: Console, base: load.Base | None = None, world: distributed.World = distributed.ALONE
) -> Training:
    """Reads the data and makes the plan, loads weights and adapter, and checks them against each other."""
    source = read(run)
    space = room.limit(run, base.device if base else load.pick_device(run.model.device))
    with console.status("loading the model"):
        base = base or load.load_base(run.model)
        load.check_length(base, run.prompt.max_length)
        words = prompt.render(run.prompt, base.tokenizer)
        rows_encoder = encoder(words, base.tokenizer)
        reason = load.check_paths(base, run.prompt.max_length)
    if reason:
        said = f"{base.path}: rows are computed one by one, slowly, because {reason}"
        console.print(said, style="yellow", markup=False)
    model = adapter.add_adapter(base, run.lora, seed=run.train.seed, start_from=run.train.start_from)
    parameters = [p for p in model.parameters() if p.requires_grad]
    state = Training(
        run=run,
        source=source,
        base=base,
        model=model,
        optimizer=optimizers.make(parameters, run.train),
        encoder=rows_encoder,
        shared=reason is None,
        budget=run.train.micro_batch_tokens or MICRO_BATCH_TOKENS[base.device.type],
        about=adapter.About(words, base.path, base.precision, source.fingerprint),
        world=world,
        recomputed=len(load.layers(model)) if run.train.gradient_checkpointing == "on" else 0,
    )
    room.use(state, room.planned(state, space))
    if state.planned and not state.planned.fit.fits:
        console.print(f"memory may not suffice: {state.planned}", style="yellow", markup=False)
    if run.train.compile and base.device.type == "cuda" and state.shared:
        with console.status("compiling the layers"):
            speed_up(state, console)
    else:
        plain_layers(model)
    return state


def speed_up(state: Training, console: Console) -> None:
    """Compiles the layers and records passes, where that gives the same gradients on the run's first rows."""
    alone = replace(state, world=distributed.ALONE)
    graphs = not (state.run.lora.dropout or state.recomputed) and launch_bound(state.model, state.budget)
    if graphs:
        own_stream(state.base.device)
    # Plain layers, which these are compared with, take more memory: a few rows.
    _, (few, *_), _ = micro_batches(alone, 0, min(state.budget, room.PROBE_TOKENS))
    problem = compile_layers(state.model, lambda: micro_loss(state, few))
    slower = "layers are not compiled"
    if problem:
        room.replan(state, compiled=False)
    if problem is None and graphs and not state.recomputed:
        answers, (_, (micro, *_), _) = state.encoder.frame.answer_ids, micro_batches(alone, 0)
        assert micro.trie is not None, "only rows that share a beginning get here"
        state.graphs, problem = record(
            state.model, state.base.device, answers, micro.trie, micro.labels, lambda: micro_loss(state, micro)
        )
        slower = "steps are not recorded as CUDA graphs"
    if problem:
        console.print(f"{slower}, which is slower: {problem}", style="yellow", markup=False)


def decisive(state: Training) -> dict[str, Any]:
    """What decides the mathematics besides the settings: see `runfolder.start`."""
    found: dict[str, Any] = {"fingerprint": state.about.data, "precision": state.base.precision}
    if state.run.lora.dropout:  # what is dropped depends on how a step is cut, and on what draws the random numbers
        device = state.base.device.type
        compiled = state.run.train.compile and device == "cuda"
        found |= {"train.micro_batch_tokens": state.budget, "model.device": device, "train.compile": compiled}
        found["processes"] = state.world.size
    return found


def fitting_step(
    state: Training, step: int, micros: list[Micro], stop: Session, say: Callable[[str], None]
) -> tuple[float, float]:
    """`one_step`, done again in a cheaper way if memory runs out. Raises RoomError if there is none."""
    while True:
        if micros and micros[0].budget != state.budget:  # they were made before memory ran out
            _, micros, _ = micro_batches(state, step)
        with suppress(torch.OutOfMemoryError):  # outside it, nothing that filled the memory is held any more
            return one_step(state, step, micros, stop)
        room.fall_back(state, micros, say)


def one_step(state: Training, step: int, micros: list[Micro], stop: Session) -> tuple[float, float]:
    """One optimiser step over all its micro-batches, and those of all ranks. Returns the mean loss and the gradient's
    norm before clipping; `stop` then knows what all agreed on.

    Raises NonFiniteError, on all ranks, before anything is changed.
    """
    # Dropout is a function of the step and the rank, not of history.
    torch.manual_seed(state.run.train.seed * 1_000_003 + state.plan.number(step) + (state.world.rank << 48))
    size = len(state.plan.rows(step))
    total: float | Tensor = 0.0
    for micro in micros:
        total = total + backward(state, micro, size)
    summed = state.world.reduce(state.parameters, total, float(stop.asked is not None))
    norm = torch.nn.utils.clip_grad_norm_(state.parameters, state.run.train.max_grad_norm)
    loss_value, asked, norm_value = torch.cat([summed, norm.reshape(1)]).tolist()
    stop.agree(asked > 0)
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
    try:
        state.optimizer.step()
    except torch.OutOfMemoryError as error:  # some weights may have changed: the step cannot be done again
        raise RoomError(
            f"step {step + 1:,}: memory ran out while weights were changed; the same command goes on from the last "
            f"checkpoint. A lower train.memory_gib or train.micro_batch_tokens leaves more room ({error})"
        ) from None
    state.optimizer.zero_grad(set_to_none=state.graphs is None)
    return loss_value, norm_value


def backward(state: Training, micro: Micro, size: int) -> Tensor:
    """Adds the gradients of a micro-batch's share of the mean loss over `size` rows, and returns that share."""
    if state.graphs is not None and micro.trie is not None:
        loss = state.graphs.backward(micro.trie, micro.labels, 1 / size)
        if loss is not None:
            return loss
    loss = micro_loss(state, micro) / size
    loss.backward()
    return loss.detach()


def micro_loss(state: Training, micro: Micro) -> Tensor:
    """The label loss of a micro-batch, summed over its rows."""
    device = state.base.device
    if micro.trie is not None:
        logits = label_logits(state.model, micro.trie, device)
    else:
        logits = rowwise_logits(state.model, micro.rows, device)
    labels = torch.from_numpy(micro.labels).to(device, non_blocking=True)
    return label_loss(logits, labels, state.encoder.frame.answer_ids)


def save_adapter(
    state: Training, folder: Path, step: int, quality: dict[str, Any], weights: dict[str, Tensor] | None = None
) -> None:
    """Writes an adapter folder, whole or not at all; `weights` in place of those the model has now.

    Raises NonFiniteError and CheckpointError.
    """
    if not state.world.first:
        return
    card = runfolder.card(state.run, state.base.path, state.about.data, step, quality)
    files = adapter.files(state.model, state.about, card)
    publish(folder, files | ({"adapter_model.safetensors": weights} if weights else {}))
