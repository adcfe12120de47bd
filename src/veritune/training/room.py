"""GPU memory in a run: what it may take, how a step is computed in that, and what to do when it runs out after all."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import config
from ..errors import ModelError, RoomError
from ..model import load, lora
from ..model.precision import hold_unpacked
from ..model.shape import Shape
from . import fit
from .memory import CONTEXT, GIB, Job
from .speed import card_of

if TYPE_CHECKING:
    from .feed import Micro
    from .state import Training

UNFORESEEN = {"cpu": 2048, "cuda": 16384}
"""Tokens computed at once where memory is not foreseen. Where it runs out, all layers are computed again before this is
halved, so twice as many would cost more than they could gain."""
PROBE_TOKENS = 2048
"""Tokens on which compiled layers are compared with plain ones, which take more memory."""


@dataclass(frozen=True)
class Planned:
    """How steps are computed, and what that was chosen from."""

    shape: Shape
    job: Job
    mix: fit.Mix
    fit: fit.Fit

    def __str__(self) -> str:
        found, shape = self.fit, self.shape
        again = f"{found.recomputed} of {shape.layers}" if found.recomputed else "no"
        return (
            f"{found.peak.total / GIB:.1f} of {found.room / GIB:.1f} GiB foreseen at {found.budget:,} tokens at once, "
            f"{again} layers computed again"
        )


def limit(run: config.Run, device: torch.device) -> float | None:
    """Bytes that a run's tensors may take on a GPU, None on a CPU; holds the process to `train.memory_gib`."""
    if device.type != "cuda":
        return None
    cap, (free, total) = run.train.memory_gib, torch.cuda.mem_get_info(device)
    # Also without a cap: an earlier run of this process may have had one.
    part = min((cap * GIB - CONTEXT) / total, 1.0) if cap is not None else 1.0
    torch.cuda.set_per_process_memory_fraction(part, device)
    # What torch itself holds, such as a model that is loaded already, is counted in the peak.
    return fit.room_of(free + torch.cuda.memory_reserved(device), cap)


def planned(state: "Training", room: float | None) -> Planned | None:
    """How a run's steps are computed; None on a CPU and for a model whose memory is not foreseen."""
    if room is None:
        return None
    try:
        shape = Shape.of(state.base.model.config.to_dict())
    except ModelError:
        return None
    run, table = state.run, state.train

    def rows(step: int) -> list[np.ndarray]:
        numbers = state.plan.rows(step)
        found, _ = state.encoder.rows([table.questions[i] for i in numbers], [table.solutions[i] for i in numbers])
        return [found[i] for i in state.world.share(found)] or found[:1]

    of = fit.mix([rows(step) for step in fit.looked_at(len(state.plan))], shared=state.way == "paths")
    compiled = run.train.compile and state.way == "paths"
    held = "bf16" if state.base.unpacked else state.base.precision
    job = Job(held, run.lora, run.train.optimizer, compiled)
    card = card_of(torch.cuda.get_device_name(state.base.device))
    return Planned(shape, job, of, fit.choose(shape, job, run.train, of, room, card))


def use(state: "Training", found: Planned | None) -> None:
    """Computes the steps from here on as planned."""
    state.planned = found
    if found is not None:
        state.budget, state.recomputed = found.fit.budget, found.fit.recomputed
    load.set_training(state.model, recomputed=state.recomputed)


def unpack(state: "Training") -> None:
    """Holds an NF4 base as bf16 where `fit.unpacked` finds that better."""
    was = state.planned
    if state.base.unpacked:  # for an earlier run of this process; this adapter may be on further layers
        hold_unpacked(state.model)
    found = fit.unpacked(was.fit, was.shape, was.job, state.run.train, was.mix) if was is not None else None
    if was is not None and found is not None:
        hold_unpacked(state.model)
        state.base.unpacked = True
        use(state, replace(was, job=replace(was.job, precision="bf16"), fit=found))


def for_recording(state: "Training") -> bool:
    """Makes room for recorded passes, by smaller micro-batches where memory is short; False: there is none. What they
    keep and work with stays theirs, and a pass of another size is computed beside it before it is recorded."""
    was = state.planned
    if was is None:
        return True
    once = was.fit.peak.kept + was.fit.peak.working
    room = (was.fit.room + was.fit.peak.total - once) / 2
    settings = replace(state.run.train, gradient_checkpointing="off")
    found = fit.choose(was.shape, was.job, settings, was.mix, room, was.fit.card)
    if found.fits:
        use(state, replace(was, fit=replace(found, room=was.fit.room)))
    return found.fits


def replan(state: "Training", **changes: Any) -> None:
    """Plans again for a job that is another than was thought."""
    was = state.planned
    if was is not None:
        job = replace(was.job, **changes)
        found = fit.choose(was.shape, job, state.run.train, was.mix, was.fit.room, was.fit.card)
        use(state, replace(was, job=job, fit=found))


def fall_back(state: "Training", micros: list["Micro"], say: Callable[[str], None]) -> None:
    """Takes the next cheaper way after memory ran out, and says so. Raises RoomError if there is none."""
    recorded, state.graphs = state.graphs is not None, None
    lora.forget(state.model)
    state.optimizer.zero_grad(set_to_none=True)
    if state.base.device.type == "cuda":
        torch.cuda.empty_cache()
    if recorded:  # they hold a step's memory beside the one that is computed
        say("memory ran out; from here on no CUDA graphs are used. The step is done again, nothing is lost")
        return
    was, layers = state.planned, len(load.layers(state.model))
    cheaper = fit.cheaper(was.shape, was.job, state.run.train, was.mix, was.fit) if was is not None else None
    if was is not None and cheaper is not None:
        use(state, replace(was, fit=cheaper))
    elif state.recomputed < layers:
        state.recomputed = layers
        load.set_training(state.model, recomputed=layers)
    elif any(len(micro.labels) > 1 for micro in micros):
        largest = max(sum(map(len, micro.rows)) for micro in micros)
        state.budget = max(min(state.budget, largest) // 2, 1)
    else:
        raise RoomError(
            "memory ran out on a single row with all layers computed again. A lower prompt.max_length, model.base = "
            "'nf4' or a smaller model takes less; nothing of this step was kept"
        )
    say(
        f"memory ran out; from here on {state.budget:,} tokens at once and {state.recomputed} of {layers} layers "
        "computed again. The step is done again, nothing is lost"
    )
