"""`veritune evaluate`: how good a verifier is on labelled rows, over all and by the values of a column.

`check` refuses rows that nothing can be measured on, before a model is loaded; `score_frame` gives the scores;
`evaluate` makes the figures of them, as plain values that JSON can hold; `show` prints them, `write` keeps them.
"""

import dataclasses
import difflib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..config import Columns
from ..data.rows import parse_labels, resolve_columns, same_question
from ..errors import DataError, NonFiniteError
from .metrics import (
    FEW_QUESTIONS,
    LEVEL,
    RESAMPLES,
    THRESHOLD,
    Bools,
    Floats,
    Ints,
    group_ids,
    measure,
    paired,
    plain,
    rows_by_value,
)
from .rowfile import explain, replacing, unscorable
from .score import Scorer, say, score_pairs

MOST_VALUES = 200
"""Values a column may have to be evaluated by."""
SHOWN = 40
"""Values of a column that are printed; all of them are in the JSON."""
FAR = 0.1
"""Between two shares of correct rows: from there on verdicts for the one cost the other some accuracy."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Rows that can be evaluated."""

    questions: list[str]
    solutions: list[str]
    labels: Bools
    groups: Ints
    """The number of each row's question, int64 [rows]."""
    unscorable: dict[int, str]
    """Row -> why it cannot be scored; such rows are counted, and in no figure."""
    names: tuple[str, str, str]
    """The columns of question, solution and label."""
    notes: list[str]
    """What was assumed about the columns."""


def check(
    frame: pl.DataFrame, columns: Columns | None = None, *, by: Sequence[str] = (), where: str = "the rows"
) -> Labelled:
    """Takes questions, solutions and labels out of `frame`; `where` names it in messages.

    Raises DataError if a column is missing, a label is unusable, all labels are equal, no row can be scored, or a
    column of `by` is missing or has over 200 values.
    """
    if frame.is_empty():
        raise DataError(f"{where}: no rows to evaluate")
    names, notes = resolve_columns(frame.columns, columns or Columns(), need_label=True, where=where)
    label = names.label or ""
    labels = _labels(frame[label], where)
    texts = frame.select(
        pl.col(name).cast(pl.String) if frame[name].dtype in (pl.Categorical, pl.Enum) else pl.col(name)
        for name in (names.question, names.solution)
    )
    questions, solutions = (texts[name].to_list() for name in (names.question, names.solution))
    reasons = ((row, unscorable(*parts)) for row, parts in enumerate(zip(questions, solutions, strict=True)))
    problems = {row: reason for row, reason in reasons if reason}
    if len(problems) == len(frame):
        raise DataError(f"{where}: no row can be scored: {explain(problems, lambda row: f'row {row + 1}')}")
    for name in by:
        _check_by(frame, name, where)
    questions, solutions = ([text if isinstance(text, str) else "" for text in part] for part in (questions, solutions))
    groups = group_ids([same_question(question) for question in questions])
    return Labelled(
        questions, solutions, labels, groups, problems, (names.question, names.solution, label), list(notes)
    )


def _labels(series: pl.Series, where: str) -> Bools:
    parsed = parse_labels(series)
    total, bad = len(series), np.flatnonzero(parsed.is_null().to_numpy())
    if len(bad) == total:
        raise DataError(
            f"{where}: column {series.name!r} holds no labels (its first value is {series[0]!r}); evaluation compares "
            "scores with labels: true or false, yes or no, 1 or 0. Rows without labels can be scored: `veritune score`"
        )
    if len(bad):
        shown = ", ".join(f"row {row + 1} ({series[int(row)]!r})" for row in bad[:5]) + (", …" if len(bad) > 5 else "")
        raise DataError(
            f"{where}: {len(bad):,} of {total:,} labels in column {series.name!r} are missing or neither true nor "
            f"false: {shown}. Correct these rows or take them out"
        )
    labels = parsed.to_numpy().astype(bool)
    if labels.all() or not labels.any():
        raise DataError(
            f"{where}: all {total:,} labels in column {series.name!r} are {bool(labels[0])}, so nothing can be "
            "measured against them. The competition's test set is like this: its labels are placeholders, all True. "
            "Evaluate on rows with real labels, such as the prepared dataset's validation rows; for the test set use "
            "`veritune score` or `veritune submit`"
        )
    return labels


def _check_by(frame: pl.DataFrame, name: str, where: str) -> None:
    if name not in frame.columns:
        near = difflib.get_close_matches(name, frame.columns, n=1)
        known = ", ".join(map(repr, frame.columns))
        raise DataError(
            f"{where}: --by {name}: no such column{f' (did you mean {near[0]!r}?)' if near else ''}; there are {known}"
        )
    values = len(rows_by_value(frame[name].to_list()))
    if values > MOST_VALUES:
        raise DataError(
            f"{where}: --by {name}: the column has {values:,} values; figures are made for at most {MOST_VALUES}"
        )


def score_frame(scorer: Scorer, rows: Labelled, console: Console) -> Floats:
    """P(correct) of each row, float64 [rows], NaN where it cannot be scored. Raises NonFiniteError as `score_pairs`."""
    return score_pairs(
        scorer,
        rows.questions,
        rows.solutions,
        skip=rows.unscorable,
        place=lambda row: f"row {row + 1}",
        console=console,
    )[0]


def evaluate(
    frame: pl.DataFrame,
    p_correct: Floats,
    baseline: Floats | None = None,
    by: Sequence[str] = (),
    *,
    columns: Columns | None = None,
    where: str = "the rows",
    share: float | None = None,
    train_share: float | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """The figures of `p_correct` (float64 [rows of frame]) and, beside it, of `baseline` on the same rows.

    Returns counts; `adapter` and `baseline` (see `metrics.measure`; an undefined figure is None); `difference`,
    adapter minus baseline (see `metrics.paired`); `by`: column -> a list with each value's figures, the most frequent
    value first; `share`, of correct solutions, that the scores were moved to, and that of train. Raises DataError as
    `check` does, and NonFiniteError if a row that can be scored has no score.
    """
    rows = check(frame, columns, by=by, where=where)
    used = np.array([row for row in range(len(frame)) if row not in rows.unscorable], dtype=np.int64)
    for p in (p_correct, baseline) if baseline is not None else (p_correct,):
        if len(p) != len(frame):
            raise ValueError(f"{len(p)} scores for {len(frame)} rows")
        bad = used[~np.isfinite(p[used])]
        if len(bad):
            raise NonFiniteError(f"{where}, row {bad[0] + 1}: P(correct) is {p[bad[0]]} ({len(bad):,} such rows)")

    def figures(of: Ints, p: Floats) -> dict[str, Any]:
        groups = group_ids(rows.groups[of].tolist())
        return measure(rows.labels[of], p[of], groups, seed=seed, resamples=resamples)

    result: dict[str, Any] = {
        "rows": len(frame),
        "unscored": dict(Counter(rows.unscorable.values())),
        "columns": dict(zip(("question", "solution", "label"), rows.names, strict=True)),
        "threshold": THRESHOLD,
        "share": share,
        "train_share": train_share,
        "interval": {"level": LEVEL, "method": "bootstrap over questions", "resamples": resamples, "seed": seed},
        "adapter": figures(used, p_correct),
        "baseline": None,
        "difference": None,
        "by": {},
    }
    if baseline is not None:
        groups = group_ids(rows.groups[used].tolist())
        difference = paired(rows.labels[used], baseline[used], p_correct[used], groups, seed=seed, resamples=resamples)
        result["baseline"] = figures(used, baseline)
        result["difference"] = {name: dataclasses.asdict(value) for name, value in difference.items()}
    for name in by:
        table = []
        for value, places in rows_by_value(frame[name].gather(used).to_list()).items():
            of = used[places]
            entry = {"value": value, **figures(of, p_correct)}
            if baseline is not None:
                entry["baseline"] = figures(of, baseline)
            table.append(entry)
        result["by"][name] = table
    return plain(result)


def write(result: dict[str, Any], path: Path) -> None:
    """Writes the figures as JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def show(result: dict[str, Any], console: Console) -> None:
    """Prints what `evaluate` returned as tables."""
    adapter, baseline = result["adapter"], result["baseline"]
    rows, questions, share = adapter["rows"], adapter["questions"], adapter["share_true"]
    say(console, f"{rows:,} rows of {questions:,} questions, {share:.1%} of the solutions correct")
    meant = result["train_share"] if result["share"] is None else result["share"]
    if meant is not None:
        told = abs(meant - share) > FAR and 0 < round(share, 2) < 1  # --share takes neither 0 nor 1
        hint = f"; --share {share:.2f} moves it to these" if told else ""
        say(console, f"P(correct) is meant for rows of which {meant:.1%} are correct{hint}")
    if result["unscored"]:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in result["unscored"].items())
        say(console, f"{sum(result['unscored'].values()):,} more rows could not be scored ({reasons})")
    if questions < FEW_QUESTIONS:
        console.print(f"[yellow]Under {FEW_QUESTIONS} questions: the intervals are narrower than they should be.[/]")
    columns = [("adapter", adapter)] + ([("base model", baseline)] if baseline else [])
    table = Table("", *(name for name, _ in columns), title="Quality (95 % intervals over questions)")
    for key, name in NAMES.items():
        table.add_row(name, *(_figure(of, key) for _, of in columns))
    for key, name in CONFUSION.items():
        table.add_row(name, *(f"{of['confusion'][key]:,}" for _, of in columns))
    console.print(table)
    if result["difference"]:
        _show_difference(result["difference"], console)
    for name, entries in result["by"].items():
        _show_by(name, entries, console)


NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "auroc": "AUROC",
    "brier": "Brier score (less is better)",
    "log_loss": "log loss (less is better)",
}
CONFUSION = {
    "true_positive": "correct, called correct",
    "false_negative": "correct, called incorrect",
    "true_negative": "incorrect, called incorrect",
    "false_positive": "incorrect, called correct",
}


def _figure(of: dict[str, Any], key: str) -> str:
    value, interval = of[key], of.get(f"{key}_interval")
    text = "-" if value is None else f"{value:.4f}"
    return text + (f" [{interval[0]:.4f}, {interval[1]:.4f}]".replace("[", r"\[") if interval else "")


def _show_difference(difference: dict[str, Any], console: Console) -> None:
    table = Table("adapter minus base model", "difference", "95 % interval", "p-value")
    for key, of in difference.items():
        interval = "-" if of["interval"] is None else "{:+.4f} to {:+.4f}".format(*of["interval"])
        p_value = "-" if of["p_value"] is None else f"{of['p_value']:.4f}"
        table.add_row(NAMES[key], "-" if of["value"] is None else f"{of['value']:+.4f}", interval, p_value)
    console.print(table)


def _show_by(name: str, entries: list[dict[str, Any]], console: Console) -> None:
    with_base = any("baseline" in of for of in entries)
    base = ("base accuracy", "base AUROC") if with_base else ()
    table = Table(escape(name), "rows", "questions", "share correct", "accuracy", "AUROC", *base)
    for of in entries[:SHOWN]:
        cells = [f"{of['rows']:,}", f"{of['questions']:,}", f"{of['share_true']:.1%}"]
        cells += [_figure(of, "accuracy"), _figure(of, "auroc")]
        if with_base:
            cells += [_figure({key: of["baseline"][key]}, key) for key in ("accuracy", "auroc")]
        table.add_row(escape(of["value"]), *cells)
    console.print(table)
    if len(entries) > SHOWN:
        say(console, f"and {len(entries) - SHOWN} more values; the JSON file has them all")
