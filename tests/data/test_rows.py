"""Columns are found, labels read in every usual spelling, and the same text known as the same."""

import unicodedata

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veritune.config import Columns
from veritune.data.rows import Names, as_hex, digest, parse_labels, resolve_columns, same_question, same_text
from veritune.errors import ConfigError, DataError


def test_the_competitions_columns_need_no_guess():
    names, notes = resolve_columns(["question", "answer", "solution", "is_correct"], Columns(), need_label=True)
    assert names == Names("question", "solution", "is_correct")
    assert notes == []


def test_usual_names_are_recognised_and_said():
    names, notes = resolve_columns(
        ["Problem", "generated-solution", "isCorrect"], Columns(), need_label=True, where="a.csv"
    )
    assert names == Names("Problem", "generated-solution", "isCorrect")
    assert [note for note in notes if "a.csv" in note and "'Problem'" in note and "question" in note]
    assert len(notes) == 3


def test_our_own_name_wins_over_a_usual_one():
    names, notes = resolve_columns(["problem", "question", "response", "solution"], Columns(), need_label=False)
    assert names == Names("question", "solution", None)
    assert notes == []


def test_a_flag_wins_and_frees_the_column_for_no_other_part():
    names, _ = resolve_columns(
        ["question", "answer", "is_correct", "solution"], Columns(solution="answer"), need_label=True
    )
    assert names.solution == "answer"
    with pytest.raises(DataError, match=r"no column holds the question.*--columns\.question"):
        resolve_columns(["prompt", "is_correct"], Columns(solution="prompt"), need_label=True)


def test_answer_is_not_guessed_to_be_the_solution():
    with pytest.raises(DataError, match=r"no column holds the solution.*'answer'.*--columns\.solution"):
        resolve_columns(["question", "answer", "label"], Columns(), need_label=True)


def test_a_label_is_only_missed_where_it_is_needed():
    assert resolve_columns(["question", "solution"], Columns(), need_label=False)[0].label is None
    with pytest.raises(DataError, match=r"label.*--columns\.label"):
        resolve_columns(["question", "solution"], Columns(), need_label=True)


def test_wrong_flags_are_refused():
    with pytest.raises(DataError, match="'nope'"):
        resolve_columns(["question", "solution", "label"], Columns(label="nope"), need_label=True)
    with pytest.raises(ConfigError, match="different columns"):
        resolve_columns(["question", "x", "label"], Columns(solution="x", label="x"), need_label=True)


@pytest.mark.parametrize("text", ["true", "TRUE", " True ", "t", "yes", "Y", "1", "1.0", "correct", "Right"])
def test_spellings_of_true(text):
    assert parse_labels(pl.Series([text])).to_list() == [True]


@pytest.mark.parametrize("text", ["false", "FALSE", "f", "no", "N", "0", "0.0", "incorrect", "wrong\n"])
def test_spellings_of_false(text):
    assert parse_labels(pl.Series([text])).to_list() == [False]


def test_what_is_no_label_is_null():
    assert parse_labels(pl.Series(["maybe", "", None, "2", "truee"])).to_list() == [None] * 5
    assert parse_labels(pl.Series([1, 0, 2, None, -1])).to_list() == [True, False, None, None, None]
    assert parse_labels(pl.Series([1.0, 0.0, 0.5, float("nan")])).to_list() == [True, False, None, None]
    assert parse_labels(pl.Series([[1], [0]])).to_list() == [None, None]
    assert parse_labels(pl.Series([None, None])).to_list() == [None, None]
    assert parse_labels(pl.Series([True, None, False])).to_list() == [True, None, False]
    assert parse_labels(pl.Series(["yes", "no"], dtype=pl.Categorical)).to_list() == [True, False]


def test_the_same_text_is_the_same_whatever_its_encoding_and_line_breaks():
    assert same_text("caf\u00e9  is\r\n open ") == same_text("cafe\u0301 is\nopen")
    assert same_text("10\u00b2") != same_text("102")
    assert same_text("5 + 3") != same_text("5 - 3")


def test_a_question_is_its_words_and_numbers():
    assert same_question("Josh has 7 marbles., How many?") == same_question("josh has 7 marbles. how many")
    assert same_question("\uff15 apples") == same_question("5 apples")
    assert same_question("5 apples") != same_question("6 apples")
    assert same_question("1 1/2") != same_question("11/2")
    assert same_question("\u222b ?") != same_question("\u2211 ?")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_same_text_is_always_the_same_question(text):
    other = unicodedata.normalize("NFD", text).replace(" ", " \r\n")
    assert same_text(text) == same_text(other)
    assert same_question(text) == same_question(other)


def test_digests_never_change():
    # These numbers are in users' files: a change of them needs a new format of the prepared folder.
    assert as_hex([digest(""), digest("What is 2 + 2?"), 7]) == [
        "e4a6a0577479b2b4",
        "ea4a029fd2c7331b",
        "0000000000000007",
    ]
