"""Runs that share a process's model, data and tokens compute what each computes alone; who watches sees every line."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import metrics, prepared, settings, tensors, trained

from veritune import config
from veritune.data.generate import generate
from veritune.errors import ConfigError, NonFiniteError
from veritune.model import load
from veritune.training.trainer import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(generate(10, solutions_per_question=4, seed=1), tmp_path_factory.mktemp("data") / "d", 8)


def quietly(run: config.Run, base: load.Base | None = None, **options: Any) -> dict[str, Any]:
    return train(run, Console(file=io.StringIO()), base, **options)


def kept(model: Path) -> load.Base:
    base = load.load_base(config.Model(path=str(model), base="fp32", device="cpu"))
    base.ids = {}
    return base


def test_runs_of_one_process_are_those_of_many(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    changes: list[dict[str, dict[str, Any]]] = [
        {},
        {"train": {"lr": 3e-3, "optimizer": "adamw_8bit", "batch_size": 4}},
        {"lora": {"rank": 4, "dropout": 0.1}, "prompt": {"max_length": 200}, "train": {"seed": 5}},
        {},
    ]
    base = kept(tiny_folder)
    for i, change in enumerate(changes):
        run = settings(tmp_path / f"kept{i}", data, tiny_folder, validation={"every": 2}, **change)
        quietly(run, base)
    assert len(base.ids or ()) == 40 + 10  # each solution and each question, once
    for i, change in enumerate(changes[1:3], 1):
        alone = settings(tmp_path / f"alone{i}", data, tiny_folder, validation={"every": 2}, **change)
        trained(alone)
        assert metrics(Path(alone.out)) == metrics(tmp_path / f"kept{i}")
        left, right = tensors(Path(alone.out)), tensors(tmp_path / f"kept{i}")
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert metrics(tmp_path / "kept0") == metrics(tmp_path / "kept3")


def test_a_run_that_broke_off_leaves_nothing_to_the_next(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    base = kept(tiny_folder)
    with pytest.raises(NonFiniteError):
        quietly(settings(tmp_path / "a", data, tiny_folder, train={"lr": 1e30, "warmup_ratio": 0}), base)
    quietly(settings(tmp_path / "b", data, tiny_folder), base)
    trained(settings(tmp_path / "c", data, tiny_folder))
    assert metrics(tmp_path / "b") == metrics(tmp_path / "c")


def test_a_run_that_cannot_begin_leaves_no_adapter_on_the_base(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    trained(settings(tmp_path / "a", data, tiny_folder, lora={"rank": 4}))
    base = kept(tiny_folder)
    start_from = {"start_from": str(tmp_path / "a" / "adapter")}
    with pytest.raises(ConfigError, match="the adapter has rank 4 instead of 2"):
        quietly(settings(tmp_path / "b", data, tiny_folder, lora={"rank": 2}, train=start_from), base)
    assert not any("lora" in name for name, _ in base.model.named_modules())
    assert not hasattr(base.model, "peft_config")
    quietly(settings(tmp_path / "c", data, tiny_folder, lora={"rank": 4}), base)
    assert metrics(tmp_path / "c") == metrics(tmp_path / "a")


def test_who_watches_sees_each_line_and_can_end_the_run(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Enough(Exception):
        pass

    def watch(state: Any, step: int, values: dict[str, Any]) -> None:
        seen.append({"step": step, **{key: value for key, value in values.items() if key != "seconds"}})
        if step == 2 and "validation" in values:
            raise Enough

    run = settings(tmp_path / "run", data, tiny_folder, validation={"every": 2})
    with pytest.raises(Enough):
        quietly(run, watch=watch)
    assert json.loads(json.dumps(seen)) == metrics(tmp_path / "run")
    assert ["validation" in line for line in seen] == [False, False, True]
    assert not (tmp_path / "run" / "best").exists()


def test_without_adapters_only_figures_are_left(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    quietly(settings(tmp_path / "run", data, tiny_folder), adapters=False)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "metrics.jsonl", "evaluation.json"} <= names
    assert not names & {"adapter", "best", "checkpoints"}
