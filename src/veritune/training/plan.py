"""What will be trained, computed before anything runs: phases of rows, and the learning rate of every step.

A plan is a list of phases; a run of one plain phase is the common case. Everything here is a pure function of the
settings and the dataset's labels and questions.
"""

import math
from dataclasses import dataclass

import numpy as np

from .. import config
from ..tokens.batches import Batches


@dataclass(frozen=True)
class Phase:
    """Steps `start` to `start + len(batches)` of the run, over some rows with one learning rate schedule."""

    name: str
    start: int
    rows: np.ndarray  # int64: row numbers of the training set; batches index into this
    batches: Batches


@dataclass(frozen=True)
class Plan:
    settings: config.Train
    phases: tuple[Phase, ...]

    def __len__(self) -> int:
        last = self.phases[-1]
        return last.start + len(last.batches)

    def phase(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        return next(p for p in reversed(self.phases) if p.start <= step)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the training set in a step, int64 [examples]."""
        phase = self.phase(step)
        return phase.rows[phase.batches[step - phase.start]]

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        phase = self.phase(step)
        return self.settings.lr * shape(self.settings, step - phase.start, len(phase.batches))

    @property
    def presentations(self) -> int:
        """Rows shown in all, repeats counted."""
        return sum(phase.batches.presentations for phase in self.phases)


def make(settings: config.Train, questions: np.ndarray, labels: np.ndarray) -> Plan:
    """One phase over all rows. questions: int64 [rows], labels: bool [rows]."""
    size = settings.batch_size * settings.gradient_accumulation
    batches = Batches(questions, labels, size, settings.per_question, settings.epochs, settings.seed)
    return Plan(settings, (Phase("all", 0, np.arange(len(labels)), batches),))


def shape(settings: config.Train, step: int, steps: int) -> float:
    """The part of the highest learning rate at a step, 0 to 1: linear warm-up, then the schedule.

    cosine: Loshchilov & Hutter 2017, section 3 (SGDR), without and with restarts; wsd: Hu et al. 2024 (MiniCPM),
    section 4, with a linear decay.
    """
    warmup = round(settings.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(steps - warmup, 1)
    match settings.schedule:
        case "linear":
            return 1 - done
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        case "cosine_with_restarts":
            return 0.5 * (1 + math.cos(math.pi * (done * settings.restarts % 1)))
        case "constant":
            return 1.0
        case "wsd":
            decay = max(round(settings.decay_ratio * steps), 1)
            return min(1.0, (steps - step) / decay)
