"""The prepared folder on disk: written beside its place and renamed when whole, so a half-written one never loads.

`manifest.json` is written last and holds the hash of every other file; `check` compares them.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from ..durable import is_process, sync_folder
from ..errors import ConfigError, DataError, MissingError, VerituneError
from .sources import KIND, MANIFEST, Source, file_hash, is_prepared

FORMAT = 1
TRAIN, VALIDATION, REJECTED = "train.parquet", "validation.parquet", "rejected.jsonl"
FILES = (TRAIN, VALIDATION, REJECTED)
OURS = (*FILES, MANIFEST)


def check_place(out: Path, sources: list[Source]) -> None:
    """Raises ConfigError if `out` cannot become a prepared folder without a loss: it is a file, a folder of other
    things, or holds one of the sources."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: this is a file; name a folder")
    ours = OURS if is_prepared(out) else ()
    if out.is_dir() and (others := sorted(path.name for path in out.iterdir() if path.name not in ours)):
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise ConfigError(f"--out {out}: this folder holds other things ({shown}); name a new one, or move them away")
    for source in sources:
        if source.path.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"--out {out}: the source {source.name} is in it and would be lost; name another folder")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A temporary folder that takes `out`'s place when the block ends without an error, and is gone otherwise."""
    out = out.resolve()
    temporary = out.parent / f".{out.name}.{os.getpid()}.partial"
    old = temporary.with_suffix(".old")
    try:
        _settle(out)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            _sync(path)
        sync_folder(temporary)
        _swap(temporary, out, old)
        sync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except VerituneError:
        raise
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Adds the files' sizes and hashes to `manifest`, writes it and returns it."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_hash(folder / name)} for name in FILES}
    manifest = {"kind": KIND, "format": FORMAT, **manifest, "files": files}
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole, unaltered prepared folder. Raises MissingError or DataError for anything else."""
    if not folder.exists():
        raise MissingError(f"{folder}: no such prepared dataset; make it with `veritune prepare SOURCE --out {folder}`")
    again = f"prepare it again with `veritune prepare SOURCE --out {folder}`"
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: not a prepared dataset (no {MANIFEST}); make one with `veritune prepare`")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise DataError(f"{folder / MANIFEST}: damaged; {again}") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise DataError(f"{folder}: not a prepared dataset ({MANIFEST} is of something else)")
    if manifest.get("format") != FORMAT:
        raise DataError(f"{folder}: prepared in format {manifest.get('format')}, this veritune reads {FORMAT}; {again}")
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder}: {name} is missing; {again}")
        if file_hash(path) != manifest["files"][name]["sha256"]:
            raise DataError(f"{path}: not the file that was prepared (altered or damaged); {again}")
    return manifest


def _settle(out: Path) -> None:
    """Puts right what killed processes left beside `out`: what is unfinished goes, the only dataset there is stays."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
        name, _, kind = left.name.removeprefix(f".{out.name}.").partition(".")
        if kind not in ("partial", "old") or not name.isdecimal():
            continue
        if int(name) != os.getpid() and is_process(int(name)):  # in a container every process may have one number
            continue
        if kind == "old" and not out.exists():
            left.rename(out)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _swap(new: Path, out: Path, old: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    out.rename(old)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
