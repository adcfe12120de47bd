"""Whole training runs on a tiny model: what a run leaves, that a stop changes nothing, that what must not matter does
not, that a NaN ends a run with nothing of it kept, and that the loop learns."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from rich.console import Console
from runs import assert_same, checkpoints, copied_until, losses, metrics, prepared, settings, tensors, trained
from safetensors.torch import load_file, save_file
from tiny_models import byte_level, tiny, worked_text

from veritune import config, durable
from veritune.data import dataset
from veritune.data.generate import generate
from veritune.errors import BusyError, ConfigError, DataError, ModelError, NonFiniteError
from veritune.model.adapter import read_about
from veritune.model.verdict import label_logits, label_loss
from veritune.model.verifier import Verifier
from veritune.quality.metrics import log_loss, measure
from veritune.report import folder
from veritune.tokens.trie import build
from veritune.training import checkpoint, distributed, progress, replica, status, trainer
from veritune.training import plan as plans
from veritune.training import step as steps
from veritune.training.feed import Micro, Rows
from veritune.training.session import Session


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated problems: 48 rows to train on (6 steps of 8) and 16 to validate on, of other questions."""
    return prepared(generate(16, solutions_per_question=4, seed=1), tmp_path_factory.mktemp("data") / "d", 16)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose label one word of the solution tells."""
    rng = random.Random(0)
    rows = [
        {"question": f"{i}?", "solution": f"{rng.randrange(1000)} {word * 3}", "is_correct": word == "pen "}
        for i in range(250)
        for word in ("pen ", "cup ")
    ]
    return prepared(rows, tmp_path_factory.mktemp("marked") / "d", 80)


def whole_run(out: Path, data: Path, model: Path, **changes: Any) -> config.Run:
    """A run with a checkpoint after each step, a validation after each second one, and dropout."""
    return settings(
        out,
        data,
        model,
        prompt={"max_length": 160},  # some rows are longer
        lora={"rank": 64, "alpha": 16, "dropout": 0.1},  # 64 x 64 numbers: enough for bitsandbytes to keep 8 bits
        train={"lr": 3e-3, "batch_size": 8, "per_question": 4, **changes},
        validation={"every": 2},
        checkpoint={"every": 1, "keep": 100},
    )


@pytest.fixture(scope="module", params=["adamw_torch", "adamw_8bit"])
def uninterrupted(
    request: pytest.FixtureRequest, data: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> config.Run:
    run = whole_run(tmp_path_factory.mktemp("whole") / "run", data, tiny_folder, optimizer=request.param)
    trained(run)
    return run


# What a run leaves.


def test_a_run_leaves_adapters_figures_and_every_step(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    intervals = {"validation": {"every": 2}, "checkpoint": {"every": 4}}
    run = settings(tmp_path / "run", data, tiny_folder, train={"lr": 0.05, "schedule": "constant"}, **intervals)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, rows=1000))
    quality, printed = trained(run)
    out = Path(run.out)
    lines = metrics(out)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert sum(line.get("rows", 0) for line in lines) == 48
    assert [line["step"] for line in lines if "validation" in line] == [2, 4, 6]
    assert [path.name for path in checkpoints(out)] == ["step-00000004", "step-00000006"]
    validations = {line["step"]: line["validation"] for line in lines if "validation" in line}
    left = json.loads((out / "evaluation.json").read_text())
    assert left["truncated_rows"] == 0
    assert left["validation"]["log_loss"] == validations[6]["log_loss"] == quality["log_loss"]
    assert json.loads((out / "run.json").read_text())["settings"] == config.as_dict(run)
    assert "6 of 8 examples" in printed
    assert "note: data.rows = 1,000: there are 48\n" in printed
    best = min(validations, key=lambda step: validations[step]["loss"])
    assert best < 6  # at this learning rate it gets worse
    prepared_data = dataset.load(data)
    for name, step in (("adapter", 6), ("best", best)):
        card = (out / name / "README.md").read_text(encoding="utf-8")
        assert prepared_data.fingerprint in card
        assert f"After step {step}," in card
        assert f"{validations[step]['accuracy']:.3f}" in card
        rows = Rows.of(prepared_data.validation)
        p = Verifier.load(out / name, device="cpu").score_rows(rows.questions, rows.solutions)
        again = measure(rows.labels, p, rows.groups)
        assert again["confusion"] == validations[step]["confusion"]
        assert again["log_loss"] == pytest.approx(validations[step]["log_loss"], rel=1e-9)


def test_the_best_adapter_is_that_of_the_loss_at_trains_share(tiny_folder: Path, tmp_path: Path) -> None:
    """Four of five validation rows are correct and three of five train rows: what says "correct" more often has the
    lower plain log loss there, and is not chosen for it."""
    made = generate(80, solutions_per_question=4, seed=5)
    rows = [row for i, row in enumerate(made) if row["is_correct"] or i % 4 == 0]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = config.Prepare(validation_rows=40, balance="0.6")
    dataset.prepare([str(tmp_path / "rows.jsonl")], tmp_path / "prepared", told)
    train = {"lr": 0.01, "schedule": "constant", "epochs": 0.75, "seed": 2}
    run = settings(tmp_path / "run", tmp_path / "prepared", tiny_folder, train=train, validation={"every": 1})
    trained(run)
    out, share = Path(run.out), float(dataset.load(tmp_path / "prepared").train["is_correct"].mean())
    assert share == pytest.approx(0.6, abs=0.02)
    assert read_about(out / "best").share == share
    found = {line["step"]: line["validation"] for line in metrics(out) if "validation" in line}
    by = {key: min(found, key=lambda step: found[step][key]) for key in ("loss", "log_loss")}
    assert by["loss"] != by["log_loss"]
    scores = pl.read_parquet(out / "scores-best.parquet")
    assert scores["step"][0] == by["loss"]
    labels, p = scores["is_correct"].to_numpy(), scores["p_correct"].to_numpy().astype(float)
    assert labels.mean() > share + 0.1
    assert found[by["loss"]]["loss"] == pytest.approx(log_loss(labels, p, share), abs=1e-6)
    card = (out / "best" / "README.md").read_text(encoding="utf-8")
    assert f"After step {by['loss']}," in card
    assert f"{found[by['loss']]['loss']:.3f}" in card
    assert folder.read(out).metrics.best == found[by["loss"]] | {"step": by["loss"]}


def test_a_run_whose_best_was_chosen_by_another_figure_chooses_anew(
    uninterrupted: config.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of an earlier version, with figures that know no `loss` and a best that none will get under."""

    def earlier(state: Any, saved: Any) -> Any:
        for found in (saved.state["at"]["quality"], saved.state["at"]["best_quality"]):
            del found["loss"]
        saved.state["at"]["best"] = 1e-3
        return progress.restore(state, saved)

    last = int(checkpoints(Path(uninterrupted.out))[-1].name.removeprefix("step-"))
    for step in (4, last):
        run = copied_until(uninterrupted, step, tmp_path / f"from-{step}")
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "restore", earlier)
            trained(run)
        found = {line["step"]: line["validation"]["loss"] for line in metrics(Path(run.out)) if "validation" in line}
        card = (Path(run.out) / "adapter" / "README.md").read_text(encoding="utf-8")
        assert f"After step {last}," in card
        if step < last:
            best = min((at for at in found if at > step), key=found.__getitem__)
            assert f"After step {best}," in (Path(run.out) / "best" / "README.md").read_text(encoding="utf-8")


# A stop changes nothing.


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    uninterrupted: config.Run, tmp_path: Path, step: int
) -> None:
    if uninterrupted.train.optimizer == "adamw_8bit":
        assert any(value.dtype == torch.uint8 for value in tensors(Path(uninterrupted.out)).values())
    again = copied_until(uninterrupted, step, tmp_path / "again")
    printed = trained(again)[1]
    assert f"going on after step {step}" in printed
    assert_same(Path(uninterrupted.out), Path(again.out))


def test_a_template_that_prints_the_time_does_not_change_the_prompt_of_a_run_that_goes_on(
    data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "dated"
    shutil.copytree(tiny_folder, model)
    template = model / "chat_template.jinja"
    template.write_text("Now: {{ strftime_now('%H:%M:%S.%f') }}\n" + template.read_text())
    whole = whole_run(tmp_path / "whole", data, model, epochs=0.5)
    trained(whole)
    again = copied_until(whole, 2, tmp_path / "again")
    trained(again)
    assert_same(Path(whole.out), Path(again.out))
    about = (Path(it.out) / "best" / "veritune.json" for it in (whole, again))
    assert next(about).read_bytes() == next(about).read_bytes()


def test_a_finished_run_stays_as_it_is(uninterrupted: config.Run, tmp_path: Path) -> None:
    again = copied_until(uninterrupted, 6, tmp_path / "again")
    trained(again)
    assert_same(Path(uninterrupted.out), Path(again.out))


def test_the_optimiser_state_matters(uninterrupted: config.Run, tmp_path: Path, monkeypatch: Any) -> None:
    """What the tests above compare does show whether the state was put back."""
    again = copied_until(uninterrupted, 3, tmp_path / "again")
    monkeypatch.setattr(progress, "restore_optimizer", lambda *unused: None)
    trained(again)
    ends = [load_file(Path(run.out) / "adapter" / "adapter_model.safetensors") for run in (uninterrupted, again)]
    assert all(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(
    uninterrupted: config.Run, data: Path, tiny_folder: Path, tmp_path: Path, number: int
) -> None:
    if uninterrupted.train.optimizer != "adamw_torch":
        pytest.skip("once is enough")
    run = whole_run(tmp_path / "run", data, tiny_folder)
    rare = config.build(
        config.Run, {**config.as_dict(run), "checkpoint": {"every": 1000, "keep": 100}}, "test"
    )  # the stop alone saves

    def ask() -> None:
        file = Path(run.out) / "metrics.jsonl"
        while not file.exists() or b'"step": 2' not in file.read_bytes():
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=ask)
    sender.start()
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        trained(rare)
    sender.join()
    assert signal.getsignal(number) is before
    assert len(checkpoints(Path(run.out))) == 1
    assert not (Path(run.out) / "adapter").exists()
    trained(run)
    assert_same(Path(uninterrupted.out), Path(run.out))


def test_a_resume_refuses_other_mathematics_and_takes_other_intervals(
    uninterrupted: config.Run, tmp_path: Path
) -> None:
    again = copied_until(uninterrupted, 4, tmp_path / "again")
    values = config.as_dict(again)
    for table, key, value in (("train", "lr", 1e-4), ("train", "seed", 3), ("lora", "dropout", 0.0)):
        changed = {**values, table: {**values[table], key: value}}
        with pytest.raises(ConfigError, match=rf"{table}\.{key} was {values[table][key]}, is {value}"):
            trained(config.build(config.Run, changed, "test"))
    free = {**values, "validation": {"every": 5}, "checkpoint": {"every": 3, "keep": 1}}
    trained(config.build(config.Run, free, "test"))
    out = Path(again.out)
    assert [line["step"] for line in metrics(out) if "validation" in line] == [2, 4, 5, 6]
    assert [path.name for path in checkpoints(out)] == ["step-00000006"]
    left, right = (load_file(Path(it.out) / "adapter" / "adapter_model.safetensors") for it in (uninterrupted, again))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_losses_on_other_validation_rows_are_not_compared(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def run(rows: int, name: str = "whole") -> config.Run:
        how = {"validation": {"every": 1, "rows": rows}, "checkpoint": {"every": 1, "keep": 9}}
        # At this learning rate it gets worse.
        return settings(tmp_path / name, data, tiny_folder, train={"lr": 0.05, "schedule": "constant"}, **how)

    trained(run(8))
    copied_until(run(8), 3, tmp_path / "again")
    printed = trained(run(16, "again"))[1]
    assert "validation is on 16 rows, before on 8: the next one is the best" in printed
    lines = {line["step"]: line["validation"] for line in metrics(tmp_path / "again") if "validation" in line}
    assert [lines[step]["rows"] for step in range(1, 7)] == [8, 8, 8, 16, 16, 16]
    best = min(range(4, 7), key=lambda step: lines[step]["loss"])
    assert lines[3]["loss"] < lines[best]["loss"]
    card = (tmp_path / "again" / "best" / "README.md").read_text(encoding="utf-8")
    assert f"After step {best}, on 16 held-out rows" in card
    shown = folder.read(tmp_path / "again").metrics.best
    assert shown is not None
    assert shown["step"] == best
    assert "before on" not in trained(run(16, "again"))[1]
    assert "before on" not in trained(run(8, "again"))[1]  # nothing is left to validate


def test_a_folder_of_other_things_is_not_a_run(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        trained(settings(tmp_path, data, tiny_folder))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_dataset_without_validation_rows_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    data = prepared(generate(4, seed=1), tmp_path / "d", 0)
    with pytest.raises(DataError, match=r"rows in both train and validation; prepare it .*--validation-rows N"):
        trained(settings(tmp_path / "run", data, tiny_folder))


def test_rows_of_one_label_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row | {"is_correct": True}) + "\n" for row in generate(8, seed=1)))
    data = config.Prepare(balance="none", validation_rows=2)
    dataset.prepare([str(rows)], tmp_path / "prepared", data)
    with pytest.raises(DataError, match="rows to train on are True, so there is nothing to tell apart"):
        trained(settings(tmp_path / "run", tmp_path / "prepared", tiny_folder))
    assert not (tmp_path / "run").exists()


# A number that is none.


def poison(name: str) -> Callable[..., Any]:
    """`micro_loss` with a loss, or a gradient, that is NaN in the third step."""
    real, calls = steps.micro_loss, []

    def loss(state: trainer.Training, micro: Micro) -> torch.Tensor:
        calls.append(None)
        value = real(state, micro)
        if len(calls) < 3:
            return value
        return (
            value * math.nan
            if name == "loss"
            else value + 0 * sum(p.sum().sub(p.sum()).sqrt() for p in state.parameters)
        )

    return loss


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_ends_the_run_with_nothing_of_it_kept(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: Any, what: str
) -> None:
    run = settings(
        tmp_path / "run", data, tiny_folder, train={"micro_batch_tokens": 10**5}, checkpoint={"every": 1, "keep": 9}
    )
    with monkeypatch.context() as patch:
        patch.setattr(steps, "micro_loss", poison(what))
        with pytest.raises(NonFiniteError) as error:
            trained(run)
    rows = Rows.of(dataset.load(data).train)
    third = plans.make(run.train, rows.groups, rows.labels).rows(2)
    assert "step 3: the " + what + " is not finite" in str(error.value)
    assert "model.base" not in str(error.value)  # which is fp32: there is nothing finer
    assert all(rows.ids[row] in str(error.value) for row in third)
    out = Path(run.out)
    assert [line["step"] for line in metrics(out)] == [1, 2]
    assert [path.name for path in checkpoints(out)] == ["step-00000001", "step-00000002"]
    assert not (out / "adapter").exists()
    for file in out.rglob("*.safetensors"):
        assert all(bool(value.isfinite().all()) for value in load_file(file).values() if value.is_floating_point())
    trained(run)  # and it goes on from there
    assert len(losses(out)) == 6


@pytest.mark.parametrize("loss", [0.0, 1.0])
def test_a_gradient_of_zero_is_an_error_unless_the_loss_is_zero_too(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: Any, loss: float
) -> None:
    """Rows known for certain have neither; a loss without a gradient means that the layers let none through."""

    def flat(state: trainer.Training, micro: Micro) -> torch.Tensor:
        return loss + 0 * sum(p.sum() for p in state.parameters)

    monkeypatch.setattr(steps, "micro_loss", flat)
    run = settings(tmp_path / "run", data, tiny_folder)
    if loss:
        with pytest.raises(NonFiniteError, match="step 1: the gradient is exactly zero"):
            trained(run)
        assert losses(tmp_path / "run") == []
    else:
        trained(run)
        assert losses(tmp_path / "run") == [0.0] * 6


def test_an_adapter_with_a_nan_is_no_start(
    data: Path, tiny_folder: Path, uninterrupted: config.Run, tmp_path: Path
) -> None:
    shutil.copytree(Path(uninterrupted.out) / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    values = load_file(file)
    next(iter(values.values()))[0, 0] = math.nan
    save_file(values, file, metadata={"format": "pt"})
    run = whole_run(tmp_path / "run", data, tiny_folder, start_from=str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="not finite"):
        trained(run)
    assert not (tmp_path / "run").exists()


# What must not matter, and what must.


def test_how_a_step_is_computed_does_not_change_what_is_learnt(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    found = {}
    for name, train in {
        "whole": {},
        "accumulated": {"batch_size": 4, "gradient_accumulation": 2},
        "cut": {"micro_batch_tokens": 200},
        "recomputed": {"gradient_checkpointing": "on"},
    }.items():
        run = settings(tmp_path / name, data, tiny_folder, train={"micro_batch_tokens": 10**5, **train})
        trained(run)
        found[name] = metrics(tmp_path / name)
    assert found["accumulated"] == found["whole"]
    for name in ("cut", "recomputed"):
        for ours, whole in zip(found[name][:6], found["whole"][:6], strict=True):
            assert ours["loss"] == pytest.approx(whole["loss"], rel=1e-5), name
            assert ours["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3), name


def test_seed_and_schedule_decide(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    for name, train in {"a": {}, "b": {}, "seed": {"seed": 2}, "slow": {"warmup_ratio": 0.9}}.items():
        trained(settings(tmp_path / name, data, tiny_folder, train=train))
    a, seed, slow = (losses(tmp_path / name) for name in ("a", "seed", "slow"))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert a[0] != seed[0]
    assert a[0] == slow[0]
    assert a[1] != slow[1]


def test_long_rows_are_counted(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run = settings(tmp_path / "run", data, tiny_folder, prompt={"max_length": 160}, train={"epochs": 2})
    trained(run)
    counted = json.loads((tmp_path / "run" / "evaluation.json").read_text())["truncated_rows"]
    assert 0 < counted <= 96
    assert counted % 2 == 0  # two epochs


def test_a_run_starts_from_an_adapter(data: Path, tiny_folder: Path, uninterrupted: config.Run, tmp_path: Path) -> None:
    before = Path(uninterrupted.out) / "adapter"
    run = settings(
        tmp_path / "run",
        data,
        tiny_folder,
        prompt={"max_length": 160},
        lora={"rank": 64, "alpha": 16},
        train={"start_from": str(before), "seed": 5},
    )
    assert "this adapter learnt to" not in trained(run)[1]
    rows = Rows.of(dataset.load(data).train)
    first = plans.make(run.train, rows.groups, rows.labels).rows(0)
    verifier = Verifier.load(before, device="cpu")
    ids, _ = verifier.encoder.rows([rows.questions[i] for i in first], [rows.solutions[i] for i in first])
    with torch.inference_mode():
        scored = label_logits(verifier.model, build(ids), verifier.device)
        loss = label_loss(scored, torch.from_numpy(rows.labels[first]), verifier.encoder.frame.answer_ids) / len(first)
    assert losses(tmp_path / "run")[0] == pytest.approx(float(loss), rel=1e-5)
    with pytest.raises(ConfigError, match="rank 64 instead of 8"):
        trained(settings(tmp_path / "other", data, tiny_folder, train={"start_from": str(before)}))
    words = {"prompt": {**vars(run.prompt), "answers": ["Yes", "No"]}, "lora": vars(run.lora), "train": vars(run.train)}
    _, printed = trained(settings(tmp_path / "words", data, tiny_folder, **words))
    assert f"'{before}': this adapter learnt to answer 'True' or 'False', not 'Yes' or 'No'" in printed
    (plain := tmp_path / "plain").mkdir()  # PEFT's own, which does not tell
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(before / name, plain)
    words["train"] = {**vars(run.train), "start_from": str(plain)}
    assert "this adapter learnt to" not in trained(settings(tmp_path / "untold", data, tiny_folder, **words))[1]


# It learns.


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [("adamw_torch", 1e-2), ("adamw_8bit", 1e-2), ("paged_adamw_32bit", 1e-2), ("lion_8bit", 2e-3)],
)
def test_it_learns_what_one_word_tells(
    marked: Path, tiny_folder: Path, tmp_path: Path, optimizer: str, lr: float
) -> None:
    run = settings(
        tmp_path / "run",
        marked,
        tiny_folder,
        lora={"rank": 64, "alpha": 64},
        train={"lr": lr, "optimizer": optimizer, "epochs": 1.5, "batch_size": 16, "warmup_ratio": 0.1},
    )
    quality = trained(run)[0]
    found = losses(tmp_path / "run")
    assert len(found) <= 60
    assert quality["auroc"] > 0.9
    assert sum(found[-5:]) < 0.5 * sum(found[:5])


def test_a_model_that_looks_back_a_little_only_is_trained_row_by_row(data: Path, tmp_path: Path) -> None:
    tokenizer = byte_level(worked_text())
    model = tiny("mistral", vocab_size=len(tokenizer), sliding_window=32)
    for it in (model, tokenizer):
        it.save_pretrained(tmp_path / "mistral")
    run = settings(
        tmp_path / "run",
        data,
        tmp_path / "mistral",
        train={"lr": 1e-2, "epochs": 1.5},
    )
    printed = trained(run)[1]
    assert "rows do not share their beginnings, which is slower, because" in printed
    found = losses(tmp_path / "run")
    assert len(found) == 9
    assert sum(found[-2:]) < sum(found[:2])


@pytest.mark.alone
def test_the_time_until_a_save_is_on_the_disk_is_learnt(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a limit there must be time for it; the copy in memory, which is all the loop waits for, is nothing."""
    took: dict[str, float] = {}
    write, learn = checkpoint._write, Session.took

    def slow(*args: Any) -> Path:
        time.sleep(0.2)
        return write(*args)

    def learnt(self: Session, kind: str, seconds: float) -> None:
        took[kind] = max(took.get(kind, 0), seconds)
        learn(self, kind, seconds)

    monkeypatch.setattr(checkpoint, "_write", slow)
    monkeypatch.setattr(Session, "took", learnt)
    trained(settings(tmp_path / "run", data, tiny_folder, checkpoint={"every": 2}))
    assert took["save"] >= 0.2
    assert took.keys() == {"step", "validation", "save"}


def test_two_processes_cannot_train_one_run_at_once(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run = settings(tmp_path / "run", data, tiny_folder)
    with durable.alone_in(tmp_path / "run"), pytest.raises(BusyError, match="another process works in"):
        trained(run)
    assert not (tmp_path / "run").exists()
    trained(run)
    assert (tmp_path / "run" / "adapter").exists()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_run_whose_terminal_is_gone_goes_on_to_its_end(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run = settings(tmp_path / "run", data, tiny_folder, validation={"every": 2})
    reader, terminal = os.openpty()

    def leave(state: trainer.Training, step: int, values: dict[str, Any]) -> None:
        if step == 1:
            os.close(reader)

    with suppress(OSError), os.fdopen(terminal, "w") as file:  # closing it writes what it could not
        trainer.train(run, Console(file=file), watch=leave)
    assert len(losses(tmp_path / "run")) == 6
    assert status.read(tmp_path / "run")["sessions"][-1]["state"] == "finished"


def test_other_processes_need_not_wait_for_a_slow_replica(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would for ten minutes, and then take the first one, which does, for dead."""
    met, copy, found = threading.Event(), replica._copy, []

    def slow(*inputs: Any) -> bool:
        found.append(met.wait(10))
        return copy(*inputs)

    monkeypatch.setattr(replica, "_copy", slow)
    monkeypatch.setattr(distributed.World, "wait", lambda world: met.set())
    trained(settings(tmp_path / "run", data, tiny_folder, checkpoint={"replica": str(tmp_path / "drive")}))
    assert found == [True]
    assert [path.name for path in (tmp_path / "drive").iterdir()] == [checkpoints(tmp_path / "run")[-1].name]
