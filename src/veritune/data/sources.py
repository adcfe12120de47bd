"""What the user names becomes rows: csv, jsonl, both also gzipped, parquet, folders of these, and hub datasets.

`find_files` says which files are meant, `read_chunks` reads one of them for preparing, and `read_table` gives one
whole file as it is, for scoring and evaluating.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import polars as pl

from ..config import Columns
from ..errors import DataError, MissingError, VerituneError
from .chunks import Chunk, Note, Tick, csv_chunks, json_chunks, table_chunks
from .lines import is_unicode
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
HUB = "hf://"
KIND, MANIFEST = "veritune prepared dataset", "manifest.json"


class Source(NamedTuple):
    """A file to read rows from. `name` is what the user sees."""

    name: str
    path: Path
    bytes: int


def find_files(named: list[str], note: Note) -> list[Source]:
    """The files that `named` stands for, each once, sorted by name: what is done never depends on the order in which
    they were named. A folder stands for the data files in it, however deep, but not for those of prepared folders or
    behind links to folders; `note` is told what else was there.

    Raises MissingError and DataError for what is not there, is of another kind, or is a folder without data files.
    """
    found: dict[str, Source] = {}
    for name in named:
        if name.startswith(HUB):
            from . import hub  # the hub's client takes longer to import than all else here

            for shown, file in hub.files(name, tuple(KINDS), note):
                found[shown] = Source(shown, file, file.stat().st_size)
            continue
        place = Path(name)
        if not place.exists():
            raise MissingError(f"{place}: no such file or folder")
        for file in _files_in(place, note) if place.is_dir() else [place]:
            kind_of(file)
            if not is_unicode(str(file)):
                raise DataError(f"{str(file)!r}: the name is not UTF-8: rename the file or its folder")
            key = str(file.resolve())
            if key in found:
                note(f"{file}: named more than once, read once")
            else:
                found[key] = Source(str(file), file, file.stat().st_size)
    if not found:
        raise DataError("no source is named; give a file, a folder or an hf:// path")
    return sorted(found.values())


def read_chunks(source: Source, wanted: Columns, limit: int, note: Note, tick: Tick) -> Iterator[Chunk]:
    """Chunks of one source, in the order of the file. A text record of over `limit` bytes is refused unread.

    `note` is told which columns were guessed, `tick` how many bytes of the file have been read so far. Raises
    DataError if the file as a whole cannot be used, among others if it has no rows.
    """
    rows = 0
    try:
        if kind_of(source.path) == "parquet":
            chunks = table_chunks(pl.read_parquet(source.path, glob=False), source.name, wanted, note)
        elif kind_of(source.path) == "csv":
            chunks = csv_chunks(source.path, wanted, limit, note, tick)
        else:
            chunks = json_chunks(source.path, wanted, limit, note, tick)
        for chunk in chunks:
            rows += len(chunk.frame) + len(chunk.refused)
            yield chunk
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _unreadable(source.name, error) from None
    if not rows:
        raise DataError(f"{source.name}: it has no rows")
    tick(source.bytes)


def read_table(path: Path) -> pl.DataFrame:
    """All rows and columns of one file, in order, with the types it has (csv: all text).

    Raises MissingError if there is no such file and DataError, with the line, if any row of it cannot be read: nothing
    is dropped here.
    """
    kind = kind_of_file(path)
    try:
        if kind == "parquet":
            frame = pl.read_parquet(path, glob=False)
        else:
            frame = read_csv_table(path) if kind == "csv" else read_json_table(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _unreadable(str(path), error) from None
    if frame.is_empty():
        raise DataError(f"{path}: it has no rows")
    return frame


def kind_of(path: Path) -> str:
    """jsonl, csv or parquet, by the name's end. Raises DataError for any other."""
    for suffix, kind in KINDS.items():
        if path.name.lower().endswith(suffix):
            return kind
    raise DataError(f"{path}: unknown kind of file; veritune reads {', '.join(KINDS)} and folders of these")


def kind_of_file(path: Path) -> str:
    """`kind_of` one file. Raises MissingError if it is not there, and DataError for a folder too."""
    if path.is_dir():
        raise DataError(f"{path}: this is a folder; name one file in it")
    if not path.exists():
        raise MissingError(f"{path}: no such file")
    return kind_of(path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_prepared(folder: Path) -> bool:
    """Whether this is a prepared folder; its manifest says so."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _files_in(folder: Path, note: Note) -> list[Path]:
    if is_prepared(folder):
        raise DataError(f"{folder}: a prepared dataset already; to use its rows, name its train.parquet")
    files, others, prepared = [], [], set[Path]()
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or prepared.intersection(path.parents):
            continue
        if path.is_dir() and is_prepared(path):
            prepared.add(path)
            note(f"{path}: left alone, a prepared dataset")
        elif path.is_file():
            (files if path.name.lower().endswith(tuple(KINDS)) else others).append(path)
        elif path.is_symlink():
            to = "a folder; name it beside this one" if path.is_dir() else "a lost file"
            note(f"{path}: left alone, a link to {to}")
    if not files:
        raise DataError(f"{folder}: no data file in this folder; veritune reads {', '.join(KINDS)}")
    if others:
        shown = ", ".join(path.name for path in others[:3]) + (", …" if len(others) > 3 else "")
        note(f"{folder}: {len(others)} other files left alone ({shown})")
    return files


def _unreadable(name: str, error: Exception) -> Exception:
    if isinstance(error, VerituneError):
        return error
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    return DataError(f"{name}: cannot be read: {reason}")
