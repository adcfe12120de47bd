"""Short training runs on a CPU: datasets that take a second to make, settings that take seconds to train, and what a
run left, in a form that can be compared."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from veritune import config
from veritune.data import dataset
from veritune.training.trainer import train


def prepared(source: list[dict[str, Any]], folder: Path, validation_rows: int) -> Path:
    """A prepared dataset of rows, in `folder`."""
    folder.mkdir(parents=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in source), encoding="utf-8")
    dataset.prepare([str(file)], folder / "prepared", config.Prepare(validation_rows=validation_rows))
    return folder / "prepared"


def settings(out: Path, data: Path, model: Path, **tables: dict[str, Any]) -> config.Run:
    """Small settings, with those of `tables` over them."""
    values: dict[str, Any] = {
        "out": str(out),
        "data": {"path": str(data)},
        "model": {"path": str(model), "base": "fp32", "device": "cpu"},
        "prompt": {"max_length": 512},
        "lora": {"rank": 8, "alpha": 16},
        "train": {"lr": 1e-3, "batch_size": 8, "per_question": 4},
        "validation": {"every": 1000},
        "checkpoint": {"every": 1000},
    }
    for name, table in tables.items():
        values[name] = values[name] | table
    return config.build(config.Run, values, "test")


def trained(run: config.Run) -> tuple[dict[str, Any], str]:
    """Trains, and gives the last validation's figures and what was printed."""
    printed = io.StringIO()
    return train(run, Console(file=printed, width=200)), printed.getvalue()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what differs from run to run: the time a step took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor a run left at its end: both adapters, and the last checkpoint's adapter and optimiser."""
    files = [folder / name / "adapter_model.safetensors" for name in ("adapter", "best")]
    files += sorted(checkpoints(folder)[-1].glob("*.safetensors"))
    return {f"{file.parent.name}/{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def copied_until(run: config.Run, step: int, out: Path) -> config.Run:
    """The run's folder as it was when the process was killed after `step`, and the settings to go on there."""
    shutil.copytree(run.out, out)
    for path in checkpoints(out):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "adapter")
    (out / "evaluation.json").unlink()
    best = out / "best" / "README.md"
    if int(best.read_text().partition("After step ")[2].partition(",")[0]) > step:
        shutil.rmtree(out / "best")
    return config.build(config.Run, {**config.as_dict(run), "out": str(out)}, "test")


def assert_same(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    for name in ("evaluation.json", "adapter/adapter_config.json", "adapter/veritune.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
