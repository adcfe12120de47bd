"""What was meant by a name that is none."""

import difflib
from collections.abc import Sequence


def distance(a: str, b: str) -> int:
    """Characters to drop, add, change, or swap with their neighbour to make `a` into `b` (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, right in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (left != right)))
            if i > 1 and j > 1 and (left, a[i - 2]) == (b[j - 2], right):
                row[-1] = min(row[-1], older[j - 2] + 1)
    return row[-1]


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """The known dotted names that `name` was probably meant to be: those one slip away; else those that stand under
    another table; else the most similar one, if it is similar at all."""
    one = [it for it in known if abs(len(it) - len(name)) <= 1 and distance(name, it) == 1]
    if one:
        return one
    last = name.rpartition(".")[2]
    same = [it for it in known if it.rpartition(".")[2] == last]
    return same[:1] or difflib.get_close_matches(name, known, n=1, cutoff=0.5)


def did_you_mean(found: Sequence[str]) -> str:
    """` (did you mean 'a' or 'b'?)`, or nothing."""
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""
