"""Worked problems with a known wrong step: the embedded data set of `veritune demo`.

First the tables (words, families of word problems, styles of writing), then `generate`, and under it what it rests on:
`_work_out` gives a problem's results, `_redraw` changes one number, `_render` writes a solution. A wrong solution has
exactly one planted fault: a number of the question miscopied in a step, with everything after it consistent, or a
final answer that contradicts the last step.

No count of words or numbers in a solution tells its label. Changing a number is symmetric: n turns into n' as often as
n' into n, so a solution to n' under the question of n reads like any right one, and the answer of n' put under the
steps of n is an answer like any other. Right and wrong solutions come in pairs of one style and order of steps.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

NAMES = (
    "Anna Ben Carla David Emma Felix Grace Henry Iris Jack Karen Leo Maria Noah Olga Paul Rosa Sam Tina Victor "
    "Alice Bruno Clara Dan Eva Frank Gina Hugo Ida Jon Kate Luis Mona Nick Omar Peter Ruth Simon Tom Wendy"
)
THINGS = "pens books apples cups hats balls lamps plates shirts toys cards bags eggs pears forks chairs stamps belts"
PLACES = "Rome Paris London Berlin Madrid Oslo Vienna Prague Dublin Athens Lisbon Warsaw"


@dataclass(frozen=True)
class Family:
    """One kind of problem. Steps are (expression, what it gives); their results are called x, y, z in turn, and the
    last is the answer. Every number of the question is used in exactly one step, so that miscopying it there is one
    fault. `swap`: the first two steps do not need each other and may change places."""

    name: str
    questions: tuple[str, str]
    numbers: Mapping[str, range]
    steps: tuple[tuple[str, str], ...]
    swap: bool = False


FAMILIES = (
    Family(
        "shopping",
        (
            "{who} buys {a} {things} at ${b} each and {c} {others} at ${d} each. How many dollars is that?",
            "{things} cost ${b} and {others} ${d} each. {who} buys {a} {things} and {c} {others}. What does {who} pay?",
        ),
        {"a": range(2, 15), "b": range(2, 25), "c": range(2, 15), "d": range(2, 25)},
        (("a * b", "price of {things}"), ("c * d", "price of {others}"), ("x + y", "total")),
        swap=True,
    ),
    Family(
        "change",
        (
            "{who} has ${a} and buys {b} {things} at ${c} each. How many dollars are left?",
            "{who} pays for {b} {things} with ${a}. They cost ${c} each. How much change does {who} get?",
        ),
        {"a": range(50, 400), "b": range(2, 15), "c": range(3, 30)},
        (("b * c", "price of the {things}"), ("a - x", "money left")),
    ),
    Family(
        "distance",
        (
            "{who} drives to {place} for {a} hours at {b} km per hour, then {c} km more. How many km is that?",
            "To reach {place}, {who} cycles {c} km and takes a bus for {a} hours at {b} km per hour. How far is it?",
        ),
        {"a": range(2, 12), "b": range(20, 80), "c": range(11, 99)},
        (("a * b", "distance at that speed"), ("x + c", "whole distance")),
    ),
    Family(
        "sharing",
        (
            "{who} has {a} {things}, keeps {b} and shares the rest among {c} friends. How many does each friend get?",
            "Of {a} {things}, {b} are broken. {who} puts the others into {c} equal boxes. How many are in a box?",
        ),
        {"a": range(30, 200), "b": range(3, 60), "c": range(2, 13)},
        (("a - b", "number left"), ("x / c", "number in each part")),
    ),
    Family(
        "ages",
        (
            "{who} is {a}. {other} is {b} years older. {third} is {c} years younger than {other}. How old is {third}?",
            "{who} is {a}, {other} {b} years older, and {third} {c} years younger than {other}. How old is {third}?",
        ),
        {"a": range(15, 60), "b": range(3, 40), "c": range(3, 40)},
        (("a + b", "age of {other}"), ("x - c", "age of {third}")),
    ),
    Family(
        "rates",
        (
            "A machine of {who} makes {a} {things} in {b} minutes. How many {things} does it make in {c} minutes?",
            "{who} packs {a} {things} in {b} minutes. How many {things} does {who} pack in {c} minutes?",
        ),
        {"a": range(12, 200), "b": range(2, 13), "c": range(3, 30)},
        (("a / b", "number per minute"), ("x * c", "number of {things}")),
    ),
    Family(
        "percentages",
        (
            "{who} has a shop in {place} with {a} {things} and sells {b}% of them. How many {things} are sold?",
            "{who} has {a} {things}. In {place}, {b}% of them get lost. How many {things} does {who} lose?",
        ),
        {"a": range(200, 1000, 100), "b": range(11, 99)},
        (("a / 100", "hundredth part"), ("x * b", "number of {things}")),
    ),
    Family(
        "garden",
        (
            "{who} plants {a} rows of {b} roses. Then {c} die and {d} new ones are planted. How many roses are there?",
            "{who} has {a} boxes with {b} {things} each, sells {c} and buys {d}. How many {things} are there now?",
        ),
        {"a": range(3, 20), "b": range(3, 30), "c": range(3, 60), "d": range(3, 60)},
        (("a * b", "first number"), ("x - c", "number kept"), ("y + d", "number now")),
    ),
    Family(
        "passengers",
        (
            "A train to {place} has {a} passengers. {b} get off and {c} get on. How many passengers are there now?",
            "{a} people are on a ship to {place}. In a port {b} leave and {c} come aboard. How many are on it then?",
        ),
        {"a": range(60, 400), "b": range(11, 99), "c": range(11, 99)},
        (("a - b", "number who stay"), ("x + c", "number now")),
    ),
)

# Of each style: a step, the answer line, and whether the two sides of + and * change places.
STYLES = {
    "plain": ("The {text} is {sum}.", "The answer is {answer}.", False),
    "colon": ("{Text}: {sum}", "Answer: {answer}", False),
    "terse": ("{sum}", "Answer: {answer}", False),
    "turned": ("{sum}", "The answer is {answer}.", True),
    "after": ("{sum} is the {text}.", "So the answer is {answer}.", True),
    "brackets": ("{sum} ({text})", "Result: {answer}", False),
    "find": ("Find the {text}: {sum}.", "So it must be {answer}.", True),
    "list": ("- {text}: {sum}", "Final answer: {answer}", True),
}
MISCOPIED = 0.75  # of the wrong solutions; in the others the final answer contradicts the last step


def generate(questions: int, *, solutions_per_question: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of `questions` different problems, all rows of a question in a run, half of them right.

    Fields: question, solution (lines; the last is the final answer), answer (the solution's own), is_correct, gold,
    dataset (the family), solver (the style), first_error (index of the first wrong line, -1 if none). The first rows
    do not depend on how many are asked for. Raises ConfigError for a number that cannot be.
    """
    if questions < 1:
        raise ConfigError(f"questions = {questions}: ask for at least 1")
    if solutions_per_question % 2 or not 2 <= solutions_per_question <= 2 * len(STYLES):
        allowed = f"give an even number from 2 to {2 * len(STYLES)}"  # the right ones each have their own style
        raise ConfigError(f"solutions_per_question = {solutions_per_question}: {allowed}")
    rng = random.Random(f"veritune {seed}")
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    while len(seen) < questions:
        family = FAMILIES[len(seen) % len(FAMILIES)]
        values = _draw(rng, family)
        who, other, third = rng.sample(NAMES.split(), 3)
        things, others = rng.sample(THINGS.split(), 2)
        words = dict(who=who, other=other, third=third, things=things, others=others, place=rng.choice(PLACES.split()))
        question = rng.choice(family.questions).format(**words, **values)
        question = question[0].upper() + question[1:]
        if question in seen:
            continue
        seen.add(question)
        for style in rng.sample(sorted(STYLES), solutions_per_question // 2):
            order = list(range(len(family.steps)))
            if family.swap and rng.random() < 0.5:
                order[:2] = [1, 0]
            key, changed = _redraw(rng, family, values)
            fault = len(order)
            if rng.random() < MISCOPIED:
                fault = next(line for line, step in enumerate(order) if key in family.steps[step][0].split())
            else:
                changed = values | {"answer": changed["answer"]}
            pair = [(values, -1), (changed, fault)]
            rng.shuffle(pair)
            for shown, first_error in pair:
                rows.append(
                    dict(
                        question=question,
                        solution=_render(family, shown, words, style, order),
                        answer=str(shown["answer"]),
                        is_correct=first_error == -1,
                        gold=str(values["answer"]),
                        dataset=family.name,
                        solver=style,
                        first_error=first_error,
                    )
                )
    return rows


def write(path: Path, questions: int, *, solutions_per_question: int = 4, seed: int = 0) -> int:
    """Writes the rows of `generate` to a jsonl file (its folder is made); returns how many there are."""
    rows = generate(questions, solutions_per_question=solutions_per_question, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def _work_out(family: Family, numbers: Mapping[str, int]) -> dict[str, int] | None:
    """The numbers with the results x, y, z and the answer; None unless every result is a whole number from 2 to 999
    and no two are equal (a miscopied number that stands elsewhere in the problem would be hard to see)."""
    values = dict(numbers)
    for name, (expression, _) in zip("xyz", family.steps, strict=False):
        left, sign, right = expression.split()
        a, b = (values[side] if side in values else int(side) for side in (left, right))
        if sign == "/" and a % b:
            return None
        values[name] = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        if not 2 <= values[name] <= 999:
            return None
    if len(set(values.values())) < len(values):
        return None
    return values | {"answer": list(values.values())[-1]}


def _draw(rng: random.Random, family: Family) -> dict[str, int]:
    while True:
        if values := _work_out(family, {key: rng.choice(numbers) for key, numbers in family.numbers.items()}):
            return values


def _redraw(rng: random.Random, family: Family, values: dict[str, int]) -> tuple[str, dict[str, int]]:
    """Changes one number to another that could have been drawn and gives another answer: its key, the new values."""
    numbers = {key: values[key] for key in family.numbers}
    for key in rng.sample(sorted(numbers), len(numbers)):
        for number in rng.sample(family.numbers[key], len(family.numbers[key])):
            changed = _work_out(family, numbers | {key: number})
            if changed and changed["answer"] != values["answer"]:
                return key, changed
    raise AssertionError(f"{family.name}: {numbers} has no neighbours")


def _render(family: Family, values: dict[str, int], words: dict[str, str], style: str, order: list[int]) -> str:
    line, last, turned = STYLES[style]
    lines = []
    for step in order:
        expression, text = family.steps[step]
        left, sign, right = expression.split()
        if turned and sign in "+*":
            left, right = right, left
        text = text.format(**words)
        total = f"{values.get(left, left)} {sign} {values.get(right, right)} = {values['xyz'[step]]}"
        lines.append(line.format(text=text, Text=text[0].upper() + text[1:], sum=total))
    return "\n".join([*lines, last.format(answer=values["answer"])])
