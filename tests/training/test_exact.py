"""An interrupted run ends, bit for bit, as one that was not: for each optimiser, at every step, inside a step, inside a
validation and inside a probe. And it would not, were any one part of what a checkpoint holds missing."""

import dataclasses
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console
from runs import assert_same, checkpoints, copied_until, metrics, settings

from veritune import config
from veritune.model import load
from veritune.training import measure, trainer
from veritune.training import step as steps
from veritune.training.checkpoint import Saved
from veritune.training.progress import At

PHASES = [
    {"rows": [0, 16], "lr": 0.05, "schedule": "constant"},
    {"rows": [16, 32], "optimizer_state": "keep", "start_from": "best"},
    {"rows": [32, 40], "replay_ratio": 1.0},
]
STREAM = {"kind": "stream", "slices": 2, "cooldowns": [16], "probe_rows": 4}


def run_of(out: Path, data: Path, model: Path, **tables: Any) -> config.Run:
    """Six steps of two accumulations in three phases, each computed in several parts, with dropout and rows cut."""
    small = settings(
        out,
        data,
        model,
        prompt={"max_length": 160},
        # 64 x 64 numbers: enough for bitsandbytes to keep 8 bits
        lora={"rank": 64, "dropout": 0.1, "targets": ["q_proj", "v_proj"]},
        train={
            "lr": 3e-3,
            "batch_size": 4,
            "gradient_accumulation": 2,
            "micro_batch_tokens": 400,
            "decay_ratio": 0.5,
            **tables.pop("train", {}),
        },
        validation={"every": 2},
        checkpoint={"every": 1, "keep": 100},
    )
    tables = tables or {"phases": PHASES, "strategy": {"probe_rows": 0}}
    return config.build(config.Run, {**config.as_dict(small), **tables}, "test")


def go(run: config.Run, base: load.Base) -> None:
    trainer.train(run, Console(file=io.StringIO(), width=200), base)


def finished(out: Path, base: load.Base, data: Path, model: Path, **tables: Any) -> config.Run:
    run = run_of(out, data, model, **tables)
    go(run, base)
    return run


def steps_of(run: config.Run) -> int:
    return int(checkpoints(Path(run.out))[-1].name[5:])


def same(a: Path, b: Path) -> None:
    """Everything a run leaves, and the last checkpoint's whole state."""
    assert_same(a, b)
    left, right = (json.loads((checkpoints(it)[-1] / "state.json").read_bytes()) for it in (a, b))
    assert left == right
    cards = [(it / "best" / "README.md").read_text().partition("| setting")[0] for it in (a, b)]
    assert cards[0] == cards[1]
    lines = [(line["step"], *sorted(set(line) & {"loss", "validation"})) for line in metrics(b)]
    assert len(lines) == len(set(lines))
    left, right = (it / "forgetting.json" for it in (a, b))
    assert left.exists() == right.exists()
    assert not left.exists() or left.read_bytes() == right.read_bytes()


@pytest.mark.parametrize("optimizer", get_args(config.Optimizer))
def test_every_optimiser_goes_on_bit_for_bit_from_every_step(
    base: load.Base, data: Path, tiny_folder: Path, tmp_path: Path, optimizer: str
) -> None:
    whole = finished(tmp_path / "whole", base, data, tiny_folder, train={"optimizer": optimizer})
    assert steps_of(whole) == 6
    for step in range(1, 6):
        again = copied_until(whole, step, tmp_path / f"{step}")
        go(again, base)
        same(tmp_path / "whole", tmp_path / f"{step}")


@pytest.fixture(scope="module")
def whole(base: load.Base, data: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> config.Run:
    return finished(tmp_path_factory.mktemp("whole") / "run", base, data, tiny_folder)


@pytest.fixture(scope="module")
def stream(base: load.Base, data: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> config.Run:
    return finished(tmp_path_factory.mktemp("stream") / "run", base, data, tiny_folder, strategy=STREAM)


def signalled(
    run: config.Run, base: load.Base, owner: Any, name: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes on with a run until a SIGTERM in the at-th call of a function, which stops it soon after."""
    real, calls = getattr(owner, name), 0

    def call(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        with pytest.raises(trainer.Stop, match="SIGTERM"):
            go(run, base)
    assert calls == at


PLACES = [("whole", step, "micro_loss", 2) for step in range(5)]  # step 4 computes its last part then
PLACES += [("whole", 2, "micro_loss", call) for call in (1, 3)]
PLACES += [("whole", 1, "score_ids", 1), ("whole", 5, "score_ids", 1)]
PLACES += [("stream", step, "micro_loss", 2) for step in (1, 2, 3)]  # before, in and after the cooldown
PLACES += [("stream", 2, "score_ids", call) for call in (1, 3)]


@pytest.fixture
def pair(request: pytest.FixtureRequest, kind: str, step: int, tmp_path: Path) -> tuple[config.Run, config.Run]:
    """A run of a kind that is done, and a copy of it as it was after a step."""
    want: config.Run = request.getfixturevalue(kind)
    return want, copied_until(want, step, tmp_path / "again")


@pytest.mark.parametrize(("kind", "step", "name", "call"), PLACES)
def test_a_signal_inside_a_step_or_a_validation_changes_nothing(
    pair: tuple[config.Run, config.Run], base: load.Base, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    want, again = pair
    signalled(again, base, steps if name == "micro_loss" else measure, name, call, monkeypatch)
    assert not Path(again.out, "adapter").exists()
    go(again, base)
    same(Path(want.out), Path(again.out))


class Killed(BaseException):
    """Nothing is saved after it, as after a kill."""


@pytest.mark.parametrize(("kind", "step", "call"), [("whole", 1, 1), ("stream", 2, 1), ("stream", 2, 3)])
def test_a_validation_between_a_stop_and_a_kill_is_not_kept_twice(
    pair: tuple[config.Run, config.Run], base: load.Base, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The stop, before the validation or a probe is done, saves the step; the next session measures, and is killed
    before it has saved that."""
    want, again = pair
    signalled(again, base, measure, "score_ids", call, monkeypatch)

    def kill(*unused: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", kill)
        with pytest.raises(Killed):
            go(again, base)
    last = metrics(Path(again.out))[-1]
    assert "validation" in last
    assert last["step"] == int(checkpoints(Path(again.out))[-1].name[5:])
    go(again, base)
    same(Path(want.out), Path(again.out))


# What a checkpoint holds is needed, every part of it.


def without(saved: Saved, part: str) -> Saved:
    """A checkpoint in which one part is as in a fresh run."""
    kind, _, name = part.partition(":")
    tensors, state = {**saved.tensors}, json.loads(json.dumps(saved.state))
    if kind == "at":
        fresh = dataclasses.asdict(At())[name]
        state["at"][name] = None if name == "best" else fresh
    elif kind == "group" and name == "best":
        del tensors["best"]
    elif kind == "group":
        tensors[name] = {key: torch.zeros_like(value) for key, value in tensors[name].items()}
    else:
        group = tensors["optimizer"]
        assert any(key.endswith(f".{name}") for key in group)
        tensors["optimizer"] = {
            key: torch.zeros_like(value) if key.endswith(f".{name}") else value for key, value in group.items()
        }
    return dataclasses.replace(saved, tensors=tensors, state=state)


AT = [f"at:{field.name}" for field in dataclasses.fields(At) if not field.name.startswith("skipped")]
PARTS = [("whole", part) for part in (*AT, "group:adapter", "group:best")]
PARTS += [("whole", f"moment:{name}") for name in ("exp_avg", "exp_avg_sq", "step")]
PARTS += [("stream", "group:fork_adapter"), ("stream", "group:fork_optimizer")]


@pytest.mark.parametrize(("kind", "part"), PARTS, ids=[part for _, part in PARTS])
def test_without_any_one_part_the_run_would_end_elsewhere(
    request: pytest.FixtureRequest,
    base: load.Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    part: str,
) -> None:
    want: config.Run = request.getfixturevalue(kind)
    real = trainer.load_latest

    def load_latest(*args: Any, **named: Any) -> Saved | None:
        saved = real(*args, **named)
        assert saved is not None
        return without(saved, part) if not part.startswith("group:fork") or "fork" in saved.state else saved

    monkeypatch.setattr(trainer, "load_latest", load_latest)
    for step in range(steps_of(want), 0, -1):
        again = copied_until(want, step, tmp_path / f"{step}")
        if part in ("at:best_quality", "group:best"):
            shutil.rmtree(tmp_path / f"{step}" / "best", ignore_errors=True)
        try:
            go(again, base)
            same(Path(want.out), Path(again.out))
        except Exception:
            return
    pytest.fail(f"no step at which {part} matters")
