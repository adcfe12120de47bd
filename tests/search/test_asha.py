"""The rule by which paused trials go on, over figures made by hand."""

from typing import Any

import pytest
from made_sweeps import point

from veritune.search import asha

NAN = float("nan")


def at(number: int, state: Any, *reached: float | None, loss: float = 0.5) -> asha.Standing:
    return asha.Standing(number, state, [(auroc, loss) for auroc in reached])


def test_rungs_lie_a_reduction_apart_before_the_end() -> None:
    assert asha.rungs(9, 2) == [1, 2, 4, 8]
    assert asha.rungs(9, 3) == [1, 3]
    assert asha.rungs(8, 2) == [1, 2, 4]
    assert asha.rungs(3, 4) == [1]
    assert asha.rungs(1, 2) == []


def test_a_rung_keeps_the_first_figures_at_or_after_it() -> None:
    assert [asha.validated(step, 625, 9) for step in (70, 490, 560, 625)] == [1, 7, 8, 9]
    rungs = asha.rungs(9, 2)
    first = asha.reach([], rungs, 1, point(1, 0.7, 0.55))
    assert first == [(0.55, 0.7)]
    third = asha.reach(first, rungs, 3, point(3, 0.6, 0.65))  # of a trial with few steps
    assert third == [(0.55, 0.7), (0.65, 0.6)]
    assert asha.reach(third, rungs, 1, point(1, 0.1, 0.9)) == third  # it has begun again
    assert len(asha.reach([], rungs, 9, point(1))) == 4


def test_the_best_part_of_a_rung_goes_on_from_the_highest_rung_down() -> None:
    one = [at(0, "paused", 0.6)]
    assert asha.choose(one, 2, more=True) is None
    two = [*one, at(1, "paused", 0.7)]
    assert asha.choose(two, 2, more=True) == 1
    assert asha.choose(two, 3, more=True) is None
    under_way = [*one, at(1, "under way", 0.7)]
    assert asha.choose(under_way, 2, more=True) is None
    higher = [*one, at(1, "paused", 0.7, 0.71), at(2, "under way", 0.8), at(3, "paused", 0.65)]
    assert asha.choose(higher, 2, more=True) is None
    higher += [at(4, "paused", 0.75, 0.7), at(5, "paused", 0.9)]
    assert asha.choose(higher, 2, more=True) == 1  # the second rung's best, before the first rung's
    assert asha.choose([it for it in higher if it.number != 4], 2, more=True) == 5


def test_equal_figures_are_told_apart_by_the_loss_and_then_the_number() -> None:
    equal = [at(0, "paused", 0.6), at(1, "paused", 0.6, loss=0.4), at(2, "paused", 0.6, loss=0.4)]
    assert asha.choose(equal, 2, more=True) == 1


@pytest.mark.parametrize("nothing", [None, NAN])
def test_without_an_auroc_a_trial_is_last_and_the_loss_decides(nothing: float | None) -> None:
    assert asha.choose([at(0, "paused", nothing, loss=0.1), at(1, "paused", 0.3)], 2, more=True) == 1
    one_class = [at(0, "paused", nothing), at(1, "paused", nothing, loss=0.4), at(2, "paused", nothing, loss=0.6)]
    assert asha.choose(one_class, 2, more=True) == 1


def test_broken_trials_count_at_no_rung() -> None:
    better = [at(0, "broken"), at(1, "broken", 0.5), at(2, "paused", 0.6)]
    assert asha.choose(better, 2, more=True) is None
    replaced = [at(0, "broken", 0.9), at(1, "paused", 0.6), at(2, "paused", 0.7)]
    assert asha.choose(replaced, 2, more=True) == 2


def test_a_sweep_is_over_when_one_is_complete_and_none_can_go_on() -> None:
    assert asha.choose([], 2, more=False) is None
    assert asha.choose([at(0, "broken", 0.6)], 2, more=False) is None
    paused = [at(0, "paused", 0.6, 0.5), at(1, "paused", 0.9), at(2, "pruned", 0.95)]
    assert asha.choose(paused, 4, more=True) is None
    assert asha.choose(paused, 4, more=False) == 0  # the highest rung's best
    assert asha.choose([*paused, at(3, "under way")], 4, more=False) is None
    assert asha.choose([*paused, at(3, "complete", 0.1, 0.1)], 5, more=False) is None
