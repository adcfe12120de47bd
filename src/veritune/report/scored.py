"""A run's scores on its validation rows, beside the rows themselves where the prepared dataset can be found."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..data.folder import VALIDATION
from ..data.sources import MANIFEST
from ..quality.metrics import Bools, Floats, Ints, group_ids
from ..training.status import SCORES
from .folder import RunFolder


@dataclass(frozen=True)
class Scored:
    """Rows that a run was validated on, after its best validation."""

    frame: pl.DataFrame
    """id, is_correct, p_correct, step; and the prepared dataset's columns, unless `problem` says why not."""
    labels: Bools
    p: Floats
    groups: Ints
    """The number of each row's question; a number for each row where the rows could not be found."""
    problem: str

    @property
    def step(self) -> int:
        return int(self.frame["step"][0])


def load(run: RunFolder, data: Path | None = None) -> Scored | None:
    """Reads the scores of the best validation and joins them with the rows of the prepared folder (`data`, or the one
    that the run names); None where the run has kept none."""
    try:
        scores = pl.read_parquet(run.path / SCORES["best"], glob=False)
        labels, p = scores["is_correct"].to_numpy().astype(bool), scores["p_correct"].to_numpy().astype(np.float64)
    except (OSError, pl.exceptions.PolarsError):
        return None
    if not len(p) or not np.isfinite(p).all():
        return None
    place = prepared(run, data)
    problem = ""
    try:
        if not manifest(run, data):
            problem = not_its_own(run, data)
        else:
            rows = pl.read_parquet(place / VALIDATION, glob=False).unique("id")
            joined = scores.join(rows.drop("is_correct"), on="id", how="left", maintain_order="left")
            if joined["question"].null_count():
                problem = f"{place} does not hold all rows that the run was validated on"
            else:
                scores = joined
    except (OSError, pl.exceptions.PolarsError) as error:
        problem = f"{place} cannot be read ({error})"
    groups = np.arange(len(p)) if problem else group_ids(scores["qid"].to_list())
    return Scored(scores, labels, p, groups, problem)


def prepared(run: RunFolder, data: Path | None) -> Path:
    """The prepared folder of a run."""
    return data or Path(run.settings["data"]["path"])


def not_its_own(run: RunFolder, data: Path | None) -> str:
    """What is said where there is no `manifest`."""
    return f"{prepared(run, data)} is not there, or is not the dataset that the run was trained on"


def manifest(run: RunFolder, data: Path | None) -> dict[str, Any]:
    """The manifest of the dataset that a run was trained on; empty where its place holds none, or another."""
    try:
        values = json.loads((prepared(run, data) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = isinstance(values, dict) and values.get("fingerprint") == run.about["resolved"].get("fingerprint")
    return values if same else {}
