"""Every line of a text file is either a record or a refusal with its number, and reading always goes on."""

import csv
import gzip
import io
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veritune.data import lines
from veritune.data.lines import Line, Refused, read_csv, read_json_lines, read_lines
from veritune.errors import DataError, MissingError


def json_records(tmp_path, data: bytes, limit: int = lines.UNLIMITED):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    return list(read_json_lines(read_lines(path, limit)))


def csv_records(tmp_path, data: bytes, limit: int = lines.UNLIMITED):
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    return list(read_csv(read_lines(path, limit), path, limit))


def reasons(records):
    return {number: value.reason for number, value in records if isinstance(value, Refused)}


def test_line_ends_and_a_byte_order_mark_are_no_part_of_a_row(tmp_path):
    assert json_records(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}') == [(1, {"a": 1}), (3, {"a": 2})]
    assert csv_records(tmp_path, b"\xef\xbb\xbfa,b\r\n1,2\r\n") == [(1, ["a", "b"]), (2, ["1", "2"])]


def test_broken_json_is_refused_in_its_place(tmp_path):
    data = b'{"a": 1}\n{"a":\n[1]\n"x"\nnull\n\xff\n{"a": "\\ud800"}\n' + b"[" * 50_000 + b'\n{"a": "\\ud83d\\ude00"}\n'
    records = json_records(tmp_path, data)
    assert reasons(records) == {
        2: lines.BROKEN_JSON,
        3: lines.NOT_OBJECT,
        4: lines.NOT_OBJECT,
        5: lines.NOT_OBJECT,
        6: lines.NOT_UTF8,
        7: lines.NOT_UNICODE,
        8: lines.BROKEN_JSON,
    }
    assert [value for _, value in records if not isinstance(value, Refused)] == [{"a": 1}, {"a": "\U0001f600"}]


def test_a_line_over_the_limit_is_refused_without_being_kept(tmp_path):
    long = json.dumps({"a": "x" * 5000}).encode()
    records = json_records(tmp_path, b'{"a": 1}\n' + long + b'\n{"a": 2}\n' + long, limit=1000)
    assert reasons(records) == {2: lines.TOO_LARGE, 4: lines.TOO_LARGE}
    assert all(len(value.raw) <= 1000 for _, value in records if isinstance(value, Refused))
    assert (3, {"a": 2}) in records
    marked = json_records(tmp_path, b"\xef\xbb\xbf" + long + b'\n{"a": 2}', limit=1000)
    assert (reasons(marked), marked[1:]) == ({1: lines.TOO_LARGE}, [(2, {"a": 2})])
    exact = b'{"a": 1}'
    assert json_records(tmp_path, exact, limit=len(exact)) == [(1, {"a": 1})]


def test_a_gzip_file_cut_in_half_says_how_much_of_it_can_be_read(tmp_path):
    data = gzip.compress("".join(f'{{"a": {n * 7919}}}\n' for n in range(20_000)).encode())
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    whole_lines = zlib.decompressobj(31).decompress(data[: len(data) // 2]).count(b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl\.gz: .*after line {whole_lines} .*gzip -dc .*part\.jsonl"):
        list(read_json_lines(read_lines(path)))


def test_gzip_is_known_by_its_content(tmp_path):
    for name, data in (("a.jsonl", gzip.compress(b'{"a": 1}\n')), ("a.jsonl.gz", b'{"a": 1}\n')):
        (tmp_path / name).write_bytes(data)
        assert list(read_json_lines(read_lines(tmp_path / name))) == [(1, {"a": 1})]


def test_files_that_cannot_be_read_at_all(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="empty"):
        list(read_lines(tmp_path / "empty"))
    with pytest.raises(MissingError):
        list(read_lines(tmp_path / "none"))
    (tmp_path / "wide").write_bytes("a,b\n".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        list(read_lines(tmp_path / "wide"))


def test_the_number_of_a_csv_record_is_the_line_where_it_starts(tmp_path):
    records = csv_records(tmp_path, b'a,b\n"one\r\ntwo","say ""hi"""\nx,y\n\n"\n",z\n')
    assert records == [(1, ["a", "b"]), (2, ["one\r\ntwo", 'say "hi"']), (4, ["x", "y"]), (6, ["\n", "z"])]


def test_a_quote_that_is_never_closed_costs_one_line(tmp_path):
    body = "".join(f"q{n},{n}\n" for n in range(20))
    records = csv_records(tmp_path, f'a,b\n"open,1\n{body}'.encode())
    assert reasons(records) == {2: lines.BROKEN_CSV}
    assert [number for number, _ in records] == list(range(1, 23))


def test_broken_csv_records_are_refused_in_their_place(tmp_path):
    records = csv_records(tmp_path, b'a,b\n1\n1,2,3\n"x"y,2\ncaf\xe9,2\n\x00,2\na\rb,2\n1,2\n')
    assert reasons(records) == {
        2: lines.WRONG_FIELDS,
        3: lines.WRONG_FIELDS,
        4: lines.BROKEN_CSV,
        5: lines.NOT_UTF8,
        7: lines.BROKEN_CSV,
    }
    assert records[5] == (6, ["\x00", "2"])


@pytest.mark.parametrize("quoted", [False, True])
def test_a_csv_field_over_the_limit_is_refused(tmp_path, quoted):
    field = '"' + "x\n" * 3000 + '"' if quoted else "x" * 6000
    records = csv_records(tmp_path, f"a,b\n1,2\n{field},2\n3,4\n".encode(), limit=2000)
    assert records[:2] == [(1, ["a", "b"]), (2, ["1", "2"])]
    assert reasons(records)[3] == lines.TOO_LARGE
    assert records[-1][1] == ["3", "4"]


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("a;b\n", "separated by commas"),
        ("a,a\n", "more than once: 'a'"),
        ('"a\n', "header cannot be read"),
        ("a\rb\r", "bare carriage return"),
    ],
)
def test_a_header_that_cannot_be_used(tmp_path, header, problem):
    with pytest.raises(DataError, match=problem):
        csv_records(tmp_path, header.encode())


FIELDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=12)


@given(st.lists(st.tuples(FIELDS, FIELDS), max_size=8))
def test_whatever_a_csv_writer_quotes_comes_back(rows):
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    raw = [Line(n + 1, line, False) for n, line in enumerate(text.getvalue().encode().splitlines(keepends=True))]
    # Lines end at LF alone, as in a file.
    joined = b"".join(line.raw for line in raw).split(b"\n")
    feed = (Line(n + 1, line + b"\n", False) for n, line in enumerate(joined) if line or n < len(joined) - 1)
    assert [value for _, value in read_csv(feed, "a.csv")][1:] == [list(row) for row in rows]


@given(st.binary(max_size=300))
def test_any_bytes_give_a_record_or_a_refusal_for_each_line(data):
    whole = data.split(b"\n")
    feed = [Line(n + 1, line + b"\n", False) for n, line in enumerate(whole)]
    numbers = [number for number, _ in read_json_lines(iter(feed))]
    blank = [n + 1 for n, line in enumerate(whole) if not line.decode("utf-8", "replace").strip()]
    assert sorted(numbers + blank) == list(range(1, len(whole) + 1))
