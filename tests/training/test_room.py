"""Memory that runs out in the middle of a step costs no step; where nothing takes less, it is said."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from rich.console import Console
from runs import metrics, prepared, settings, trained
from torch import Tensor

from veritune import config
from veritune.data.generate import generate
from veritune.errors import RoomError
from veritune.model import verdict, verifier
from veritune.model.shape import Shape
from veritune.model.verifier import MICRO_BATCH_TOKENS
from veritune.tokens.trie import Trie, build
from veritune.training import fit, memory, setup, trainer
from veritune.training import room as rooms
from veritune.training import step as steps
from veritune.training.state import Training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows to train on, 6 steps of 8."""
    return prepared(generate(16, solutions_per_question=4, seed=1), tmp_path_factory.mktemp("data") / "d", 16)


def run_of(out: Path, data: Path, model: Path) -> config.Run:
    return settings(out, data, model, train={"micro_batch_tokens": 400})


class RunsOut:
    """Memory runs out in the backward passes (from 0) that are named."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *which: int) -> None:
        self.passes = -1
        whole = verdict.label_loss

        def loss(*inputs: Any) -> Tensor:
            self.passes += 1
            out = whole(*inputs)
            if self.passes in which:  # when the gradient reaches the loss, so in the middle of a backward pass
                out.register_hook(self._fail)
            return out

        monkeypatch.setattr(steps, "label_loss", loss)

    @staticmethod
    def _fail(grad: Tensor) -> None:
        raise torch.OutOfMemoryError("no memory for this gradient")


@pytest.mark.parametrize("which", [(0,), (3, 4)], ids=["at once", "twice within a step"])
def test_a_step_in_which_memory_ran_out_is_done_again(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: tuple[int, ...]
) -> None:
    whole = run_of(tmp_path / "whole", data, tiny_folder)
    trained(whole)
    RunsOut(monkeypatch, *which)
    disturbed = run_of(tmp_path / "disturbed", data, tiny_folder)
    _, said = trained(disturbed)
    assert said.count("memory ran out") == len(which)
    assert "3 of 3 layers computed again" in said
    ours, theirs = metrics(tmp_path / "disturbed"), metrics(tmp_path / "whole")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        if "loss" in b:
            assert (a["rows"], a["lr"]) == (b["rows"], b["lr"])
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_memory_for_less_than_a_row_ends_the_run_with_advice(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunsOut(monkeypatch, *range(1000))
    with pytest.raises(RoomError, match=r"single row.*max_length"):
        trained(run_of(tmp_path / "run", data, tiny_folder))
    assert not metrics(tmp_path / "run")


@pytest.mark.parametrize("least", [250, 10], ids=["for all at once", "for a row"])
def test_a_validation_for_which_memory_does_not_suffice_is_computed_in_smaller_parts(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    """Beside recorded passes, which hold a step's memory, there may be little left."""
    whole, _ = trained(run_of(tmp_path / "whole", data, tiny_folder))
    computed: list[int] = []

    def logits(model: Any, trie: Trie, device: torch.device) -> Tensor:
        if trie.tokens > least:
            raise torch.OutOfMemoryError("no memory for so many tokens")
        computed.append(trie.tokens)
        return verdict.label_logits(model, trie, device)

    monkeypatch.setattr(verifier, "label_logits", logits)
    run = run_of(tmp_path / "disturbed", data, tiny_folder)
    if least == 10:
        with pytest.raises(torch.OutOfMemoryError):
            trained(run)
        return
    found, _ = trained(run)
    assert computed
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_memory_that_runs_out_while_weights_change_is_not_tried_again(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory for the optimiser")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(RoomError, match="step 1: memory ran out while weights were changed"):
        trained(run_of(tmp_path / "run", data, tiny_folder))


def test_steps_that_are_not_foreseen_begin_with_fewer_tokens_than_scoring_which_keeps_nothing(
    data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    state = trainer.prepare(settings(tmp_path / "run", data, tiny_folder), Console(quiet=True))
    assert (state.planned, state.budget) == (None, rooms.UNFORESEEN["cpu"])
    assert rooms.UNFORESEEN["cuda"] < MICRO_BATCH_TOKENS["cuda"]


@pytest.mark.parametrize(("room", "held"), [(10 * memory.GIB, "bf16"), (1.0, "nf4")], ids=["room", "none"])
def test_an_nf4_base_is_held_unpacked_only_where_there_is_room(
    data: Path, tiny_folder: Path, tmp_path: Path, room: float, held: str
) -> None:
    run = settings(tmp_path / "run", data, tiny_folder)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, base="nf4"))
    state = trainer.prepare(run, Console(quiet=True))
    table = state.train
    rows, _ = state.encoder.rows(table.questions[:8], table.solutions[:8])
    shape, of = Shape.of(state.base.model.config.to_dict()), fit.mix([rows])
    job = memory.Job("nf4", run.lora, run.train.optimizer, compiled=False)
    state.planned = rooms.Planned(shape, job, of, fit.choose(shape, job, run.train, of, room))
    before = verdict.label_logits(state.model, build(rows), state.base.device)
    rooms.unpack(state)
    assert state.planned.job.precision == held
    assert state.base.unpacked == (held == "bf16")  # who trains the next adapter on it plans with that
    assert any(isinstance(module, Linear4bit) for module in state.model.modules()) == (held == "nf4")
    assert torch.equal(verdict.label_logits(state.model, build(rows), state.base.device), before)


def with_room(data: Path, model: Path, out: Path, spare: float, *, recompute: bool = False) -> Training:
    """A run of which 8 rows at once are planned, in so much more room than a pass needs: 1 is that of a second one."""
    state = trainer.prepare(settings(out, data, model), Console(quiet=True))
    table, train = state.train, config.Train(gradient_checkpointing="auto" if recompute else "off")
    rows, _ = state.encoder.rows(table.questions[:8], table.solutions[:8])
    shape, of = Shape.of(state.base.model.config.to_dict()), fit.mix([rows])
    job = memory.Job("bf16", state.run.lora, train.optimizer, compiled=True)
    whole = fit.choose(shape, job, train, of, memory.GIB)
    room = whole.peak.total + spare * (whole.peak.kept + whole.peak.working)
    rooms.use(state, rooms.Planned(shape, job, of, fit.choose(shape, job, train, of, room)))
    return state


@pytest.mark.parametrize(("spare", "smaller"), [(1.1, False), (0.3, True)], ids=["two", "less"])
def test_recorded_passes_leave_room_for_a_pass_of_another_size(
    data: Path, tiny_folder: Path, tmp_path: Path, spare: float, smaller: bool
) -> None:
    state = with_room(data, tiny_folder, tmp_path / "run", spare)
    assert state.planned is not None
    was = state.planned.fit
    assert rooms.for_recording(state)
    now = state.planned.fit
    assert now.room == was.room
    assert (now.budget < was.budget) == smaller
    assert now.peak.total + now.peak.kept + now.peak.working <= was.room
    assert state.budget == now.budget


def test_what_is_not_recorded_is_computed_as_it_was_planned(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = with_room(data, tiny_folder, tmp_path / "little", -0.8, recompute=True)
    before = little.planned, little.budget
    assert "memory does not suffice" in str(setup._recorded(little, little))
    assert (little.planned, little.budget) == before
    less = with_room(data, tiny_folder, tmp_path / "less", 0.3)
    before = less.planned, less.budget
    budgets = []

    def fails(*inputs: Any, **named: Any) -> tuple[None, str]:
        budgets.append(less.budget)
        return None, "recording failed"

    monkeypatch.setattr(setup, "record", fails)
    assert setup._recorded(less, less) == "recording failed"
    assert budgets[0] < less.budget
    assert (less.planned, less.budget) == before
