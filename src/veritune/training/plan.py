"""What will be trained, computed before anything runs: phases of rows, and the learning rate of every step.

A plan is a list of phases; a run of one plain phase is the common case. Everything here is a pure function of the
settings and the dataset's labels and questions.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .. import config
from ..errors import ConfigError
from ..tokens.batches import Batches
from .slices import draw_evenly


@dataclass(frozen=True)
class Phase:
    """Steps `start` to `end` of the run, over some rows; they are steps `first` and on of `batches`."""

    name: str
    rows: np.ndarray  # int64: row numbers of the training set; batches index into this
    batches: Batches
    settings: config.Train
    """The run's, with the phase's own lr, schedule and warm-up."""
    schedule: tuple[int, int]
    """The place in its schedule at which the phase begins, and the schedule's length, in steps."""
    steps: int
    start: int = 0
    first: int = 0
    kind: Literal["whole", "part", "cooldown"] = "whole"
    """part: of a phase that a cooldown interrupts; cooldown: a branch off the main line."""
    slice: int | None = None
    """The slice that it brings or, in a later pass, repeats."""
    optimizer_state: Literal["reset", "keep"] = "keep"
    start_from: Literal["last", "best", "fork"] = "last"
    """fork: the weights and optimiser state at which the cooldown before it left the main line."""

    @property
    def end(self) -> int:
        return self.start + self.steps

    @property
    def presentations(self) -> int:
        """Rows shown, repeats counted."""
        size = self.batches.size
        return min((self.first + self.steps) * size, self.batches.presentations) - self.first * size


@dataclass(frozen=True)
class Plan:
    phases: tuple[Phase, ...]

    def __len__(self) -> int:
        return self.phases[-1].end

    def phase(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        return next(p for p in reversed(self.phases) if p.start <= step)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the training set in a step, int64 [examples]."""
        phase = self.phase(step)
        if step >= phase.end:
            raise IndexError(f"step {step} of {len(self)}")
        return phase.rows[phase.batches[phase.first + step - phase.start]]

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        phase = self.phase(step)
        offset, span = phase.schedule
        return phase.settings.lr * shape(phase.settings, offset + step - phase.start, span)

    def number(self, step: int) -> int:
        """What decides a step's dropout: its place on the main line, which no branch shifts."""
        phase = self.phase(step)
        if phase.kind == "cooldown":
            return step + (1 << 40)
        return step - sum(it.steps for it in self.phases if it.kind == "cooldown" and it.start < phase.start)

    @property
    def presentations(self) -> int:
        """Rows shown in all, repeats counted."""
        return sum(phase.presentations for phase in self.phases)

    def begins(self, step: int) -> Phase | None:
        """The phase whose first step this is; None within a phase, and at the run's first step."""
        phase = self.phase(step)
        return phase if step == phase.start > 0 else None

    def ends(self, done: int) -> Phase | None:
        """The phase that is over after `done` steps of the run."""
        return next((phase for phase in self.phases if phase.end == done), None)

    def agrees(self, other: "Plan", done: int) -> bool:
        """Whether the first `done` steps of both are the same: rows, rates, and what happens where phases begin."""
        if done > min(len(self), len(other)):
            return False

        def joints(plan: Plan) -> list[tuple[int, bool, str, str]]:
            begun = [phase for phase in plan.phases if 0 < phase.start < done]
            return [(it.start, it.kind == "cooldown", it.optimizer_state, it.start_from) for it in begun]

        return joints(self) == joints(other) and all(
            self.lr(step) == other.lr(step) and np.array_equal(self.rows(step), other.rows(step))
            for step in range(done)
        )


def make(
    settings: config.Train,
    questions: np.ndarray,
    labels: np.ndarray,
    strategy: config.Strategy | None = None,
    phases: Sequence[config.Phase] = (),
    slices: Sequence[np.ndarray] = (),
) -> Plan:
    """The phases of a strategy over slices, or those listed, or one over all rows.

    questions: int64 [rows], labels: bool [rows], slices: row numbers of each; see `slices.divide`. Raises ConfigError
    for cooldowns that cannot be.
    """
    make = _Maker(settings, questions, labels, slices)
    if phases:
        made = make.listed(phases)
    elif strategy is None or strategy.kind == "plain":
        made = [make.phase("all", np.arange(len(labels)))]
    elif strategy.kind == "stream":
        made = make.stream(strategy)
    else:
        made = make.strategy(strategy)
    for shown in sorted(set(strategy.cooldowns)) if strategy else ():
        made = make.branch(made, shown)
    return Plan(_placed(made))


def _placed(phases: list[Phase]) -> tuple[Phase, ...]:
    """The phases one after another."""
    out, start = [], 0
    for phase in phases:
        out.append(dataclasses.replace(phase, start=start))
        start += phase.steps
    return tuple(out)


@dataclass(frozen=True)
class _Maker:
    """What every phase of a run is made from."""

    settings: config.Train
    questions: np.ndarray
    labels: np.ndarray
    slices: Sequence[np.ndarray]

    @property
    def size(self) -> int:
        return self.settings.batch_size * self.settings.gradient_accumulation

    def phase(
        self, name: str, rows: np.ndarray, *, shown: int | None = None, number: int = 0, **options: object
    ) -> Phase:
        """A phase over rows that shows `shown` of them, repeats counted; the number decides its order of rows."""
        settings = options.pop("settings", self.settings)
        assert isinstance(settings, config.Train)
        batches = Batches(
            self.questions[rows],
            self.labels[rows],
            self.size,
            settings.per_question,
            settings.epochs if shown is None else shown / len(rows),
            settings.seed + (number << 32),
        )
        schedule = (0, len(batches))
        return Phase(name, rows, batches, settings, schedule, len(batches), **options)  # pyright: ignore[reportArgumentType]

    def old(self, before: int, count: int, number: int) -> np.ndarray:
        """`count` rows of the slices before one, drawn evenly by label and slice."""
        rows = np.concatenate([np.array([], np.int64), *self.slices[:before]])
        age = np.repeat(np.arange(before), [len(part) for part in self.slices[:before]])
        rng = np.random.default_rng((self.settings.seed, 4, number))
        return draw_evenly(rows, 2 * age + self.labels[rows], count, rng)

    def listed(self, phases: Sequence[config.Phase]) -> list[Phase]:
        """The phases of a run file."""
        out, seen, brought = [], 0, 0
        for number, it in enumerate(phases):
            own = {name: getattr(it, name) for name in ("epochs", "lr", "schedule", "warmup_ratio")}
            rows = np.arange(it.rows[0], min(it.rows[1], len(self.labels)))
            earlier = self.old(brought, round(it.replay_ratio * len(rows)), number)
            new, seen = rows[-1] >= seen, max(seen, rows[-1] + 1)
            out.append(
                self.phase(
                    f"{number + 1}: rows {rows[0]:,} to {rows[-1] + 1:,}" + (" and replay" if len(earlier) else ""),
                    np.union1d(rows, earlier),
                    number=number,
                    settings=dataclasses.replace(self.settings, **{k: v for k, v in own.items() if v is not None}),
                    slice=brought if new else None,
                    optimizer_state=it.optimizer_state,
                    start_from=it.start_from,
                )
            )
            brought += bool(new)
        return out

    def strategy(self, strategy: config.Strategy) -> list[Phase]:
        """sequential, cumulative and replay: one phase a slice."""
        parts = []
        for number, rows in enumerate(self.slices):
            if strategy.kind == "cumulative":
                rows = np.sort(np.concatenate(self.slices[: number + 1]))
            elif strategy.kind == "replay":
                earlier = self.old(number, round(strategy.replay_ratio * len(rows)), number)
                rows = np.sort(np.concatenate((rows, earlier)))
            parts.append(rows)
        shown = self._shown([len(rows) for rows in parts], strategy.presentations)
        names = {"sequential": "slice {}", "cumulative": "slices 1 to {}", "replay": "slice {} and replay"}
        return [
            self.phase(
                f"{number + 1}: " + names[strategy.kind if number else "sequential"].format(number + 1),
                rows,
                shown=count,
                number=number,
                slice=number,
                optimizer_state=strategy.optimizer_state,
                start_from=strategy.start_from,
            )
            for number, (rows, count) in enumerate(zip(parts, shown, strict=True))
        ]

    def stream(self, strategy: config.Strategy) -> list[Phase]:
        """The slices one after another, as often as there are epochs, under one schedule."""
        settings = dataclasses.replace(self.settings, schedule="wsd")
        sizes = [len(rows) for rows in self.slices]
        left = strategy.presentations or max(round(settings.epochs * sum(sizes)), 1)
        passes = -(-left // sum(sizes))
        out: list[Phase] = []
        for number in range(passes):
            shown = sizes if left >= sum(sizes) else _parted(sizes, left)
            left -= sum(shown)
            for place, count in enumerate(shown):
                name = f"{len(out) + 1}: slice {place + 1}" + (f", pass {number + 1}" if passes > 1 else "")
                if count:
                    out.append(
                        self.phase(
                            name, self.slices[place], shown=count, number=len(out), slice=place, settings=settings
                        )
                    )
        span, at, placed = sum(phase.steps for phase in out), 0, []
        for phase in out:
            placed.append(dataclasses.replace(phase, schedule=(at, span)))
            at += phase.steps
        return placed

    def branch(self, phases: list[Phase], shown: int) -> list[Phase]:
        """The phases with a cooldown after `shown` row presentations of the main line."""
        main = [place for place, phase in enumerate(phases) if phase.kind != "cooldown"]
        steps, left, seen, place, phase = 0, shown, [], 0, phases[0]
        for place in main:
            phase = phases[place]
            if left <= phase.presentations:
                break
            steps, left = steps + phase.steps, left - phase.presentations
            seen += _shown_rows(phase, phase.steps)
        inner = -(-left // self.size)
        if steps + inner >= sum(phases[place].steps for place in main):
            raise ConfigError(
                f"strategy.cooldowns: {shown:,} is not before the end of the run's main line, which cools down itself"
            )
        steps += inner
        seen += _shown_rows(phase, inner)
        if inner == phase.steps and phases[place + 1].kind == "cooldown":
            return phases  # another cooldown falls on the same step
        offset, span = phase.schedule
        lr = phase.settings.lr * shape(phase.settings, offset + inner, span)
        length = max(round(self.settings.decay_ratio * steps), 1)
        rows = np.unique(np.concatenate(seen))
        cooldown = self.phase(
            f"cooldown after {shown:,} rows",
            rows,
            shown=length * self.size,
            number=steps + (1 << 16),
            kind="cooldown",
            settings=dataclasses.replace(self.settings, lr=lr, schedule="linear", warmup_ratio=0.0),
        )
        if inner == phase.steps:  # it ends there
            after = dataclasses.replace(phases[place + 1], start_from="fork")
            return [*phases[: place + 1], cooldown, after, *phases[place + 2 :]]
        head = dataclasses.replace(phase, steps=inner, kind="part")
        tail = dataclasses.replace(
            phase,
            steps=phase.steps - inner,
            first=phase.first + inner,
            schedule=(offset + inner, span),
            start_from="fork",
        )
        return [*phases[:place], head, cooldown, tail, *phases[place + 1 :]]

    def _shown(self, sizes: list[int], presentations: int | None) -> list[int]:
        if presentations is None:
            return [max(round(self.settings.epochs * size), 1) for size in sizes]
        return [max(count, 1) for count in _parted(sizes, presentations)]


def _shown_rows(phase: Phase, steps: int) -> list[np.ndarray]:
    """The rows that the first `steps` steps of a phase show."""
    if phase.presentations >= len(phase.rows) and steps == phase.steps:
        return [phase.rows]
    return [phase.rows[phase.batches[phase.first + step]] for step in range(steps)]


def _parted(sizes: list[int], total: int) -> list[int]:
    """`total` in whole parts, in proportion to sizes."""
    ends = [round(total * end / sum(sizes)) for end in np.cumsum(sizes).tolist()]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


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
