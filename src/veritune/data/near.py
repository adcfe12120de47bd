"""Near-duplicate questions across the splits: held-out questions that train holds too, but for a word or a number.

Two questions are near-duplicates if their sets of five-word shingles (words as in `rows.same_question`) have a Jaccard
similarity of at least `THRESHOLD`: one changed word in a question of 20 words (0.52), two far apart in one of 40
(0.57). MinHash with banding (Broder 1997; Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, ch. 3) finds the
candidates, 99.9 % of the pairs at the threshold; the similarity that counts is then computed exactly.
"""

import importlib
from typing import Any

from ..errors import ConfigError
from .rows import same_question

SHINGLE_WORDS = 5
THRESHOLD = 0.5
PERMUTATIONS, BANDS = 192, 64


def library() -> Any:
    """The MinHash library. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module("rensa")
    except ImportError:
        raise ConfigError(
            "near_duplicates needs the library rensa: pip install 'veritune[near-duplicates]', or leave it out"
        ) from None


def near_duplicates(validation: list[str], train: list[str]) -> list[tuple[int, int, float]]:
    """For each validation question that has near-duplicates in train, its nearest: (position in `validation`, position
    in `train`, similarity), in the order of `validation`."""
    rensa = library()
    held_out = [shingles(question) for question in validation]
    index = rensa.RMinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, num_bands=BANDS)
    for place, sketch in enumerate(rensa.RMinHash.from_token_sets(map(sorted, held_out), PERMUTATIONS, 0)):
        index.insert(place, sketch)
    nearest: dict[int, tuple[float, int]] = {}
    for start in range(0, len(train), 10_000):
        sets = [shingles(question) for question in train[start : start + 10_000]]
        sketches = rensa.RMinHash.from_token_sets(map(sorted, sets), PERMUTATIONS, 0)
        for offset, sketch in enumerate(sketches):
            for place in index.query(sketch):
                similarity = jaccard(held_out[place], sets[offset])
                if similarity >= THRESHOLD:
                    best = nearest.get(place, (0.0, 0))
                    nearest[place] = max(best, (similarity, -(start + offset)))
    return [(place, -position, similarity) for place, (similarity, position) in sorted(nearest.items())]


def shingles(question: str) -> set[str]:
    """The question's runs of five words; the whole of a shorter one."""
    words = same_question(question).split()
    runs = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in runs}


def jaccard(a: set[str], b: set[str]) -> float:
    """The share of the union that is in both."""
    return len(a & b) / len(a | b)
