"""`veritune submit`: verdicts on a test file as the competition wants them, a csv `ID,is_correct` with True or False.

`open_submission` reads the test file and holds it against the sample submission before a model is loaded: the same
IDs, each once, as many rows. `submit` scores (and goes on after an interruption, as `veritune score` does) and writes.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from ..config import Columns
from ..data.lines import Refused, read_csv, read_lines
from ..errors import DataError, MissingError
from .metrics import verdicts
from .rowfile import RowFile, check_free, explain, read_rows, replacing
from .score import CHUNK, Scorer, say, score_rows_of

HEADER = ["ID", "is_correct"]


@dataclass(frozen=True)
class Submission:
    """A test file whose verdicts can be submitted."""

    rows: RowFile
    ids: list[str]
    """The IDs in the order in which they are written."""
    order: list[int]
    """For each of them, the row of the test file."""
    notes: list[str]


@dataclass(frozen=True)
class Submitted:
    """What `submit` did."""

    out: Path
    rows: int
    said_true: int
    unscorable: int
    """Rows without question or solution: False."""
    resumed: int


def open_submission(
    test: Path, out: Path, columns: Columns, *, sample: Path | None = None, overwrite: bool = False
) -> Submission:
    """Reads the test file and checks it against the sample.

    A row's ID is the file's own ID column where it has one, else its number from 0. Rows are written in the sample's
    order. Raises DataError if IDs are missing or repeated, or the sample is not one for this test file: other columns,
    more rows, fewer rows, other IDs, or, where IDs are row numbers, another order.
    """
    if sample is not None and not sample.is_file():
        raise MissingError(f"{sample}: no such file")
    check_free(out, [test] + ([sample] if sample else []), overwrite=overwrite)
    rows = read_rows(test, columns)
    own = rows.ids is not None
    ids = rows.ids if rows.ids is not None else [str(row) for row in range(len(rows.questions))]
    _check_ids(ids, rows)
    source = "its own ID column" if own else "the row's number from 0"
    notes = [*rows.notes, f"{test}: ID is {source}"]
    order = list(range(len(ids)))
    if sample is not None:
        wanted = _read_sample(sample)
        _compare(wanted, ids, sample, rows, own=own)
        if wanted != ids:
            notes.append(f"{sample}: has the same IDs in another order, which is kept")
            at = {value: row for row, value in enumerate(ids)}
            order = [at[value] for value in wanted]
    return Submission(rows, [ids[row] for row in order], order, notes)


def _check_ids(ids: Sequence[str], rows: RowFile) -> None:
    empty = [row for row, value in enumerate(ids) if not value]
    if empty:
        raise DataError(f"{rows.place(empty[0])}: has no ID ({len(empty):,} such rows)")
    first: dict[str, int] = {}
    for row, value in enumerate(ids):
        if first.setdefault(value, row) != row:
            count = len(ids) - len(set(ids))
            raise DataError(
                f"{rows.place(row)}: ID {value!r} was there before, at {rows.place(first[value])} ({count:,} repeated)"
            )


def _read_sample(path: Path) -> list[str]:
    """The IDs of a sample submission. Raises DataError if it is not one."""
    records = read_csv(read_lines(path), path)
    header = next(records, (0, []))[1]
    if header != HEADER:
        shown = ",".join(header) if isinstance(header, list) else ""
        raise DataError(f"{path}: a sample submission has the columns {','.join(HEADER)}, this file has {shown!r}")
    ids: list[str] = []
    lines: dict[str, int] = {}
    for line, fields in records:
        if isinstance(fields, Refused):
            raise DataError(f"{path}:{line}: {fields.why}")
        value = fields[0].strip()
        if not value:
            raise DataError(f"{path}:{line}: has no ID")
        if lines.setdefault(value, line) != line:
            raise DataError(f"{path}:{line}: ID {value!r} was there before, in line {lines[value]}")
        ids.append(value)
    if not ids:
        raise DataError(f"{path}: it has a header but no rows")
    return ids


def _compare(wanted: Sequence[str], ids: Sequence[str], sample: Path, rows: RowFile, *, own: bool) -> None:
    test, known, asked = rows.path, set(ids), set(wanted)
    missing = [value for value in wanted if value not in known]
    extra = [value for value in ids if value not in asked]
    if len(wanted) > len(ids):
        raise DataError(
            f"{sample}: the sample has {len(wanted):,} rows, more than the test file's {len(ids):,} ({test}): "
            f"{len(missing):,} IDs have no row there, such as {_some(missing)}. The submission would lack them; use "
            "the whole test file"
        )
    if len(wanted) < len(ids):
        raise DataError(
            f"{sample}: the sample has {len(wanted):,} rows, fewer than the test file's {len(ids):,} ({test}): "
            f"{len(extra):,} test rows are not asked for, such as ID {_some(extra)}. Use the sample of this test file"
        )
    if missing:
        hint = "" if own else "; the test file has no ID column, so its IDs are the row numbers from 0"
        raise DataError(
            f"{sample}: {len(missing):,} of its IDs are not in {test}, such as {_some(missing)}; that has "
            f"{_some(extra)} instead{hint}"
        )
    if not own and list(wanted) != list(ids):
        row = next(i for i, pair in enumerate(zip(wanted, ids, strict=True)) if pair[0] != pair[1])
        raise DataError(
            f"{sample}: its IDs are in another order than the rows of {test}: row {row + 1} has ID {wanted[row]!r}, "
            f"not {ids[row]!r}. The test file has no ID column, so which row an ID means cannot be told; give the test "
            "file an ID column or use the sample in its original order"
        )


def _some(values: Sequence[str]) -> str:
    return ", ".join(values[:3]) + (", …" if len(values) > 3 else "")


def submit(
    scorer: Scorer, submission: Submission, out: Path, *, identity: str, console: Console, chunk_rows: int = CHUNK
) -> Submitted:
    """Scores the test rows and writes the submission, whole or not at all. The same call goes on where it stopped.

    A row that cannot be scored is submitted as False. `identity` as in `score.partial_for`; raises as `score_file`.
    """
    rows = submission.rows
    p, resumed, partial = score_rows_of(
        scorer, rows, out, identity=identity, notes=submission.notes, console=console, chunk_rows=chunk_rows
    )
    said = verdicts(np.nan_to_num(p, nan=0.0))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(HEADER)
    lines.writerows((value, bool(said[row])) for value, row in zip(submission.ids, submission.order, strict=True))
    with replacing(out) as file:
        file.write(text.getvalue().encode())
    partial.path.unlink(missing_ok=True)
    answers = Counter(said.tolist())
    say(console, f"{out}: {len(p):,} rows, {answers[True]:,} True, {answers[False]:,} False")
    if rows.unscorable:
        say(console, f"False because they cannot be scored: {explain(rows.unscorable, rows.place)}")
    return Submitted(out, len(p), answers[True], len(rows.unscorable), resumed)
