"""What a sweep searches: settings under their dotted names, each with a range, a log range or a choice.

    [sweep.space]
    train.lr = { log = [1e-6, 5e-1] }
    train.warmup_ratio = { range = [0.0, 0.2] }
    train.optimizer = { choice = ["adamw_torch", "lion_8bit"] }

Everything is checked before anything starts: each end of a range and each choice is put into the run's settings, which
must take it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import config
from ..errors import ConfigError
from ..suggest import did_you_mean, nearest
from ..sweepkeys import FIXED, KINDS

Value = Any
# The search of the competition entry that veritune grew out of.
DEFAULT: dict[str, dict[str, list[Value]]] = {
    "train.lr": {"log": [1e-6, 5e-1]},
    "train.optimizer": {"choice": ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "lion_8bit"]},
    "train.schedule": {"choice": ["linear", "cosine", "cosine_with_restarts"]},
    "train.max_grad_norm": {"range": [0.3, 2.0]},
    "train.warmup_ratio": {"range": [0.0, 0.2]},
    "train.weight_decay": {"range": [0.0, 0.1]},
    "train.batch_size": {"choice": [8, 16, 32]},
    "train.gradient_accumulation": {"choice": [1, 2, 4]},
}


@dataclass(frozen=True)
class Axis:
    """One setting and the values it can take."""

    key: str
    kind: Literal["range", "log", "choice"]
    values: tuple[Value, ...]
    """The two ends, both included, or the choices."""
    whole: bool = False
    """Only whole numbers between the ends."""

    def as_json(self) -> dict[str, Any]:
        return {self.kind: list(self.values)}


def read(declared: Mapping[str, Any], run: config.Run, where: str) -> list[Axis]:
    """The axes of a `[sweep.space]` table, sorted by key; `DEFAULT` if it is empty.

    Raises ConfigError that names each key that is not a setting, cannot be searched, is set by a phase of the run, or
    has values that the setting does not take.
    """
    settings = config.keys(config.Run)
    leaves = _leaves(declared, settings) if declared else DEFAULT
    known = [key for key in settings if not key.startswith(FIXED)]
    problems: list[str] = []
    axes = []
    for key, spec in sorted(leaves.items()):
        if key not in known:
            shared = f"{key} cannot be searched: all trials share it"
            unknown = f"unknown setting {key!r}{did_you_mean(nearest(key, known))}"
            problems.append(shared if key in settings else unknown)
            continue
        for number, phase in enumerate(run.phases, 1):
            name = key.removeprefix("train.")
            if getattr(phase, name, None) is not None:
                problems.append(
                    f"{key}: phase {number} of the run sets its own {name}, so what is found would change nothing "
                    f"there; take {name} out of the phase, or declare a [sweep.space] without {key}"
                )
        try:
            axes.append(_axis(key, spec, run))
        except ConfigError as error:
            problems.append(str(error))
    if not problems:
        problems = [found for end in (0, -1) if (found := _refused(run, {axis.key: axis.values[end] for axis in axes}))]
    if problems:
        raise ConfigError(f"{where}: [sweep.space]: {'; '.join(problems)}")
    return axes


def name(value: Value) -> Value:
    """A choice as Optuna can hold it and as trials name it."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def apply(run: config.Run, params: Mapping[str, Value]) -> config.Run:
    """The run with other values under dotted keys. Raises ConfigError if it does not take them."""
    values = config.as_dict(run)
    for key, value in params.items():
        table, *rest = key.split(".")
        inner = values[table]
        for name in rest[:-1]:
            inner = inner[name]
        inner[rest[-1]] = value
    return config.build(config.Run, values, "sweep")


def _leaves(table: Mapping[str, Any], settings: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a table, quoted or nested in the file, down to a setting or what can only be a specification."""
    out: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and value and key not in settings and not set(value) & set(KINDS):
            out |= _leaves(value, settings, f"{key}.")
        else:
            out[key] = value
    return out


def _axis(key: str, spec: Any, run: config.Run) -> Axis:
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in KINDS:
        raise ConfigError(
            f"{key} must be {{ range = [a, b] }}, {{ log = [a, b] }} or {{ choice = [...] }}, not {spec!r}"
        )
    kind, values = next(iter(spec.items()))
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{key}: {kind} must be a list of values, not {values!r}")
    if kind == "choice":
        if len({json.dumps(value) for value in values}) < len(values):
            raise ConfigError(f"{key}: {values!r} has a choice twice")
    else:
        if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise ConfigError(f"{key}: {kind} must be two numbers, not {values!r}")
        low, high = values
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(f"{key}: {kind} must go from a lower to a higher number, not {values!r}")
        if kind == "log" and low <= 0:
            raise ConfigError(f"{key}: a log range cannot start at {low!r}; start above 0")
    for value in values:
        if problem := _refused(run, {key: value}):
            raise ConfigError(problem)
    if kind == "choice":
        return Axis(key, kind, tuple(values))
    low, high = values
    between = low + 0.31830988 * (high - low)  # no whole number, whatever the ends
    if _refused(run, {key: between}) is None:
        return Axis(key, kind, (float(low), float(high)))
    return Axis(key, kind, (int(low), int(high)), whole=True)


def _refused(run: config.Run, params: Mapping[str, Value]) -> str | None:
    """Why the settings do not take these values, if they do not."""
    try:
        apply(run, params)
    except ConfigError as error:
        return str(error).removeprefix("sweep: ")
    return None
