"""The generated problems: right ones compute, wrong ones have their one planted fault, and no count gives them away."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from veritune.data.generate import generate, write
from veritune.errors import ConfigError

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
FIELDS = {"question", "solution", "answer", "is_correct", "gold", "dataset", "solver", "first_error"}
TOKENS = r"\d+|[A-Za-z]+|[^\s\w]"
DIGITS = r"\d|[A-Za-z]+|[^\s\w]"


def check(row):
    """Follows a solution as a careful reader would, knowing only the question: the first wrong line and its kind.

    A number on the left of a step must be the question's, not used before, or the result of an earlier step, or a
    constant: 100 for percentages. Slips raise an AssertionError: the generator never makes one.
    """
    *steps, last = row["solution"].split("\n")
    unused = [int(n) for n in re.findall(r"\d+", row["question"])]
    results, faults = [], []
    for i, step in enumerate(steps):
        sums = SUM.findall(step)
        assert len(sums) == 1, step
        assert len(re.findall(r"\d+", step)) == 3, step
        left, sign, right, result = int(sums[0][0]), sums[0][1], int(sums[0][2]), int(sums[0][3])
        assert {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[sign] == result, step
        for number in (left, right):
            if number in unused:
                unused.remove(number)
            elif number in results:
                results.remove(number)
            elif not (row["dataset"] == "percentages" and number == 100):
                faults.append((i, "miscopied"))
        results.append(result)
    [stated] = re.findall(r"\d+", last)
    assert stated == row["answer"], row
    if int(stated) != result:
        faults.append((len(steps), "contradicts"))
    if not faults:
        assert not unused, row
        assert results == [result], row
    return faults


@pytest.fixture(scope="module")
def rows():
    return generate(2000, seed=3)


@pytest.fixture(scope="module")
def split(rows):
    """1,550 questions to train on and 450 held out."""
    questions = list(dict.fromkeys(row["question"] for row in rows))
    held = {q for i, q in enumerate(questions) if i % 40 < 9}
    return [r for r in rows if r["question"] not in held], [r for r in rows if r["question"] in held]


def test_right_solutions_are_right_and_wrong_ones_have_exactly_the_planted_fault(rows):
    kinds = Counter()
    for row in rows:
        faults = check(row)
        if row["is_correct"]:
            assert (faults, row["first_error"], row["answer"]) == ([], -1, row["gold"])
        else:
            assert len(faults) == 1
            assert faults[0][0] == row["first_error"]
            assert row["answer"] != row["gold"]
            kinds[faults[0][1]] += 1
    share = kinds["miscopied"] / kinds.total()
    assert 0.7 < share < 0.8
    assert kinds.total() == len(rows) / 2


def test_labels_styles_and_answers_are_even_within_each_question(rows):
    groups = defaultdict(list)
    for row in rows:
        assert set(row) == FIELDS
        groups[row["question"]].append(row)
    assert len(groups) == 2000
    for group in groups.values():
        right, wrong = [r for r in group if r["is_correct"]], [r for r in group if not r["is_correct"]]
        assert len(right) == len(wrong) == 2
        assert sorted(r["solver"] for r in right) == sorted(r["solver"] for r in wrong)
        assert len({r["solution"] for r in group}) == 4
        assert {r["gold"] for r in group} == {right[0]["answer"]}
    families = Counter(row["dataset"] for row in rows)
    assert len(families) >= 8
    assert max(families.values()) - min(families.values()) <= 4
    assert len({row["solver"] for row in rows}) == 8


def test_texts_are_short_and_numbers_small(rows):
    for row in rows:
        assert all(int(n) <= 999 for n in re.findall(r"\d+", row["solution"]))
        assert 3 <= len(row["solution"].split("\n")) <= 4
        assert len(row["question"]) < 120
        assert "{" not in row["question"] + row["solution"]


def test_first_rows_do_not_depend_on_the_count_and_seeds_are_disjoint(rows):
    assert generate(50, seed=3) == rows[:200]
    questions = {row["question"] for row in rows}
    for seed in (0, 1, 2):
        assert questions.isdisjoint(row["question"] for row in generate(1000, solutions_per_question=2, seed=seed))


def test_sixteen_solutions_are_all_different():
    rows = generate(20, solutions_per_question=16)
    assert len({(row["question"], row["solution"]) for row in rows}) == 320


@pytest.mark.parametrize("count", [0, 1, 3, 18])
def test_impossible_numbers_of_solutions_are_refused(count):
    with pytest.raises(ConfigError, match=f"solutions_per_question = {count}: give an even number from 2 to 16"):
        generate(5, solutions_per_question=count)


def test_no_questions_are_refused():
    with pytest.raises(ConfigError, match="questions = 0"):
        generate(0)


def test_written_file_holds_the_rows_and_is_the_same_each_time(tmp_path: Path):
    paths = [tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl"]
    assert [write(path, 30, seed=5) for path in paths] == [120, 120]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [json.loads(line) for line in paths[0].read_text().splitlines()] == generate(30, seed=5)


def labels(rows):
    return np.array([row["is_correct"] for row in rows])


def held_out_accuracy(split, vectorizer, text):
    train, held = split
    x = vectorizer.fit_transform(text(row) for row in train)
    model = LogisticRegression(solver="liblinear").fit(x, labels(train))
    return model.score(vectorizer.transform(text(row) for row in held), labels(held))


@pytest.mark.parametrize(
    "vectorizer",
    [
        CountVectorizer(ngram_range=(1, 2)),
        CountVectorizer(ngram_range=(1, 2), token_pattern=TOKENS),
        CountVectorizer(ngram_range=(1, 2), token_pattern=DIGITS),
    ],
    ids=["words", "numbers as tokens", "digits as tokens"],
)
@pytest.mark.parametrize("parts", [("solution",), ("question", "solution")], ids=["solution", "question and solution"])
def test_bag_of_words_stays_at_chance(split, vectorizer, parts):
    accuracy = held_out_accuracy(split, vectorizer, lambda row: "\n".join(row[part] for part in parts))
    assert accuracy < 0.55


def sizes(row):
    numbers = [int(n) for n in re.findall(r"\d+", row["solution"])]
    return [
        len(row["solution"]),
        sum(c.isdigit() for c in row["solution"]),
        len(row["answer"]),
        int(row["answer"]),
        max(numbers),
        sum(numbers),
        sum(n % 10 == 0 for n in numbers),
        sum(n % 5 == 0 for n in numbers),
        sum(n % 2 for n in numbers),
    ]


def test_lengths_digits_and_roundness_stay_at_chance(split):
    train, held = (np.array([sizes(row) for row in part], float) for part in split)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(train, labels(split[0]))
    assert model.score(held, labels(split[1])) < 0.55


def test_numbers_of_both_labels_come_from_one_distribution(rows):
    """At each place of a solution: the means agree within four standard errors, and so does the share of round ones."""
    by_label = {True: defaultdict(list), False: defaultdict(list)}
    for row in rows:
        numbers = [int(n) for n in re.findall(r"\d+", row["solution"])]
        for place, number in enumerate(numbers):
            by_label[row["is_correct"]][row["dataset"], place, len(numbers)].append(number)
    for key, right in by_label[True].items():
        wrong = by_label[False][key]
        error = (np.var(right) / len(right) + np.var(wrong) / len(wrong)) ** 0.5
        assert abs(np.mean(right) - np.mean(wrong)) <= 4 * error + 1e-9, key
        round_right, round_wrong = (np.mean(np.array(numbers) % 10 == 0) for numbers in (right, wrong))
        error = (round_right * (1 - round_right) / len(right) + round_wrong * (1 - round_wrong) / len(wrong)) ** 0.5
        assert abs(round_right - round_wrong) <= 4 * error + 0.01, key
