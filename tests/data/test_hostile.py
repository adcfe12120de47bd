"""Files as users really have them: each is prepared with its refusals counted, or is one clear message."""

import gzip
import json
import os

import pytest

from veritune.config import Prepare
from veritune.data import chunks, clean, dataset, lines
from veritune.errors import DataError, MissingError

GOOD = [{"question": f"What is {n} + 1?", "solution": f"It is {n + 1}.", "is_correct": n % 2 == 0} for n in range(100)]
HEADER = b"question,solution,is_correct\n"


def jsonl(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in (*GOOD, *rows))


def csv(*rows: bytes) -> bytes:
    good = b"".join(b"What is %d + 1?,It is %d.,%d\n" % (n, n + 1, n % 2) for n in range(100))
    return HEADER + good + b"".join(row + b"\n" for row in rows)


def row(question="q", solution="s", label: object = True) -> dict:
    return {"question": question, "solution": solution, "is_correct": label}


def without_train(*rows: dict) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


COUNTED = {
    "crlf.jsonl": (jsonl().replace(b"\n", b"\r\n"), {}),
    "crlf.csv": (csv().replace(b"\n", b"\r\n"), {}),
    "mark.jsonl": (b"\xef\xbb\xbf" + jsonl(), {}),
    "mark.csv": (b"\xef\xbb\xbf" + csv(), {}),
    "blank-lines.jsonl": (b"\n" + jsonl() + b"\n  \n", {}),
    "quoted-newlines.csv": (csv(b'"a\nb","c ""d""\r\ne",yes'), {}),
    "stray-quote.csv": (csv(b'"open,s,1', b"q,s,1"), {lines.BROKEN_CSV: 1}),
    "ten-megabytes.jsonl": (jsonl(row(solution="x" * 10_000_000)), {lines.TOO_LARGE: 1}),
    "ten-megabytes.csv": (csv(b"q," + b"x" * 10_000_000 + b",1", b"q,s,1"), {lines.TOO_LARGE: 1}),
    "two-megabytes.jsonl": (jsonl(row(solution="x" * 2_000_000)), {lines.TOO_LARGE: 1}),
    "nul.jsonl": (jsonl(row("a\0b")) + b'{"question": "\0"}\n', {clean.NUL: 1, lines.BROKEN_JSON: 1}),
    "nul.csv": (csv(b"a\0b,s,1"), {clean.NUL: 1}),
    "latin-1.csv": (csv(b"caf\xe9,s,1"), {lines.NOT_UTF8: 1}),
    "latin-1.jsonl": (jsonl() + b'{"question": "caf\xe9"}\n', {lines.NOT_UTF8: 1}),
    "surrogate.jsonl": (jsonl() + b'{"question": "\\ud800"}\n', {lines.NOT_UNICODE: 1}),
    "fields.csv": (csv(b"q,s", b"q,s,1,2"), {lines.WRONG_FIELDS: 2}),
    "values.jsonl": (
        jsonl(row(["q"]), row({"q": 1}), row(5), row(None), {"solution": "s", "is_correct": True}, row(solution=" ")),
        {chunks.NOT_TEXT: 3, clean.NO_QUESTION: 2, clean.NO_SOLUTION: 1},
    ),
    "labels.jsonl": (
        jsonl(*(row(f"q{n}", label=v) for n, v in enumerate(["yes", "0", "FALSE", 1, 0.0, None, "", 2, [1], "?"]))),
        {clean.MISSING_LABEL: 2, clean.BAD_LABEL: 3},
    ),
    "labels.csv": (csv(b"q,a,yes", b"q,b,0", b"q,c,FALSE", b"q,d,null", b"q,e,", b"q,f,2"), {
        clean.MISSING_LABEL: 2, clean.BAD_LABEL: 1,
    }),
    "look-alikes.jsonl": (
        jsonl(row("10\u00b2 ?"), row("102 ?", label=False), row("\uff15 ?"), row("5 ?", label=False)),
        {},
    ),
    "not-json.jsonl": (jsonl() + b'{"a":\n[1]\nnull\n', {lines.BROKEN_JSON: 1, lines.NOT_OBJECT: 2}),
}  # fmt: skip

MESSAGES = {
    "empty.csv": (b"", "the file is empty"),
    "empty.jsonl": (b"", "the file is empty"),
    "empty.jsonl.gz": (b"", "the file is empty"),
    "empty.parquet": (b"", "cannot be read"),
    "nothing-inside.jsonl.gz": (gzip.compress(b""), "no rows"),
    "header-only.csv": (HEADER, "no rows"),
    "blank.jsonl": (b"\n\n", "no rows"),
    "wrong-columns.csv": (
        b"a,b\n1,2\n",
        r"no column holds the question; its columns are 'a', 'b'.*--columns\.question",
    ),
    "wrong-columns.jsonl": (b'{"question": "q", "text": "s"}\n', r"no column holds the solution"),
    "no-label.jsonl": (b'{"question": "q", "solution": "s"}\n', r"--columns\.label"),
    "semicolons.csv": (b"question;solution;is_correct\nq;s;1\n", "separated by commas"),
    "cut.jsonl.gz": (gzip.compress(jsonl())[:400], r"cut off or damaged after line \d+"),
    "utf-16.csv": ("question,solution,is_correct\n".encode("utf-16"), "UTF-16"),
    "array.json": (b"[]", "unknown kind of file"),
    "random.jsonl": (os.urandom(3000), "no row can be used"),
    "random.parquet": (os.urandom(3000), "cannot be read"),
    "old-mac.csv": (csv().replace(b"\n", b"\r"), "carriage return"),
    "one-question.jsonl": (
        b"".join(json.dumps(row(solution=str(n))).encode() + b"\n" for n in range(9)),
        "nothing is left",
    ),
    "all-true.jsonl": (without_train(*(row(str(n)) for n in range(9))), "nothing is left"),
}


@pytest.mark.parametrize("name", COUNTED)
def test_rows_that_cannot_be_used_are_counted_and_the_others_kept(tmp_path, name):
    data, refused = COUNTED[name]
    (tmp_path / name).write_bytes(data)
    manifest = dataset.prepare([str(tmp_path / name)], tmp_path / "out", Prepare(allow_refused=0.2))
    assert manifest["refused"] == refused
    rows = manifest["rows"]
    assert rows["usable"] == rows["read"] - sum(refused.values()) >= 100
    listed = (tmp_path / "out/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] >= 101 for line in listed] == [True] * sum(refused.values())
    assert len(dataset.load(tmp_path / "out").train) > 0


@pytest.mark.parametrize("name", MESSAGES)
def test_a_file_that_cannot_be_used_is_a_message_that_names_it(tmp_path, name):
    data, message = MESSAGES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        dataset.prepare([str(tmp_path / name)], tmp_path / "out", Prepare(allow_refused=1))
    assert name in str(error.value) or "nothing is left" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_folders_and_files_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in this folder"):
        dataset.prepare([str(tmp_path / "empty")], tmp_path / "out", Prepare())
    with pytest.raises(MissingError, match="no such file or folder"):
        dataset.prepare([str(tmp_path / "none.jsonl")], tmp_path / "out", Prepare())
