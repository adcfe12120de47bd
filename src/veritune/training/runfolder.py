"""The run folder: the resolved settings it was started with, and the card of its adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__, config
from ..durable import found, make_folder, replace_file
from ..errors import ConfigError, OtherWayError
from ..quality.metrics import plain

RUN = "run.json"
ADAPTERS = ("adapter", "best")
WEIGHTS = "model.weights"
"""The resolved value that stands in place of model.path: the fingerprint of the base's weights."""
TOKENIZER = "model.tokenizer"
"""The resolved value that tells how the tokenizer reads some of the held-out rows."""
START = "train.start_from"
"""As a resolved value the fingerprint of the adapter that it names, if that is there."""
# Settings that may change between two sessions of a run: none of them alters what is learnt, but for those that decide
# what dropout draws, which then come with the resolved values, and for `validation` where it chooses what a phase
# starts from. What the run started from is in its checkpoint by then, and may be gone or lie elsewhere.
FREE = ("out", "data.path", "model.path", "model.device", "validation.", "checkpoint.", "session.", "track.",
        START, "train.non_finite", "train.micro_batch_tokens", "train.compile", "train.cuda_graphs",
        "train.deterministic", "train.gradient_checkpointing", "train.memory_gib")  # fmt: skip


# Settings that say what is still to be trained: they may change as far as nothing of what is done would be different.
AHEAD = ("phases", "strategy.", "train.epochs", "data.rows")

MEANS = {
    "fingerprint": " (of the rows at data.path: they are others, or prepared otherwise. To train on with other rows, "
    "begin another run with this one's adapter as train.start_from)",
    "precision": " (of the base: 'auto' goes by the machine, so name the one it was as model.base)",
    WEIGHTS: " (the fingerprint of what model.path names: it has changed, or is another model)",
    TOKENIZER: " (the fingerprint of how it reads rows: model.path has another tokenizer than before)",
    START: " (the fingerprint of the adapter that it names, if it is there)",
}
"""What is said of resolved values that differ."""

WAY = ("precision", "model.device", "train.micro_batch_tokens", "train.compile", "processes")
"""Of the resolved values, those that say how the same run is computed: a machine and its memory may decide them."""


def described(run: config.Run, resolved: dict[str, Any]) -> dict[str, Any]:
    """What run.json holds.

    resolved: what decides the mathematics besides the settings (the fingerprints of data and base, the precision), or
    in place of a setting.
    """
    return {"veritune": __version__, "resolved": resolved, "settings": config.as_dict(run)}


def start(
    folder: Path, values: dict[str, Any], same_so_far: Callable[[config.Run], bool] = lambda earlier: False
) -> None:
    """Writes run.json (`described`), or checks that the run which the folder holds is this one.

    same_so_far: whether the steps that are done would have been the same under other settings of what is to be trained;
    so phases or epochs can be appended. A folder in which nothing was saved yet takes other settings. Raises
    ConfigError naming every key that differs.
    """
    admit(folder, values, same_so_far)
    make_folder(folder)
    write_json(folder / RUN, values)


def outside_sweeps(folder: Path) -> None:
    """Raises ConfigError for a trial's place in a sweep: a run there would take the place of what the trial left, or be
    in the way of one to come."""
    trials = folder.resolve().parent
    if trials.name == "trials" and (trials.parent / "trials.jsonl").is_file():
        raise ConfigError(
            f"{folder} is a trial's place in the sweep {trials.parent}, which alone trains there: choose another `out`"
        )


def admit(folder: Path, values: dict[str, Any], same_so_far: Callable[[config.Run], bool]) -> None:
    """The check of `start` alone: nothing is written."""
    path = folder / RUN
    if path.exists():
        saved = found(folder / "checkpoints") or any((folder / name).exists() for name in ADAPTERS)
        if saved:
            check(path, path.read_bytes(), values, same_so_far)
    elif folder.exists() and any(not inside.name.startswith(".") for inside in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run: choose another `out`")


def check(
    path: Path,
    before: bytes,
    values: dict[str, Any],
    same_so_far: Callable[[config.Run], bool],
    setting: str = "out",
) -> None:
    """Raises ConfigError unless a run whose run.json, at `path`, holds `before` may go on as `values` say.

    setting: what leads to `path`.
    """
    earlier, differing = differences(path, before, values)
    differing = {key: text + MEANS.get(key, "") for key, text in differing.items()}
    ahead = all(key.startswith(AHEAD) for key in differing)
    if differing and not (ahead and same_so_far(earlier)):
        hint = ". With them, steps that are done would have been others" if ahead else ""
        if ahead and "train.epochs" in differing and earlier.train.schedule != "constant":
            hint += (
                ": the rate of every step depends on how many there are, so append [[phases]] instead of epochs, or "
                "train a constant rate"
            )
        kind = OtherWayError if set(differing) <= set(WAY) else ConfigError
        raise kind(
            f"{path.parent} holds a run with other settings: {'; '.join(differing.values())}{hint}. "
            f"Put them back to go on with that run, or choose another `{setting}`"
        )


def differences(path: Path, before: bytes, values: dict[str, Any]) -> tuple[config.Run, dict[str, str]]:
    """The run that a run.json describes, and how its mathematics differs from `values`: a phrase for each key.

    A setting that it lacks, being of an earlier version, has its default. Raises ConfigError.
    """
    try:
        held = json.loads(before)
        earlier = config.build(config.Run, held["settings"], str(path))
        old = _by_phase(config.flat(config.as_dict(earlier)) | held["resolved"])
        new = _by_phase(mathematics(values))
        if WEIGHTS not in old:  # of an earlier version
            new.pop(WEIGHTS, None)
            new["model.path"] = values["settings"]["model"]["path"]
        if TOKENIZER not in old or old.get("fingerprint") != new.get("fingerprint"):  # only on the same rows it tells
            new.pop(TOKENIZER, None)
        begun = values["settings"]["train"]["start_from"]
        if (earlier.train.start_from is None) != (begun is None):
            new[START] = begun
        elif START not in held["resolved"]:  # it was not there any more, or an earlier version did not look
            new.pop(START, None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); move the folder away to start afresh") from None
    keys = [*new, *(key for key in old if key.startswith("phases.") and key not in new)]
    differing = [key for key in keys if old.get(key) != new.get(key)]
    return earlier, {key: f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in differing}


def _by_phase(settings: dict[str, Any]) -> dict[str, Any]:
    """Flat settings with a key for each setting of each phase, the phases counted from 1."""
    out = dict(settings)
    for number, phase in enumerate(out.pop("phases"), 1):
        out |= {f"phases.{number}.{key}": value for key, value in phase.items()}
    return out


def write_json(path: Path, values: Any) -> None:
    """Writes a strict JSON file, whole or not at all. A figure that is NaN or infinite is written as null."""
    text = json.dumps(plain(values), indent=1, ensure_ascii=False, allow_nan=False)
    replace_file(path, text.encode(), sync=True)


def mathematics(values: dict[str, Any]) -> dict[str, Any]:
    """What of a run.json decides what is learnt, by key."""
    settings = config.flat(values["settings"])
    starts = [phase["start_from"] for phase in settings["phases"]]
    if settings["strategy.kind"] not in ("plain", "stream"):
        starts.append(settings["strategy.start_from"])
    free = tuple(key for key in FREE if key != "validation." or "best" not in starts)
    return {key: value for key, value in settings.items() if not key.startswith(free)} | values["resolved"]


def card(run: config.Run, base: str, data: str, step: int, quality: dict[str, Any]) -> str:
    """The model card of an adapter: what it is, how good it was measured to be, how to use it (Markdown)."""
    accuracy, low_high = quality["accuracy"], quality["accuracy_interval"]
    interval = f" (95 % interval {low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else ""
    settings = "\n".join(f"| `{key}` | {value} |" for key, value in config.flat(config.as_dict(run)).items())
    return f"""---
library_name: peft
base_model: {base}
tags: [lora, verifier, math]
---
# A verifier of mathematical solutions

A LoRA adapter for `{base}`, trained with veritune {__version__}: given a question and a worked solution it says how
likely the solution is correct.

- After step {step:,}, on {quality["rows"]:,} held-out rows of {quality["questions"]:,} questions: accuracy
  {accuracy:.3f}{interval}, AUROC {quality["auroc"]:.3f}, Brier {quality["brier"]:.3f}, log loss
  {quality["log_loss"]:.3f}, with both labels weighing as in train {quality["loss"]:.3f}.
  {quality["share_true"]:.0%} of those rows are correct.
- Trained on the dataset with fingerprint `{data}`.
- The prompt and the two answer words are in `veritune.json`; use no others.

```python
from veritune.model.verifier import Verifier

Verifier.load("this folder").score("What is 2 + 2?", ["2 + 2 = 4. The answer is 4.", "The answer is 5."])
```

| setting | value |
|---|---|
{settings}
"""
