"""The plan of a run: the learning rate of every step, and which rows are shown when."""

from typing import Any

import numpy as np
import pytest

from veritune import config
from veritune.training.plan import make

PEAK = 3e-4


def plan(rows: int = 1600, **train: Any) -> Any:
    """A plan over questions of four rows, two of them right."""
    settings = config.build(config.Train, {"lr": PEAK, "batch_size": 16, "per_question": 4, **train}, "test")
    return make(settings, np.arange(rows) // 4, np.arange(rows) % 2 == 0)


def rates(**train: Any) -> np.ndarray:
    it = plan(**train)
    return np.array([it.lr(step) for step in range(len(it))])


SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "constant", "wsd"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.2])
def test_no_step_is_wasted_and_none_exceeds_the_peak(schedule: str, warmup: float) -> None:
    lr = rates(schedule=schedule, warmup_ratio=warmup)
    assert len(lr) == 100
    assert (lr > 0).all()
    assert lr.max() == pytest.approx(PEAK)
    before = round(warmup * 100)
    assert np.argmax(np.isclose(lr, PEAK)) == before
    rising = np.diff(lr[: before + 1])
    assert (rising > 0).all()
    assert np.allclose(rising, rising[:1])  # in equal parts


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_rate_falls_to_nearly_nothing(schedule: str) -> None:
    lr = rates(schedule=schedule)
    assert (np.diff(lr[3:]) <= 0).all()
    assert lr[-1] < 0.06 * PEAK


def test_a_cosine_is_half_way_down_in_the_middle() -> None:
    lr = rates(schedule="cosine", warmup_ratio=0)
    assert lr[50] == pytest.approx(PEAK / 2)
    assert lr[25] - lr[75] > lr[0] - lr[25] > 0  # steepest in the middle
    assert np.allclose(rates(schedule="linear", warmup_ratio=0), PEAK * (1 - np.arange(100) / 100))


@pytest.mark.parametrize("restarts", [1, 2, 4])
def test_a_cosine_restarts_at_the_peak(restarts: int) -> None:
    lr = rates(schedule="cosine_with_restarts", warmup_ratio=0, restarts=restarts)
    assert np.isclose(lr, PEAK).sum() == restarts
    assert (np.diff(lr) > 0).sum() == restarts - 1
    assert np.allclose(lr.reshape(restarts, -1), lr[: 100 // restarts])
    if restarts == 1:
        assert np.array_equal(lr, rates(schedule="cosine", warmup_ratio=0))


def test_wsd_stays_and_then_falls_in_a_line() -> None:
    lr = rates(schedule="wsd", warmup_ratio=0.1, decay_ratio=0.3)
    assert np.allclose(lr[10:71], PEAK)
    assert np.allclose(np.diff(lr[70:]), -PEAK / 30)
    assert lr[-1] == pytest.approx(PEAK / 30)
    assert np.allclose(rates(schedule="constant", warmup_ratio=0), PEAK)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step_learns(schedule: str) -> None:
    assert rates(rows=8, schedule=schedule).tolist() == [PEAK]


@pytest.mark.parametrize(("epochs", "shown"), [(1, 1600), (2, 3200), (0.5, 800), (1.25, 2000), (1e-9, 1)])
def test_every_row_is_shown_as_often_as_any(epochs: float, shown: int) -> None:
    it = plan(epochs=epochs)
    rows = [it.rows(step) for step in range(len(it))]
    counts = np.bincount(np.concatenate(rows), minlength=1600)
    assert it.presentations == counts.sum() == shown
    assert counts.max() - counts.min() <= 1
    assert {len(part) for part in rows[:-1]} <= {16}
    assert 0 < len(rows[-1]) <= 16


def test_a_step_is_as_many_rows_however_it_is_accumulated() -> None:
    one, two = plan(batch_size=8), plan(batch_size=4, gradient_accumulation=2)
    assert len(one) == len(two) == 200
    assert all(np.array_equal(one.rows(step), two.rows(step)) for step in range(200))


def test_a_plan_is_a_function_of_settings_and_labels() -> None:
    a, b, other = plan(epochs=2), plan(epochs=2), plan(epochs=2, seed=1)
    backwards = {step: b.rows(step) for step in reversed(range(len(b)))}  # no step depends on one before it
    assert all(np.array_equal(a.rows(step), backwards[step]) for step in range(len(a)))
    assert not np.array_equal(a.rows(0), other.rows(0))
    assert [a.lr(step) for step in range(200)] == [other.lr(step) for step in range(200)]


def test_the_last_step_of_a_plan_is_its_last() -> None:
    it = plan()
    with pytest.raises(IndexError):
        it.rows(len(it))
