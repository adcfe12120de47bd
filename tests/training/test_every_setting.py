"""Every setting changes something that can be observed: a table with an entry for each key of a run file.

`PREPARED`: what `trainer.prepare` makes of the settings (the plan, the prompt, weights, the optimiser, ...), by
facets. `TRAINED`: what a run of a few steps leaves in its folder. `REFUSED`: an error that says so. A key that stands
in none of them fails the test.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from runs import losses, prepared, settings, tensors, trained
from tiny_models import write_folder

from veritune import config
from veritune.data import generate
from veritune.errors import ConfigError, MissingError
from veritune.training import feed, trainer


@dataclass(frozen=True)
class Case:
    """A changed value, and the facet in which it shows."""

    value: Any
    shows_in: str
    also: dict[str, Any] = field(default_factory=dict)
    """Other settings, in both of the runs that are compared, under which this one matters."""


PREPARED: dict[str, Case] = {
    "data.rows": Case(16, "rows"),
    "model.base": Case("bf16", "precision"),
    "prompt.template": Case("plain", "frame"),
    "prompt.instruction": Case("Is it {true} or {false}?", "frame"),
    "prompt.answers": Case(["Yes", "No"], "frame"),
    "prompt.max_length": Case(128, "tokens"),
    "lora.rank": Case(2, "adapter"),
    "lora.alpha": Case(64, "scale"),
    "lora.dropout": Case(0.5, "dropout"),
    "lora.targets": Case(["q_proj"], "adapter"),
    "train.lr": Case(2e-3, "rates"),
    "train.optimizer": Case("lion_8bit", "optimizer"),
    "train.schedule": Case("linear", "rates"),
    "train.warmup_ratio": Case(0.5, "rates"),
    "train.decay_ratio": Case(0.9, "rates", {"train.schedule": "wsd"}),
    "train.restarts": Case(3, "rates", {"train.schedule": "cosine_with_restarts"}),
    "train.weight_decay": Case(0.1, "optimizer"),
    "train.batch_size": Case(4, "batches"),
    "train.gradient_accumulation": Case(2, "batches"),
    "train.per_question": Case(1, "batches"),
    "train.epochs": Case(2.0, "batches"),
    "train.gradient_checkpointing": Case("on", "recomputes"),
    "train.micro_batch_tokens": Case(64, "parts"),
    "train.seed": Case(7, "batches"),
    "validation.rows": Case(4, "validation"),
    "phases": Case([{"rows": [0, 8]}], "batches"),
    "strategy.kind": Case("sequential", "batches"),
    "strategy.slices": Case(3, "batches", {"strategy.kind": "sequential"}),
    "strategy.ends": Case([8, 24], "batches", {"strategy.kind": "sequential"}),
    "strategy.slice_rows": Case(4, "batches", {"strategy.kind": "sequential"}),
    "strategy.column": Case("solver", "batches", {"strategy.kind": "sequential", "strategy.slices": 2}),
    "strategy.replay_ratio": Case(0.5, "batches", {"strategy.kind": "replay"}),
    "strategy.optimizer_state": Case("keep", "phases", {"strategy.kind": "sequential"}),
    "strategy.start_from": Case("best", "phases", {"strategy.kind": "sequential"}),
    "strategy.presentations": Case(40, "batches", {"strategy.kind": "sequential"}),
    "strategy.cooldowns": Case([8], "rates", {"strategy.kind": "stream"}),
    "strategy.probe_rows": Case(3, "probes", {"strategy.kind": "sequential"}),
}
TRAINED: dict[str, Case] = {
    "out": Case("OTHER", "folder"),
    "train.max_grad_norm": Case(1e-4, "tensors"),
    "train.start_from": Case("ADAPTER", "losses"),
    "validation.every": Case(1, "validations"),
    "checkpoint.every": Case(1, "checkpoints"),
    "checkpoint.keep": Case(1, "checkpoints", {"checkpoint.every": 1}),
    "checkpoint.replica": Case("REPLICA", "copies"),
    "track.to": Case(["tensorboard"], "trackers"),
}
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "data.path": ("./nothing", MissingError, "nothing: no such prepared dataset"),
    "model.path": ("./nothing", MissingError, "model.path = './nothing': no such file or folder"),
    "model.device": ("cuda", ConfigError, "model.device = 'cuda': no CUDA GPU is visible"),
}
# Where else a key is shown to matter, since here it cannot.
ELSEWHERE = {
    "train.compile": "tests/model/test_compiled.py",  # a GPU's
    "train.cuda_graphs": "tests/model/test_gpu.py",
    "train.non_finite": "tests/training/test_step.py",
    "train.deterministic": "tests/training/test_gpu_resume.py",
    "session.hours": "tests/test_cli.py",
    "train.memory_gib": "tests/training/test_fit.py",
    **dict.fromkeys(("track.project", "track.name", "track.group"), "tests/trackers/test_trackers.py"),
}


def test_every_key_has_an_entry() -> None:
    tables: list[Any] = [PREPARED, TRAINED, REFUSED, ELSEWHERE]
    entries = [key for table in tables for key in table]
    assert sorted(entries) == sorted(config.keys(config.Run)), "add a new key to one of the tables"
    root = Path(__file__).parents[2]
    for key, place in ELSEWHERE.items():
        assert key.rpartition(".")[2] in (root / place).read_text(encoding="utf-8"), place


@dataclass(frozen=True)
class Place:
    data: Path
    model: Path
    folder: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("settings")
    data = prepared(list(generate.generate(12, solutions_per_question=4, seed=3)), folder / "data", 12)
    return Place(data, write_folder(folder / "model"), folder)


def with_values(run: config.Run, values: dict[str, Any]) -> config.Run:
    """The run with other values under dotted keys."""
    changed = config.as_dict(run)
    for key, value in values.items():
        table: Any = changed
        *tables, name = key.split(".")
        for part in tables:
            table = table[part]
        table[name] = value
    return config.build(config.Run, changed, "test")


def base_run(place: Place, out: Path) -> config.Run:
    return with_values(settings(out, place.data, place.model), {"data.rows": 24})


def facets(run: config.Run) -> dict[str, Any]:
    """What `prepare` makes of a run, in parts that can be compared."""
    state = trainer.prepare(run, Console(quiet=True))
    steps = range(len(state.plan))
    made = [feed.micro_batches(state, step) for step in steps]
    weights = {name: value.detach().clone() for name, value in state.model.named_parameters() if value.requires_grad}
    layers = [module for module in state.model.modules() if hasattr(module, "lora_dropout")]
    return {
        "rows": len(state.train.labels),
        "precision": str({value.dtype for value in state.base.model.parameters()}),
        "frame": state.encoder.frame.to_json(),
        "tokens": [[len(row) for micro in micros for row in micro.rows] for _, micros, _ in made],
        "adapter": {name: tuple(value.shape) for name, value in weights.items()},
        "scale": [dict(layer.scaling) for layer in layers],
        "dropout": [str(layer.lora_dropout) for layer in layers],
        "rates": [state.plan.lr(step) for step in steps],
        "optimizer": (type(state.optimizer).__name__, state.optimizer.param_groups[0]["weight_decay"]),
        "batches": [np.asarray(state.plan.rows(step)).tolist() for step in steps],
        "recomputes": [module.training for module in trainer.load.layers(state.model)],
        "parts": [len(micros) for _, micros, _ in made],
        "validation": len(state.validation.labels),
        "phases": [(phase.optimizer_state, phase.start_from) for phase in state.plan.phases],
        "probes": [len(part.trained) for part in state.source.slices],
    }


def test_the_same_settings_show_the_same(place: Place, tmp_path: Path) -> None:
    assert facets(base_run(place, tmp_path / "a")) == facets(base_run(place, tmp_path / "b"))


@pytest.mark.parametrize("key", PREPARED)
def test_a_setting_shows_in_what_is_prepared(key: str, place: Place, tmp_path: Path) -> None:
    case = PREPARED[key]
    before = with_values(base_run(place, tmp_path / "run"), case.also)
    after = with_values(before, {key: case.value})
    assert facets(before)[case.shows_in] != facets(after)[case.shows_in]


def left(run: config.Run) -> dict[str, Any]:
    """What a short run leaves, in parts that can be compared."""
    trained(run)
    folder = Path(run.out)
    return {
        "folder": str(folder),
        "tensors": {name: value.tolist() for name, value in tensors(folder).items() if name.startswith("adapter/")},
        "losses": losses(folder),
        "validations": (folder / "metrics.jsonl").read_text().count('"validation"'),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "copies": sorted(path.name for path in (folder.parent / "replica").glob("step-*")),
        "trackers": sorted(path.name for path in folder.glob("trackers/*")),
    }


@pytest.fixture(scope="module")
def plain(place: Place) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What a run leaves without the change; each such run is made once."""
    kept: dict[str, dict[str, Any]] = {}

    def get(also: dict[str, Any]) -> dict[str, Any]:
        name = json.dumps(also)
        if name not in kept:
            run = base_run(place, place.folder / f"plain-{len(kept)}")
            kept[name] = left(with_values(run, also))
        return kept[name]

    return get


@pytest.mark.parametrize("key", TRAINED)
def test_a_setting_shows_in_what_a_run_leaves(
    key: str, place: Place, plain: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    if key == "track.to":
        pytest.importorskip("tensorboard")
    case = TRAINED[key]
    before = plain(case.also)
    places = {"OTHER": tmp_path / "other", "REPLICA": tmp_path / "replica"}
    places["ADAPTER"] = Path(before["folder"]) / "adapter"
    value = str(places[case.value]) if isinstance(case.value, str) else case.value
    run = base_run(place, tmp_path / "run")
    after = left(with_values(with_values(run, case.also), {key: value}))
    assert before[case.shows_in] != after[case.shows_in]


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_that_cannot_be_met_is_refused(key: str, place: Place, tmp_path: Path) -> None:
    value, kind, told = REFUSED[key]
    if key == "model.device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(kind, match=told.replace(".", r"\.")):
        trainer.prepare(with_values(base_run(place, tmp_path / "run"), {key: value}), Console(quiet=True))
