"""Which trials of a sweep go on: ASHA (Li et al. 2020, algorithm 2), over figures that trials have reported.

A trial pauses at each rung. Whoever is free lets a paused one go on that is among the best 1 / reduction of all that
have reached its rung, from the highest rung down; only where there is none does a new trial begin. Trials are compared
by validation AUROC: the loss tells little before scores are calibrated, which is late. At the first of nine validations
the best of 31 trials was the 5th by AUROC and the 23rd by loss, with one over chance's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optuna.trial import FrozenTrial

Figures = tuple[float | None, float]
"""Validation AUROC (none, or NaN, where only one label is there) and loss."""


@dataclass(frozen=True)
class Standing:
    """How far a trial has come."""

    number: int
    state: Literal["under way", "paused", "complete", "pruned", "broken"]
    """broken: it diverged or failed. pruned: an earlier end of the sweep took it."""
    reached: Sequence[Figures]
    """Its figures at each rung so far."""

    def rank(self, level: int) -> tuple[float, float, int]:
        """What it is compared by at its `level`-th rung, the less the better."""
        auroc, loss = self.reached[level - 1]
        return -auroc if auroc is not None and math.isfinite(auroc) else math.inf, loss, self.number


def paused(info: dict[str, Any]) -> bool:
    """Whether a trial, by its `info`, has come as far as it may for now; never where nothing keeps what it reached."""
    return len(info.get("reached", [])) >= info.get("goal", 1)


def standing(trial: FrozenTrial) -> Standing:
    """How far a trial of the board has come. It is not paused before its worker has given it up."""
    info = trial.user_attrs.get("info", {})
    if not trial.state.is_finished():
        state = "paused" if paused(info) and info["worker"] is None else "under way"
    else:
        state = info["state"] if info.get("state") in ("complete", "pruned") else "broken"
    return Standing(trial.number, state, info.get("reached", []))


def validated(step: int, steps: int, validations: int) -> int:
    """How many of a trial's evenly spaced validations lie behind it after the one at `step`."""
    return math.floor(validations * step / steps + 1e-9)


def rungs(validations: int, reduction: int) -> list[int]:
    """The validations at which a trial pauses: 1, reduction, reduction² and so on before the last."""
    found = [1]
    while found[-1] < validations:
        found.append(found[-1] * reduction)
    return found[:-1]


def reach(reached: Sequence[Figures], at: Sequence[int], behind: int, point: dict[str, Any]) -> list[Figures]:
    """`reached` after a validation that is a trial's `behind`-th: a rung keeps the first figures that came at or after
    it."""
    new = sum(rung <= behind for rung in at) - len(reached)
    return [*reached, *[(point["auroc"], point["loss"])] * new]


def choose(trials: Sequence[Standing], reduction: int, *, more: bool) -> int | None:
    """The paused trial that goes on now, to its next rung. None: none does, so a new one begins; or without `more` to
    begin, the sweep waits for those under way, and is over without any. It is not over before one is complete.

    A broken trial counts at no rung: another goes on in its place, and none for being better than it."""
    trials = [trial for trial in trials if trial.state != "broken"]
    for level in range(max((len(trial.reached) for trial in trials), default=0), 0, -1):
        rung = sorted((t for t in trials if len(t.reached) >= level), key=lambda t: t.rank(level))
        for trial in rung[: len(rung) // reduction]:
            if trial.state == "paused" and len(trial.reached) == level:
                return trial.number
    if more or any(trial.state in ("under way", "complete") for trial in trials):
        return None
    paused = [trial for trial in trials if trial.state == "paused"]
    highest = max((len(trial.reached) for trial in paused), default=0)
    return min((t.rank(highest) for t in paused if len(t.reached) == highest), default=(None,))[-1]
