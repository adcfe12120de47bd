"""What the user names becomes rows: csv, jsonl, both also gzipped, parquet, folders of these, and hub datasets.

`read_table` gives one whole file as it is, for scoring and evaluating.
"""

from pathlib import Path

import polars as pl

from ..errors import DataError, MissingError
from .tables import read_csv_table, read_json_table

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson.gz": "jsonl",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
}


def read_table(path: Path) -> pl.DataFrame:
    """All rows and columns of one file, in order, with the types it has (csv: all text).

    Raises MissingError if there is no such file and DataError, with the line, if any row of it cannot be read: nothing
    is dropped here.
    """
    if path.is_dir():
        raise DataError(f"{path}: this is a folder; name one file in it")
    if not path.exists():
        raise MissingError(f"{path}: no such file")
    kind = kind_of(path)
    try:
        if kind == "parquet":
            frame = pl.read_parquet(path, glob=False)
        else:
            frame = read_csv_table(path) if kind == "csv" else read_json_table(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        if isinstance(error, (DataError, MissingError)):
            raise
        raise DataError(f"{path}: cannot be read: {error}") from None
    if frame.is_empty():
        raise DataError(f"{path}: it has no rows")
    return frame


def kind_of(path: Path) -> str:
    """jsonl, csv or parquet, by the name's end. Raises DataError for any other."""
    for suffix, kind in KINDS.items():
        if path.name.lower().endswith(suffix):
            return kind
    raise DataError(f"{path}: unknown kind of file; veritune reads {', '.join(KINDS)} and folders of these")
