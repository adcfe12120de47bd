"""What one run holds while it trains."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..model import adapter, load
from ..model.graphs import Graphs
from ..model.verdict import Way
from ..tokens.encode import Encoder
from ..trackers.follow import Ended
from . import distributed, room
from . import plan as plans
from .feed import Rows, Source
from .progress import Point


@dataclass
class Training:
    """Everything one run holds while it trains."""

    run: config.Run
    source: Source
    base: load.Base
    model: Any
    optimizer: torch.optim.Optimizer
    encoder: Encoder
    way: Way
    """How rows are computed."""
    budget: int
    """Tokens computed at once."""
    about: adapter.About
    watch: "Watch | None" = None
    ending: Ended | None = None
    """What `watch` has returned."""
    adapters: bool = True
    """Whether adapters are saved."""
    recomputed: int = 0
    """Layers, from the first, whose activations are computed again in the backward pass."""
    planned: room.Planned | None = None
    """What these two were chosen from, on a GPU."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The adapter of the lowest validation loss so far, on the CPU."""
    saved: tuple[int, int] = (0, 0)
    """The steps that were done and last validated in the newest checkpoint."""
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


Watch = Callable[[Training, int, dict[str, Any]], Ended | None]
"""Called with finished steps and what metrics.jsonl got for them. What it raises ends the run there; what it returns
for a validation does so with a checkpoint, from which the same run goes on."""
