"""Files become chunks: frames of some thousand rows, all with the same columns whatever the format, and what was
refused on the way.

A chunk's frame has `line` (UInt32: the line, or in parquet the row, from 1), `question`, `solution` and `label` (text
or null, as given), and every other column of the file as text under its name behind the prefix `EXTRA`, so that it
cannot collide with ours. Text is the one type that a column has in every format: the same rows as csv, jsonl and
parquet make the same chunks, apart from an empty csv field, which is null.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from ..config import Columns
from ..errors import DataError
from .lines import Line, Refused, clip, json_kind, read_csv, read_json_lines, read_lines
from .rows import Names, resolve_columns
from .tables import as_text

NOT_TEXT = "question or solution is not text"

EXTRA = "column:"
CHUNK_ROWS = 20_000
CHUNK_BYTES = 1 << 25

Note = Callable[[str], None]
Tick = Callable[[int], None]


class Chunk(NamedTuple):
    """Rows in the order of the file, and the records among them that could not be read."""

    frame: pl.DataFrame
    refused: list[Refused]


def json_chunks(path: Path, wanted: Columns, limit: int, note: Note, tick: Tick) -> Iterator[Chunk]:
    """Chunks of a jsonl file. Its columns are resolved on the first chunk that holds an object."""
    names: Names | None = None
    for lines in _batches(read_lines(path, limit, tick)):
        records: list[tuple[int, dict[str, Any]]] = []
        refused: list[Refused] = []
        for number, record in read_json_lines(iter(lines)):
            if isinstance(record, Refused):
                refused.append(record)
            else:
                records.append((number, record))
        if names is None and records:
            keys = list(dict.fromkeys(key for _, record in records for key in record))
            names, notes = resolve_columns(keys, wanted, need_label=True, where=str(path))
            for line in notes:
                note(line)
        if names is not None:
            raws = {line.number: line.raw for line in lines}
            yield _from_objects(records, refused, names, raws)
        elif refused:
            yield Chunk(_frame([], [], [], [], {}), refused)


def csv_chunks(path: Path, wanted: Columns, limit: int, note: Note, tick: Tick) -> Iterator[Chunk]:
    """Chunks of a csv file with a header."""
    records = read_csv(read_lines(path, limit, tick), path, limit)
    header = next(records, None)
    if header is None or isinstance(header[1], Refused):
        return
    columns = header[1]
    names, notes = resolve_columns(columns, wanted, need_label=True, where=str(path))
    for line in notes:
        note(line)
    numbers: list[int] = []
    rows: list[list[str]] = []
    refused: list[Refused] = []
    size = 0
    for number, fields in records:
        if isinstance(fields, Refused):
            refused.append(fields)
        else:
            numbers.append(number)
            rows.append(fields)
            size += sum(map(len, fields))
        if len(rows) + len(refused) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield Chunk(_from_fields(numbers, rows, columns, names), refused)
            numbers, rows, refused, size = [], [], [], 0
    if rows or refused:
        yield Chunk(_from_fields(numbers, rows, columns, names), refused)


def table_chunks(table: pl.DataFrame, where: str, wanted: Columns, note: Note) -> Iterator[Chunk]:
    """Chunks of a table that is in memory already; they share its text. `line` is the row's number."""
    names, notes = resolve_columns(table.columns, wanted, need_label=True, where=where)
    for line in notes:
        note(line)
    for part, name in (("question", names.question), ("solution", names.solution)):
        if table.schema[name] not in (pl.String, pl.Null, pl.Categorical, pl.Enum):
            raise DataError(f"{where}: column {name!r} holds {table.schema[name]}, but the {part} must be text")
    for start in range(0, len(table), CHUNK_ROWS):
        part = table.slice(start, CHUNK_ROWS)
        columns = [pl.Series("line", range(start + 1, start + len(part) + 1), pl.UInt32)]
        columns += [_text(part[name]).alias(ours) for ours, name in _ours(names)]
        columns += [_text(part[name]).alias(EXTRA + name) for name in table.columns if name not in names]
        yield Chunk(pl.DataFrame(columns), [])


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line.raw)
        if len(batch) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _from_objects(
    records: list[tuple[int, dict[str, Any]]], refused: list[Refused], names: Names, raws: dict[int, bytes]
) -> Chunk:
    kept: list[tuple[int, dict[str, Any]]] = []
    for number, record in records:
        for name in (names.question, names.solution):
            value = record.get(name)
            if type(value) is not str and value is not None:
                detail = f"{name!r} is {json_kind(value)}"
                refused.append(Refused(number, NOT_TEXT, detail, clip(raws[number])))
                break
        else:
            kept.append((number, record))
    objects = [record for _, record in kept]
    keys = dict.fromkeys(key for record in objects for key in record)
    frame = _frame(
        [number for number, _ in kept],
        [record.get(names.question) for record in objects],
        [record.get(names.solution) for record in objects],
        [as_text(record.get(str(names.label))) for record in objects],
        {key: [as_text(record.get(key)) for record in objects] for key in keys if key not in names},
    )
    return Chunk(frame, refused)


def _from_fields(numbers: list[int], rows: list[list[str]], columns: list[str], names: Names) -> pl.DataFrame:
    values = dict(zip(columns, zip(*rows, strict=True), strict=True)) if rows else {name: () for name in columns}
    extras = {name: [field or None for field in values[name]] for name in columns if name not in names}
    return _frame(numbers, values[names.question], values[names.solution], values[str(names.label)], extras)


def _frame(
    numbers: Iterable[int],
    questions: Iterable[str | None],
    solutions: Iterable[str | None],
    labels: Iterable[str | None],
    extras: dict[str, list[str | None]],
) -> pl.DataFrame:
    columns = [
        pl.Series("line", numbers, pl.UInt32),
        pl.Series("question", questions, pl.String),
        pl.Series("solution", solutions, pl.String),
        pl.Series("label", labels, pl.String),
    ]
    return pl.DataFrame(columns + [pl.Series(EXTRA + name, values, pl.String) for name, values in extras.items()])


def _ours(names: Names) -> list[tuple[str, str]]:
    return [("question", names.question), ("solution", names.solution), ("label", str(names.label))]


def _text(column: pl.Series) -> pl.Series:
    if column.dtype == pl.String:
        return column
    if column.dtype.is_integer() or column.dtype in (pl.Boolean, pl.Null, pl.Categorical, pl.Enum):
        return column.cast(pl.String)
    return pl.Series(column.name, [as_text(value) for value in column.to_list()], pl.String)
