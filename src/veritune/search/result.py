"""What a sweep leaves: its trials as lines, its results as JSON, its best configuration as a run file, and a table."""

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__, config
from ..durable import replace_file
from ..quality.metrics import plain
from ..starter import toml
from ..training.runfolder import FREE, write_json
from . import asha
from .board import Board
from .space import apply

SHOWN = 10


def line(trial: FrozenTrial) -> dict[str, Any]:
    """A trial as a line of trials.jsonl; see docs/sweep.md."""
    info, curve = trial.user_attrs.get("info", {}), trial.user_attrs.get("curve", [])
    best = min(curve, key=lambda point: point["loss"], default={})
    state = "paused" if asha.paused(info) else trial.state.name.lower()
    state = info.get("state") if trial.state.is_finished() else state
    values = {
        "trial": trial.number,
        "state": state or "failed",
        "params": trial.params,
        **{key: best.get(key) for key in ("loss", "auroc", "accuracy")},
        "best_step": best.get("step"),
        **{key: info.get(key) for key in ("steps", "steps_done", "rows_done", "seconds")},
        "curve": curve,
        "error": info.get("error"),
        "attempts": info.get("attempts", 0),
        "worker": info.get("host"),
        "started": trial.datetime_start and trial.datetime_start.isoformat(timespec="seconds"),
        "finished": trial.datetime_complete and trial.datetime_complete.isoformat(timespec="seconds"),
    }
    return plain(values)


def lines(board: Board) -> list[dict[str, Any]]:
    """Every trial there is, by number; see docs/sweep.md."""
    return [line(trial) for trial in board.trials()]


def best_of(trials: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The complete trial with the lowest validation loss."""
    complete = [trial for trial in trials if trial["state"] == "complete"]
    return min(complete, key=lambda trial: trial["loss"], default=None)


def write(board: Board, run: config.Run, rows: int) -> list[dict[str, Any]]:
    """Writes trials.jsonl, results.json and, once a trial is complete, best.toml. Returns the trials."""
    with board.locked():  # several processes may come to this at the same time
        return _write(board, run, rows)


def _write(board: Board, run: config.Run, rows: int) -> list[dict[str, Any]]:
    trials = lines(board)
    replace_file(board.folder / "trials.jsonl", "".join(json.dumps(trial) + "\n" for trial in trials).encode())
    best = best_of(trials)
    settings = config.as_dict(board.settings) | {"storage": board.settings.storage and board.storage.engine.name}
    results = {
        "veritune": __version__,
        "sweep": settings,
        "space": {axis.key: axis.as_json() for axis in board.axes},
        "run": config.as_dict(run),
        "rows": rows,
        "states": dict(Counter(trial["state"] for trial in trials)),
        "seconds": round(sum(trial["seconds"] or 0 for trial in trials), 3),
        "best": best and {key: value for key, value in best.items() if key != "curve"},
    }
    write_json(board.folder / "results.json", results)
    if best:
        replace_file(board.folder / "best.toml", run_file(board, run, best, rows).encode())
    return trials


def run_file(board: Board, run: config.Run, best: dict[str, Any], rows: int) -> str:
    """The run file of the best trial: the sweep's own run file with the values it found."""
    found = apply(run, board.params(best["params"]))
    default, values = config.as_dict(config.Run(out="")), config.as_dict(found)
    count = sum(trial.state.is_finished() for trial in board.trials())
    text = [
        f"# The best of {count} trials of {board.folder.name}: trial {best['trial']}, validation loss "
        f"{best['loss']:.4f},",
        f"# AUROC {figure(best['auroc'])}, after {best['best_step']} steps on {rows:,} rows.",
        f"#   veritune train {shlex.quote(str(board.folder / 'best.toml'))}",
        f"out = {toml(found.out)}",
        *([f"phases = {toml(values['phases'])}"] if found.phases else []),
    ]
    for table, content in values.items():
        if not isinstance(content, dict):
            continue
        wanted = {
            key: value
            for key, value in content.items()
            if value is not None and (value != default[table][key] or f"{table}.{key}" in best["params"])
        }
        if wanted:
            text += ["", f"[{table}]", *(f"{key} = {toml(value)}" for key, value in wanted.items())]
    return "\n".join(text) + "\n"


def tell(trial: dict[str, Any], best: dict[str, Any] | None, console: Console) -> None:
    """One line for a trial that ended."""
    figures = f", loss {figure(trial['loss'])}, AUROC {figure(trial['auroc'])}" if trial["curve"] else ""
    done = f", {trial['steps_done']}/{trial['steps']} steps in {trial['seconds']:.1f} s" if trial["steps"] else ""
    mark = "; the best so far" if best and best["trial"] == trial["trial"] else ""
    why = f": {trial['error']}" if trial["error"] else ""
    text = f"trial {trial['trial']}: {trial['state']}{figures}{done}{mark}{why}"
    console.out(text, highlight=False)


def show(board: Board, trials: list[dict[str, Any]], console: Console) -> None:
    """The best trials as a table, and what became of all."""
    ranked = sorted((t for t in trials if t["state"] == "complete"), key=lambda trial: trial["loss"])
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("trial", "loss", "AUROC", "accuracy", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("settings")
    for trial in ranked[:SHOWN]:
        settings = (f"{axis.key.rpartition('.')[2]} {shown(trial['params'].get(axis.key))}" for axis in board.axes)
        table.add_row(
            str(trial["trial"]),
            *(figure(trial[key]) for key in ("loss", "auroc", "accuracy")),
            f"{trial['seconds']:.0f}",
            escape(", ".join(settings)),
        )
    if ranked:
        console.print(table, highlight=False)
    counts = Counter(trial["state"] for trial in trials)
    total = sum(trial["seconds"] or 0 for trial in trials)
    console.print(
        f"{len(trials)} trials, {total:.0f} s of training and validation: "
        + ", ".join(f"{count} {state}" for state, count in counts.most_common()),
        highlight=False,
    )


def figure(value: float | None) -> str:
    """A figure of a validation."""
    return "-" if value is None else f"{value:.4f}"


def shown(value: Any) -> str:
    """A figure or setting, short."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def agreed(
    run: config.Run, settings: config.Sweep, space: dict[str, Any], fingerprint: str, rows: int
) -> dict[str, Any]:
    """What all workers of a sweep must have the same, flat. Where the model and the data lie may differ."""
    flat = config.flat(config.as_dict(run))
    values = {key: value for key, value in flat.items() if not key.startswith(FREE) and key not in space}
    values["validation.rows"] = run.validation.rows
    values["model.path"] = Path(run.model.path).name
    keys = ("sampler", "pruner", "validations", "seed", *(["reduction"] if settings.pruner != "none" else []))
    searched = {f"sweep.{key}": getattr(settings, key) for key in keys}
    # What trials are compared by, since another version compared them by another loss, or had other rungs.
    searched |= {"loss": "at train's share of labels"} | ({"rungs": "by AUROC"} if settings.pruner == "asha" else {})
    return values | searched | {"space": space, "rows": rows, "data": fingerprint}
