"""What preparing shows: a progress bar while it reads, and a table of what it did."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

SHOWN = 10
"""Sources and notes that are printed; a folder may hold hundreds of files."""


@contextmanager
def progress(console: Console | None, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; call what it yields with the bytes read so far. No console: nothing is shown."""
    if console is None:
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("reading", total=total)

        def tick(done: int) -> None:
            bar.update(task, completed=done, description="reading" if done < total else "splitting and writing")

        yield tick


def show(console: Console, manifest: dict[str, Any], out: Path) -> None:
    """Prints what was read, what became of each row, what may have leaked, and where the dataset is."""

    def say(line: str) -> None:
        console.out(line, highlight=False)

    for line in _first([f"source: {source['name']}, {source['rows']:,} rows" for source in manifest["sources"]]):
        say(line)
    for line in _first([f"note: {note}" for note in manifest["notes"]]):
        say(line)
    rows, train, validation, leaks = (manifest[key] for key in ("rows", "train", "validation", "leaks"))
    table = Table(title="prepared", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(justify="left")
    table.add_row("read", f"{rows['read']:,}", "rows in all")
    table.add_row("refused", f"{rows['refused']:,}", f"{rows['refused'] / rows['read']:.2%} of the rows read")
    for reason, count in manifest["refused"].items():
        table.add_row("", f"{count:,}", reason)
    table.add_row("contradictory", f"{rows['contradictory']:,}", "rows with the same text and both labels, left out")
    table.add_row("duplicates", f"{rows['duplicates']:,}", "exact copies of a row that stays")
    table.add_row("usable", f"{rows['usable']:,}", f"rows of {manifest['questions']:,} questions")
    table.add_row("validation", f"{validation['rows']:,}", _of(validation))
    table.add_row("left out", f"{train['left_out_with_validation_questions']:,}", "more rows of validation's questions")
    table.add_row("", f"{train['left_out_for_balance']:,}", f"for balance ({manifest['settings']['balance']})")
    if manifest["settings"]["limit"]:
        table.add_row("", f"{train['left_out_by_limit']:,}", f"over the limit of {manifest['settings']['limit']:,}")
    table.add_row("train", f"{train['rows']:,}", _of(train))
    table.add_row("leaks", f"{leaks['shared_questions']:,}", "questions in both train and validation")
    near = leaks["near_duplicate_questions"]
    if near is None:
        table.add_row("", "-", "near-duplicates not counted (--near-duplicates)")
    else:
        table.add_row("", f"{near:,}", "validation questions with a near-duplicate in train")
    table.add_row("fingerprint", "", manifest["fingerprint"])
    console.print(table, highlight=False, markup=False)
    say(f"written to {out}")
    if rows["refused"] or rows["contradictory"]:
        say(f"each refused row, with its place and why: {out / 'rejected.jsonl'}")
    if not validation["rows"]:
        say("note: no rows were held out; train and sweep need some (--validation-rows N)")


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - SHOWN
    return lines if more <= 0 else [*lines[:SHOWN], f"and {more} more in manifest.json"]


def _of(part: dict[str, Any]) -> str:
    share = f", {part['true_share']:.1%} True" if part["rows"] else ""
    return f"rows of {part['questions']:,} questions{share}"
