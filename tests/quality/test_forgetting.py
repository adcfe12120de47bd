"""The forgetting matrix's summaries, against values worked by hand."""

import pytest

from veritune.quality.forgetting import average_forgetting, backward_transfer, report

A = [[0.8, 0.5, 0.5], [0.7, 0.9, 0.5], [0.6, 0.95, 0.9]]


def test_what_was_lost() -> None:
    assert average_forgetting(A, [0, 1, 2]) == pytest.approx((0.2 - 0.05) / 2)
    assert backward_transfer(A, [0, 1, 2]) == pytest.approx((-0.2 + 0.05) / 2)


def test_forgetting_is_from_the_best_and_transfer_from_the_first() -> None:
    risen = [A[0], [0.85, 0.9, 0.5], A[2]]
    assert average_forgetting(risen, [0, 1, 2]) == pytest.approx((0.25 - 0.05) / 2)
    assert backward_transfer(risen, [0, 1, 2]) == backward_transfer(A, [0, 1, 2])


def test_what_was_measured_before_a_slice_came_does_not_count() -> None:
    early = [[0.8, 0.99], [0.7, 0.6], [0.7, 0.5]]
    assert average_forgetting(early, [0, 1, None]) == pytest.approx((0.1 + 0.1) / 2)


def test_passes_that_repeat_a_slice() -> None:
    assert backward_transfer([[0.5, 0.1], [0.4, 0.6], [0.9, 0.5], [0.8, 0.9]], [0, 1, 0, 1]) == pytest.approx(0.3)


def test_a_slice_without_a_probe_is_left_out() -> None:
    without = [[0.8, None, 0.5], [0.7, None, 0.5], [0.6, None, 0.9]]
    assert average_forgetting(without, [0, 1, 2]) == pytest.approx(0.2)
    assert backward_transfer(without, [0, 1, 2]) == pytest.approx(-0.2)


def test_one_phase_forgets_nothing() -> None:
    assert average_forgetting([[0.5, 0.5]], [0]) is None
    assert backward_transfer([[0.5, 0.5]], [0]) is None


SLICES = [{"name": name, "trained_rows": 20, "held_out_rows": 30} for name in "ab"]


def entry(step: int, index: int | None, row: list[float], cooldown: bool = False, held_out: int = 30) -> dict:
    probes = {name: {"accuracy": row, "auroc": row} for name in ("trained", "held_out")}
    rows = {"trained": [20] * len(row), "held_out": [held_out] * len(row)}
    about = {"phase": f"phase {step}", "slice": index, "cooldown": cooldown, "rows": rows}
    validation = {"rows": 9, "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "auroc": None, "brier": 1}
    return {"step": step, "probes": {**about, **probes}, "validation": validation}


def test_a_report_is_of_the_main_line_and_takes_slices_that_came_later() -> None:
    entries = [entry(1, 0, [0.8]), entry(2, 0, [0.0], True), entry(3, 1, [0.6, 0.9])]
    found = report(SLICES, entries)
    assert found["accuracy"]["trained"] == [[0.8, None], [0.6, 0.9]]
    assert [phase["step"] for phase in found["phases"]] == [1, 3]
    assert found["phases"][0]["validation"] == {
        "rows": 9, "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "auroc": None
    }  # fmt: skip
    assert found["average_forgetting"]["held_out"] == pytest.approx(0.2)
    assert found["backward_transfer"]["held_out"] == pytest.approx(-0.2)


def test_figures_of_other_probe_rows_are_not_compared() -> None:
    entries = [entry(1, 0, [0.8], held_out=16), entry(3, 1, [0.6, 0.9])]
    found = report(SLICES, entries)
    assert found["accuracy"]["held_out"] == [[None, None], [0.6, 0.9]]
    assert found["average_forgetting"] == {"trained": pytest.approx(0.2), "held_out": None}
    del entries[0]["probes"]["rows"]  # of before this was written down
    assert report(SLICES, entries)["accuracy"]["held_out"][0] == [0.8, None]
