"""Scoring many rows, slowly, so that a stop costs little: in chunks, each kept in a side file as soon as it is done.

`score_pairs` scores questions and solutions and shows its progress; with a `Partial` it goes on where an earlier run
stopped. `score_file` is `veritune score`: a file's rows, in its order and format, with two columns more.

The side file OUT.partial is one JSON object a line: a header that says what is being scored by what, then for each
chunk its row numbers and scores. A chunk is synced to the disk when it is done; a line that a kill or a power cut left
torn is cut off again at the next start, so at most the chunk under way is lost.

Rows are scored with those of the same question beside them, wherever they stand in the file, because they share work.
Where a chunk ends depends on the rows alone, so an interrupted run computes the same batches as one that was not.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..config import Columns
from ..errors import DataError, NonFiniteError
from .metrics import Floats, Ints, group_ids, verdicts
from .rowfile import RowFile, check_target, explain, read_rows, replacing, write_scored

CHUNK = 1024
"""Rows between two saves: minutes on a CPU, seconds on a GPU, and enough to fill many batches."""
FORMAT = 1


class Scorer(Protocol):
    """What scores rows, such as `Verifier.score_rows`."""

    def __call__(
        self, questions: Sequence[str], solutions: Sequence[str], progress: Callable[[int], None] | None = None, /
    ) -> np.ndarray:
        """P(correct) of each row, float [rows]; `progress` is told how many rows are newly done, as they are."""
        ...


@dataclass(frozen=True)
class Partial:
    """Scores kept while a file is scored."""

    path: Path
    header: dict[str, Any]
    """What the scores belong to; a side file with another header is refused."""


@dataclass(frozen=True)
class Scored:
    """What `score_file` did."""

    out: Path
    rows: int
    scored: int
    resumed: int
    """Rows whose scores an earlier, interrupted run had left."""
    unscorable: dict[str, int]
    """Why rows have no score, and how many."""
    called_correct: int


def say(console: Console, text: str) -> None:
    """Prints plain text as it is: paths are neither broken nor coloured, brackets are no markup, :b: no letter."""
    console.out(text, highlight=False)


def partial_for(rows: RowFile, out: Path, identity: str) -> Partial:
    """The side file of an output. `identity` names all that scores depend on: weights, adapter, precision, prompt."""
    header = {
        "veritune_scores": FORMAT,
        "source": rows.fingerprint,
        "columns": list(rows.names),
        "scorer": identity,
    }
    return Partial(out.with_name(out.name + ".partial"), header)


def open_scoring(source: Path, out: Path, columns: Columns, *, overwrite: bool = False) -> RowFile:
    """Reads `source` and checks that scores may be written to `out`: everything that can be refused before a model is
    loaded. Raises MissingError, ConfigError, DataError (see `read_rows` and `check_target`)."""
    check_target(source, out, overwrite=overwrite)
    return read_rows(source, columns)


def score_file(
    scorer: Scorer, rows: RowFile, out: Path, *, identity: str, console: Console, chunk_rows: int = CHUNK
) -> Scored:
    """Scores the rows that `open_scoring` read and writes them to `out`, with `p_correct` (null where a row cannot be
    scored) and `verdict` added. The same call goes on after an interruption.

    Raises DataError if the side file belongs to other rows or another scorer, or the source changed meanwhile;
    NonFiniteError if a score is not a number.
    """
    p, resumed, partial = score_rows_of(
        scorer, rows, out, identity=identity, notes=rows.notes, console=console, chunk_rows=chunk_rows
    )
    write_scored(rows, p, out)
    partial.path.unlink(missing_ok=True)
    done = ~np.isnan(p)
    result = Scored(
        out=out,
        rows=len(p),
        scored=int(done.sum()),
        resumed=resumed,
        unscorable=dict(Counter(rows.unscorable.values())),
        called_correct=int(verdicts(p[done]).sum()),
    )
    say(console, f"{out}: {result.rows:,} rows, {result.called_correct:,} of them called correct")
    if rows.unscorable:
        say(console, f"not scored, p_correct is null: {explain(rows.unscorable, rows.place)}")
    return result


def score_rows_of(
    scorer: Scorer,
    rows: RowFile,
    out: Path,
    *,
    identity: str,
    notes: Sequence[str],
    console: Console,
    chunk_rows: int = CHUNK,
) -> tuple[Floats, int, Partial]:
    """Says the notes and scores a file's rows for the output `out`, going on where an earlier run stopped: P(correct)
    as `score_pairs` gives it, how many were resumed, and the side file, to be deleted once `out` is written."""
    partial = partial_for(rows, out, identity)
    for note in notes:
        say(console, note)
    p, resumed = score_pairs(
        scorer,
        rows.questions,
        rows.solutions,
        skip=rows.unscorable,
        place=rows.place,
        console=console,
        partial=partial,
        chunk_rows=chunk_rows,
    )
    return p, resumed, partial


def score_pairs(
    scorer: Scorer,
    questions: Sequence[str],
    solutions: Sequence[str],
    *,
    skip: Mapping[int, str],
    place: Callable[[int], str],
    console: Console,
    partial: Partial | None = None,
    chunk_rows: int = CHUNK,
) -> tuple[Floats, int]:
    """P(correct) of each row, float64 [rows] in their order, NaN for the rows in `skip`; and how many were resumed.

    `place` says where a row is. Raises NonFiniteError that names the first row whose score is not a number; the chunks
    before it are kept.
    """
    p = _read_partial(partial, len(questions)) if partial else np.full(len(questions), np.nan)
    order = _by_question(questions, skip)
    resumed = int((~np.isnan(p[order])).sum())
    if resumed and partial:
        say(console, f"{partial.path}: {resumed:,} of {len(order):,} rows are scored already, going on")
    with _progress(console) as bar:
        task = bar.add_task("scoring", total=len(order), completed=resumed, begun=resumed)
        try:
            for start in range(0, len(order), chunk_rows):
                chunk = order[start : start + chunk_rows]
                chunk = chunk[np.isnan(p[chunk])]
                if not len(chunk):
                    continue
                asked: list[int] = chunk.tolist()
                scores = scorer(
                    [questions[row] for row in asked], [solutions[row] for row in asked], lambda n: bar.advance(task, n)
                )
                scores = _checked(scores, chunk, place)
                if partial:
                    _append(partial, chunk, scores)
                p[chunk] = scores
                # Counted again, because a scorer need not tell of its rows.
                bar.update(task, completed=int((~np.isnan(p[order])).sum()))
        except KeyboardInterrupt:
            if partial:
                done = int((~np.isnan(p[order])).sum())
                kept = f"{done:,} of {len(order):,} scores are kept in {partial.path}"
                say(console, f"stopped: {kept}; the same command goes on")
            raise
    return p, resumed


def _by_question(questions: Sequence[str], skip: Mapping[int, str]) -> Ints:
    """The rows to score, int64: questions in order of first appearance, each question's rows in their order."""
    rows = np.array([row for row in range(len(questions)) if row not in skip], dtype=np.int64)
    return rows[np.argsort(group_ids([questions[row] for row in rows]), kind="stable")]


def _checked(scores: np.ndarray, rows: Ints, place: Callable[[int], str]) -> Floats:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != rows.shape:
        raise ValueError(f"the scorer gave {scores.shape} scores for {len(rows)} rows")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        first = int(rows[bad].min())
        value = scores[rows == first][0]
        raise NonFiniteError(
            f"{place(first)}: the model's P(correct) is {value} ({len(bad):,} such rows of {len(rows):,}). The adapter "
            "or the base holds values that are not finite, or the precision overflows: check the adapter, or use "
            "another base precision"
        )
    return scores


def _read_partial(partial: Partial, rows: int) -> Floats:
    """The scores kept so far, float64 [rows], NaN elsewhere; a torn end is cut off. Begins the file if need be."""
    scores = np.full(rows, np.nan)
    if not partial.path.exists():
        with replacing(partial.path) as file:
            file.write(json.dumps(partial.header).encode() + b"\n")
        return scores
    with open(partial.path, "r+b") as file:
        _check_header(partial, file.readline())
        good = file.tell()
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                chunk = json.loads(line)
                scores[np.array(chunk["rows"], dtype=np.int64)] = np.array(chunk["p_correct"], dtype=np.float64)
            except (ValueError, TypeError, KeyError, IndexError):
                break
            good += len(line)
        file.truncate(good)
    return scores


def _check_header(partial: Partial, line: bytes) -> None:
    advice = "Delete it to score from the beginning, or name another output"
    try:
        found = json.loads(line)
        kind = found["veritune_scores"]
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{partial.path}: is not a file of kept scores. {advice}") from None
    if kind != FORMAT:
        raise DataError(f"{partial.path}: was written by another version of veritune. {advice}")
    meaning = {
        "source": "another source file",
        "columns": "other columns",
        "scorer": "another adapter, base, prompt or share",
    }
    other = [text for key, text in meaning.items() if found.get(key) != partial.header[key]]
    if other:
        raise DataError(f"{partial.path}: holds scores of {' and of '.join(other)}. {advice}")


def _append(partial: Partial, rows: Ints, scores: Floats) -> None:
    line = json.dumps({"rows": rows.tolist(), "p_correct": scores.tolist()}).encode() + b"\n"
    try:
        with open(partial.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(
            f"{partial.path}: could not be written: {error.strerror}. The chunks before this one are kept; make room, "
            "then give the same command again"
        ) from None


class _Speed(ProgressColumn):
    """Over the last minutes; in the end over all, since of a small file all rows are told of in one moment."""

    def render(self, task: Task) -> Text:
        speed = task.speed
        if task.finished and task.elapsed:
            speed = (task.completed - task.fields["begun"]) / task.elapsed
        return Text(f"{speed:,.1f} rows/s" if speed else "- rows/s")


def _progress(console: Console) -> Progress:
    """A bar with speed and time left, both over the last minutes, since one chunk's rows differ in length."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    return Progress(*columns, console=console, speed_estimate_period=600)
