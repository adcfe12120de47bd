"""Text files as records, with exact line numbers: one JSON object a line, or csv.

A record that cannot be read is yielded as `Refused`, in its place, and reading goes on with the next line; nothing is
skipped silently and nothing is guessed. Only what makes the whole file unusable (a gzip stream that ends early, UTF-16)
raises DataError. Files are read line by line, so memory depends on the longest line alone, and `limit` bounds that.
"""

import csv
import gzip
import json
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from ..errors import DataError, MissingError

NOT_UTF8 = "not valid UTF-8"
TOO_LARGE = "over the size limit"
BROKEN_JSON = "not valid JSON"
NOT_OBJECT = "not a JSON object"
NOT_UNICODE = "text with half a character (a lone surrogate)"
BROKEN_CSV = "broken csv"
WRONG_FIELDS = "wrong number of fields"

RAW_BYTES = 2000
"""A refused record is kept up to this many bytes."""
UNLIMITED = 2**31 - 1
# The module's own limit on a field is 128 KiB; ours is on the whole record and counts the refusal.
csv.field_size_limit(UNLIMITED)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Refused(NamedTuple):
    """A record that cannot be used: the line it starts at (from 1), why, details for people, and its beginning."""

    line: int
    reason: str
    detail: str
    raw: str

    @property
    def why(self) -> str:
        """The reason with its details."""
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


class Line(NamedTuple):
    """A physical line: its number from 1, its bytes with the line end, and whether it was cut for being too long."""

    number: int
    raw: bytes
    cut: bool


def clip(raw: bytes) -> str:
    """The beginning of `raw` as text; bytes that are not UTF-8 become U+FFFD."""
    return raw[:RAW_BYTES].decode("utf-8", "replace")


def read_lines(path: Path, limit: int = UNLIMITED, tick: Callable[[int], None] | None = None) -> Iterator[Line]:
    """The lines of a plain or gzip file (told apart by their first bytes), without a byte order mark.

    A line of more than `limit` bytes comes as its first `limit` bytes, marked as cut. `tick` is told how many bytes of
    the file, as it lies on the disk, have been read. Raises DataError if the file is empty, is UTF-16, or its gzip
    stream is damaged, and then says how many lines came before the damage.
    """
    number = 0
    try:
        with open(path, "rb") as plain:
            start = plain.read(2)
            if not start:
                raise DataError(f"{path}: the file is empty (0 bytes)")
            plain.seek(0)
            # A second buffer around it would lose what it holds when the stream turns out to be cut.
            source = cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if start == b"\x1f\x8b" else plain
            while raw := source.readline(limit):
                number += 1
                cut = len(raw) >= limit and not raw.endswith(b"\n") and _skip_line(source)
                if number == 1:
                    raw = _without_mark(raw, path)
                if tick and number % 1000 == 1:
                    tick(plain.tell())
                yield Line(number, raw, cut)
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip stream is cut off or damaged after line {number} ({error}). Get the file again; or, "
            f"to use what can be read, unpack it (`gzip -dc {path} > part{_inner_suffix(path)}`) and name the result"
        ) from None


def read_json_lines(lines: Iterator[Line]) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    """(line number, object or refusal) for each line that is not blank."""
    for number, raw, cut in lines:
        if cut:
            yield number, Refused(number, TOO_LARGE, f"a line of over {len(raw):,} bytes", clip(raw))
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            yield number, Refused(number, NOT_UTF8, f"byte {error.start + 1} of the line", clip(raw))
            continue
        if not text or text.isspace():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield number, Refused(number, BROKEN_JSON, _json_problem(error), clip(raw))
            continue
        if type(value) is not dict:
            yield number, Refused(number, NOT_OBJECT, json_kind(value), clip(raw))
        elif _SURROGATE.search(raw) and not is_unicode(value):
            yield number, Refused(number, NOT_UNICODE, "", clip(raw))
        else:
            yield number, value


def read_csv(lines: Iterator[Line], path: Path, limit: int = UNLIMITED) -> Iterator[tuple[int, list[str] | Refused]]:
    """(line number, fields or refusal) for each record; the first is the header. The number is that of the physical
    line where the record starts, however many line ends its quoted fields hold.

    Quotes are read strictly. Where a record breaks (a quote that is never closed, or text after a closing quote) only
    its first line is refused and reading goes on with the second, so one stray quote cannot swallow the rest.
    Raises DataError if the header itself cannot be used.
    """
    feed = _Feed(lines, limit)
    reader = csv.reader(feed, strict=True)
    header: list[str] | None = None
    while True:
        feed.taken = []
        problem: tuple[str, str] | None = None
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = (TOO_LARGE if isinstance(error, _TooLarge) else BROKEN_CSV, _csv_problem(error))
            feed.give_back_all_but_first()
        first = feed.taken[0]
        if problem is None and feed.is_not_utf8():
            problem = (NOT_UTF8, "")
        if problem is None and not fields:
            continue
        if header is None:
            if problem:
                raise DataError(
                    f"{path}:{first.number}: the header cannot be read: {problem[0]}: {problem[1]}".rstrip(": ")
                )
            header = _checked_header(fields, path)
            yield first.number, header
            continue
        if problem is None and len(fields) != len(header):
            problem = (WRONG_FIELDS, f"{len(fields)} fields, the header has {len(header)}")
        if problem:
            raw = b"".join(line.raw for line in feed.taken)
            yield first.number, Refused(first.number, *problem, clip(raw))
        else:
            yield first.number, fields


class _TooLarge(csv.Error):
    pass


class _Feed:
    """Lines for csv.reader that can be given back, so that it can start again after a broken record."""

    def __init__(self, lines: Iterator[Line], limit: int) -> None:
        self.lines, self.limit = lines, limit
        self.waiting: deque[Line] = deque()
        self.taken: list[Line] = []
        self.size = 0

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        line = self.waiting.popleft() if self.waiting else next(self.lines)
        self.size = len(line.raw) if not self.taken else self.size + len(line.raw)
        self.taken.append(line)
        if line.cut or self.size > self.limit:
            raise _TooLarge(f"a record of over {self.limit:,} bytes; is a quote left open?")
        try:
            return line.raw.decode()
        except UnicodeDecodeError:
            return line.raw.decode("utf-8", "surrogateescape")

    def give_back_all_but_first(self) -> None:
        self.waiting.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]

    def is_not_utf8(self) -> bool:
        try:
            for line in self.taken:
                line.raw.decode()
        except UnicodeDecodeError:
            return True
        return False


def _inner_suffix(path: Path) -> str:
    return Path(path.stem).suffix or ".jsonl"


def _without_mark(raw: bytes, path: Path) -> bytes:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: the file is UTF-16; save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)")
    return raw.removeprefix(b"\xef\xbb\xbf")


def _skip_line(source: BinaryIO) -> bool:
    """Reads on to the end of the line; False if there was nothing left of it."""
    skipped = False
    while rest := source.readline(1 << 20):
        skipped = True
        if rest.endswith(b"\n"):
            break
    return skipped


def _checked_header(fields: list[str], path: Path) -> list[str]:
    names = [name.strip() for name in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the header has these names more than once: {', '.join(map(repr, twice))}")
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise DataError(f"{path}: the header has one column, {names[0]!r}; fields must be separated by commas")
    return names


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _csv_problem(error: csv.Error) -> str:
    text = str(error)
    if text.startswith("new-line character"):
        return "a bare carriage return outside quotes; lines must end in LF or CRLF"
    if text == "unexpected end of data":
        return "a quote that is never closed"
    return text


def json_kind(value: Any) -> str:
    """What JSON calls the value, for messages."""
    if value is None:
        return "null"
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return kinds.get(type(value), "a number")


def is_unicode(value: Any) -> bool:
    """Whether text, and what JSON makes of lists and objects of it, can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
