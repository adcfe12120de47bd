"""A row is a question, a worked solution and whether the solution is correct; this file says how a row is recognised.

`resolve_columns` finds the three in a file's columns, `parse_labels` reads every usual spelling of true and false, and
`same_text`, `same_question` and `digest` say when two rows or two questions are the same one.

Which texts are the same: rows by Unicode's canonical form (NFC) with runs of white space collapsed, so only encodings
and line breaks are ignored. NFKC would also fold look-alikes, among them the superscript in 10² and the 2 in 102: two
solutions that differ in that are different solutions, and dropping one would lose a row. Questions are compared by
their letters and digits alone (NFKC, no case, no punctuation), because there the error is on the safe side: questions
that wrongly count as one (3 + 5 and 3 - 5) are only held out together, while "How many" in train and "how many" in
validation is a leak. (In the real sets we know a fifth of the questions are such copies.) So rows of one `qid` may
differ in the text of their question. Letters of other alphabets that look Latin (the Cyrillic a) are folded by
neither and stay different.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import polars as pl

from ..config import Columns
from ..errors import ConfigError, DataError

QUESTION, SOLUTION, LABEL = "question", "solution", "is_correct"

# In order of preference, compared without case, spaces, dashes and underscores. `answer` is not here on purpose: it
# is the worked solution in some sets and only the final number in others, so the user has to say.
USUAL = {
    QUESTION: ("question", "problem", "problem_statement", "question_text", "problem_text", "query", "prompt"),
    SOLUTION: (
        "solution",
        "generated_solution",
        "solution_text",
        "worked_solution",
        "model_solution",
        "response",
        "completion",
        "generation",
        "model_output",
        "rationale",
        "reasoning",
    ),
    LABEL: ("is_correct", "correct", "label", "correctness", "is_right", "is_solution_correct", "target"),
}
FLAGS = {QUESTION: "question", SOLUTION: "solution", LABEL: "label"}

TRUE = ("true", "t", "yes", "y", "1", "1.0", "correct", "right")
FALSE = ("false", "f", "no", "n", "0", "0.0", "incorrect", "wrong")
NO_LABEL = ("", "null", "none", "nan", "na", "n/a")


class Names(NamedTuple):
    """The columns of one file that hold a row's parts; `label` is None where there is none and none is needed."""

    question: str
    solution: str
    label: str | None


def resolve_columns(
    columns: Sequence[str], wanted: Columns, *, need_label: bool, where: str = "the rows"
) -> tuple[Names, list[str]]:
    """The columns that hold question, solution and label, and one sentence for each that was guessed.

    A name the user gave wins, then the names veritune itself uses, then the usual ones. Raises DataError, naming
    `where`, if a part that is needed is in no column, and ConfigError if one column is to be two parts.
    """
    found: dict[str, str | None] = {}
    notes = []
    for part, given in ((QUESTION, wanted.question), (SOLUTION, wanted.solution), (LABEL, wanted.label)):
        if given is not None:
            if given not in columns:
                raise DataError(f"{where}: no column {given!r} (--columns.{FLAGS[part]}); {_listed(columns)}")
            found[part] = given
            continue
        usual = [name for key in USUAL[part] for name in columns if _key(name) == _key(key)]
        taken = [name for name in (wanted.question, wanted.solution, wanted.label) if name is not None]
        usual = [name for name in usual if name not in taken]
        found[part] = part if part in usual else next(iter(usual), None)
        if found[part] is None and (part != LABEL or need_label):
            raise DataError(
                f"{where}: no column holds the {FLAGS[part]}; {_listed(columns)}. "
                f"Name it with --columns.{FLAGS[part]} COLUMN"
            )
        if found[part] not in (None, part):
            notes.append(f"{where}: column {found[part]!r} taken as the {FLAGS[part]}")
    names = [name for name in found.values() if name is not None]
    if len(set(names)) < len(names):
        raise ConfigError(f"--columns: question, solution and label must be different columns, not {names}")
    return Names(str(found[QUESTION]), str(found[SOLUTION]), found[LABEL]), notes


def parse_labels(labels: pl.Series) -> pl.Series:
    """Booleans of the same length; null where a label is missing or is neither true nor false in a usual spelling.

    Takes booleans, numbers (1 and 0) and text (true/false, t/f, yes/no, y/n, 1/0, correct/incorrect, right/wrong, in
    any case, with white space around). Anything else (lists, objects, dates) is null.
    """
    kind = labels.dtype
    if kind == pl.Boolean:
        return labels
    if kind.is_numeric():
        frame = labels.to_frame("label").select(
            pl.when(pl.col("label") == 1).then(True).when(pl.col("label") == 0).then(False).alias(labels.name)
        )
        return frame.to_series()
    if kind in (pl.Categorical, pl.Enum):
        labels = labels.cast(pl.String)
    if labels.dtype != pl.String:
        return pl.Series(labels.name, [None] * len(labels), dtype=pl.Boolean)
    spelt = dict.fromkeys(TRUE, True) | dict.fromkeys(FALSE, False)
    tidy = labels.str.strip_chars().str.to_lowercase()
    return tidy.replace_strict(spelt, default=None, return_dtype=pl.Boolean)


def same_text(text: str) -> str:
    """Equal for two texts that count as the same text: NFC, white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def same_question(text: str) -> str:
    """Equal for two texts that count as the same question: the words and numbers, NFKC, without case."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words) or same_text(text)


def digest(text: str) -> int:
    """A 64-bit number that stands for `text`, the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def as_hex(numbers: Iterable[int]) -> list[str]:
    """64-bit numbers as 16 hexadecimal digits, whose alphabetical order is the numbers' order."""
    return [f"{number:016x}" for number in numbers]


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in columns[:20]) + (", …" if len(columns) > 20 else "")
    return f"its columns are {shown}" if columns else "it has no columns"
