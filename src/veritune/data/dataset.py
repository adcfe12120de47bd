"""Labelled rows of any files become a frozen dataset: a folder that training, validation and a resume can rely on.

`prepare` reads, cleans, splits and writes; `load` gives the folder back, checked. The folder holds `train.parquet`,
`validation.parquet`, `rejected.jsonl` and `manifest.json`. Both tables have `id` and `qid` (16 hexadecimal digits: the
row's and the question's hash), `question`, `solution`, `is_correct`, then the sources' other columns as text, sorted
by name. A column of a source that bears one of our five names but is none of the three parts is kept as `source_NAME`.
Each line of `rejected.jsonl` is a row that was refused: `file`, `line` (of parquet, the row), `reason`, `detail` and
`raw`, the row's beginning.

Everything here is deterministic, and nothing depends on the names or the order of the sources except their listing.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import polars as pl
from rich.console import Console

from ..config import Prepare, as_dict
from ..errors import DataError
from . import clean, folder, near, summary
from .chunks import EXTRA
from .lines import Refused
from .rows import as_hex
from .sources import Source, file_hash, find_files, read_chunks
from .split import Split, split, true_share

OURS = ("id", "qid", "question", "solution", "is_correct")
REPORTING = ("columns", "allow_refused", "near_duplicates")
"""Settings that the fingerprint leaves out: they decide what is read or reported, not what becomes of the rows."""


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset in memory. `train` stands in its prepared order, `validation` sorted by question."""

    train: pl.DataFrame
    validation: pl.DataFrame
    fingerprint: str


@dataclass
class _Read:
    """What reading the sources has given so far."""

    frames: list[pl.DataFrame] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    first_places: dict[str, str] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(named: list[str], out: Path, settings: Prepare, console: Console | None = None) -> dict[str, Any]:
    """Makes the prepared folder `out` from the sources `named`; returns its manifest, and prints to `console`.

    An `out` that is a prepared dataset is replaced, once the new one is whole. Raises MissingError, DataError or
    ConfigError, and then leaves `out` as it was.
    """
    true_share(settings.balance)
    if settings.near_duplicates:
        near.library()
    notes: list[str] = []
    sources = find_files(named, notes.append)
    folder.check_place(out, sources)
    size = sum(source.bytes for source in sources)
    with folder.replacing(out) as temporary, summary.progress(console, size) as tick:
        with open(temporary / folder.REJECTED, "w", encoding="utf-8", newline="\n") as rejected:
            read = _read(sources, settings, rejected, tick)
            rows = pl.concat(read.frames, how="diagonal")
            _stop_if_too_many_refused(read, len(rows), settings)
            same = clean.find_same(rows)
            for row in rows[same.contradictory].sort("file", "line").iter_rows(named=True):
                name = sources[row["file"]].name
                label = "True" if row["is_correct"] else "False"
                _reject(rejected, name, Refused(row["line"], clean.CONTRADICTORY, f"here {label}", clean.describe(row)))
        usable = rows[same.kept]
        parts = split(usable, settings)
        train, validation = usable[parts.train], usable[parts.validation]
        _write(train, temporary / folder.TRAIN)
        _write(validation, temporary / folder.VALIDATION)
        manifest = {
            "fingerprint": _fingerprint(rows, train, validation, settings),
            "settings": as_dict(settings),
            "sources": read.sources,
            "notes": notes + read.notes,
            "rows": {
                "read": len(rows) + sum(read.refused.values()),
                "refused": sum(read.refused.values()),
                "contradictory": len(same.contradictory),
                "duplicates": same.duplicates,
                "usable": len(usable),
            },
            "refused": dict(sorted(read.refused.items())),
            "questions": usable["qid"].n_unique(),
            "validation": _described(validation),
            "train": _described(train) | _left_out(parts),
            "leaks": _leaks(validation, train, settings),
        }
        manifest = folder.write_manifest(temporary, manifest)
    if console:
        summary.show(console, manifest, out)
    return manifest


def load(path: Path) -> Prepared:
    """A prepared dataset, after a check that its files are those that were written.

    Raises MissingError if there is none, DataError if it is only partly there or has been altered.
    """
    manifest = folder.read_manifest(path)
    return Prepared(
        train=pl.read_parquet(path / folder.TRAIN, glob=False),
        validation=pl.read_parquet(path / folder.VALIDATION, glob=False),
        fingerprint=manifest["fingerprint"],
    )


def _read(sources: list[Source], settings: Prepare, rejected: IO[str], tick: Callable[[int], None]) -> _Read:
    read = _Read()
    before = 0
    # A row's text may take more bytes in the file than in memory (JSON escapes), and other columns come on top.
    limit = 8 * settings.max_row_bytes + (1 << 16)
    for number, source in enumerate(sources):
        count = refused_count = 0
        for chunk in read_chunks(source, settings.columns, limit, read.notes.append, lambda n, b=before: tick(b + n)):
            usable, refused = clean.check(chunk, settings.max_row_bytes)
            for item in refused:
                read.refused[item.reason] += 1
                seen = f", {item.detail}" if item.detail else ""
                read.first_places.setdefault(item.reason, f"{source.name}:{item.line}{seen}")
                _reject(rejected, source.name, item)
            count += len(usable) + len(refused)
            refused_count += len(refused)
            read.frames.append(clean.identify(usable).with_columns(pl.lit(number, pl.UInt32).alias("file")))
        before += source.bytes
        about = {"name": source.name, "bytes": source.bytes, "sha256": file_hash(source.path)}
        read.sources.append(about | {"rows": count, "refused": refused_count})
    return read


def _reject(rejected: IO[str], name: str, item: Refused) -> None:
    row = {"file": name, "line": item.line, "reason": item.reason, "detail": item.detail, "raw": item.raw}
    rejected.write(json.dumps(row, ensure_ascii=False) + "\n")


def _stop_if_too_many_refused(read: _Read, usable: int, settings: Prepare) -> None:
    refused = sum(read.refused.values())
    if usable and refused <= settings.allow_refused * (refused + usable):
        return
    counts = "; ".join(f"{n:,} {why} (first: {read.first_places[why]})" for why, n in read.refused.most_common())
    if not usable:
        raise DataError(f"no row can be used; all {refused:,} were refused: {counts}")
    raise DataError(
        f"{refused:,} of {refused + usable:,} rows cannot be used ({refused / (refused + usable):.1%}, allowed are "
        f"{settings.allow_refused:.1%}): {counts}. Mend them, or go on without them: --allow-refused "
        f"{math.ceil(100 * refused / (refused + usable)) / 100}"
    )


def _write(rows: pl.DataFrame, path: Path) -> None:
    """Writes rows with the columns that the dataset has."""
    extras = sorted(name.removeprefix(EXTRA) for name in rows.columns if name.startswith(EXTRA))
    taken = {*OURS, *extras}
    renamed = {}
    for name in extras:
        renamed[name] = name
        while name in OURS and renamed[name] in taken:
            renamed[name] = "source_" + renamed[name]
    out = rows.select(
        pl.Series("id", as_hex(rows["id"]), pl.String),
        pl.Series("qid", as_hex(rows["qid"]), pl.String),
        "question",
        "solution",
        "is_correct",
        *(pl.col(EXTRA + name).alias(renamed[name]) for name in extras),
    )
    out.write_parquet(path)


def _fingerprint(rows: pl.DataFrame, train: pl.DataFrame, validation: pl.DataFrame, settings: Prepare) -> str:
    """32 hexadecimal digits that change with any byte of a usable row, with any setting that decides what becomes of
    the rows, and with the rows that were taken and their order; not with the sources' names, order or formats."""
    deciding = {key: value for key, value in as_dict(settings).items() if key not in REPORTING}
    hasher = hashlib.blake2b(json.dumps([folder.FORMAT, deciding, len(rows)]).encode(), digest_size=16)
    # The sum does not depend on the order of the rows and, unlike an exclusive or, counts duplicates.
    hasher.update(rows["content"].to_numpy().sum(dtype="uint64").tobytes())
    for part in (train, validation):
        hasher.update(part["content"].to_numpy().tobytes())
    return hasher.hexdigest()


def _described(rows: pl.DataFrame) -> dict[str, Any]:
    true = int(rows["is_correct"].sum())
    share = round(true / len(rows), 4) if len(rows) else None
    return {"rows": len(rows), "questions": rows["qid"].n_unique(), "true": true, "true_share": share}


def _left_out(parts: Split) -> dict[str, int]:
    return {
        "left_out_with_validation_questions": parts.with_validation_questions,
        "left_out_for_balance": parts.for_balance,
        "left_out_by_limit": parts.by_limit,
    }


def _leaks(validation: pl.DataFrame, train: pl.DataFrame, settings: Prepare) -> dict[str, Any]:
    shared = len(set(validation["qid"]) & set(train["qid"]))
    if not settings.near_duplicates:
        return {"shared_questions": shared, "near_duplicate_questions": None}
    firsts = (part.unique("qid", keep="first", maintain_order=True) for part in (validation, train))
    held_out, trained = (questions["question"].to_list() for questions in firsts)
    found = near.near_duplicates(held_out, trained)
    examples = [
        {"validation": held_out[a], "train": trained[b], "similarity": round(similarity, 3)}
        for a, b, similarity in sorted(found, key=lambda pair: -pair[2])[:10]
    ]
    return {
        "shared_questions": shared,
        "near_duplicate_questions": len(found),
        "near_duplicate_similarity": near.THRESHOLD,
        "examples": examples,
    }
