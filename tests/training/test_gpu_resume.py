"""A run on a GPU that was stopped and goes on: bit for bit the run that was not, where train.deterministic asks for it,
and the same to rounding where not. On a CPU, where every run is deterministic, the same test runs too."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_same, checkpoints, copied_until, losses, prepared, settings, tensors, trained
from tiny_models import write_folder

from veritune import config
from veritune.data.generate import generate
from veritune.training import step as steps

ON_GPU = pytest.mark.gpu


@pytest.mark.parametrize(
    ("device", "deterministic"),
    [("cpu", True), pytest.param("cuda", True, marks=ON_GPU), pytest.param("cuda", False, marks=ON_GPU)],
)
def test_a_stopped_run_ends_as_the_one_that_was_not(device: str, deterministic: bool, tmp_path: Path) -> None:
    data = prepared(generate(12, solutions_per_question=4, seed=1), tmp_path / "d", 8)
    model = write_folder(tmp_path / "model")
    run = settings(
        tmp_path / "whole", data, model,
        train={"epochs": 2, "deterministic": deterministic, "micro_batch_tokens": 2048},
        validation={"every": 3}, checkpoint={"every": 1, "keep": 100},
    )  # fmt: skip
    on = {"model": {"path": str(model), "base": "bf16", "device": device}}
    run = config.build(config.Run, config.as_dict(run) | on, "test")
    trained(run)
    assert not torch.are_deterministic_algorithms_enabled()
    last = int(checkpoints(Path(run.out))[-1].name.removeprefix("step-"))
    assert last == 10
    for step in (1, 4, 9):
        resumed = copied_until(run, step, tmp_path / f"from-{step}")
        trained(resumed)
        if deterministic:
            assert_same(Path(run.out), Path(resumed.out))
        else:
            whole, again = (np.array(losses(Path(it.out))) for it in (run, resumed))
            assert np.abs(whole - again).max() < 0.02
            a, b = tensors(Path(run.out)), tensors(Path(resumed.out))
            name = next(name for name in a if name.startswith("adapter/") and "lora_B" in name)
            assert (a[name] - b[name]).norm() < 0.1 * a[name].norm()


def test_deterministic_holds_for_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for on in (True, False):
        with steps.deterministic(on):
            assert torch.are_deterministic_algorithms_enabled() == on
        assert not torch.are_deterministic_algorithms_enabled()
