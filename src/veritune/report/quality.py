"""The sections of a report that are made of scores: their spread, calibration, thresholds, columns, worst rows."""

from typing import Any

from ..quality.metrics import accuracy, confusion
from . import figures, svg
from .blocks import Chart, Row, Section, Table, Text
from .scored import Scored
from .svg import Series, plot
from .words import between, number, plain

WORST = 10
"""Rows that are shown of each kind of mistake."""
UNIT = (0.0, 1.0)


def sections(rows: Scored | None) -> list[Section]:
    """All of them; one that says why, where a run has kept no scores."""
    if rows is None:
        text = "The run has kept no scores of its validation rows (scores-best.parquet)."
        return [Section("scores", "Scores", [Text(text, warning=True)])]
    return [scores(rows), *columns(rows), *worst(rows)]


def scores(rows: Scored) -> Section:
    """Histograms, reliability, ROC, thresholds, confusion."""
    labels, p = rows.labels, rows.p
    blocks: list[Any] = []
    if rows.problem:
        text = f"{rows.problem}: rows of one question count as independent here, so intervals are too narrow."
        blocks.append(Text(text, warning=True))
    edges, right, wrong = figures.histogram(labels, p)
    both = [("s1", "correct solutions"), ("s2", "incorrect solutions")]
    blocks.append(Chart("Scores by label", svg.bars(edges, [(1, right), (2, wrong)], x_label="P(correct)"), both))
    found = figures.reliability(labels, p, rows.groups)
    shares = Series(
        [x for x, *_ in found],
        [share for _, share, *_ in found],
        1,
        kind="both",
        low=[low for *_, low, _, _ in found],
        high=[high for *_, high, _ in found],
        tips=[f"{count:,} rows: mean P {x:.3f}, correct {share:.3f}" for x, share, _, _, count in found],
    )
    drawn = plot([shares], x_label="mean P(correct)", x_range=UNIT, y_range=UNIT, diagonal=True)
    blocks.append(
        Chart(
            "Reliability: the share that is correct",
            drawn,
            note=f"Dashed: P(correct) as it should be on rows of train's share of correct solutions. Of these "
            f"{labels.mean():.0%} are.",
        )
    )
    misses, hits = figures.roc(labels, p)
    curve = plot(
        [Series(misses, hits, 1)], x_label="incorrect called correct", x_range=UNIT, y_range=UNIT, diagonal=True
    )
    blocks.append(Chart("ROC: the share of correct solutions called correct", curve))
    at = figures.thresholds(labels, p)
    names = (("accuracy", "accuracy"), ("balanced", "balanced accuracy"), ("recall", "correct ones found"),
             ("precision", "right when it says correct"))  # fmt: skip
    lines = [Series(at["threshold"], at[key], i, kind="line") for i, (key, _) in enumerate(names, 1)]
    legend = [(svg.colour(i), name) for i, (_, name) in enumerate(names, 1)]
    drawn = plot(lines, x_label="threshold on P(correct)", x_range=UNIT, y_range=UNIT, marks=[(0.5, "used")])
    blocks.append(Chart("What another threshold would give", drawn, legend))
    table = confusion(labels, p)
    blocks.append(
        Table(
            [
                ("correct", f"{table['true_positive']:,}", f"{table['false_negative']:,}"),
                ("incorrect", f"{table['false_positive']:,}", f"{table['true_negative']:,}"),
            ],
            ("solution is", "called correct", "called incorrect"),
            title="At threshold 0.5",
        )
    )
    note = f"{len(p):,} validation rows, after step {rows.step:,} (lowest loss)."
    return Section("scores", "Scores", blocks, note)


def columns(rows: Scored) -> list[Section]:
    """Accuracy by every column that tells rows apart, and by length."""
    found = figures.by_column(rows.frame, rows.labels, rows.p, rows.groups)
    blocks: list[Any] = []
    overall = accuracy(rows.labels, rows.p)
    for name, parts in found.items():
        lines = [(x.name, x.figures["accuracy"], x.low_high["accuracy"]) for x in parts]
        drawn = svg.intervals(lines, x_label="accuracy", rule=overall)
        blocks.append(Chart(f"Accuracy by {name}", drawn, note="The dashed line is all rows together."))
    for name, parts in found.items():
        cells = [
            (
                x.name,
                f"{x.rows:,}",
                f"{x.questions:,}",
                f"{x.share:.1%}",
                f"{number(x.figures['accuracy'])}  {between(x.low_high['accuracy'])}",
                f"{number(x.figures['auroc'])}  {between(x.low_high['auroc'])}",
            )
            for x in parts
        ]
        head = (name, "rows", "questions", "correct", "accuracy", "AUROC")
        blocks.append(Table(cells, head, details=f"By {name}, as a table"))
    return [Section("parts", "Where it is right", blocks)] if blocks else []


def worst(rows: Scored) -> list[Section]:
    """The rows that the verifier was surest and wrong about."""
    if rows.problem:
        return []
    blocks: list[Any] = []
    for title, chosen in zip(
        ("Incorrect solutions, called correct", "Correct solutions, called incorrect"),
        figures.most_wrong(rows.labels, rows.p, WORST),
        strict=True,
    ):
        if not chosen:
            blocks.append(Text(f"{title}: none."))
            continue
        blocks.append(Text(f"{title}, the surest first:"))
        blocks += [row(rows, i) for i in chosen]
    return [Section("worst", "What it is most wrong about", blocks)]


def row(rows: Scored, i: int) -> Row:
    """One row, ready to be shown."""
    values = rows.frame.row(i, named=True)
    about = [
        (name, plain(str(value))[:200])
        for name, value in values.items()
        if name not in ("id", "qid", "question", "solution", "is_correct", "p_correct", "step") and value is not None
    ]
    return Row(
        float(rows.p[i]),
        bool(rows.labels[i]),
        plain(str(values["id"])),
        about[:8],
        plain(str(values["question"])),
        plain(str(values["solution"])),
    )
