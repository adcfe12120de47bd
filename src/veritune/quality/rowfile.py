"""A file of rows (csv, jsonl, parquet) that is read for scoring and written again with two columns more.

`read_rows` takes the questions and solutions out of a file and says of each row that holds none why not. `write_scored`
copies the file with `p_correct` and `verdict` added: a csv or jsonl record keeps its bytes and gets the two at its end,
so that numbers, quotes and line ends stay as they were; a parquet file keeps its columns and their types.
"""

import contextlib
import gzip
import itertools
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import polars as pl

from ..config import Columns
from ..data.lines import NOT_UNICODE, Refused, read_csv, read_json_lines, read_lines
from ..data.rows import resolve_columns
from ..data.sources import file_hash, kind_of, kind_of_file, read_table
from ..durable import sync_folder
from ..errors import ConfigError, DataError, VerituneError
from .metrics import THRESHOLD, Floats, verdicts

ADDED = ("p_correct", "verdict")
PROBLEM = "\0problem"
"""Key of a record that stands for one whose parts cannot be had: why."""
HEAD = 1000
"""Records whose keys are looked at to find the columns of a jsonl file."""
SHOWN = 5
"""Places that a message names before it stops at a count."""


@dataclass(frozen=True)
class RowFile:
    """The parts of a file's rows, in the file's order. Rows are counted from 0 here and from 1 in messages."""

    path: Path
    kind: str
    """csv, jsonl or parquet."""
    fingerprint: str
    """SHA-256 of the file's bytes."""
    names: tuple[str, str]
    """The columns that hold question and solution."""
    notes: list[str]
    """What was assumed about the columns, one sentence each."""
    questions: list[str]
    """"" where a row holds none."""
    solutions: list[str]
    unscorable: dict[int, str]
    """Row -> why it cannot be scored."""
    ids: list[str] | None
    """The file's own ID column as text, if it has one."""
    starts: array = field(repr=False)
    """csv, jsonl: the line (from 1) at which each row starts, int64."""
    frame: pl.DataFrame | None = field(repr=False)
    """parquet: the whole table."""

    def place(self, row: int) -> str:
        """Where a row is, for a message."""
        return f"{self.path}:{self.starts[row]}" if self.starts else f"{self.path}, row {row + 1}"


def unscorable(question: Any, solution: Any) -> str | None:
    """Why a row cannot be scored, or None: both parts must be text that says something and can be encoded."""
    for name, text in (("question", question), ("solution", solution)):
        if text is None:
            return f"no {name}"
        if not isinstance(text, str):
            return f"{name} is not text"
        if not text.strip():
            return f"empty {name}"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"{name} is not valid Unicode (half of a surrogate pair)"
    return None


def read_rows(path: Path, columns: Columns) -> RowFile:
    """Reads what scoring needs of a csv, jsonl(.gz) or parquet file.

    Raises MissingError if it is not there; DataError if it is a folder or another format, has no rows, lacks a column,
    already has `p_correct` or `verdict`, holds records that cannot be read, or no row that can be scored.
    """
    kind = kind_of_file(path)
    starts: array = array("q")
    frame = None
    if kind == "parquet":
        frame = read_table(path)
        columns_of_file, records = frame.columns, _table_records(frame)
    else:
        columns_of_file, records = _text_records(path, kind, starts)
    names, notes = resolve_columns(columns_of_file, columns, need_label=False, where=str(path))
    id_column = next((name for name in columns_of_file if name.strip().lower() == "id"), None)
    questions, solutions, problems = [], [], {}
    ids: list[str] | None = [] if id_column else None
    for row, record in enumerate(records):
        if taken := [name for name in ADDED if name in record]:
            raise DataError(
                f"{path}: has {taken[0]!r} already (row {row + 1}), which scoring adds; score the original file, or "
                "rename that column"
            )
        parts = record.get(names.question), record.get(names.solution)
        if problem := record.get(PROBLEM) or unscorable(*parts):
            problems[row] = problem
        question, solution = (part if isinstance(part, str) else "" for part in parts)
        questions.append(question)
        solutions.append(solution)
        if ids is not None:
            value = record.get(cast(str, id_column))
            ids.append("" if value is None else str(value).strip())
    if not questions:
        raise DataError(f"{path}: it has a header but no rows")
    out = RowFile(
        path=path,
        kind=kind,
        fingerprint=file_hash(path),
        names=(names.question, names.solution),
        notes=notes,
        questions=questions,
        solutions=solutions,
        unscorable=problems,
        ids=ids,
        starts=starts,
        frame=frame,
    )
    if len(problems) == len(questions):
        raise DataError(f"{path}: no row can be scored: {explain(problems, out.place)}")
    return out


def explain(problems: Mapping[int, str], place: Any) -> str:
    """`2 rows: empty solution (a.csv:3, a.csv:9); 1 row: no question (a.csv:5)`."""
    parts = []
    for reason, count in Counter(problems.values()).most_common():
        rows = itertools.islice((row for row, why in problems.items() if why == reason), SHOWN)
        shown = ", ".join(place(row) for row in rows) + (", …" if count > SHOWN else "")
        parts.append(f"{count:,} row{'s' if count > 1 else ''}: {reason} ({shown})")
    return "; ".join(parts)


def _table_records(frame: pl.DataFrame) -> Iterator[dict[str, Any]]:
    texts = frame.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
    return texts.iter_rows(named=True)


def _text_records(path: Path, kind: str, starts: array) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The columns of a csv or jsonl file, and its records; each record's line is added to `starts` as it is read."""
    lines = read_lines(path)
    if kind == "csv":
        found = read_csv(lines, path)
        header = cast("list[str]", next(found, (0, []))[1])
        return header, (dict(zip(header, fields, strict=True)) for fields in _whole(found, path, starts))
    records: Iterator[dict[str, Any]] = iter(_whole(read_json_lines(lines), path, starts))
    head = list(itertools.islice(records, HEAD))
    if not head:
        raise DataError(f"{path}: it has no rows")
    keys = dict.fromkeys(key for record in head for key in record if key != PROBLEM)
    return list(keys), itertools.chain(head, records)


def _whole(found: Iterable[tuple[int, Any]], path: Path, starts: array) -> Iterator[Any]:
    """The records; DataError at the end if any could not be read, because they could not be written again either.

    An object that JSON can hold and Unicode cannot is a record without parts.
    """
    refused: list[Refused] = []
    for line, record in found:
        if isinstance(record, Refused) and record.reason != NOT_UNICODE:
            refused.append(record)
        else:
            starts.append(line)
            yield {PROBLEM: record.reason} if isinstance(record, Refused) else record
    if refused:
        shown = "; ".join(f"{path}:{bad.line}: {bad.why}" for bad in refused[:SHOWN])
        raise DataError(
            f"{path}: {len(refused):,} of {len(refused) + len(starts):,} records cannot be read, and so could not be "
            f"written again with a score: {shown}{'; …' if len(refused) > SHOWN else ''}. Repair or remove them"
        )


def check_target(source: Path, out: Path, *, overwrite: bool) -> None:
    """Raises ConfigError if scores of `source` cannot go to `out`: another format (gzip or not does not matter), or
    see `check_free`."""
    kind = kind_of_file(source)
    if kind_of(out) != kind:
        raise ConfigError(f"{out}: the output keeps the format of {source.name}; name it something.{kind}")
    check_free(out, [source], overwrite=overwrite)


def check_free(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Raises ConfigError if `out` is a folder, is one of the inputs, is there and must not be overwritten, or could not
    be written: told before hours of scoring, not after."""
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; name a file")
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ConfigError(f"{out}: nothing can be written in {place}; name a file elsewhere")
    if any(out.exists() and out.samefile(path) for path in inputs):
        raise ConfigError(f"{out}: is the input; name another file")
    if out.exists() and not overwrite:
        raise ConfigError(
            f"{out}: is there already. An output appears only when it is whole, so if this command wrote it, nothing "
            "is left to do; to write it anew, pass --overwrite or name another file"
        )


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `out` when the block ends well: written beside it, synced, then renamed.

    Raises DataError if it cannot be written; what stood at `out` stands there still.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
        sync_folder(out.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, VerituneError):
            raise DataError(f"{out}: could not be written: {error.strerror or error}. Give the command again") from None
        raise


def write_scored(rows: RowFile, p: Floats, out: Path) -> None:
    """Writes the file again with `p_correct` and `verdict`; `p` is float64 [rows], NaN (then null) where unscorable.

    Raises DataError if the source changed since it was read.
    """
    if file_hash(rows.path) != rows.fingerprint:
        raise DataError(f"{rows.path}: changed while it was scored; score it again")
    with replacing(out) as file:
        if rows.kind == "parquet":
            assert rows.frame is not None
            null = np.isnan(p)
            added = [
                pl.Series(name, values, dtype=kind).set(pl.Series(null), None)
                for name, values, kind in zip(ADDED, (p, verdicts(p)), (pl.Float64, pl.Boolean), strict=True)
            ]
            rows.frame.with_columns(added).write_parquet(file)
        elif out.name.lower().endswith(".gz"):
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
                packed.writelines(_scored_lines(rows, p))
        else:
            file.writelines(_scored_lines(rows, p))


def _scored_lines(rows: RowFile, p: Floats) -> Iterator[bytes]:
    add = _csv_ending if rows.kind == "csv" else _json_ending
    records = _raw_records(rows.path, rows.starts)
    before = next(records)
    header = before.rstrip(b"\r\n")
    yield before if rows.kind == "jsonl" else header + ("," + ",".join(ADDED)).encode() + before[len(header) :]
    for record, value in zip(records, p.tolist(), strict=True):
        # Line ends after a record, and blank lines, stay as they are.
        body = record.rstrip(b"\r\n")
        yield add(body, value) + record[len(body) :]


def _raw_records(path: Path, starts: Sequence[int]) -> Iterator[bytes]:
    """The bytes before the first row (csv: the header), then each row's bytes with all up to where the next starts."""
    with open(path, "rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as file:
        lines = iter(cast(BinaryIO, file))
        for many in np.diff(np.concatenate(([1], np.asarray(starts)))).tolist():
            yield b"".join(itertools.islice(lines, many))
        yield b"".join(lines)


def _csv_ending(body: bytes, value: float) -> bytes:
    return body + (b",," if math.isnan(value) else f",{value!r},{value >= THRESHOLD}".encode())


def _json_ending(body: bytes, value: float) -> bytes:
    inside, _, tail = body.rpartition(b"}")  # what follows is blank
    inside = inside.rstrip()
    score, verdict = ("null", "null") if math.isnan(value) else (repr(value), str(value >= THRESHOLD).lower())
    comma = "" if inside.endswith(b"{") else ", "
    return inside + f'{comma}"{ADDED[0]}": {score}, "{ADDED[1]}": {verdict}}}'.encode() + tail
