"""Files of all formats through `score_file`: every row in its place and as it was, and stops that cost a chunk."""

import csv
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fake_scorer import Recorder, p_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from veritune.config import Columns
from veritune.errors import ConfigError, DataError, MissingError, NonFiniteError
from veritune.quality.score import open_scoring, say, score_file

SHARED = Path(__file__).parents[2] / "../shared/data/validation.jsonl.gz"


def score(scorer, source, out, console, chunk_rows=7, overwrite=False, identity="adapter 1", columns=None):
    rows = open_scoring(source, out, columns or Columns(), overwrite=overwrite)
    return score_file(scorer, rows, out, identity=identity, console=console, chunk_rows=chunk_rows)


def some_rows(count=50, questions=12):
    return [{"question": f"What is {i % questions}+1?", "solution": f"It is {i}."} for i in range(count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_keeps_every_byte_of_a_line_and_gets_two_fields(tmp_path, scorer, console):
    lines = [
        b'\xef\xbb\xbf{"question": "1+1?", "solution": "2", "n": 12345678901234567890123, "x": 1.10, "y": 1E3}\n',
        b'{"solution":"3",  "question":"1+1?" ,"nested": {"a": [1, {"b": null}]}, "u": "\\u00e9\xc3\xa9"}  \r\n',
        b"\n",
        b'{"question": "say \\"}\\"", "solution": "a\\nb", "same": 1, "same": 2}\n',
        b"   \n",
        b"\x1f\xc2\xa0\n",  # blank by Unicode's measure
        b'{"question": "last {", "solution": "}", "z": -0.0}',
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"".join(lines))
    result = score(scorer, source, out, console)
    got = out.read_bytes().splitlines(keepends=True)
    assert [len(got), result.rows, result.scored] == [7, 4, 4]
    for before, after in zip(lines, got, strict=True):
        if not before.decode("utf-8-sig").strip():
            assert after == before
            continue
        body, end = before.rstrip()[:-1], before[len(before.rstrip()) :]
        record = json.loads(after.decode("utf-8-sig"))
        p = p_of(record["question"], record["solution"])
        assert after == body + f', "p_correct": {p!r}, "verdict": {str(p >= 0.5).lower()}}}'.encode() + end


def test_a_path_is_told_as_it_is(console):
    text = "runs/a:b:c/[bold]/" + "long/" * 60
    say(console, text)
    assert console.file.getvalue() == text + "\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_keeps_the_text_of_every_field(tmp_path, scorer, console, end):
    records = [
        "\ufeffid,question,solution,note",
        '007,1+1?,2,"a ""quote"""',
        '1e5,"two\nlines, and\n\na comma",  spaces  ,1.50',
        '"",x,"\n",',
        "3,ünï,последний,9999999999999999999",
    ]
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    text = end.join(records[:3]) + end + end + end.join(records[3:])
    source.write_bytes(text.encode())
    result = score(scorer, source, out, console)
    got = out.read_bytes().decode()
    header, *rows = csv.reader(io.StringIO(got.removeprefix("\ufeff"), newline=""))
    assert header == ["id", "question", "solution", "note", "p_correct", "verdict"]
    rows = [row for row in rows if row]
    assert [row[:4] for row in rows] == [r for r in csv.reader(io.StringIO(text[1:], newline="")) if r][1:]
    assert (result.rows, result.scored, result.unscorable) == (4, 3, {"empty solution": 1})
    for row in rows:
        p = p_of(row[1], row[2])
        assert row[4:] == (["", ""] if row[2] == "\n" else [repr(p), str(p >= 0.5)])
    without = got
    for row in rows:
        without = without.replace(f",{row[4]},{row[5]}" + end, end, 1)
    last = f",{rows[-1][4]},{rows[-1][5]}"
    assert without.removesuffix(last).replace(",p_correct,verdict", "", 1) == text


def test_parquet_keeps_columns_types_and_order(tmp_path, scorer, console):
    frame = pl.DataFrame(
        {
            "big": pl.Series([2**63, 1, 2**64 - 1], dtype=pl.UInt64),
            "question": pl.Series(["a", "b", "a"], dtype=pl.Categorical),
            "money": pl.Series([Decimal("1.10"), None, Decimal("2.00")], dtype=pl.Decimal(10, 2)),
            "solution": ["1", None, "3"],
            "list": [[1, 2], [], None],
        }
    )
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    frame.write_parquet(source)
    result = score(scorer, source, out, console)
    got = pl.read_parquet(out)
    assert got.schema == frame.schema | {"p_correct": pl.Float64, "verdict": pl.Boolean}
    assert got.drop("p_correct", "verdict").equals(frame)
    assert got["p_correct"].to_list() == [p_of("a", "1"), None, p_of("a", "3")]
    assert got["verdict"].to_list() == [p_of("a", "1") >= 0.5, None, p_of("a", "3") >= 0.5]
    assert result.unscorable == {"no solution": 1}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_gzip_in_gzip_out_and_twice_the_same(tmp_path, scorer, console, name):
    plain = json.dumps(some_rows(1)[0]) if "jsonl" in name else "question,solution\n1+1,2"
    source = tmp_path / name
    source.write_bytes(gzip.compress(plain.encode()))
    for out in ("1-" + name, "2-" + name):
        score(scorer, source, tmp_path / out, console)
    first = (tmp_path / f"1-{name}").read_bytes()
    assert first == (tmp_path / f"2-{name}").read_bytes()
    assert b"p_correct" in gzip.decompress(first)
    unpacked = tmp_path / ("plain-" + name.removesuffix(".gz"))
    score(scorer, source, unpacked, console)
    assert unpacked.read_bytes() == gzip.decompress(first)


text = st.text(alphabet=st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(text, text, text), min_size=1, max_size=12))
def test_any_text_comes_back_in_every_format(tmp_path, console, rows):
    rows = [("q", "s", "x"), *rows]
    frame = pl.DataFrame(rows, schema=["question", "solution", "other"], orient="row")
    expected = [p_of(q, s) if q.strip() and s.strip() else None for q, s, _ in rows]
    for kind in ("csv", "jsonl", "parquet"):
        source, out = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
        if kind == "csv":
            with open(source, "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([frame.columns, *rows])
        elif kind == "jsonl":
            write_jsonl(source, [dict(zip(frame.columns, row, strict=True)) for row in rows])
        else:
            frame.write_parquet(source)
        score(Recorder(), source, out, console, overwrite=True)
        if kind == "csv":
            with open(out, newline="", encoding="utf-8") as file:
                got = [r for r in csv.reader(file) if r][1:]
            assert [tuple(r[:3]) for r in got] == rows
            assert [float(r[3]) if r[3] else None for r in got] == expected
        elif kind == "jsonl":
            got = [json.loads(line) for line in out.read_bytes().split(b"\n") if line]
            assert [tuple(list(r.values())[:3]) for r in got] == rows
            assert [r["p_correct"] for r in got] == expected
        else:
            got = pl.read_parquet(out)
            assert got.select(frame.columns).rows() == rows
            assert got["p_correct"].to_list() == expected


def test_rows_that_cannot_be_scored_are_kept_counted_and_explained(tmp_path, scorer, console):
    rows = [
        {"question": "a", "solution": "b"},
        {"question": "", "solution": "b"},
        {"question": "a"},
        {"question": ["a"], "solution": "b"},
        {"question": "\ud800", "solution": "b"},
        {},
        {"question": "a", "solution": " \n"},
    ]
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    result = score(scorer, source, out, console)
    got = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: v for k, v in r.items() if k not in ("p_correct", "verdict")} for r in got] == rows
    assert [r["verdict"] for r in got[1:]] == [r["p_correct"] for r in got[1:]] == [None] * 6
    assert (result.scored, sum(result.unscorable.values()), scorer.rows) == (1, 6, 1)
    assert result.unscorable["question is not text"] == 1
    assert f"{source}:4" in console.file.getvalue()
    assert f"1 row: empty question ({source}:2)" in console.file.getvalue()


def test_rows_of_one_question_are_scored_together_wherever_they_stand(tmp_path, scorer, console):
    rows = some_rows(40, questions=4)
    score(scorer, write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", console, chunk_rows=10)
    assert [{q for q, _ in chunk} for chunk in scorer.asked] == [{f"What is {i}+1?"} for i in range(4)]
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["solution"] for r in got] == [r["solution"] for r in rows]
    assert all(r["p_correct"] == p_of(r["question"], r["solution"]) for r in got)


class Stopping(Recorder):
    """Fails at the n-th chunk, as Ctrl-C would."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def __call__(self, questions, solutions, progress=None, /):
        if len(self.asked) == self.at:
            raise KeyboardInterrupt
        return super().__call__(questions, solutions, progress)


def interrupted(tmp_path, console, chunks=3):
    source, out = write_jsonl(tmp_path / "in.jsonl", some_rows()), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score(Stopping(chunks), source, out, console)
    return source, out, tmp_path / "out.jsonl.partial"


def test_a_stopped_run_goes_on_and_computes_nothing_twice(tmp_path, console, scorer):
    source, out, partial = interrupted(tmp_path, console)
    assert not out.exists()
    assert "21 of 50 scores are kept" in console.file.getvalue()
    result = score(scorer, source, out, console)
    assert (result.resumed, scorer.rows, result.scored) == (21, 29, 50)
    assert not partial.exists()
    whole = Recorder()
    score(whole, source, tmp_path / "whole.jsonl", console)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert scorer.asked == whole.asked[3:], "the same batches as without the stop"


def test_a_side_file_torn_at_any_byte_costs_one_chunk(tmp_path, console):
    source, out, partial = interrupted(tmp_path, console)
    score(Recorder(), source, tmp_path / "whole.jsonl", console)
    kept = partial.read_bytes()
    last = kept.rstrip(b"\n").rindex(b"\n") + 1
    for cut in [last, last + 1, (last + len(kept)) // 2, len(kept) - 2, len(kept) - 1, len(kept)]:
        for tail in (b"", b"\0" * 9):
            partial.write_bytes(kept[:cut] + tail)
            with pytest.raises(KeyboardInterrupt):
                score(Stopping(1), source, out, console)
            scorer = Recorder()
            result = score(scorer, source, out, console, overwrite=True)
            assert scorer.rows + result.resumed == 50
            assert result.resumed == (28 if cut == len(kept) else 21)
            assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
            out.unlink()


def test_a_side_file_of_something_else_is_refused_with_advice(tmp_path, console, scorer):
    source, out, partial = interrupted(tmp_path, console)
    kept = partial.read_bytes()
    with pytest.raises(DataError, match=r"another adapter, base, prompt or share.*Delete it"):
        score(scorer, source, out, console, identity="adapter 2")
    with pytest.raises(DataError, match="other columns"):
        score(scorer, source, out, console, columns=Columns(question="solution", solution="question"))
    write_jsonl(source, some_rows(51))
    with pytest.raises(DataError, match="another source file"):
        score(scorer, source, out, console)
    for junk in (b"", b"no json\n", b"[1]\n", b"\0\0"):
        partial.write_bytes(junk)
        with pytest.raises(DataError, match="not a file of kept scores"):
            score(scorer, source, out, console)
        assert partial.read_bytes() == junk
    partial.write_bytes(kept.replace(b'"veritune_scores": 1', b'"veritune_scores": 0'))
    with pytest.raises(DataError, match="another version"):
        score(scorer, source, out, console)
    assert scorer.rows == 0
    partial.unlink()
    assert score(scorer, source, out, console).scored == 51


KILLED = """
import sys, time
from pathlib import Path
from rich.console import Console
from veritune.config import Columns
from veritune.quality.score import open_scoring, score_file
sys.path.insert(0, sys.argv[1])
from fake_scorer import Recorder
class Slow(Recorder):
    def __call__(self, *args):
        time.sleep(0.03)
        with open(sys.argv[4], "a") as log:
            log.write(f"{len(args[0])}\\n")
        return super().__call__(*args)
source, out = Path(sys.argv[2]), Path(sys.argv[3])
score_file(Slow(), open_scoring(source, out, Columns()), out, identity="slow", console=Console(), chunk_rows=5)
"""


@pytest.mark.alone
def test_the_speed_of_a_small_file_is_that_of_all_its_rows(tmp_path):
    """Its rows are told of in one moment, after all the work."""

    class Late(Recorder):
        def __call__(self, questions, solutions, progress=None, /):
            time.sleep(0.1)
            for _ in questions:
                progress(1)
            return super().__call__(questions, solutions)

    printed = io.StringIO()
    source = write_jsonl(tmp_path / "in.jsonl", some_rows(10))
    score(Late(), source, tmp_path / "out.jsonl", Console(file=printed, width=120), chunk_rows=10)
    (told,) = re.findall(r"10/10 +([0-9.,]+) rows/s", printed.getvalue())
    assert 0 < float(told.replace(",", "")) < 10 / 0.1


@pytest.mark.alone
def test_a_killed_process_loses_at_most_a_chunk(tmp_path, console):
    source, out = write_jsonl(tmp_path / "in.jsonl", some_rows(600, questions=40)), tmp_path / "out.jsonl"
    partial, log = tmp_path / "out.jsonl.partial", tmp_path / "log"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(source), str(out), str(log)]
    kills = 0
    for delay in (0.0, 0.01, 0.4, 0.7, None):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = partial.stat().st_size if partial.exists() else 0
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > before):
            time.sleep(0.005)
        if delay is not None:
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            assert not out.exists()
        else:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors
    assert kills == 4
    score(Recorder(), source, tmp_path / "whole.jsonl", console)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    computed = sum(map(int, log.read_text().split()))
    assert 600 <= computed <= 600 + 5 * kills
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "log", "out.jsonl", "whole.jsonl"]


def test_a_score_that_is_not_a_number_names_the_row_and_keeps_the_chunks_before(tmp_path, console):
    source, out = write_jsonl(tmp_path / "in.jsonl", some_rows(50, questions=50)), tmp_path / "out.jsonl"

    class Broken(Recorder):
        def __call__(self, questions, solutions, progress=None, /):
            p = super().__call__(questions, solutions, progress)
            return np.where([s == "It is 30." for s in solutions], np.nan, p)

    with pytest.raises(NonFiniteError, match=rf"{source}:31: .*is nan \(1 such rows of 7\)"):
        score(Broken(), source, out, console)
    assert not out.exists()
    scorer = Recorder()
    assert score(scorer, source, out, console).resumed == 28


def test_an_output_that_is_there_is_never_lost(tmp_path, console, scorer):
    source = write_jsonl(tmp_path / "in.jsonl", some_rows())
    out, folder = tmp_path / "new folder" / "out.jsonl", tmp_path / "folder.jsonl"
    folder.mkdir()
    score(scorer, source, out, console)
    first = out.read_bytes()
    with pytest.raises(ConfigError, match=r"is there already.*--overwrite"):
        open_scoring(source, out, Columns())
    with pytest.raises(ConfigError, match="is the input"):
        open_scoring(source, source, Columns(), overwrite=True)
    with pytest.raises(ConfigError, match="is a folder"):
        open_scoring(source, folder, Columns())
    score(scorer, source, out, console, overwrite=True)
    assert out.read_bytes() == first


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, console):
    source, out = write_jsonl(tmp_path / "in.jsonl", some_rows()), tmp_path / "out.jsonl"

    class Meddling(Recorder):
        def __call__(self, *args):
            write_jsonl(source, some_rows(49))
            return super().__call__(*args)

    with pytest.raises(DataError, match="changed while it was scored"):
        score(Meddling(), source, out, console)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.csv", b"", "empty"),
        ("a.csv", b"question,solution\n", "header but no rows"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.jsonl", b'{"text": "a"}\n', "no column holds the question"),
        ("a.csv", b"problem,text\nx,y\n", "no column holds the solution"),
        ("a.csv", b"question,solution\na,b\nc\n", r"a.csv:3: wrong number of fields \(1 fields, the header has 2\)\. "),
        ("a.csv", b'question,solution\na,b\n"c,d\ne,f\n', "a.csv:3: broken csv"),
        ("a.csv", b"question,solution\na,\xff\nc,d\n", "a.csv:2: not valid UTF-8"),
        ("a.csv", "question,solution\na,b\n".encode("utf-16"), "UTF-16"),
        ("a.csv", b"question,solution,p_correct\na,b,1\n", "has 'p_correct' already"),
        (
            "a.jsonl",
            b'{"question": "a", "solution": "b"}\n{"question": "a", "verdict": 1}\n',
            "'verdict' already .row 2",
        ),
        ("a.csv", b"question,solution\n,b\nc,\n", "no row can be scored: 1 row: empty question"),
        ("a.jsonl", b'{"question": "a", "solution": "b"}\n{"question": "a", \n[1]\n', "2 of 3 records.*a.jsonl:2"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "a", "solution": "b"}\n' * 99, mtime=0)[:60], "cut off or damaged"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
        ("a.txt", b"question", "unknown kind of file"),
    ],
)
def test_hostile_files_are_refused_before_anything_is_scored(tmp_path, name, content, message):
    source = tmp_path / name
    source.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_scoring(source, tmp_path / f"out{''.join(source.suffixes)}", Columns())


def test_wrong_places_are_refused(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", some_rows())
    with pytest.raises(MissingError, match="no such file"):
        open_scoring(tmp_path / "none.jsonl", tmp_path / "out.jsonl", Columns())
    with pytest.raises(DataError, match="folder"):
        open_scoring(tmp_path, tmp_path / "out.jsonl", Columns())
    with pytest.raises(ConfigError, match="keeps the format of in"):
        open_scoring(source, tmp_path / "out.csv", Columns())


def test_a_field_of_ten_megabytes_and_nul_bytes_go_through(tmp_path, scorer, console):
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(b"question,solution\n" + b"x" * 10_000_000 + b",y\na\0b,c\n")
    assert score(scorer, source, out, console).scored == 2
    assert scorer.asked[0][1] == ("a\0b", "c")


def test_a_place_that_cannot_be_written_is_named_before_anything_is_scored(tmp_path, scorer, console):
    source = write_jsonl(tmp_path / "in.jsonl", some_rows())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="nothing can be written in"):
        score(scorer, source, tmp_path / "file" / "out.jsonl", console)
    assert scorer.rows == 0


def test_a_full_disk_is_named_and_costs_nothing_kept(tmp_path, console):
    resource = pytest.importorskip("resource")
    source, out, partial = interrupted(tmp_path, console)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (partial.stat().st_size + 10, hard))
        with pytest.raises(DataError, match="could not be written"):
            score(Recorder(), source, out, console)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert score(Recorder(), source, out, console).resumed == 21


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_rows(tmp_path, scorer, console):
    with gzip.open(SHARED, "rt", encoding="utf-8") as file:
        lines = [next(file) for _ in range(400)]
    source, out = tmp_path / "real.jsonl.gz", tmp_path / "scored.jsonl.gz"
    with gzip.open(source, "wt", encoding="utf-8") as file:
        file.writelines(lines)
    assert score(scorer, source, out, console, chunk_rows=100).scored == 400
    with gzip.open(out, "rt", encoding="utf-8") as file:
        for before, after in zip(lines, file, strict=True):
            record = json.loads(after)
            assert record["p_correct"] == p_of(record["question"], record["solution"])
            assert after.startswith(before.rstrip()[:-1])
