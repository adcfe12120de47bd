"""Curves and tables made of scores: plain numpy. `labels` is bool [n], `p` float64 [n], `groups` int64 [n]."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ..quality.metrics import Bools, Floats, Ints, at_edge, group_ids, intervals, point, rows_by_value, verdicts

BINS = 20
RELIABILITY_BINS = 10
RESAMPLES = 1000
MOST_VALUES = 20
"""Values of a column that are shown, the most frequent ones; the rest are one more."""


def histogram(labels: Bools, p: Floats) -> tuple[list[float], list[float], list[float]]:
    """Bin edges in [0, 1], and how many correct and incorrect solutions each bin holds."""
    edges = np.linspace(0, 1, BINS + 1)
    right, wrong = (np.histogram(p[which], edges)[0].astype(float).tolist() for which in (labels, ~labels))
    return edges.tolist(), right, wrong


def reliability(labels: Bools, p: Floats, groups: Ints) -> list[tuple[float, float, float, float, int]]:
    """For each tenth of [0, 1] that holds rows: mean P(correct), the share that is correct, a 95 % interval of that
    share over questions, and the rows.

    The interval is the normal one with the cluster-robust variance of a ratio, clipped to [0, 1]; where all labels of a
    tenth are alike, Clopper and Pearson's for its questions, each counted once; of one question with both, all of it.
    """
    out = []
    bins = np.clip((p * RELIABILITY_BINS).astype(int), 0, RELIABILITY_BINS - 1)
    for number in range(RELIABILITY_BINS):
        chosen = bins == number
        if not chosen.any():
            continue
        share, count = float(labels[chosen].mean()), int(chosen.sum())
        many = len(np.unique(groups[chosen]))
        if share in (0, 1):
            low, high = at_edge(share == 1, many)
        elif many == 1:
            low, high = 0.0, 1.0
        else:
            off = np.bincount(groups[chosen], weights=labels[chosen] - share)
            width = 1.96 * float(np.sqrt((off**2).sum() * many / (many - 1))) / count
            low, high = max(0.0, share - width), min(1.0, share + width)
        out.append((float(p[chosen].mean()), share, low, high, count))
    return out


def roc(labels: Bools, p: Floats) -> tuple[list[float], list[float]]:
    """The share of incorrect solutions called correct, and of correct ones so called, as the threshold falls."""
    order = np.argsort(-p, kind="stable")
    last = np.flatnonzero(np.diff(p[order], append=-1.0))  # ties move together
    hits, misses = np.cumsum(labels[order])[last], np.cumsum(~labels[order])[last]
    return (
        [0.0, *(misses / max(misses[-1], 1)).tolist()],
        [0.0, *(hits / max(hits[-1], 1)).tolist()],
    )


def thresholds(labels: Bools, p: Floats) -> dict[str, list[float]]:
    """By threshold: accuracy, balanced accuracy, recall and precision of correct solutions."""
    at = np.linspace(0, 1, 101)
    said = p[None, :] >= at[:, None]
    hits, calls = (said & labels).sum(1), said.sum(1)
    rejected = (~said & ~labels).sum(1)
    right, wrong = max(int(labels.sum()), 1), max(int((~labels).sum()), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(calls > 0, hits / calls, np.nan)
    return {
        "threshold": at.tolist(),
        "accuracy": ((hits + rejected) / max(len(p), 1)).tolist(),
        "balanced": ((hits / right + rejected / wrong) / 2).tolist(),
        "recall": (hits / right).tolist(),
        "precision": precision.tolist(),
    }


@dataclass(frozen=True)
class Part:
    """The figures of the rows with one value of a column."""

    name: str
    rows: int
    questions: int
    share: float
    """The share that is correct."""
    figures: dict[str, float]
    low_high: dict[str, tuple[float, float] | None]
    """95 % intervals by the figure's name."""


def by_column(
    frame: pl.DataFrame, labels: Bools, p: Floats, groups: Ints, *, resamples: int = RESAMPLES
) -> dict[str, list[Part]]:
    """Figures by each column that tells rows apart, and by the solution's length; no intervals if `resamples` is 0."""
    known = {"id", "qid", "question", "solution", "is_correct", "p_correct", "step", "answer", "gold", "first_error"}
    out = {}
    for name in frame.columns:
        if name in known or frame[name].dtype not in (pl.String, pl.Categorical, pl.Boolean, pl.Int64, pl.Int32):
            continue
        found = list(rows_by_value(frame[name].to_list()).items())
        most = max((len(rows) for value, rows in found if value != "(none)"), default=0)
        if len(found) < 2 or most < max(2, frame[name].count() / 100):  # all alike, or all different
            continue
        if others := [rows for _, rows in found[MOST_VALUES:]]:
            found[MOST_VALUES:] = [(f"({len(others):,} others)", np.sort(np.concatenate(others)))]
        out[name] = [part(value, rows, labels, p, groups, resamples) for value, rows in found]
    if "solution" in frame.columns:
        length = frame["solution"].str.len_chars().to_numpy()
        cuts = np.unique(np.quantile(length, [0, 0.2, 0.4, 0.6, 0.8, 1]).round().astype(int))
        if len(cuts) > 2:
            place = np.searchsorted(cuts[1:-1], length, side="right")
            out["length of the solution"] = [
                part(f"{cuts[i]:,} to {cuts[i + 1]:,} letters", rows, labels, p, groups, resamples)
                for i in range(len(cuts) - 1)
                if len(rows := np.flatnonzero(place == i))
            ]
    return out


def part(name: str, chosen: Ints, labels: Bools, p: Floats, groups: Ints, resamples: int) -> Part:
    """The figures of the rows with some numbers."""
    own = group_ids(groups[chosen].tolist())
    return Part(
        name,
        len(chosen),
        int(own.max()) + 1,
        float(labels[chosen].mean()),
        point(labels[chosen], p[chosen]),
        intervals(labels[chosen], p[chosen], own, resamples=resamples) if resamples else {},
    )


def most_wrong(labels: Bools, p: Floats, count: int) -> tuple[list[int], list[int]]:
    """Row numbers: incorrect solutions called correct, the surest first; and correct ones called incorrect."""
    order, said = np.argsort(p, kind="stable"), verdicts(p)
    low = [int(i) for i in order if labels[i] and not said[i]][:count]
    high = [int(i) for i in order[::-1] if said[i] and not labels[i]][:count]
    return high, low


def differing(settings: list[dict[str, Any]]) -> list[str]:
    """The keys (of flat settings) whose values are not the same in all."""
    keys = list(dict.fromkeys(key for one in settings for key in one))
    return [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]
