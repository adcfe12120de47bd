"""Near-duplicates are found across the splits, exactly at the documented similarity."""

import random
import sys

import pytest

from veritune.data import near
from veritune.errors import ConfigError

WORDS = [f"word{n}" for n in range(3000)]


def test_a_missing_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"pip install 'veritune\[near-duplicates\]'"):
        near.library()


def test_shingles_are_runs_of_five_words():
    assert near.shingles("One, two three four five SIX?") == {"one two three four five", "two three four five six"}
    assert near.shingles("What is 2+2?") == {"what is 2 2"}
    assert near.jaccard({"a", "b"}, {"b", "c"}) == pytest.approx(1 / 3)


def test_a_changed_word_is_found_and_another_question_is_not():
    pytest.importorskip("rensa")
    draw = random.Random(0)
    questions = [draw.choices(WORDS, k=40) for _ in range(400)]
    held_out = [" ".join(words) for words in questions[:150]]
    one, two, three = ((10,), (12, 25), (8, 18, 28))
    train = []
    for at, words in enumerate(questions):
        places = (one, two, three)[at // 50] if at < 150 else ()
        train.append(" ".join("changed" if place in places else word for place, word in enumerate(words)))
    found = near.near_duplicates(held_out, train)
    assert [(place, position) for place, position, _ in found] == [(n, n) for n in range(100)]
    assert {round(similarity, 9) for _, _, similarity in found} == {round(31 / 41, 9), round(26 / 46, 9)}


def test_the_nearest_is_named():
    pytest.importorskip("rensa")
    words = WORDS[:40]
    near_one, nearest = [*words[:20], "x", *words[21:]], [*words[:39], "x"]
    found = near.near_duplicates([" ".join(words)], [" ".join(near_one), " ".join(nearest)])
    assert [(place, position) for place, position, _ in found] == [(0, 1)]
    assert near.near_duplicates([], ["a b c"]) == []
    assert near.near_duplicates(["a b c"], []) == []
