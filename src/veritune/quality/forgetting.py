"""What is left of each slice after each phase: the forgetting matrix and its two usual summaries.

A matrix `a` is a list of rows, one a phase of the main line in order; `a[i][j]` is the accuracy after phase i on the
probe of slice j. `brought[i]` is the slice that phase i brought or, in a later pass, repeated; None for one that
brought nothing new.
"""

from collections.abc import Sequence
from typing import Any

Matrix = Sequence[Sequence[Any]]
Brought = Sequence[int | None]


def average_forgetting(a: Matrix, brought: Brought) -> float | None:
    """How far accuracy has fallen from its best: the mean over the slices learnt before the last phase of
    max_l a[l][j] - a[last][j], l from the phase that brought j to the one before the last (Chaudhry et al. 2018,
    section 3). Negative where it rose. None with no slice before the last phase."""
    falls = [max(row[j] for row in a[first:-1] if row[j] is not None) - a[-1][j] for j, first in _learnt(a, brought)]
    return sum(falls) / len(falls) if falls else None


def backward_transfer(a: Matrix, brought: Brought) -> float | None:
    """What later phases did to earlier slices: the mean of a[last][j] - a[first][j], `first` the phase that brought j
    (Lopez-Paz & Ranzato 2017, section 2). Negative is forgetting. None with no slice before the last phase."""
    changes = [a[-1][j] - a[first][j] for j, first in _learnt(a, brought)]
    return sum(changes) / len(changes) if changes else None


def _learnt(a: Matrix, brought: Brought) -> list[tuple[int, int]]:
    """The slices that a phase before the last brought and that were measured then, each with the first such phase."""
    first: dict[int, int] = {}
    for phase, j in enumerate(brought[:-1]):
        if j is not None:
            first.setdefault(j, phase)
    return sorted((j, phase) for j, phase in first.items() if None not in (a[phase][j], a[-1][j]))


def _comparable(probes: dict[str, Any], probe: str, figure: str, now: list[int]) -> list[float | None]:
    """A phase's row of a matrix: None for slices that came later, and for those whose probe had another number of rows
    than it has now."""
    row = probes[probe][figure]
    rows = probes.get("rows", {}).get(probe, now)  # which was not written down before probes could change
    same = [value if own == last else None for value, own, last in zip(row, rows, now, strict=False)]
    return [*same, *[None] * (len(now) - len(same))]


PROBES = ("trained", "held_out")


def report(slices: list[dict[str, Any]], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The contents of forgetting.json (see docs/phases.md) from the metrics' lines that hold `probes`."""
    main = [entry for entry in entries if not entry["probes"]["cooldown"]]
    brought = [entry["probes"]["slice"] for entry in main]
    out: dict[str, Any] = {
        "slices": slices,
        "phases": [
            {
                "name": entry["probes"]["phase"],
                "step": entry["step"],
                "slice": entry["probes"]["slice"],
                "validation": {
                    key: entry["validation"][key] for key in ("rows", "accuracy", "accuracy_interval", "auroc")
                },
            }
            for entry in main
        ],
    }
    now = {probe: [it[f"{probe}_rows"] for it in slices] for probe in PROBES}
    for figure in ("accuracy", "auroc"):
        out[figure] = {
            probe: [_comparable(entry["probes"], probe, figure, rows) for entry in main] for probe, rows in now.items()
        }
    for summary in (average_forgetting, backward_transfer):
        out[summary.__name__] = {probe: summary(out["accuracy"][probe], brought) for probe in PROBES}
    return out
