"""One optimiser step: the loss and its gradient over micro-batches, and what becomes of it."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import NonFiniteError, RoomError
from ..model.graphs import default_stream
from ..model.verdict import label_logits, label_loss, rowwise_logits
from . import room
from .feed import Micro, micro_batches
from .progress import At
from .session import Session

if TYPE_CHECKING:
    from .state import Training

MOST_SKIPPED = 10
"""Steps in a row that are not finite, after which skipping them is no help."""


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Has torch, its compiler and cuBLAS compute the same bits every time inside the block, if that is asked for. What
    can be computed in no such way raises."""
    was = torch.are_deterministic_algorithms_enabled()
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)


def fitting(
    state: "Training", step: int, micros: list[Micro], stop: Session, say: Callable[[str], None]
) -> tuple[float, float]:
    """`gradients`, done again in a cheaper way if memory runs out. Raises RoomError if there is none."""
    while True:
        if micros and micros[0].budget != state.budget:  # they were made before memory ran out
            _, micros, _ = micro_batches(state, step)
        with suppress(torch.OutOfMemoryError):  # outside it, only layers computed together hold some of it
            return gradients(state, step, micros, stop)
        room.fall_back(state, micros, say)


def gradients(state: "Training", step: int, micros: list[Micro], stop: Session) -> tuple[float, float]:
    """The mean loss of a step over the micro-batches of all ranks, with its gradient, clipped, left in the parameters;
    and the norm before clipping. `stop` then knows what all ranks agreed on.

    Raises Stop between micro-batches, and NonFiniteError, on all ranks, for a loss without any gradient.
    """
    # Dropout is a function of the step and the rank, not of history.
    torch.manual_seed(state.run.train.seed * 1_000_003 + state.plan.number(step) + (state.world.rank << 48))
    size = len(state.plan.rows(step))
    total: float | Tensor = 0.0
    for micro in micros:
        stop.check()
        total = total + backward(state, micro, size)
    summed = state.world.reduce(state.parameters, total, float(stop.asked is not None))
    norm = torch.nn.utils.clip_grad_norm_(state.parameters, state.run.train.max_grad_norm or math.inf)
    loss_value, asked, norm_value = torch.cat([summed, norm.reshape(1)]).tolist()
    stop.agree(asked > 0)
    if norm_value == 0 and loss_value > 0:  # a loss of exactly 0 has nothing left to teach
        raise NonFiniteError(f"step {step + 1:,}: the gradient is exactly zero, so nothing would be learnt")
    return loss_value, norm_value


def update(state: "Training", at: At, step: int, loss: float, norm: float) -> bool:
    """Applies a step's gradient; with train.non_finite = "skip", not one that is not finite. Returns whether it did.

    Raises NonFiniteError before anything is changed.
    """
    finite = math.isfinite(loss) and math.isfinite(norm)
    if not finite and (state.run.train.non_finite == "stop" or at.skipped_in_a_row + 1 == MOST_SKIPPED):
        raise NonFiniteError(non_finite(state, step, loss, norm, at.skipped_in_a_row))
    if finite:
        for group in state.optimizer.param_groups:
            group["lr"] = state.plan.lr(step)
        try:
            with default_stream(state.base.device):
                state.optimizer.step()
        except torch.OutOfMemoryError as error:  # some weights may have changed: the step cannot be done again
            raise RoomError(
                f"step {step + 1:,}: memory ran out while weights were changed; the same command goes on from the last "
                f"checkpoint. A lower train.memory_gib or train.micro_batch_tokens leaves more room ({error})"
            ) from None
        at.skipped_in_a_row = 0
    else:
        at.skipped, at.skipped_in_a_row = at.skipped + 1, at.skipped_in_a_row + 1
    state.optimizer.zero_grad(set_to_none=state.graphs is None)
    if state.plan.phase(step).kind != "cooldown":
        state.fork = None  # the main line has gone on from there
    at.done = step + 1
    return finite


def non_finite(state: "Training", step: int, loss: float, norm: float, before: int) -> str:
    """What is said where a step is not finite, and `before` steps before it were skipped."""
    ids = [state.train.ids[i] for i in state.plan.rows(step)]
    what = "gradient" if math.isfinite(loss) else "loss"
    text = (
        f"step {step + 1:,}: the {what} is not finite (loss {loss}, gradient norm {norm})"
        + (f", as in the {before} steps before it" if before else "")
        + f". Nothing of this step was kept. Rows: {', '.join(ids)}. "
    )
    if state.run.train.non_finite == "stop":
        text += "train.non_finite = 'skip' leaves out such steps. "
    finer = {"bf16": "'fp32'", "fp32": ""}.get(state.base.precision, "'bf16' or 'fp32'")
    clip = "a smaller train.max_grad_norm" if state.run.train.max_grad_norm else "train.max_grad_norm = 1"
    base = f", or model.base = {finer}" if finer else ""
    return text + (
        f"Or start another run (another `out`) with a lower train.lr, {clip}{base}; "
        f"train.start_from = '{state.run.out}/best' goes on from the best adapter, once there is one"
    )


def backward(state: "Training", micro: Micro, size: int) -> Tensor:
    """Adds the gradients of a micro-batch's share of the mean loss over `size` rows, and returns that share."""
    if state.graphs is not None and micro.trie is not None:
        loss = state.graphs.backward(micro.trie, micro.labels, 1 / size)
        if loss is not None:
            return loss
    loss = micro_loss(state, micro) / size
    loss.backward()
    return loss.detach()


def micro_loss(state: "Training", micro: Micro) -> Tensor:
    """The label loss of a micro-batch, summed over its rows."""
    device = state.base.device
    if micro.trie is not None:
        logits = label_logits(state.model, micro.trie, device)
    else:
        logits = rowwise_logits(state.model, micro.rows, device, state.way)
    labels = torch.from_numpy(micro.labels).to(device, non_blocking=True)
    return label_loss(logits, labels, state.encoder.frame.answer_ids)
