"""How good a verifier's scores are: plain numpy, from labels and P(correct) to figures with intervals.

`point` gives every figure of one set of rows; `measure` adds 95 % intervals and the confusion table; `paired` compares
two verifiers on the same rows. Intervals come from a bootstrap over questions, because the solutions of one question
are right or wrong together: a bootstrap over rows would promise more than the rows can hold. In this module `labels`
is bool [n] (True: the solution is correct), `p` is float64 [n], P(correct) in [0, 1], and `groups` is int64 [n], the
number 0..G-1 of each row's question (`group_ids`). A figure that its rows leave undefined is NaN.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

THRESHOLD = 0.5
"""P(correct) from which a solution is called correct."""
CLIP = 1e-7
"""Log loss moves p into [CLIP, 1 - CLIP]: what a float32 softmax can tell from 0 and 1. A row costs at most 16.1."""
RESAMPLES = 2000
LEVEL = 0.95
FEW_QUESTIONS = 30
"""With fewer questions than this a percentile interval is too narrow, and whoever prints it should say so."""


def verdicts(p: Floats) -> Bools:
    """Whether each solution is called correct, bool [n]."""
    return np.asarray(p) >= THRESHOLD


def group_ids(keys: Sequence[Any]) -> Ints:
    """The number 0..G-1 of each key, int64 [n], in order of first appearance; equal keys have one number."""
    numbers: dict[Any, int] = {}
    return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), dtype=np.int64, count=len(keys))


def rows_by_value(values: Sequence[Any]) -> dict[str, Ints]:
    """The row numbers of each value as text, the commonest first, then by the text; None is `(none)`."""
    found: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        found.setdefault("(none)" if value is None else str(value), []).append(row)
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return {value: np.array(rows) for value, rows in ordered}


def confusion(labels: Bools, p: Floats) -> dict[str, int]:
    """Counts of rows: `true_positive` is a correct solution called correct, `false_positive` a wrong one so called."""
    said = verdicts(p)
    return {
        "true_positive": int((said & labels).sum()),
        "false_positive": int((said & ~labels).sum()),
        "false_negative": int((~said & labels).sum()),
        "true_negative": int((~said & ~labels).sum()),
    }


def accuracy(labels: Bools, p: Floats) -> float:
    """The share of rows whose verdict is their label."""
    return float((verdicts(p) == labels).mean()) if len(p) else float("nan")


def balanced_accuracy(labels: Bools, p: Floats) -> float:
    """The mean of the accuracies on correct and on incorrect solutions; NaN unless there are both."""
    right = verdicts(p) == labels
    return float((right[labels].mean() + right[~labels].mean()) / 2) if _both(labels) else float("nan")


def f1(labels: Bools, p: Floats) -> float:
    """2·TP / (2·TP + FP + FN) with "correct" as the positive class; NaN where nothing is, or is called, correct."""
    table = confusion(labels, p)
    both = 2 * table["true_positive"]
    total = both + table["false_positive"] + table["false_negative"]
    return both / total if total else float("nan")


def auroc(labels: Bools, p: Floats) -> float:
    """P(a correct solution scores above an incorrect one), ties counted half; NaN unless there are both labels.

    The Mann-Whitney statistic with midranks (Hanley & McNeil 1982).
    """
    return float(_Auroc(labels, p)(np.ones((1, len(p))))[0])


def brier(labels: Bools, p: Floats) -> float:
    """The mean of (p - label)², in [0, 1], lower is better (Brier 1950)."""
    return float(np.mean((p - labels) ** 2)) if len(p) else float("nan")


def log_loss(labels: Bools, p: Floats, share: float | None = None) -> float:
    """The mean of -log P(the row's label), in nats, lower is better; p is first moved into [CLIP, 1 - CLIP].

    `share`: correct and incorrect rows weigh as if that share of all were correct (importance weights for a shift of
    labels, Saerens et al. 2002); where one kind is not there, the other is all.
    """
    if not len(p):
        return float("nan")
    p = np.clip(p, CLIP, 1 - CLIP)
    losses = -np.where(labels, np.log(p), np.log1p(-p))
    have = float(labels.mean())
    if share is None or have in (0, 1):
        return float(np.mean(losses))
    return float(np.mean(losses * np.where(labels, share / have, (1 - share) / (1 - have))))


def point(labels: Bools, p: Floats) -> dict[str, float]:
    """Every figure of a set of rows by its name, without intervals."""
    return {
        "accuracy": accuracy(labels, p),
        "balanced_accuracy": balanced_accuracy(labels, p),
        "f1": f1(labels, p),
        "auroc": auroc(labels, p),
        "brier": brier(labels, p),
        "log_loss": log_loss(labels, p),
    }


def measure(labels: Bools, p: Floats, groups: Ints, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """`point` with counts, the confusion table, and 95 % intervals of accuracy and AUROC as (low, high) or None."""
    low_high = intervals(labels, p, groups, seed=seed, resamples=resamples)
    return {
        "rows": len(labels),
        "questions": int(groups.max()) + 1 if len(groups) else 0,
        "share_true": float(labels.mean()) if len(labels) else float("nan"),
        **point(labels, p),
        "accuracy_interval": low_high["accuracy"],
        "auroc_interval": low_high["auroc"],
        "confusion": confusion(labels, p),
    }


def plain(value: Any) -> Any:
    """Figures as strict JSON holds them, which gives them back the same: NaN and infinity as None, tuples as lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figures(values: dict[str, Any] | None) -> dict[str, Any] | None:
    """What `measure` gave, from what `plain` made of it."""
    if values is None:
        return None
    undefined = {name: math.nan for name, value in values.items() if value is None and not name.endswith("_interval")}
    return values | undefined


def intervals(
    labels: Bools, p: Floats, groups: Ints, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float] | None]:
    """95 % intervals of `accuracy` and `auroc`: percentiles over `resamples` draws of G questions with replacement.

    The cluster bootstrap (Field & Welsh 2007). None where the rows allow no interval: under two questions, or, for
    AUROC, one label. Where a figure is exactly 0 or 1 the draws do not differ, and the interval is Clopper and
    Pearson's (1934): accuracy's for G questions, each counted once; AUROC's for as many pairs of a correct and an
    incorrect solution as there are with no question in two of them.
    """
    right = verdicts(p) == labels
    if not len(p):
        return {"accuracy": None, "auroc": None}
    draws: dict[str, list[Floats]] = {"accuracy": [], "auroc": []}
    area = _Auroc(labels, p) if _both(labels) else None
    for weights, counts in _draws(groups, resamples, seed):
        draws["accuracy"].append(_weighted_accuracy(right, groups, counts))
        if area:
            draws["auroc"].append(area(weights()))
    questions = int(groups.max()) + 1
    out = {name: _percentiles(values) if questions > 1 else None for name, values in draws.items()}
    if right.all() or not right.any():
        out["accuracy"] = at_edge(bool(right[0]), questions)
    if area and questions > 1 and (value := auroc(labels, p)) in (0, 1):
        out["auroc"] = at_edge(value == 1, min(len(np.unique(groups[kind])) for kind in (labels, ~labels)))
    return out


def at_edge(all_hit: bool, count: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval of a share where all of `count` draws hit, or none."""
    edge = ((1 - LEVEL) / 2) ** (1 / count)
    return (edge, 1.0) if all_hit else (0.0, 1 - edge)


@dataclass(frozen=True)
class Difference:
    """The second verifier's figure minus the first's, on the same rows."""

    value: float
    interval: tuple[float, float] | None
    """95 %, by the bootstrap over questions."""
    p_value: float | None
    """Two-sided; None where there is no interval."""


def paired(
    labels: Bools, first: Floats, second: Floats, groups: Ints, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Difference]:
    """Is `second` better than `first` (both float64 [n]) in `accuracy` and `auroc`?

    Each draw of questions measures both verifiers on the same rows, so what makes a question hard for both cancels.
    The p-value inverts the percentile interval: twice the smaller share of draws on either side of 0, one draw added
    to each side so that it is never 0 (Davison & Hinkley 1997, section 4.2 and 5.4).
    """
    right = [verdicts(p) == labels for p in (first, second)]
    areas = [_Auroc(labels, p) for p in (first, second)] if _both(labels) else None
    draws: dict[str, list[Floats]] = {"accuracy": [], "auroc": []}
    for weights, counts in _draws(groups, resamples, seed) if len(labels) else ():
        a, b = (_weighted_accuracy(r, groups, counts) for r in right)
        draws["accuracy"].append(b - a)
        if areas:
            rows = weights()
            draws["auroc"].append(areas[1](rows) - areas[0](rows))
    values = {
        "accuracy": accuracy(labels, second) - accuracy(labels, first),
        "auroc": auroc(labels, second) - auroc(labels, first),
    }
    many = len(groups) > 0 and int(groups.max()) > 0
    return {name: _difference(values[name], draws[name] if many else []) for name in values}


def _difference(value: float, draws: list[Floats]) -> Difference:
    interval = _percentiles(draws)
    if interval is None:
        return Difference(value, None, None)
    all_draws = np.concatenate(draws)
    all_draws = all_draws[np.isfinite(all_draws)]
    # The two verifiers' sums are rounded apart: a difference below this is none.
    smaller = min((all_draws <= 1e-12).sum(), (all_draws >= -1e-12).sum())
    return Difference(value, interval, float(min(1.0, 2 * (smaller + 1) / (len(all_draws) + 1))))


def _both(labels: Bools) -> bool:
    return bool(labels.any() and not labels.all())


def _percentiles(draws: list[Floats]) -> tuple[float, float] | None:
    values = np.concatenate(draws) if draws else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _weighted_accuracy(right: Bools, groups: Ints, counts: Floats) -> Floats:
    """Accuracy of each draw, float64 [draws], from how often it holds each question, float64 [draws, G]."""
    rows = np.bincount(groups, minlength=counts.shape[1])
    hits = np.bincount(groups, weights=right, minlength=counts.shape[1])
    return (counts @ hits) / (counts @ rows)


def _draws(groups: Ints, resamples: int, seed: int) -> Iterator[tuple[Callable[[], Floats], Floats]]:
    """Draws of questions with replacement, a few at a time.

    Each item holds how often a draw holds each question, float64 [draws, G], and a function that gives the same for
    each row, float64 [draws, n]. How many are made at once is a matter of memory only: the stream of random numbers
    is the same.
    """
    rng = np.random.default_rng(seed)
    total = int(groups.max()) + 1
    at_once = max(1, min(resamples, 2_000_000 // max(len(groups), total)))
    for start in range(0, resamples, at_once):
        many = min(at_once, resamples - start)
        drawn = rng.integers(total, size=(many, total), dtype=np.int32)
        drawn += (np.arange(many, dtype=np.int32) * total)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=many * total).reshape(many, total).astype(np.float64)
        yield lambda counts=counts: counts[:, groups], counts


class _Auroc:
    """AUROC of one set of rows under many row weights: the sorting, which weights don't change, is done once."""

    def __init__(self, labels: Bools, p: Floats) -> None:
        order = np.argsort(p, kind="stable")
        self.positive = order[labels[order]]
        self.negative = order[~labels[order]]
        # Of the negatives in order of score, those before `low` are below a positive and those before `high` not above.
        self.low = np.searchsorted(p[self.negative], p[self.positive], side="left")
        self.high = np.searchsorted(p[self.negative], p[self.positive], side="right")

    def __call__(self, weights: Floats) -> Floats:
        """AUROC of each draw, float64 [draws], for row weights float64 [draws, n]; NaN where one label has none."""
        out = np.full(len(weights), np.nan)
        for i, w in enumerate(weights):
            positive = w[self.positive]
            passed = np.concatenate(([0.0], np.cumsum(w[self.negative])))
            pairs = positive.sum() * passed[-1]
            if pairs > 0:
                # Not `@`: a threaded dot of so little work waits longer for its threads than it computes.
                out[i] = np.einsum("i,i->", positive, passed[self.low] + passed[self.high]) / 2 / pairs
        return out
