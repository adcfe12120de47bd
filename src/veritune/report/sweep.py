"""The sections of a report on a sweep: what was searched, what was found, what mattered, what it cost."""

import math
import shlex
from typing import Any

import numpy as np
from markupsafe import Markup

from ..starter import toml
from . import run, spaces, svg
from .blocks import Chart, Code, Section, Table, Text, Tiles
from .svg import Series, plot
from .trials import ENDED, Axis, Sweep, axis, by_choice, edge, importance, is_measured, is_number, surface
from .words import duration, number

LR = "train.lr"
CURVES = 60
"""Trials whose learning curves are drawn, the best ones."""
STATES = {"complete": 1, "pruned": 8, "diverged": 2, "failed": 6}
"""State -> colour."""
STATES_SHOWN = (*ENDED, "paused", "running", "waiting")
BEST = 3
"""The colour of the best trial."""
CHANCE = 0.69
"""A loss, just under ln 2, that a trial which has learnt anything goes under."""
GUESSED = 0.55
"""An AUROC that a trial which has learnt nothing hardly comes over."""


def sections(sweep: Sweep, price: float | None) -> list[Section | None]:
    """All of them."""
    ranks = importance(sweep)
    return [
        summary(sweep),
        what(sweep),
        learning_rate(sweep),
        importances(sweep, ranks),
        together(sweep, ranks),
        curves(sweep),
        choices(sweep),
        table(sweep),
        cost(sweep, price),
        again(sweep),
    ]


def summary(sweep: Sweep) -> Section:
    """The best trial, and what became of all."""
    best = sweep.best()
    counts = {state: sum(t["state"] == state for t in sweep.trials) for state in STATES_SHOWN}
    tiles = [("trials", f"{len(sweep.trials):,}", ", ".join(f"{n} {state}" for state, n in counts.items() if n))]
    if best:
        tiles += [
            ("best loss", number(best["loss"], 4), f"trial {best['trial']}"),
            ("its AUROC", number(best["auroc"]), f"after step {best['best_step']:,}"),
            ("its accuracy", number(best["accuracy"]), ""),
        ]
    tiles.append(("time", duration(seconds(sweep)), "training and validation of all trials"))
    return Section("summary", "Summary", [Tiles(tiles)])


def seconds(sweep: Sweep, state: str | None = None) -> float:
    """Time of all trials, or of those in a state."""
    return sum(t["seconds"] or 0.0 for t in sweep.trials if state in (None, t["state"]))


def what(sweep: Sweep) -> Section:
    """The space, and the run that it varies."""
    rows = []
    for key, spec in sweep.space.items():
        ((kind, values),) = spec.items()
        shown = ", ".join(map(str, values)) if kind == "choice" else f"{values[0]:g} to {values[1]:g}"
        rows.append((key, shown, {"log": "logarithmic", "range": "even", "choice": "one of them"}[kind]))
    settings = sweep.results.get("sweep", {})
    run = sweep.results.get("run", {})
    facts = [
        ("base model", str(run.get("model", {}).get("path", ""))),
        ("data", f"{run.get('data', {}).get('path', '')}, {sweep.results.get('rows', 0):,} rows a trial"),
        ("search", f"{settings.get('sampler')}, pruning: {settings.get('pruner')}, seed {settings.get('seed')}"),
        ("veritune", str(sweep.results.get("veritune", ""))),
    ]
    blocks = [Table(facts), Table(rows, ("setting", "values", "drawn"), title="What was searched")]
    return Section("what", "What was run", blocks)


def learning_rate(sweep: Sweep) -> Section | None:
    """The loss by learning rate, and the rate from which trials diverge: over all, and for each optimiser."""
    if LR not in sweep.space:
        return None
    measured = sweep.measured()
    top = max([t["loss"] for t in measured], default=1.0)
    series = []
    for state, colour in STATES.items():
        own = [t for t in sweep.trials if t["state"] == state and is_number(t["params"].get(LR))]
        y = [min(t["loss"], top) if is_measured(t) else top * 1.06 for t in own]
        series.append(Series([t["params"][LR] for t in own], y, colour, state, "points", tips=[tip(t) for t in own]))
    found = cut(sweep, sweep.trials)
    marks = [(found[0], f"too high from {found[0]:.2g}")] if found else []
    x = axis(LR, sweep.space[LR])
    drawn = plot(
        [s for s in series if s.x],
        x_label="learning rate",
        x_range=None if x.choices else (x.low, x.high),
        log_x=x.log or bool(x.choices),
        marks=marks,
        size=svg.WIDE,
    )
    legend = [(svg.colour(s.colour), s.name) for s in series if s.x]
    note = "Diverged trials stand at the upper edge." if any(s.x for s in series if s.name == "diverged") else ""
    blocks: list[Any] = [Chart("Lowest validation loss by learning rate", drawn, legend, note, wide=True)]
    rows = [("all", *edge_cells(found))]
    if "train.optimizer" in sweep.space:
        for name in axis("train.optimizer", sweep.space["train.optimizer"]).choices:
            own = [t for t in sweep.trials if t["params"].get("train.optimizer") == name]
            rows.append((name, *edge_cells(cut(sweep, own))))
    blocks.append(Table(rows, ("optimiser", "too high from lr", "95 % interval"), title="The edge of divergence"))
    text = (
        "The edge is the learning rate that best parts trials it was too high for from the others; interval: "
        "bootstrap. It was too high for those that diverged, and for those above the best trial's that came back with "
        f"a loss of chance (never under 0.69) and learnt nothing; one pruned with an AUROC over {GUESSED} had learnt."
    )
    return Section("learning-rate", "Learning rate", blocks, text)


def cut(sweep: Sweep, trials: list[dict[str, Any]]) -> tuple[float, tuple[float, float] | None] | None:
    """The edge of divergence among some trials."""
    known = [t for t in trials if t["state"] == "diverged" or is_measured(t)]
    values = np.array([t["params"].get(LR, float("nan")) for t in known], dtype=np.float64)
    if not len(values) or not (values > 0).all():
        return None
    best = sweep.best()
    top = best["params"][LR] if best else math.inf
    lost = [t["state"] == "diverged" or (t["params"][LR] > top and learnt_nothing(t)) for t in known]
    return edge(values, np.array(lost))


def learnt_nothing(trial: dict[str, Any]) -> bool:
    """Whether a measured trial's loss is one of chance. Where it was pruned good scores begin so: its AUROC tells."""
    good = trial["state"] == "pruned" and is_number(trial["auroc"]) and trial["auroc"] > GUESSED
    return trial["loss"] > CHANCE and not good


def edge_cells(found: tuple[float, tuple[float, float] | None] | None) -> tuple[str, str]:
    """An edge in words."""
    if found is None:
        return "not seen", ""
    value, low_high = found
    return f"{value:.2g}", f"{low_high[0]:.2g} to {low_high[1]:.2g}" if low_high else ""


def tip(trial: dict[str, Any]) -> str:
    """What a trial says when it is pointed at."""
    settings = ", ".join(f"{key.rpartition('.')[2]} {short(value)}" for key, value in trial["params"].items())
    return f"trial {trial['trial']}, {trial['state']}, loss {number(trial['loss'])}: {settings}"


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def importances(sweep: Sweep, ranks: list[tuple[str, float, tuple[float, float]]] | None) -> Section:
    """How much each setting mattered, and the two that did most as a map of the loss."""
    if ranks is None:
        text = "Importance needs eight trials, two settings, and the extra sweep: pip install 'veritune[sweep]'."
        return Section("importance", "What mattered", [Text(text, warning=True)])
    bars = [(key.removeprefix("train."), value, low_high) for key, value, low_high in ranks]
    blocks: list[Any] = [Chart("Importance, with 95 % intervals", svg.intervals(bars, x_label="part", rule=0.0))]
    x, y = (axis(key, sweep.space[key]) for key, *_ in ranks[:2])
    drawn = contour(sweep, x, y)
    if drawn:
        note = "The stronger the colour, the lower the loss; a point is a trial, a diverged one counts as the worst."
        legend = [(svg.colour(STATES[name]), name) for name in ("complete", "pruned", "diverged")]
        blocks.append(Chart(f"The two that mattered most: {x.key} (across), {y.key} (up)", drawn, legend, note))
    note = (
        "The part of each setting in being among the best quarter of trials (PED-ANOVA; intervals: bootstrap over "
        "trials). Few trials make wide intervals."
    )
    return Section("importance", "What mattered", blocks, note)


def contour(sweep: Sweep, x: Axis, y: Axis) -> Markup | None:
    """The smoothed loss over two settings, with the trials as points."""
    used = [t for t in sweep.trials if t["state"] == "diverged" or is_measured(t)]
    used = [t for t in used if all(math.isfinite(a.value(t)) for a in (x, y))]
    if not used or not sweep.measured():
        return None
    worst = max(t["loss"] for t in sweep.measured())
    losses = np.array([worst if t["state"] == "diverged" else t["loss"] for t in used])
    points = [(x.place(x.value(t)), y.place(y.value(t)), STATES[t["state"]], tip(t)) for t in used]
    return spaces.field(surface(x, y, used, losses), points, x, y)


def together(sweep: Sweep, ranks: list[tuple[str, float, tuple[float, float]]] | None) -> Section | None:
    """Every trial as a line over all settings, the most important first."""
    order = [key for key, *_ in ranks] if ranks else list(sweep.space)
    axes = [axis(key, sweep.space[key]) for key in order]
    measured = sorted(sweep.measured(), key=lambda t: -t["loss"])
    if not measured:
        return None
    worst, lowest = measured[0]["loss"], measured[-1]["loss"]
    good = {t["trial"] for t in measured[-max(1, len(measured) // 10) :]}
    lines = []
    for t in [t for t in sweep.trials if t["state"] == "diverged"] + measured:
        kind = BEST if t["trial"] in good else STATES[t["state"]]
        loss = worst if t["state"] == "diverged" else t["loss"]
        # The loss axis counts ranks' distances evenly in the logarithm: good trials lie close together.
        low, high = math.log(max(lowest, 1e-6)), math.log(max(worst, 1e-6))
        at = (math.log(max(loss, 1e-6)) - low) / (high - low) if high > low else 0.5
        lines.append(([a.place(a.value(t)) for a in axes] + [at], kind, t["trial"] in good, tip(t)))
    drawn = spaces.parallel(lines, axes, ("loss", f"{lowest:.3g}", f"{worst:.3g}"))
    legend = [(svg.colour(BEST), "the best tenth")]
    legend += [(svg.colour(STATES[name]), name) for name in ("complete", "pruned", "diverged")]
    return Section("together", "All settings together", [Chart("One line a trial", drawn, legend, wide=True)])


def curves(sweep: Sweep) -> Section | None:
    """Validation loss over the rows of each trial."""
    ranked = sorted((t for t in sweep.trials if t["curve"]), key=lambda t: t["loss"] if is_number(t["loss"]) else 1e9)
    if not ranked:
        return None
    best, lines, shown = sweep.best(), [], []
    for t in reversed(ranked[:CURVES]):
        known = [(p["rows"], p["loss"]) for p in t["curve"] if is_number(p["loss"])]
        if not known:
            continue
        first = bool(best) and t["trial"] == best["trial"]
        shown += [loss for _, loss in known]
        kind = "line" if first else "thin"
        xs, ys = zip(*known, strict=True)
        lines.append(Series(xs, ys, BEST if first else STATES.get(t["state"], 5), kind=kind))
    if not shown:
        return None
    shown.sort()
    top = max(shown[int(len(shown) * 0.9) - 1] * 1.1, shown[len(shown) // 2] * 1.3)
    drawn = plot(lines, x_label="rows trained on", y_range=(min(shown) * 0.95, top), size=svg.WIDE)
    legend = [(svg.colour(BEST), "the best")]
    legend += [(svg.colour(STATES[name]), name) for name in ("complete", "pruned", "diverged")]
    more = f"The {CURVES} best of {len(ranked):,} trials. " if len(ranked) > CURVES else ""
    chart = Chart("Validation loss", drawn, legend, f"{more}What lies above the axis is drawn at its edge.", wide=True)
    return Section("curves", "Learning curves", [chart])


def choices(sweep: Sweep) -> Section | None:
    """What became of the trials with each choice: which schedule is better, which optimiser is the steadiest."""
    blocks = []
    for key, spec in sweep.space.items():
        if "choice" not in spec:
            continue
        rows = [
            (
                one.choice,
                f"{one.trials:,}",
                f"{one.diverged:,}" + (f" ({one.diverged / one.trials:.0%})" if one.trials else ""),
                number(one.best),
                number(one.median),
                number(one.spread),
            )
            for one in by_choice(sweep, key)
        ]
        head = (key, "trials", "diverged", "best loss", "median", "spread")
        blocks.append(Table(rows, head))
    note = (
        "Spread: between the first and the third quarter of the loss; the smaller, the steadier. A diverged trial "
        "counts as the worst of all."
    )
    return Section("choices", "Choice by choice", blocks, note) if blocks else None


def table(sweep: Sweep) -> Section:
    """Every trial, the best first."""
    order = sorted(sweep.trials, key=lambda t: (not is_measured(t), t["loss"] or 0.0, t["trial"]))
    keys = list(sweep.space)
    rows = [
        (
            t["trial"],
            t["state"],
            *(number(t[key]) for key in ("loss", "auroc", "accuracy")),
            duration(t["seconds"] or 0.0),
            *(short(t["params"].get(key)) for key in keys),
        )
        for t in order
    ]
    head = ("trial", "state", "loss", "AUROC", "accuracy", "time", *(key.rpartition(".")[2] for key in keys))
    failed = [(t["trial"], str(t.get("error") or "")[:500]) for t in sweep.trials if t["state"] == "failed"]
    blocks = [Table(rows[:10], head, title="The ten best" if len(rows) > 10 else "")]
    if len(rows) > 10:
        blocks.append(Table(rows, head, details=f"All {len(rows):,} trials"))
    if failed:
        blocks.append(Table(failed, ("trial", "why it failed")))
    return Section("trials", "Trials", blocks)


def cost(sweep: Sweep, price: float | None) -> Section:
    """Time by what became of it, and money."""
    total = seconds(sweep)
    rows = [
        (state, f"{count:,}", duration(spent), f"{spent / total:.0%}" if total else "-")
        for state in STATES_SHOWN
        if (count := sum(t["state"] == state for t in sweep.trials))
        for spent in [seconds(sweep, state)]
    ]
    blocks: list[Any] = [Table(rows, ("state", "trials", "time", "part of all"))]
    facts = [("rows trained on", f"{sum(t.get('rows_done') or 0 for t in sweep.trials):,}")]
    workers = sorted({str(t["worker"]).partition(":")[0] for t in sweep.trials if t.get("worker")})
    facts.append(("machines", ", ".join(workers) or "-"))
    if price is not None:
        facts.append(("cost", f"{total / 3600 * price:,.2f} at {price:g} an hour, if one trial ran at a time"))
    blocks.append(Table(facts))
    return Section("cost", "Cost", blocks)


def again(sweep: Sweep) -> Section:
    """The best run file, what to do with it, and the run file that led to it."""
    train = shlex.join(["veritune", "train", str(sweep.path / "best.toml")])
    blocks: list[Any] = [
        Code(f"veritune sweep run.toml\n{train}", "Commands"),
        Text("run.toml stands for the sweep's run file, whatever its name; it is shown below."),
    ]
    try:
        blocks.append(Code((sweep.path / "best.toml").read_text(encoding="utf-8"), "best.toml"))
    except (OSError, ValueError):
        blocks.append(Text("No trial is complete yet, so there is no best.toml."))
    blocks.append(Code(run_file(sweep), "run.toml"))
    return Section("again", "How to go on", blocks)


def run_file(sweep: Sweep) -> str:
    """The run file that the sweep was made from; where its storage was is written nowhere."""
    settings = sweep.results.get("sweep", {}) | {"storage": None}
    text = run.run_file({**sweep.results.get("run", {}), "sweep": settings})
    space = [f"{key} = {toml(spec)}" for key, spec in sweep.space.items()]
    return "\n".join([text, "[sweep.space]", *space])
