"""Every row that cannot be used is refused with its reason; the same row counts once, and never with both labels."""

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from veritune.data import clean
from veritune.data.chunks import Chunk
from veritune.data.lines import TOO_LARGE, Refused


def chunk(*rows, **extras):
    """Rows as (question, solution, label)."""
    columns = {"line": range(1, len(rows) + 1)}
    columns |= {name: [row[at] for row in rows] for at, name in enumerate(("question", "solution", "label"))}
    columns |= {f"column:{name}": values for name, values in extras.items()}
    schema = {name: pl.UInt32 if name == "line" else pl.String for name in columns}
    return Chunk(pl.DataFrame(columns, schema=schema), [])


def identified(*rows, **extras):
    usable, refused = clean.check(chunk(*rows, **extras), 10**6)
    assert not refused
    return clean.identify(usable)


def test_each_reason():
    rows = [
        ("q", "s", "yes"),
        ("", "s", "1"),
        (None, "s", "1"),
        ("q", " \n\t\u3000", "1"),
        ("q", "x" * 200, "1"),
        ("q\0", "s", "1"),
        ("q", "s", None),
        ("q", "s", " NaN "),
        ("q", "s", "perhaps"),
        ("q", "s", "FALSE"),
    ]
    usable, refused = clean.check(chunk(*rows), 100)
    assert [(item.line, item.reason) for item in refused] == [
        (2, clean.NO_QUESTION),
        (3, clean.NO_QUESTION),
        (4, clean.NO_SOLUTION),
        (5, TOO_LARGE),
        (6, clean.NUL),
        (7, clean.MISSING_LABEL),
        (8, clean.MISSING_LABEL),
        (9, clean.BAD_LABEL),
    ]
    assert "perhaps" in refused[-1].detail
    assert usable.select("line", "is_correct").rows() == [(1, True), (10, False)]
    assert set(usable.columns) == {"line", "question", "solution", "is_correct"}


def test_refusals_of_reading_and_of_checking_stand_in_the_files_order():
    given_chunk = Chunk(chunk(("", "s", "1"), ("q", "s", "1")).frame, [Refused(7, "broken", "", "")])
    _, refused = clean.check(given_chunk, 100)
    assert [item.line for item in refused] == [1, 7]
    assert '"question": ""' in refused[0].raw


def test_a_size_counts_bytes_of_both_texts():
    assert not clean.check(chunk(("\u03c0" * 30, "x" * 40, "1")), 100)[1]
    assert clean.check(chunk(("\u03c0" * 30, "x" * 41, "1")), 100)[1]


def test_white_space_and_encoding_do_not_make_another_row():
    rows = identified(("caf\u00e9  ?", "a\r\nb", "1"), ("cafe\u0301 ?", "a b", "1"), ("Caf\u00e9!", "a b", "1"))
    ids, qids = rows["id"].to_list(), rows["qid"].to_list()
    assert ids[0] == ids[1] != ids[2]
    assert qids[0] == qids[1] == qids[2]
    assert rows["content"].n_unique() == 3


def test_content_changes_with_any_value():
    rows = [("q", "s", "1"), ("q", "s", "0"), ("q ", "s", "1"), ("q", "s ", "1"), *[("q", "s", "1")] * 4]
    extras = {"a": [None] * 4 + ["", "x", None, "x"], "b": [None] * 6 + ["x", "y"]}
    assert identified(*rows, **extras)["content"].n_unique() == len(rows)


def test_content_does_not_depend_on_the_columns_order_or_on_columns_that_are_null():
    first = identified(("q", "s", "1"), a=["1"], b=["2"], c=[None])
    second = identified(("q", "s", "true"), b=["2"], a=["1"])
    assert first["content"].to_list() == second["content"].to_list()


def test_one_of_each_row_stays_and_none_with_both_labels():
    rows = identified(
        ("q", "a", "1"), ("q", "b", "1"), ("q", "a ", "1"), ("q", "c", "1"), ("q", "c", "0"), ("q", " c", "0"),
    )  # fmt: skip
    same = clean.find_same(rows)
    assert same.duplicates == 1
    assert same.contradictory.to_list() == [3, 4, 5]
    assert len(same.kept) == 2
    assert 1 in same.kept.to_list()


ROW = st.tuples(st.sampled_from(["p", "q"]), st.sampled_from(["a", "a ", "b", "b\n", "c"]), st.sampled_from(["1", "0"]))


@given(st.lists(ROW, min_size=1, max_size=20), st.randoms())
def test_what_stays_does_not_depend_on_the_order(rows, random):
    shuffled = rows.copy()
    random.shuffle(shuffled)
    outcomes = []
    for these in (rows, shuffled):
        frame = identified(*these)
        same = clean.find_same(frame)
        assert len(same.kept) + len(same.contradictory) + same.duplicates == len(these)
        outcomes.append((sorted(frame["content"][same.kept]), len(same.contradictory), same.duplicates))
    assert outcomes[0] == outcomes[1]
