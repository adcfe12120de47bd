"""One whole file as a table, for evaluating and scoring rows: every row, in order, every column as it came."""

import json
from pathlib import Path
from typing import Any

import polars as pl

from ..errors import DataError
from .lines import Refused, read_csv, read_json_lines, read_lines


def read_csv_table(path: Path) -> pl.DataFrame:
    """All columns as text, since csv has no types; an empty field is null."""
    records = read_csv(read_lines(path), path)
    header: list[str] = []
    rows: list[list[str]] = []
    for number, fields in records:
        if isinstance(fields, Refused):
            raise _unreadable(path, number, fields)
        if not header:
            header = fields
        else:
            rows.append(fields)
    if not rows:
        raise DataError(f"{path}: it has " + ("a header but no rows" if header else "no rows"))
    columns = zip(*rows, strict=True)
    return pl.DataFrame([pl.Series(n, [v or None for v in c], pl.String) for n, c in zip(header, columns, strict=True)])


def read_json_table(path: Path) -> pl.DataFrame:
    """Columns in the order in which the rows bring them; a key that a row lacks is null there. A column keeps its
    JSON type if all its values share it, and is JSON text otherwise."""
    rows: list[dict[str, Any]] = []
    for number, record in read_json_lines(read_lines(path)):
        if isinstance(record, Refused):
            raise _unreadable(path, number, record)
        rows.append(record)
    if not rows:
        raise DataError(f"{path}: it has no rows")
    names = dict.fromkeys(name for row in rows for name in row)
    return pl.DataFrame([_typed(name, [row.get(name) for row in rows]) for name in names])


def as_text(value: Any) -> str | None:
    """A value as text: text as it is, what JSON knows as JSON writes it, a date and the like by `str`; None is None."""
    if value is None or type(value) is str:
        return value
    if type(value) is bool:
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict | float) else str(value)


def _typed(name: str, values: list[Any]) -> pl.Series:
    kinds = {type(value) for value in values} - {type(None)}
    try:
        if kinds == {int, float}:
            if any(type(value) is int and float(value) != value for value in values):
                raise OverflowError  # a number that would become its neighbour
            return pl.Series(name, values, pl.Float64, strict=False)
        column = pl.Series(name, values, strict=True)
        if kinds & {list, dict} and column.to_list() != values:
            raise TypeError  # its type is that of the first ones: keys or fractions of later ones would be lost
        return column
    except (TypeError, OverflowError, pl.exceptions.PolarsError):
        return pl.Series(name, [as_text(value) for value in values], pl.String)


def _unreadable(path: Path, number: int, refused: Refused) -> DataError:
    return DataError(f"{path}:{number}: {refused.why}. Every row is needed here: mend this line or take it out")
