"""The keys of a run file's `[sweep]` table, what its `[sweep.space]` can hold, and what all settings share."""

import dataclasses
import os
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path in which ~ is the home folder: no shell has seen it in a run file."""
KINDS = ("range", "log", "choice")
# What trials must agree in, to be compared and to share one loaded model; what a trial, which is one plain phase, does
# not use; and what has no part in the result.
FIXED = ("out", "phases", "data.", "model.", "strategy.", "validation.", "checkpoint.", "session.", "track.",
         "train.start_from", "train.compile", "train.cuda_graphs", "train.micro_batch_tokens",
         "train.gradient_checkpointing", "train.memory_gib", "train.non_finite", "train.deterministic")  # fmt: skip


def tables(cls: Any) -> dict[str, type]:
    """The settings that are tables in a list, such as `[[phases]]`, and the class of such a table."""
    kinds = [(it.name, kind) for it in dataclasses.fields(cls) for kind in get_args(it.type) if isinstance(kind, type)]
    return {name: kind for name, kind in kinds if dataclasses.is_dataclass(kind)}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Sweep:
    """How settings are searched for. What is searched stands in `[sweep.space]`; see docs/sweep.md."""

    out: Place | None = None
    """The sweep folder; by default the run's `out` with `-sweep` behind it."""
    trials: Annotated[int, Field(ge=1)] = 31
    """Configurations to try."""
    rows: Annotated[int | None, Field(ge=1)] = 10_000
    """Every trial trains on the first N rows of the prepared order."""
    sampler: Literal["random", "tpe"] = "random"
    """random: drawn independently. tpe: drawn where earlier trials were good (Bergstra et al. 2011)."""
    pruner: Literal["none", "asha", "hyperband"] = "none"
    """Only the best go on. asha: by AUROC, the rest pauses (Li et al. 2020); hyperband: by loss (Li et al. 2018)."""
    reduction: Annotated[int, Field(ge=2)] = 4
    """asha, hyperband: one trial of N goes on at each rung, and the next rung is N times as far."""
    validations: Annotated[int, Field(ge=1)] = 9
    """Validations of a trial, evenly spaced; the first rung is at the first of them."""
    patience: Annotated[float, Field(gt=0, le=1)] = 0.1
    """A trial has diverged when its loss stays 10 % over the start's for this part of its steps, or is not finite."""
    at_once: Annotated[int, Field(ge=1)] = 1
    """Trials that run at once on this machine, each in a process. One that runs out of memory makes it one fewer."""
    storage: str | None = None
    """A PostgreSQL URL that a team's workers share; by default SQLite in the sweep folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the configurations that are drawn."""
