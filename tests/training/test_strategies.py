"""Which rows a strategy shows in which phase, at which rate, and what of it is held out for the probes."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from veritune import config
from veritune.errors import ConfigError
from veritune.training.plan import Plan, make
from veritune.training.slices import Slice, Table, divide, draw_evenly

ROWS = 400
QUESTIONS = np.arange(ROWS) // 4
LABELS = np.arange(ROWS) % 2 == 0
COLUMN = np.array(["a"] * 200 + ["b"] * 120 + ["c"] * 60 + ["d"] * 20)
HELD = Table(np.arange(100) // 4, np.arange(100) % 2 == 0, np.array(["a"] * 80 + ["b"] * 20))


def slices_of(phases: Any = (), seed: int = 0, **strategy: Any) -> tuple[Slice, ...]:
    settings = config.build(config.Strategy, strategy, "test")
    return divide(settings, phases, Table(QUESTIONS, LABELS, COLUMN), HELD, seed)


def planned(train: dict[str, Any] | None = None, phases: Any = (), **strategy: Any) -> Plan:
    settings = config.build(config.Train, {"batch_size": 10, "per_question": 4, **(train or {})}, "test")
    listed = tuple(config.build(config.Phase, it, "test") for it in phases)
    rows = [it.rows for it in slices_of(listed, **strategy)]
    return make(settings, QUESTIONS, LABELS, config.build(config.Strategy, strategy, "test"), listed, rows)


def shown(plan: Plan, number: int) -> np.ndarray:
    """How often a phase shows each row."""
    phase = plan.phases[number]
    rows = np.concatenate([plan.rows(step) for step in range(phase.start, phase.end)])
    assert len(rows) == phase.presentations
    return np.bincount(rows, minlength=ROWS)


def stretch(first: int, last: int) -> np.ndarray:
    return (np.arange(ROWS) >= first) & (np.arange(ROWS) < last)


# Slices.


def test_a_plain_run_has_no_slices() -> None:
    assert slices_of() == ()
    assert len(planned().phases) == 1


@pytest.mark.parametrize(
    ("strategy", "bounds"),
    [
        ({}, [0, 100, 200, 300, 400]),
        ({"slices": 3}, [0, 133, 267, 400]),
        ({"ends": [50, 300, 1000, 2000]}, [0, 50, 300, 400]),
        ({"slice_rows": 150}, [0, 150, 300, 400]),
        ({"slice_rows": 30, "slices": 2}, [0, 30, 60]),
        ({"slice_rows": 300, "slices": 2}, [0, 200, 400]),
    ],
)
def test_stretches(strategy: dict[str, Any], bounds: list[int]) -> None:
    found = slices_of(kind="sequential", **strategy)
    assert [(part.rows[0], part.rows[-1] + 1) for part in found] == list(pairwise(bounds))
    for part in found:
        assert np.array_equal(part.rows, np.arange(part.rows[0], part.rows[-1] + 1))
        assert np.isin(part.trained, part.rows).all()
        assert part.held_out is None  # the run's validation


def test_values_of_a_column_are_dealt_by_size_and_held_out_by_question() -> None:
    found = slices_of(kind="sequential", column="x", slices=3, probe_rows=12)
    assert [part.name for part in found] == ["a", "b", "c, d"]
    assert [part.held_out_from for part in found] == ["validation", "validation", "train"]
    assert found[0].held_out is not None
    assert (HELD.values == "a")[found[0].held_out].all()  # pyright: ignore[reportOptionalSubscript]
    assert [len(part.held_out) for part in found] == [12, 12, 8]  # of 80 rows a tenth at most
    held = found[2].held_out
    assert np.isin(COLUMN[held], ["c", "d"]).all()
    trained = np.concatenate([part.rows for part in found])
    assert not np.isin(QUESTIONS[trained], QUESTIONS[held]).any()  # in no slice
    assert len(trained) == len(set(trained)) == ROWS - len(set(QUESTIONS[held])) * 4
    assert [part.rows.tolist() for part in slices_of(kind="stream", column="x", slices=3, probe_rows=12)] == [
        part.rows.tolist() for part in found
    ]
    capped = slices_of(kind="sequential", column="x", slices=3, slice_rows=40)
    assert [len(part.rows) for part in capped] == [40, 40, 40]


def test_a_slice_of_many_values_or_none_has_a_name_that_can_be_read() -> None:
    values = np.array([*([""] * 160), *(f"{i:03} " + "long " * 20 for i in range(240))])
    settings = config.build(config.Strategy, {"kind": "sequential", "slices": 2, "column": "x"}, "test")
    first, second = divide(settings, (), Table(QUESTIONS, LABELS, values), HELD, 0)
    assert first.name.startswith("(none), ")
    assert second.name.endswith("… and 192 others")
    assert len(second.name) < 400


def test_a_question_with_rows_of_several_slices_is_held_out_of_all() -> None:
    mixed = Table(QUESTIONS, LABELS, np.array(["a", "b", "a", "b"] * 100))
    none = Table(np.arange(4), np.arange(4) % 2 == 0, None)
    settings = config.build(config.Strategy, {"kind": "sequential", "slices": 2, "probe_rows": 10}, "test")
    settings = config.build(config.Strategy, {**config.as_dict(settings), "column": "x"}, "test")
    found = divide(settings, (), mixed, none, 3)
    held = np.unique(QUESTIONS[np.concatenate([part.held_out for part in found if part.held_out is not None])])
    assert not any(np.isin(QUESTIONS[part.rows], held).any() for part in found)


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        ({"ends": [5, 5]}, "must rise"),
        ({"ends": [5], "slices": 2}, "stands alone"),
        ({"slices": 401}, "only 400 rows"),
        ({"column": "x", "slices": 5}, "only 4 values: a, b, c, d"),
        ({"kind": "plain", "ends": [5]}, r"strategy\.ends does nothing beside strategy\.kind = 'plain'"),
        ({"kind": "plain", "presentations": 9}, r"presentations does nothing .* kinds sequential, cumulative, replay"),
        ({"kind": "plain", "phases": [{"rows": [0, 9]}], "replay_ratio": 0.5}, r"beside \[\[phases\]\]: drop it"),
        ({"cooldowns": [10]}, r"cooldowns does nothing .* it is for the kinds stream"),
        ({"replay_ratio": 0.5}, "it is for the kinds replay"),
        ({"kind": "stream", "start_from": "best"}, "start_from does nothing beside"),
        ({"kind": "stream", "optimizer_state": "keep"}, "optimizer_state does nothing beside"),
        ({"kind": "stream", "cooldowns": [400]}, "not before the end"),
        ({"kind": "stream", "cooldowns": [395]}, "not before the end"),
        ({"phases": [{"rows": [0, 9]}]}, "exclude each other"),
        ({"kind": "plain", "phases": [{"rows": [400, 900]}]}, "none of the 400 training rows"),
        ({"kind": "plain", "phases": [{"rows": [0, 9]}, {"rows": [10, 20]}]}, "leaves out the rows from 9"),
    ],
)
def test_settings_that_make_no_slices_are_refused(strategy: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        planned(**{"kind": "sequential", **strategy})


def test_a_column_that_is_not_there() -> None:
    settings = config.build(config.Strategy, {"kind": "sequential", "column": "x"}, "test")
    with pytest.raises(ConfigError, match="'x': the prepared rows have no such column"):
        divide(settings, (), Table(QUESTIONS, LABELS, None), HELD, 0)


def test_drawing_evenly() -> None:
    cells = np.array([0] * 70 + [1] * 25 + [2] * 5)
    rows = np.arange(100) + 1000
    found = draw_evenly(rows, cells, 30, np.random.default_rng(0))
    assert np.bincount(cells[found - 1000]).tolist() in ([13, 12, 5], [12, 13, 5])
    assert np.array_equal(found, np.unique(found))
    assert len(draw_evenly(rows, cells, 1000, np.random.default_rng(0))) == 100
    again = draw_evenly(rows, cells, 30, np.random.default_rng(1))
    assert not np.array_equal(found, again)


# Phases.


def test_sequential_cumulative_and_replay() -> None:
    for number in range(4):
        first, last = 100 * number, 100 * (number + 1)
        assert np.array_equal(shown(planned(kind="sequential"), number), stretch(first, last))
        assert np.array_equal(shown(planned(kind="cumulative"), number), stretch(0, last))
        counts = shown(planned(kind="replay", replay_ratio=0.24), number)
        assert np.array_equal(counts[first:last], np.ones(100))
        old = np.flatnonzero(counts[:first])
        assert len(old) == (24 if number else 0)
        if number:
            ages = np.bincount(2 * (old // 100) + LABELS[old], minlength=2 * number)
            assert ages.max() - ages.min() == 0  # 24 rows of 2, 4 and 6 cells
    assert planned(kind="cumulative").presentations == 1000


@pytest.mark.parametrize("kind", ["sequential", "cumulative", "replay", "stream"])
@pytest.mark.parametrize("presentations", [None, 37, 401, 1000, 1337])
def test_strategies_can_show_as_many_rows(kind: str, presentations: int | None) -> None:
    plan = planned(kind=kind, presentations=presentations)
    if presentations:
        assert plan.presentations == presentations
    counts = np.bincount(np.concatenate([plan.rows(step) for step in range(len(plan))]), minlength=ROWS)
    assert counts.sum() == plan.presentations
    if kind in ("sequential", "stream") and presentations:
        assert counts.max() - counts.min() <= 1
        each = [counts[first : first + 100].sum() for first in range(0, 400, 100)]
        assert max(each) - min(each) <= 1


def test_a_stream_has_one_schedule() -> None:
    plan = planned({"warmup_ratio": 0.1, "decay_ratio": 0.25, "lr": 1.0}, kind="stream")
    lr = np.array([plan.lr(step) for step in range(len(plan))])
    assert len(lr) == 40
    assert np.argmax(lr == 1) == 4
    assert (lr[4:31] == 1).all()
    assert (np.diff(lr[30:]) < 0).all()
    assert [(phase.optimizer_state, phase.start_from) for phase in plan.phases] == [("keep", "last")] * 4
    for number in range(4):
        assert np.array_equal(shown(plan, number), stretch(100 * number, 100 * (number + 1)))
    twice = planned({"epochs": 1.5}, kind="stream")
    assert [phase.slice for phase in twice.phases] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [phase.presentations for phase in twice.phases] == [100] * 4 + [50] * 4


@pytest.mark.parametrize("cooldowns", [[10], [100], [137], [100, 250, 250], [5, 15, 25, 310]])
def test_cooldowns_leave_the_main_line_as_it_is(cooldowns: list[int]) -> None:
    train = {"decay_ratio": 0.3, "warmup_ratio": 0.1, "lr": 1.0}
    alone, plan = planned(train, kind="stream"), planned(train, kind="stream", cooldowns=cooldowns)
    branches = [phase for phase in plan.phases if phase.kind == "cooldown"]
    assert len(branches) == len(set(cooldowns))
    main = [step for step in range(len(plan)) if not any(branch.start <= step < branch.end for branch in branches)]
    assert len(main) == len(alone)
    for at, step in enumerate(main):
        assert np.array_equal(plan.rows(step), alone.rows(at))
        assert plan.lr(step) == alone.lr(at)
        assert plan.number(step) == at
    assert len({plan.number(step) for step in range(len(plan))}) == len(plan)
    for branch in branches:
        before = [step for step in main if step < branch.start]
        assert sum(len(plan.rows(step)) for step in before) >= max(1, min(cooldowns))
        seen = np.concatenate([plan.rows(step) for step in before])
        rows = np.concatenate([plan.rows(step) for step in range(branch.start, branch.end)])
        assert np.isin(rows, seen).all()
        rates = [plan.lr(step) for step in range(branch.start, branch.end)]
        assert len(rates) == max(round(0.3 * len(before)), 1)
        assert (np.diff(rates) < 0).all()
        assert rates[0] == plan.lr(main[len(before)])
        assert plan.phase(branch.end).start_from == "fork"


def test_listed_phases() -> None:
    plan = planned(
        {"lr": 1e-3, "epochs": 2.0},
        kind="plain",
        phases=[
            {"rows": [0, 100]},
            {"rows": [50, 150], "lr": 5e-4, "epochs": 1, "schedule": "constant", "warmup_ratio": 0.0},
            {"rows": [0, 50], "start_from": "best", "optimizer_state": "keep"},
            {"rows": [150, 9999], "replay_ratio": 0.1},
        ],
    )
    assert [phase.slice for phase in plan.phases] == [0, 1, None, 2]
    assert [phase.presentations for phase in plan.phases] == [200, 100, 100, 2 * 275]
    assert np.array_equal(shown(plan, 1), stretch(50, 150))
    assert {plan.lr(step) for step in range(plan.phases[1].start, plan.phases[1].end)} == {5e-4}
    assert (plan.phases[2].start_from, plan.phases[2].optimizer_state) == ("best", "keep")
    assert shown(plan, 3)[:150].astype(bool).sum() == 25


def test_plans_agree_as_far_as_they_are_the_same() -> None:
    first, second = {"rows": [0, 100]}, {"rows": [100, 200]}
    one, two = planned(kind="plain", phases=[first]), planned(kind="plain", phases=[first, second])
    kept = planned(kind="plain", phases=[first, {**second, "optimizer_state": "keep"}])
    best = planned(kind="plain", phases=[first, {**second, "start_from": "best"}])
    assert one.agrees(two, 10)
    assert two.agrees(one, 10)
    assert not one.agrees(two, 11)
    for other in (kept, best):
        assert two.agrees(other, 10)
        assert not two.agrees(other, 11)
    assert planned(kind="sequential", ends=[100]).agrees(planned(kind="sequential", ends=[100, 300]), 10)
    a, b = planned(kind="stream"), planned(kind="stream", cooldowns=[200])
    assert a.agrees(b, 20)
    assert not a.agrees(b, 21)
    assert not planned({"lr": 1e-3}).agrees(planned({"lr": 2e-3}), 1)
    assert not planned({"seed": 1}).agrees(planned(), 1)
    constant = {"schedule": "constant", "warmup_ratio": 0.0}
    assert planned(constant).agrees(planned({**constant, "epochs": 2.0}), 40)
    assert not planned().agrees(planned({"epochs": 2.0}), 20)
