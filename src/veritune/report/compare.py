"""The sections of a report on several runs: what differs, how each went, and whether the difference is one."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from .. import config
from ..quality.metrics import Difference, group_ids, paired
from . import figures, run, scored, svg
from .blocks import Chart, Code, Section, Table, Text
from .folder import RunFolder, smooth
from .scored import Scored
from .svg import Series, colour, plot
from .words import between, duration, number

RESAMPLES = 1000
MOST_BANDS = 4
"""With more runs than this their intervals would hide each other."""


def names(runs: Sequence[RunFolder]) -> list[str]:
    """A short name for each run: its folder's, with as many folders above it as tell all apart."""
    parts = [one.path.resolve().parts for one in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return [f"{'/'.join(part[-1:])} ({i + 1})" for i, part in enumerate(parts)]


def sections(runs: Sequence[RunFolder], data: Path | None, price: float | None) -> list[Section | None]:
    """All of them; the first run is the one that others are compared with."""
    short = names(runs)
    legend = [(colour(i), name) for i, name in enumerate(short, 1)]
    held = [scored.load(one, data) for one in runs]
    return [
        summary(runs, short),
        what(runs, short, data),
        training(runs, short, legend),
        validation(runs, legend),
        differences(held, short),
        scores(held, legend, short),
        forgetting(runs, short),
        cost(runs, short, price),
        Section("again", "How to reproduce", [Code(run.run_file(one.settings), details=f"run.toml of {name}")
                for one, name in zip(runs, short, strict=True)]),
    ]  # fmt: skip


def summary(runs: Sequence[RunFolder], short: Sequence[str]) -> Section:
    """A line for each run."""
    rows = []
    for one, name in zip(runs, short, strict=True):
        best = one.metrics.best or {}
        cells = [number(best.get("loss"))]
        cells += [f"{number(best.get(key))}  {between(best.get(f'{key}_interval'))}" for key in ("auroc", "accuracy")]
        of = f" of {one.steps:,}" if one.steps else ""
        time = duration(run.hours(one) * 3600)
        rows.append((name, one.state()[0], f"{one.metrics.done:,}{of}", *cells, time, run.device(one)))
    head = ("run", "state", "steps", "loss", "AUROC", "accuracy", "time", "machine")
    return Section("summary", "Summary", [Table(rows, head)], "Each run's best validation (lowest loss).")


def what(runs: Sequence[RunFolder], short: Sequence[str], data: Path | None) -> Section:
    """The settings that differ, and the data."""
    settings = [config.flat(one.settings) for one in runs]
    keys = [key for key in figures.differing(settings) if key != "out"]
    rows = [(key, *(json.dumps(one.get(key), ensure_ascii=False) for one in settings)) for key in keys]
    prints = [str(one.about["resolved"].get("fingerprint")) for one in runs]
    blocks: list[Any] = [
        Table(rows, ("setting", *short), title="What differs") if rows else Text("No setting differs.")
    ]
    if len(set(prints)) > 1:
        pairs = "; ".join(f"{name}: {text}" for name, text in zip(short, prints, strict=True))
        blocks.append(Text(f"The runs were trained on different data ({pairs}).", warning=True))
    elif about := scored.manifest(runs[0], data):
        blocks.append(Table([*run.data_facts(about), ("fingerprint", prints[0])], title="Data"))
    return Section("what", "What was run", blocks)


def training(runs: Sequence[RunFolder], short: Sequence[str], legend: list[tuple[str, str]]) -> Section:
    """Losses over steps and over time, learning rates."""
    done = [(i, one.metrics.steps) for i, one in enumerate(runs, 1) if one.metrics.steps["step"]]
    if not done:
        return Section("training", "Training", [Text("No step is finished yet.")])
    losses = [Series(steps["step"], smooth(steps["loss"]), i) for i, steps in done]
    shown = sorted(v for one in losses for v in one.y if v == v) or [1.0]
    # As on the page about one run: the first steps may lie above what is shown.
    top = (0, max(shown[int(len(shown) * 0.97) - 1] * 1.25, shown[len(shown) // 2] * 1.5))
    hours = [Series(spent(steps["seconds"]), one.y, one.colour) for (_, steps), one in zip(done, losses, strict=True)]
    rates = [Series(steps["step"], steps["lr"], i) for i, steps in done]
    return Section(
        "training",
        "Training",
        [
            Chart("Training loss (nats), smoothed", plot(losses, x_label="step", y_range=top), legend),
            Chart("The same over time in steps", plot(hours, x_label="hours", y_range=top), legend),
            Chart("Learning rate", plot(rates, x_label="step"), legend),
        ],
    )


def spent(seconds: Sequence[float]) -> list[float]:
    """Hours in steps, up to each of them."""
    return (np.nancumsum(seconds) / 3600).tolist()


def validation(runs: Sequence[RunFolder], legend: list[tuple[str, str]]) -> Section:
    """Figures on the held-out rows over the steps."""
    blocks = []
    for key, name in (("loss", "Loss"), ("auroc", "AUROC"), ("accuracy", "Accuracy")):
        lines = [run.over_steps(one.metrics.validations, key, i) for i, one in enumerate(runs, 1)]
        if len(runs) > MOST_BANDS:
            lines = [dataclasses.replace(one, low=None, high=None) for one in lines]
        blocks.append(Chart(f"{name} on validation", plot(lines, x_label="step"), legend))
    return Section("validation", "Validation", blocks, run.INTERVALS)


def differences(held: Sequence[Scored | None], short: Sequence[str]) -> Section:
    """Each run against the first on the rows that both have scored."""
    title, first = "Is one better?", held[0]
    if first is None:
        return Section("differences", title, [Text(f"{short[0]} has kept no scores.", warning=True)])
    rows, lines = [], {"accuracy": [], "auroc": []}
    notes = [Text(f"{first.problem}: rows count as independent here.", warning=True)] if first.problem else []
    for one, name in list(zip(held, short, strict=True))[1:]:
        found = difference(first, one) if one else None
        if found is None:
            rows.append((name, "0", "-", "-", "-", "-"))
            continue
        count, by = found
        rows.append((name, f"{count:,}", *(cell for key in lines for cell in cells(by[key]))))
        for key, line in lines.items():
            if not math.isnan(by[key].value):  # AUROC of rows with one label only
                line.append((name, by[key].value, by[key].interval))
    blocks: list[Any] = [
        Chart(f"{name}: difference from {short[0]}", svg.intervals(lines[key], x_label="difference", rule=0.0))
        for key, name in (("accuracy", "Accuracy"), ("auroc", "AUROC"))
        if lines[key]
    ]
    head = ("run", "rows in common", "accuracy", "p-value", "AUROC", "p-value")
    note = (
        f"Each run minus {short[0]} on the same rows, by a paired bootstrap over questions (95 % intervals). An "
        "interval that holds 0 is no difference that these rows can tell."
    )
    return Section("differences", title, [*notes, *blocks, Table(rows, head)], note)


def difference(first: Scored, second: Scored) -> tuple[int, dict[str, Difference]] | None:
    """`second` minus `first` on the rows of both, and how many those are."""
    place = {id_: i for i, id_ in enumerate(second.frame["id"])}
    pairs = [(i, place[id_]) for i, id_ in enumerate(first.frame["id"]) if id_ in place]
    if not pairs:
        return None
    a, b = (np.array(part) for part in zip(*pairs, strict=True))
    groups = group_ids(first.groups[a].tolist())
    return len(a), paired(first.labels[a], first.p[a], second.p[b], groups, resamples=RESAMPLES)


def cells(of: Difference) -> tuple[str, str]:
    """A difference with its interval, and its p-value."""
    if math.isnan(of.value):
        return "-", "-"
    low_high = f"  {of.interval[0]:+.3f} to {of.interval[1]:+.3f}" if of.interval else ""
    return f"{of.value:+.3f}{low_high}", number(of.p_value)


def scores(held: Sequence[Scored | None], legend: list[tuple[str, str]], short: Sequence[str]) -> Section | None:
    """ROC curves, reliability, and accuracy by column."""
    known = [(i, one) for i, one in enumerate(held, 1) if one]
    if not known:
        return None
    unit = (0.0, 1.0)
    curves = [Series(*figures.roc(one.labels, one.p), i) for i, one in known]
    honest = []
    for i, one in known:
        found = figures.reliability(one.labels, one.p, one.groups)
        honest.append(Series([x for x, *_ in found], [share for _, share, *_ in found], i, kind="both"))

    def square(series: list[Series], x_label: str) -> Markup:
        return plot(series, x_label=x_label, x_range=unit, y_range=unit, diagonal=True)

    blocks: list[Any] = [
        Chart("ROC: the share of correct solutions called correct", square(curves, "incorrect called correct"), legend),
        Chart("Reliability: the share that is correct", square(honest, "mean P(correct)"), legend),
    ]
    tables = [(i, figures.by_column(one.frame, one.labels, one.p, one.groups, resamples=0)) for i, one in known]
    for name in dict.fromkeys(name for _, table in tables for name in table):
        of = [(i, {x.name: x.figures["accuracy"] for x in table.get(name, [])}) for i, table in tables]
        values = list(dict.fromkeys(value for _, table in of for value in table))
        lines = [[table.get(value, float("nan")) for _, table in of] for value in values]
        flat = [v for line in lines for v in line if v == v]
        drawn = svg.heat(lines, values, [short[i - 1] for i, _ in of], low=min(flat), high=max(flat))
        blocks.append(Chart(f"Accuracy by {name}", drawn))
    return Section("scores", "Scores", blocks)


def forgetting(runs: Sequence[RunFolder], short: Sequence[str]) -> Section | None:
    """The summaries of every run with phases."""
    rows = []
    for one, name in zip(runs, short, strict=True):
        found = run.forgotten(one)
        if found:
            rows.append((name, *(number(found[key][probe]) for key in run.FORGETTING for probe in run.PROBES)))
    head = ("run", "forgetting, rows trained on", "held out", "backward transfer, rows trained on", "held out")
    return Section("forgetting", "What was forgotten", [Table(rows, head)]) if rows else None


def cost(runs: Sequence[RunFolder], short: Sequence[str], price: float | None) -> Section:
    """Time, rows and money of each run."""
    rows = []
    for one, name in zip(runs, short, strict=True):
        steps, total = one.metrics.steps, run.hours(one)
        shown, busy = (sum(v for v in steps[key] if v == v) for key in ("rows", "seconds"))
        speed = f"{shown / busy:,.1f}" if busy > 0 else "-"
        money = () if price is None else (f"{total * price:,.2f}",)
        rows.append((name, duration(total * 3600), f"{shown:,.0f}", speed, run.device(one), *money))
    head = ("run", "time", "row presentations", "rows a second in steps", "machine")
    head += () if price is None else (f"cost at {price:g} an hour",)
    return Section("cost", "Cost and hardware", [Table(rows, head)])
