"""How far a run is: what a checkpoint holds, how it is put back, and what happens where a phase begins."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import ConfigError
from ..model import adapter
from ..quality import metrics
from ..tokens.encode import encoder
from ..tokens.prompt import Frame
from . import optimizer as optimizers
from .checkpoint import Saved, Saver
from .optimizer_state import optimizer_tensors, restore_optimizer
from .plan import Phase

if TYPE_CHECKING:
    from .state import Training


@dataclass
class At:
    """How far a run is; what a checkpoint holds besides tensors."""

    done: int = 0
    """Finished steps."""
    validated: int = 0
    """The step of the last validation."""
    best: float = math.inf
    """The lowest validation loss."""
    best_step: int = 0
    """The step of that validation."""
    best_quality: dict[str, Any] | None = None
    """Its figures."""
    truncated: int = 0
    """Row presentations that were too long."""
    quality: dict[str, Any] | None = None
    """The last validation's figures."""
    skipped: int = 0
    """Steps that were not finite and left out."""
    skipped_in_a_row: int = 0
    """Of those, the last ones without another between."""


@dataclass(frozen=True)
class Point:
    """Adapter and optimiser at a step: copies, on the CPU."""

    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    settings: dict[str, Any]
    """What of the optimiser's state is not tensors."""


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which training does not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def begin(state: "Training", phase: Phase | None) -> None:
    """Does what is due before the first step of a phase; None: no phase begins. Doing it twice is doing it once: a
    step that was begun and not finished is begun again by the next session."""
    if phase is None:
        return
    if phase.kind == "cooldown":
        tensors, settings = optimizer_tensors(state.optimizer)
        state.fork = Point(copies(adapter.weights(state.model)), copies(tensors), settings)
    if phase.start_from == "fork":
        assert state.fork is not None
        put_back(state, state.fork)
    elif phase.start_from == "best":
        adapter.set_weights(state.model, state.best)
    if phase.optimizer_state == "reset":
        state.optimizer = optimizers.make(state.parameters, state.run.train)


def put_back(state: "Training", point: Point) -> None:
    """Sets adapter and optimiser to what they were."""
    adapter.set_weights(state.model, point.adapter)
    restore_optimizer(state.optimizer, point.optimizer, point.settings)


def save_checkpoint(state: "Training", saver: Saver, at: At) -> None:
    """Hands everything a resume needs to the saver, which writes it while training goes on."""
    tensors, settings = optimizer_tensors(state.optimizer)
    groups = {"adapter": adapter.weights(state.model), "optimizer": tensors}
    values = {
        "optimizer": settings,
        "at": metrics.plain(asdict(at)),
        "frame": state.about.frame.to_json(),
        "scalings": adapter.scalings(state.model),
    }
    if state.best:
        groups["best"] = state.best
    if state.fork is not None:
        groups |= {"fork_adapter": state.fork.adapter, "fork_optimizer": state.fork.optimizer}
        values["fork"] = state.fork.settings
    saver.save(at.done, groups, values)


def restore(state: "Training", saved: Saved) -> At:
    """Puts a checkpoint back and says how far the run is. Raises ConfigError for weights that would be scaled otherwise
    than they were, the adapter that the run started from being gone."""
    tensors, scaled = saved.tensors, adapter.scalings(state.model)
    if (was := saved.state.get("scalings", scaled)) != scaled:
        old, new = (", ".join(f"{it:g}" for it in found) for found in (was, scaled))
        raise ConfigError(
            f"train.start_from = {state.run.train.start_from!r}: this adapter's updates were scaled by {old}, and "
            f"without it would be by {new}, as [lora] says: put it back, or name where it lies now"
        )
    put_back(state, Point(tensors["adapter"], tensors["optimizer"], saved.state["optimizer"]))
    state.best = tensors.get("best", {})
    if "fork" in saved.state:
        state.fork = Point(tensors["fork_adapter"], tensors["fork_optimizer"], saved.state["fork"])
    if "frame" in saved.state:  # a template that prints today's date would go on with another prompt
        state.about = replace(state.about, frame=Frame.from_json(saved.state["frame"]))
        state.encoder = replace(encoder(state.about.frame, state.base.tokenizer), known=state.encoder.known)
    at = At(**saved.state["at"])
    at.quality, at.best_quality = metrics.figures(at.quality), metrics.figures(at.best_quality)
    if at.best is None or "loss" not in (at.best_quality or {}):  # earlier versions chose by another figure
        at.best = math.inf
    for found in (at.quality, at.best_quality):
        if found:
            found.setdefault("loss", math.nan)
    return at
