"""A number that is none is caught within its step: the run stops or leaves that step out, and nothing of it is kept."""

import io
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from rich.console import Console
from runs import checkpoints, metrics, settings
from safetensors.torch import load_file

from veritune import config
from veritune.data import dataset
from veritune.errors import DataError, NonFiniteError
from veritune.model import load
from veritune.training import step as steps
from veritune.training.feed import Rows
from veritune.training.trainer import Training, train


def run_of(out: Path, data: Path, model: Path, policy: str, **changes: Any) -> config.Run:
    """Five steps of one micro-batch, each saved."""
    train = {"micro_batch_tokens": 10**5, "non_finite": policy, **changes}
    saved = {"every": 1, "keep": 99}
    return settings(out, data, model, lora={"targets": ["q_proj", "v_proj"]}, train=train, checkpoint=saved)


def go(run: config.Run, base: load.Base) -> str:
    printed = io.StringIO()
    train(run, Console(file=printed, width=200), base)
    return printed.getvalue()


class OneWrong(torch.autograd.Function):
    """Zero, and the gradient of one element of a parameter is `value`."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, element: tuple[int, ...], value: float) -> torch.Tensor:
        ctx.shape, ctx.element, ctx.value = parameter.shape, element, value
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        out = torch.zeros(ctx.shape)
        out[ctx.element] = ctx.value
        return out, None, None


@contextmanager
def poisoned(kind: str, at: set[int], rng: random.Random, value: float = math.nan) -> Iterator[None]:
    """Makes the loss, one gradient or one weight non-finite in the steps of `at`, counted from 1."""
    real, calls = steps.micro_loss, 0

    def loss(state: Training, micro: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls not in at:
            return real(state, micro)
        parameter = rng.choice(state.parameters)
        element = tuple(rng.randrange(size) for size in parameter.shape)
        if kind == "gradient":
            return real(state, micro) + OneWrong.apply(parameter, element, value)
        if kind == "weight":
            with torch.no_grad():
                parameter[element] = value
        return real(state, micro) * (value if kind == "loss" else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "micro_loss", loss)
        yield


def assert_finite(out: Path) -> None:
    files = list(out.rglob("*.safetensors"))
    assert files
    for file in files:
        for name, value in load_file(file).items():
            assert not value.is_floating_point() or bool(value.isfinite().all()), f"{file}: {name}"


def check_points(count: int, base: load.Base, data: Path, model: Path, folder: Path) -> None:
    """Stops at once, wherever it comes, and goes on afterwards from the step before."""
    rng = random.Random(count)
    for point in range(count):
        kind, at, value = ("loss", "gradient", "weight")[point % 3], rng.randint(1, 5), rng.choice((math.nan, math.inf))
        out = folder / f"{point}"
        run = run_of(out, data, model, "stop")
        with poisoned(kind, {at}, rng, value), pytest.raises(NonFiniteError, match=f"step {at}: the .* is not finite"):
            go(run, base)
        assert [line["step"] for line in metrics(out)] == list(range(1, at)), kind
        assert [int(path.name[5:]) for path in checkpoints(out)] == list(range(1, at)), kind
        if at > 1:
            assert_finite(out)
        if point % 5 == 0:
            go(run, base)
            assert_finite(out)
            assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 3, 4, 5]


def test_what_is_not_finite_stops_the_run_within_its_step(
    base: load.Base, data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    check_points(12, base, data, tiny_folder, tmp_path)


@pytest.mark.slow
def test_what_is_not_finite_stops_the_run_within_its_step_at_50_points(
    base: load.Base, data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    check_points(50, base, data, tiny_folder, tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_skipped_step_changes_neither_weights_nor_optimiser(
    base: load.Base, data: Path, tiny_folder: Path, tmp_path: Path, kind: str, optimizer: str
) -> None:
    run = run_of(tmp_path / "run", data, tiny_folder, "skip", optimizer=optimizer)
    with poisoned(kind, {1, 3, 4}, random.Random(0)):
        printed = go(run, base)
    assert printed.count("is skipped") == 3
    lines = {line["step"]: line for line in metrics(tmp_path / "run") if "lr" in line}
    assert [step for step, line in lines.items() if line.get("skipped")] == [1, 3, 4]
    for step in (1, 3, 4):
        assert lines[step]["grad_norm"] is None
        assert (lines[step]["loss"] is None) == (kind == "loss")
    assert '"skipped_steps": 3' in (tmp_path / "run" / "evaluation.json").read_text()
    _, second, third, fourth, fifth = checkpoints(tmp_path / "run")
    for name in ("adapter", "optimizer"):
        values = [load_file(path / f"{name}.safetensors") for path in (second, third, fourth, fifth)]
        assert all(torch.equal(values[0][key], values[1][key]) for key in values[0])
        assert all(torch.equal(values[0][key], values[2][key]) for key in values[0])
        assert not all(torch.equal(values[0][key], values[3][key]) for key in values[0])
    assert_finite(tmp_path / "run")


def test_a_run_that_skips_goes_on_exactly(base: load.Base, data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """How many were skipped in a row is part of where a run is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "MOST_SKIPPED", 3)
        run = run_of(tmp_path / "run", data, tiny_folder, "skip")
        real = steps.update
        with poisoned("loss", {2, 3}, random.Random(0)):

            def update(state: Any, at: Any, step: int, *args: Any) -> bool:
                if step == 3:
                    raise ZeroDivisionError
                return real(state, at, step, *args)

            patch.setattr("veritune.training.trainer.update", update)
            with pytest.raises(ZeroDivisionError):
                go(run, base)
        patch.setattr("veritune.training.trainer.update", real)
        with (
            poisoned("loss", {1}, random.Random(0)),
            pytest.raises(NonFiniteError, match="as in the 2 steps before it"),
        ):
            go(run, base)
        assert [line["step"] for line in metrics(tmp_path / "run") if "lr" in line] == [1, 2, 3]
        go(run, base)  # this time it is finite
        assert '"skipped_steps": 2' in (tmp_path / "run" / "evaluation.json").read_text()


def test_a_weight_that_is_none_is_not_skipped_for_ever_nor_saved(
    base: load.Base, data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "saved", data, tiny_folder, "skip")
    with poisoned("weight", {3}, random.Random(0)), pytest.raises(NonFiniteError, match=r"adapter/.*1 of .* are NaN"):
        go(run, base)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path / "saved")] == [1, 2]
    assert_finite(tmp_path / "saved")
    values = config.as_dict(run_of(tmp_path / "many", data, tiny_folder, "skip", epochs=4))
    run = config.build(config.Run, {**values, "checkpoint": {"every": 100}}, "test")
    with (
        poisoned("weight", {3}, random.Random(0)),
        pytest.raises(NonFiniteError, match=r"step 12: .*in the 9 steps before"),
    ):
        go(run, base)
    assert checkpoints(tmp_path / "many") == []


def test_a_norm_of_0_clips_nothing(base: load.Base, data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    found = {}
    for norm in (0, 1e30, 1e-3):
        run = run_of(tmp_path / f"{norm}", data, tiny_folder, "stop", max_grad_norm=norm)
        go(run, base)
        found[norm] = load_file(checkpoints(tmp_path / f"{norm}")[0] / "optimizer.safetensors")
    same = [all(torch.equal(found[0][name], found[norm][name]) for name in found[0]) for norm in (1e30, 1e-3)]
    assert same == [True, False]


@pytest.mark.parametrize("label", [None, math.nan])
def test_a_label_that_is_none_never_becomes_one(data: Path, label: float | None) -> None:
    frame = dataset.load(data).train
    labels = [float(value) for value in frame["is_correct"]]
    wrong: list[float | None] = [*labels[:-1], label]
    with pytest.raises(DataError, match="neither true nor false"):
        Rows.of(frame.with_columns(is_correct=pl.Series(wrong)))
    broken = frame["is_correct"].to_list()
    broken[3] = None
    with pytest.raises(DataError, match="neither true nor false"):
        Rows.of(frame.with_columns(is_correct=pl.Series(broken)))
