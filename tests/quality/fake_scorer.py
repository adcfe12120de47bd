"""A scorer without a model: what scoring does around the model is tested with this."""

import zlib

import numpy as np


def p_of(question, solution):
    """A score that depends on both texts, the same in every process."""
    return zlib.crc32(f"{question}\0{solution}".encode()) % 1000 / 999


class Recorder:
    """A scorer that keeps the chunks it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, questions, solutions, progress=None, /):
        self.asked.append(list(zip(questions, solutions, strict=True)))
        if progress:
            progress(len(questions))
        return np.array([p_of(*pair) for pair in self.asked[-1]])

    @property
    def rows(self):
        return sum(len(chunk) for chunk in self.asked)
