"""A sweep's folder read for showing it, and what its trials say about the settings; see docs/sweep.md."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..quality.metrics import Bools, Floats
from ..search.space import name

TRIALS, RESULTS = "trials.jsonl", "results.json"
ENDED = ("complete", "pruned", "diverged", "failed")
DRAWS = 100
"""Bootstrap draws of the trials."""
SEED = 0


@dataclass(frozen=True)
class Sweep:
    """What a sweep folder holds, but for the trials' own folders."""

    path: Path
    trials: list[dict[str, Any]]
    results: dict[str, Any]

    @property
    def space(self) -> dict[str, dict[str, list[Any]]]:
        """Setting -> {"range" | "log" | "choice": its ends or its choices}."""
        return self.results["space"]

    def measured(self) -> list[dict[str, Any]]:
        """The trials that have a validation loss and did not diverge or fail."""
        return [t for t in self.trials if is_measured(t)]

    def best(self) -> dict[str, Any] | None:
        """The complete trial with the lowest validation loss."""
        complete = [t for t in self.measured() if t["state"] == "complete"]
        return min(complete, key=lambda t: t["loss"], default=None)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_measured(trial: dict[str, Any]) -> bool:
    """Whether a trial has a validation loss that counts."""
    return trial["state"] in ("complete", "pruned") and is_number(trial["loss"])


def is_sweep(path: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (path / TRIALS).is_file()


def read(path: Path) -> Sweep:
    """Reads a sweep folder. Raises DataError where it is damaged."""
    try:
        lines = (path / TRIALS).read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
        results = json.loads((path / RESULTS).read_text(encoding="utf-8"))
        needed = ("trial", "state", "params", "loss", "auroc", "accuracy", "seconds", "curve")
        if not all(key in trial for trial in found for key in needed) or not isinstance(results["space"], dict):
            raise ValueError("something is missing in it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: this sweep cannot be read ({error}); `veritune sweep` writes it again") from None
    return Sweep(path, found, results)


def edge(values: Floats, diverged: Bools) -> tuple[float, tuple[float, float] | None] | None:
    """The learning rate from which trials are lost: the cut that sets the fewest trials on its wrong side, half-way (in
    the logarithm) between two of them, and its 95 % interval by a bootstrap over trials.

    values: learning rates; diverged: whether each was lost. None unless there are two trials of both kinds.
    """
    if diverged.sum() < 2 or (~diverged).sum() < 2:
        return None
    rng = np.random.default_rng(SEED)
    draws = []
    for _ in range(DRAWS * 5):
        rows = rng.integers(len(values), size=len(values))
        if diverged[rows].any() and not diverged[rows].all():
            draws.append(_cut(values[rows], diverged[rows]))
    low, high = np.quantile(draws, [0.025, 0.975])
    return math.exp(_cut(values, diverged)), (math.exp(low), math.exp(high))


def _cut(values: Floats, diverged: Bools) -> float:
    order = np.argsort(values, kind="stable")
    logs, bad = np.log(values[order]), diverged[order]
    # Wrong if the cut is before trial i: diverged ones before it, and others from it on.
    wrong = np.concatenate([[0], np.cumsum(bad)]) + np.concatenate([np.cumsum((~bad)[::-1])[::-1], [0]])
    ends = np.concatenate([[logs[0]], (logs[1:] + logs[:-1]) / 2, [logs[-1]]])
    return float(np.mean(ends[wrong == wrong.min()]))


def importance(sweep: Sweep) -> list[tuple[str, float, tuple[float, float]]] | None:
    """Each setting's part in being among the best quarter of trials, summing to 1, the greatest first, with 95 %
    intervals by a bootstrap over trials.

    PED-ANOVA (Watanabe et al. 2023), in Optuna's implementation. A diverged trial counts as worse than all that are
    not. None without Optuna, with fewer than 8 trials, or with one setting.
    """
    try:
        import optuna
    except ImportError:
        return None
    used = [t for t in sweep.trials if t["state"] == "diverged" or is_measured(t)]
    if len(used) < 8 or len(sweep.space) < 2:
        return None
    worst = max((t["loss"] for t in sweep.measured()), default=1.0)
    losses = [t["loss"] if t["state"] != "diverged" else worst + 1.0 for t in used]
    kinds = {key: _distribution(spec) for key, spec in sweep.space.items()}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = []
    for trial, loss in zip(used, losses, strict=True):
        params = {key: name(trial["params"][key]) for key in kinds}
        made.append(optuna.trial.create_trial(params=params, distributions=kinds, value=loss))
    rng, keys = np.random.default_rng(SEED), list(kinds)
    try:
        value = _ped_anova(made, keys)
        draws = [_ped_anova([made[i] for i in rng.integers(len(made), size=len(made))], keys) for _ in range(DRAWS)]
    finally:
        optuna.logging.set_verbosity(level)
    low, high = np.quantile(np.array(draws), [0.025, 0.975], axis=0)
    out = [(key, float(value[i]), (float(low[i]), float(high[i]))) for i, key in enumerate(kinds)]
    return sorted(out, key=lambda one: -one[1])


def _ped_anova(trials: Sequence[Any], keys: Sequence[str]) -> Floats:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study()
        study.add_trials(trials)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25, evaluate_on_local=True)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(keys))
    return np.array([found.get(key, 0.0) for key in keys])


def _distribution(spec: dict[str, list[Any]]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if "choice" in spec:
        return CategoricalDistribution([name(value) for value in spec["choice"]])
    ((kind, (low, high)),) = spec.items()
    return FloatDistribution(low, high, log=kind == "log")


@dataclass(frozen=True)
class Axis:
    """A setting as a place between 0 and 1."""

    key: str
    low: float
    high: float
    log: bool
    choices: list[str]
    """The choices of a setting that has some, in order; they stand at 0, 1, 2…"""

    def value(self, trial: dict[str, Any]) -> float:
        """A trial's value; the number of its choice. NaN where it has none."""
        found = trial["params"].get(self.key)
        if self.choices:
            return float(self.choices.index(str(found))) if str(found) in self.choices else float("nan")
        return float(found) if is_number(found) else float("nan")

    def place(self, value: float) -> float:
        """Of a value, 0 to 1 along the axis."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5


def axis(key: str, spec: dict[str, list[Any]]) -> Axis:
    """A searched setting as an axis."""
    if "choice" in spec:
        choices = [str(name(value)) for value in spec["choice"]]
        return Axis(key, -0.5, len(choices) - 0.5, False, choices)
    ((kind, (low, high)),) = spec.items()
    return Axis(key, float(low), float(high), kind == "log", [])


def surface(x: Axis, y: Axis, used: Sequence[dict[str, Any]], losses: Floats) -> Floats:
    """The smoothed loss over two settings, float64 [cells of y, cells of x] (16, or one for each choice); NaN where no
    trial is near. A Gaussian kernel over the places of the trials, a tenth of an axis wide."""
    across, down = (len(a.choices) or 16 for a in (x, y))
    at_x, at_y = ((np.arange(n) + 0.5) / n for n in (across, down))
    trial_x, trial_y = (np.array([a.place(a.value(t)) for t in used]) for a in (x, y))
    near = np.exp(-0.5 * ((at_x[None, :, None] - trial_x) ** 2 + (at_y[:, None, None] - trial_y) ** 2) / 0.1**2)
    weight = near.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight > 0.1, (near * losses).sum(-1) / weight, np.nan)


@dataclass(frozen=True)
class Kind:
    """The trials with one choice of a setting."""

    choice: str
    trials: int
    diverged: int
    best: float
    median: float
    spread: float
    """Between the quarters of the loss; a diverged trial counts as the worst of all."""


def by_choice(sweep: Sweep, key: str) -> list[Kind]:
    """What became of the trials with each choice of a setting, in the order of the choices."""
    worst = max((t["loss"] for t in sweep.measured()), default=float("nan"))
    out = []
    for choice in axis(key, sweep.space[key]).choices:
        own = [t for t in sweep.trials if str(t["params"].get(key)) == choice]
        losses = [t["loss"] for t in own if is_measured(t)]
        diverged = sum(t["state"] == "diverged" for t in own)
        all_losses = [*losses, *[worst] * diverged]
        low, middle, high = np.quantile(all_losses, [0.25, 0.5, 0.75]) if all_losses else [float("nan")] * 3
        best = min(losses, default=float("nan"))
        out.append(Kind(choice, len(own), diverged, best, float(middle), float(high - low)))
    return out
