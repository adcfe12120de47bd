"""Whole sweeps with a tiny model: the files they leave, divergence, processes side by side, kills and stops."""

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from made_sweeps import board, point, prepared, run_values
from rich.console import Console

from veritune import cli, config
from veritune.data import dataset
from veritune.data.generate import generate
from veritune.errors import ConfigError, DataError, MissingError, VerituneError
from veritune.model import load
from veritune.report import page
from veritune.search import search, space
from veritune.search.board import TRIES, Board, Taken
from veritune.search.trial import Desk, Diverged, Losses, settings_of
from veritune.starter import toml
from veritune.trackers import follow
from veritune.training import status, step, trainer
from veritune.training.trainer import train

SPACE = {"train.lr": {"log": [1e-4, 1e-2]}, "train.optimizer": {"choice": ["adamw_torch", "lion_8bit"]}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture
def values(data: Path, tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A run in the test's own folder."""
    return run_values(tmp_path / "run", data, tiny_folder)


def swept(
    values: dict[str, Any], declared: dict[str, Any] = SPACE, **settings: Any
) -> tuple[list[dict[str, Any]], str, Path]:
    """Runs a sweep: its trials, what it printed, and its folder."""
    run = config.build(config.Run, values, "test")
    chosen = config.build(config.Sweep, {"trials": 3, "rows": 48, "validations": 3, **settings}, "test")
    printed = io.StringIO()
    search.sweep(run, chosen, space.read(declared, run, "test"), Console(file=printed, width=200))
    folder = Path(chosen.out or run.out + "-sweep")
    return read(folder), printed.getvalue(), folder


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "trials.jsonl").read_text().splitlines()]


def untimed(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials without what differs from run to run."""
    gone = ("seconds", "worker", "started", "finished", "attempts")
    kept = [{key: value for key, value in trial.items() if key not in gone} for trial in trials]
    for trial in kept:
        trial["curve"] = [{k: v for k, v in point.items() if k != "seconds"} for point in trial["curve"]]
    return kept


@pytest.fixture(scope="module")
def whole(
    data: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], str, Path]:
    return swept(run_values(tmp_path_factory.mktemp("whole") / "run", data, tiny_folder))


@pytest.fixture(scope="module")
def halved(
    data: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], str, Path]:
    """The same with asha."""
    return swept(run_values(tmp_path_factory.mktemp("halved") / "run", data, tiny_folder), pruner="asha", reduction=2)


def test_a_sweep_leaves_trials_results_and_a_run_file(whole: tuple[list[dict[str, Any]], str, Path]) -> None:
    trials, printed, folder = whole
    assert [trial["trial"] for trial in trials] == [0, 1, 2]
    for trial in trials:
        assert trial["state"] == "complete"
        assert [point["step"] for point in trial["curve"]] == [2, 4, 6]
        assert [point["rows"] for point in trial["curve"]] == [16, 32, 48]
        assert trial["loss"] == min(point["loss"] for point in trial["curve"])
        assert trial["steps"] == trial["steps_done"] == 6
        assert 0 < trial["curve"][0]["seconds"] < trial["curve"][-1]["seconds"] <= trial["seconds"]
        its = folder / "trials" / f"{trial['trial']:04d}"
        lines = [json.loads(text) for text in (its / "metrics.jsonl").read_text().splitlines()]
        validated = [line["validation"]["loss"] for line in lines if "validation" in line]
        assert validated == [point["loss"] for point in trial["curve"]]
        assert not (its / "checkpoints").exists()
    best = min(trials, key=lambda trial: trial["loss"])
    results = json.loads((folder / "results.json").read_text())
    assert results["best"]["trial"] == best["trial"]
    assert results["states"] == {"complete": 3}
    assert results["space"] == SPACE
    found, run = config.read_run(folder / "best.toml"), config.build(config.Run, results["run"], "test")
    assert found == space.apply(run, best["params"])
    assert found.data.rows is None
    assert f"veritune train {folder / 'best.toml'}" in printed
    assert printed.count("complete, loss") == 3


def test_a_trial_is_the_run_that_train_makes_of_its_settings(
    whole: tuple[list[dict[str, Any]], str, Path], tmp_path: Path
) -> None:
    trials, _, folder = whole
    run = config.build(config.Run, json.loads((folder / "results.json").read_text())["run"], "test")
    chosen = config.Sweep(validations=3)
    alone = settings_of(run, chosen, trials[2]["params"], 48, tmp_path / "alone")
    train(alone, Console(file=io.StringIO()))
    lines = [
        [json.loads(text) for text in (where / "metrics.jsonl").read_text().splitlines()]
        for where in (tmp_path / "alone", folder / "trials/0002")
    ]
    for line in lines[0] + lines[1]:
        line.pop("seconds", None)
    assert lines[0] == lines[1]


@pytest.mark.parametrize("number", ["0002", "0003"])
def test_a_run_begun_by_hand_in_the_place_of_a_trial_is_refused(
    whole: tuple[list[dict[str, Any]], str, Path], number: str, tmp_path: Path
) -> None:
    """One that ended would be trained anew over its metrics, and one to come would fail over what it finds."""
    folder = tmp_path / "s"
    shutil.copytree(whole[2], folder)
    run = config.build(config.Run, json.loads((folder / "results.json").read_text())["run"], "test")
    place, metrics = folder / "trials" / number, (folder / "trials/0002/metrics.jsonl").read_bytes()
    by_hand = settings_of(run, config.Sweep(validations=1), {"train.lr": 5e-4}, 16, place)
    with pytest.raises(ConfigError, match=rf"{place} is a trial's place in the sweep {folder}, .* another `out`"):
        train(by_hand, Console(file=io.StringIO()))
    assert (folder / "trials/0002/metrics.jsonl").read_bytes() == metrics
    assert place.exists() == (number == "0002")


def test_asha_trains_the_best_to_its_end_as_if_it_had_never_paused(
    whole: tuple[list[dict[str, Any]], str, Path], halved: tuple[list[dict[str, Any]], str, Path]
) -> None:
    (every, _, unpaused), (trials, printed, folder) = whole, halved
    assert Counter(trial["state"] for trial in trials) == {"complete": 1, "pruned": 2}
    best = next(trial for trial in trials if trial["state"] == "complete")
    assert best["curve"][0]["auroc"] == max(trial["curve"][0]["auroc"] for trial in trials)
    assert best["attempts"] == 3  # it paused at the first and the second of three validations
    its = f"trials/{best['trial']:04d}"
    assert [session["from_step"] for session in status.read(folder / its)["sessions"]] == [0, 2, 4]
    assert untimed([best]) == untimed([every[best["trial"]]])
    for name in status.SCORES.values():  # every probability, bit for bit
        assert (folder / its / name).read_bytes() == (unpaused / its / name).read_bytes()
    lines = [
        [json.loads(text) for text in (where / its / "metrics.jsonl").read_text().splitlines()]
        for where in (folder, unpaused)
    ]
    for line in lines[0] + lines[1]:
        line.pop("seconds", None)
    assert lines[0] == lines[1]
    for trial, other in zip(untimed(trials), untimed(every), strict=True):
        assert trial["params"] == other["params"]
        assert trial["curve"] == other["curve"][: len(trial["curve"])]
        assert trial["steps_done"] == trial["curve"][-1]["step"]
    assert list(folder.glob("trials/*/checkpoints")) == []
    told = re.findall(r"^trial (\d): (\w+), loss", printed, re.MULTILINE)
    assert Counter(state for _, state in told) == {"paused": sum(t["attempts"] for t in trials) - 1, "complete": 1}
    assert "1 complete" in printed
    assert "2 pruned" in printed


def test_a_trial_keeps_no_replica(tmp_path: Path) -> None:
    values = {"out": "o", "checkpoint": {"replica": "/drive/run"}, "session": {"hours": 12}}
    trial = settings_of(config.build(config.Run, values, "test"), config.Sweep(), {}, 48, tmp_path / "0000")
    assert (trial.checkpoint.replica, trial.session.hours) == (None, 12)


def test_a_trial_has_a_name_of_its_own_on_trackers(tmp_path: Path) -> None:
    for name, its in ((None, None), ("first", "first-0007")):
        run = config.build(config.Run, {"out": "o", "track": {"name": name}}, "test")
        track = settings_of(run, config.Sweep(), {}, 48, tmp_path / "s" / "trials" / "0007").track
        assert (track.name, track.group) == (its, "s")


@pytest.mark.parametrize(
    ("at_once", "damage"), [(1, False), pytest.param(2, False, marks=pytest.mark.slow), (1, True)]
)
def test_a_sweep_stops_at_its_limit_and_the_same_command_goes_on(
    whole: tuple[list[dict[str, Any]], str, Path],
    data: Path,
    tiny_folder: Path,
    tmp_path: Path,
    at_once: int,
    damage: bool,
) -> None:
    values = run_values(tmp_path / "run", data, tiny_folder)
    short = config.build(config.Run, {**values, "session": {"hours": 1e-4}}, "test")
    chosen = config.build(config.Sweep, {"trials": 3, "rows": 48, "validations": 3, "at_once": at_once}, "test")
    printed = io.StringIO()
    with pytest.raises(KeyboardInterrupt):  # the hours count from the start of each process
        search.sweep(short, chosen, space.read(SPACE, short, "test"), Console(file=printed, width=200))
    assert "given back; the same command goes on" in printed.getvalue()
    first = printed.getvalue().splitlines()[0]
    assert first == f"{tmp_path}/run-sweep: 3 trials of 48 rows each; searched: train.lr, train.optimizer"
    page.report([tmp_path / "run-sweep"], tmp_path / "r.html")  # with no trial that has ended
    assert {trial["state"] for trial in read(tmp_path / "run-sweep")} == {"waiting"}
    if damage:  # the only checkpoint of the first trial
        saved = tmp_path / "run-sweep" / "trials" / "0000" / "checkpoints" / "step-00000001"
        saved.mkdir(parents=True)
        (saved / "manifest.json").write_text("{}")
    found, _, folder = swept(values)
    assert ("begins again" in (folder / "trials" / "0000.log").read_text()) is damage
    keys = ("params", "loss", "auroc", "state")
    assert [[trial[key] for key in keys] for trial in found] == [[trial[key] for key in keys] for trial in whole[0]]


def test_a_worker_that_waits_for_another_ends_at_its_limit(values: dict[str, Any], tmp_path: Path) -> None:
    run = config.build(config.Run, values | {"session": {"hours": 1e-4}}, "test")

    def waits() -> None:
        raise AssertionError("it waits on")

    other = board(tmp_path / "s", trials=1)
    assert isinstance(other.take(), Taken)
    with pytest.raises(KeyboardInterrupt, match=r"^the limit of 0\.0001 hours$"):
        search.work(board(tmp_path / "s", trials=1), run, 48, Desk(), waits, waits, alone=True)


def test_the_model_is_loaded_once_and_the_same_command_goes_on(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    real = load.load_base
    monkeypatch.setattr(load, "load_base", lambda settings: (loads.append(settings), real(settings))[1])
    values = run_values(tmp_path / "run", data, tiny_folder)
    first, _, folder = swept(values, trials=2)
    assert len(loads) == 1
    again, printed, _ = swept(values, trials=2)
    assert again == first
    assert "going on after 2 of 2 trials" in printed
    more, printed, _ = swept(values, trials=3)
    assert more[:2] == first
    assert len(more) == 3
    fewer, printed, _ = swept(values, trials=1)
    assert fewer == more
    assert "going on after 3 of 3 trials; sweep.trials = 1 begins no other" in printed
    with pytest.raises(ConfigError, match=r"train.batch_size was 8, is 16"):
        swept({**values, "train": {"batch_size": 16}})
    with pytest.raises(ConfigError, match=r"space was"):
        swept(values, {"train.lr": {"log": [1e-4, 1]}})
    (folder / "study.db").unlink()
    with pytest.raises(ConfigError, match="holds trials of another sweep"):
        swept(values)


def test_a_base_whose_weights_have_changed_is_refused(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    values = run_values(tmp_path / "run", data, model)
    _, _, folder = swept(values, trials=1)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match=r"holds trials of a base with other weights: what model\.path names"):
        swept(values, trials=2)
    assert [trial["state"] for trial in read(folder)] == ["complete"]
    values["model"]["path"] = str(shutil.copytree(tiny_folder, tmp_path / "elsewhere" / "model"))
    assert [trial["state"] for trial in swept(values, trials=2)[0]] == ["complete", "complete"]


def test_diverging_trials_stop_early_and_say_so(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    declared = {"train.lr": {"choice": [1e30, 30.0]}, "train.warmup_ratio": {"choice": [0.0]}}
    trials, printed, folder = swept(
        run_values(tmp_path / "run", data, tiny_folder), declared, trials=4, rows=88, seed=2
    )
    by_rate = {trial["params"]["train.lr"]: trial for trial in trials}
    assert set(by_rate) == {1e30, 30.0}
    assert {trial["state"] for trial in trials} == {"diverged"}
    assert all(trial["steps_done"] < trial["steps"] == 11 for trial in trials)
    assert re.fullmatch("the (loss|gradient) is not finite: .*", by_rate[1e30]["error"])
    assert not (folder / "best.toml").exists()
    assert "no trial was completed" in printed
    for trial in trials:
        assert f"trial {trial['trial']}: diverged" in printed
        assert trial["error"] in printed


def test_losses_over_the_starts_for_too_long() -> None:
    steady = Losses(5)
    for loss in [0.7, 0.9, 0.6, *[0.75, 0.65, 0.72] * 30]:
        steady.add(loss)
    spike = Losses(5)
    for loss in [0.7, 0.7, 0.7, 2.0, *[0.6] * 30]:
        spike.add(loss)
    grows = Losses(5)
    for loss in [0.7, 0.7, 0.7, *[3.0] * 4]:
        grows.add(loss)
    with pytest.raises(Diverged, match=r"times the start's 0\.7 for 5 steps: 3"):
        grows.add(3.0)


def test_trials_that_cannot_be_trained_have_failed(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    values = run_values(tmp_path / "run", data, tiny_folder)
    declared: dict[str, Any] = {"lora.targets": {"choice": [["q_proj"], ["nonsense"]]}}
    trials, _, folder = swept(values, declared, trials=3, seed=2)
    assert {trial["state"] for trial in trials} == {"complete", "failed"}
    assert all("nonsense" in trial["error"] for trial in trials if trial["state"] == "failed")
    assert config.read_run(folder / "best.toml").lora.targets == ("q_proj",)
    values = run_values(tmp_path / "all", data, tiny_folder)
    with pytest.raises(ConfigError, match="the first 3 trials have all failed"):
        swept(values, {"lora.targets": {"choice": [["nonsense"]]}}, trials=9)
    values = run_values(tmp_path / "two", data, tiny_folder)
    for _ in range(2):  # and again, when nothing is left to do
        with pytest.raises(ConfigError, match=r"all 2 trials have failed; mend this.*nonsense"):
            swept(values, {"lora.targets": {"choice": [["nonsense"]]}}, trials=2)


def test_trials_that_fail_alike_end_a_sweep_unless_another_works(tmp_path: Path) -> None:
    def progress(pruner: str) -> tuple[Board, search.Progress]:
        it = board(tmp_path / pruner, trials=9, pruner=pruner)
        return it, search.Progress(it, config.Run(out="x"), 48, Console(file=io.StringIO()))

    def fail(it: Board, trial: Taken | bool) -> None:
        assert isinstance(trial, Taken)
        it.finish(trial, "failed", "nonsense")

    it, paused = progress("asha")
    first = it.take()
    assert isinstance(first, Taken)
    assert it.report(first, point(1), 1, last=False) == "paused"
    it.release(first)
    for _ in range(4):
        fail(it, it.take())
        paused.look()
    it, begun = progress("none")
    first, other = it.take(), board(tmp_path / "none", trials=9)  # the first may work, or fail like the others
    for _ in range(3):
        fail(other, other.take())
        begun.look()
    fail(it, first)
    with pytest.raises(ConfigError, match=r"the first 4 trials have all failed; .*: nonsense"):
        begun.look()


def test_a_sweep_in_the_current_folder_has_its_name(
    whole: tuple[list[dict[str, Any]], str, Path],
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trials, _, _ = swept(values, out=".", trials=1)
    assert untimed(trials) == untimed(whole[0][:1])
    described = json.loads(Path("trials/0000/run.json").read_text())
    assert described["settings"]["track"]["group"] == "here"


def test_a_trial_that_memory_does_not_hold_has_failed(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(state: Any, *unused: Any) -> Any:
        if state.run.lora.targets == ("q_proj",):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return computed(state, *unused)

    computed = step.gradients
    monkeypatch.setattr(step, "gradients", gradients)
    values = run_values(tmp_path / "run", data, tiny_folder) | {"phases": [{"rows": [0, 24]}, {"rows": [0, 48]}]}
    trials, _, folder = swept(values, {"lora.targets": {"choice": [["q_proj"], ["v_proj"]]}}, trials=3, seed=2)
    assert {trial["state"] for trial in trials} == {"complete", "failed"}
    assert all("memory ran out" in trial["error"] for trial in trials if trial["state"] == "failed")
    assert [phase.rows for phase in config.read_run(folder / "best.toml").phases] == [(0, 24), (0, 48)]


def test_a_trial_whose_error_ends_every_worker_has_failed_in_the_end(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(state: Any, *rest: Any) -> Any:
        if Path(state.run.out).name == "0000":
            raise RuntimeError("a library's")
        return computed(state, *rest)

    computed = step.gradients
    monkeypatch.setattr(step, "gradients", gradients)
    values = run_values(tmp_path / "run", data, tiny_folder)
    for _ in range(TRIES):
        with pytest.raises(RuntimeError, match="a library's"):
            swept(values, trials=2)
    trials, _, _ = swept(values, trials=2)
    assert [(trial["state"], trial["attempts"]) for trial in trials] == [("failed", TRIES), ("complete", 1)]


@pytest.mark.alone
def test_each_worker_that_ends_is_told_with_its_own_reason(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")

    def child(*unused: Any) -> None:
        ends = {"worker 0": (0.4, 2), "worker 1": (0, 3), "worker 2": (0.8, 2)}
        pause, code = ends[multiprocessing.current_process().name]
        time.sleep(pause)
        raise SystemExit(code)

    monkeypatch.setattr(search, "child", child)
    monkeypatch.setattr(search, "PAUSE", 0.01)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    run, printed = config.build(config.Run, values, "test"), io.StringIO()
    with pytest.raises(VerituneError, match="all workers have ended"):
        search.sweep(run, config.Sweep(at_once=3), space.read(SPACE, run, "test"), Console(file=printed, width=200))
    told = re.findall(r"^a worker .*", printed.getvalue(), re.MULTILINE)
    assert told[:2] == ["a worker ended (3); 2 go on", "a worker ended (2); 1 go on"]


def test_what_cannot_be_right_is_said_before_anything_starts(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    values = run_values(tmp_path / "run", data, tiny_folder)
    with pytest.raises(ConfigError, match=r"did you mean 'train\.lr'"):
        swept(values, {"train.lrr": {"log": [1e-4, 1]}})
    with pytest.raises(MissingError):
        swept({**values, "data": {"path": str(tmp_path / "none")}})
    with pytest.raises(ConfigError, match=r"prompt.max_length = 1000000: .* has positions for"):
        swept({**values, "prompt": {"max_length": 1_000_000}})
    with pytest.raises(ConfigError, match=r"prompt.answers: 'Incorrectly so' is 10 tokens"):
        swept({**values, "prompt": {**values["prompt"], "answers": ["True", "Incorrectly so"]}})
    with pytest.raises(ConfigError, match=r"lora.targets: nonsense names no layer"):
        swept({**values, "lora": {"targets": ["q_proj", "nonsense"]}})
    with pytest.raises(ConfigError, match=r"sweep.pruner = 'asha' with sweep.validations = 1: .* 2 or more"):
        swept(values, pruner="asha", validations=1)
    with pytest.raises(DataError, match=r"all 1 rows to train on are (True|False).* more of them \(sweep\.rows\)"):
        swept(values, rows=1)
    assert list(tmp_path.iterdir()) == []


def test_validation_rows_of_one_label_are_noted_since_trials_are_ranked_by_them(
    data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    rows = generate(16, solutions_per_question=4, seed=1)
    questions = list(dict.fromkeys(row["question"] for row in rows))
    single = [row for row in rows if row["is_correct"] == bool(questions.index(row["question"]) % 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single), encoding="utf-8")
    dataset.prepare([str(tmp_path / "rows.jsonl")], tmp_path / "d", config.Prepare(validation_rows=8))
    values = run_values(tmp_path / "run", tmp_path / "d", tiny_folder) | {"validation": {"rows": 1}}
    _, printed, folder = swept(values, trials=1, validations=1)
    assert re.search(r"note: all \d validation rows are (True|False): there is no AUROC", printed)
    assert "AUROC -, after" in (folder / "best.toml").read_text()


@pytest.mark.parametrize(
    ("declared", "args", "key"),
    [
        ("lora.rank = { choice = [4, 8] }", ["--lora.rank=4"], "lora.rank"),
        ("train.batch_size = { choice = [4, 8] }", ["--train.batch-size", "4"], "train.batch_size"),
        ("", ["--hours", "1", "--train.lr", "1e-3"], "train.lr"),
    ],
)
def test_a_flag_for_what_is_searched_is_refused(
    declared: str, args: list[str], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(f'out = "{tmp_path / "run"}"\n[sweep.space]\n{declared}\n')
    assert cli.run(["sweep", str(tmp_path / "run.toml"), *args]) == 2
    said = capsys.readouterr().err
    assert f"{key} is searched, so the flag would change nothing" in said
    assert said.endswith(f"declare a [sweep.space] without {key}\n")


@pytest.mark.alone
def test_a_tracker_that_hangs_costs_a_sweep_one_wait_and_one_warning(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(follow, "failures", {})
    monkeypatch.setattr(follow, "DEADLINE", 1.0)
    monkeypatch.setattr(follow, "STOPPED", 0.5)
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        values = run_values(tmp_path / "run", data, tiny_folder) | {"track": {"to": ["wandb"]}}
        trials, printed, folder = swept(values, trials=2)
    assert [trial["state"] for trial in trials] == ["complete", "complete"]
    assert printed.count("wandb had not finished after 1 s and may lack trials") == printed.count("wandb") == 1
    logs = [(folder / "trials" / f"{trial['trial']:04d}.log").read_text() for trial in trials]
    assert ["after 1 s" in logs[0], "after 0.5 s" in logs[1]] == [True, True]


@pytest.mark.alone
@pytest.mark.parametrize(("found", "at_once", "pruner"), [("whole", 2, "none"), ("halved", 1, "asha")])
def test_two_processes_find_what_one_does_and_a_kill_loses_nothing(
    found: str, at_once: int, pruner: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The command itself, with two workers, or one and a trial that is paused while a promoted one goes on; all of it
    killed in the middle, then given again."""
    trials, _, folder = request.getfixturevalue(found)
    values = json.loads((folder / "results.json").read_text())["run"]
    values["out"], values["checkpoint"]["every"] = str(tmp_path / "run"), 1
    tables = [f"out = {toml(values.pop('out'))}"]
    for name, table in values.items():
        if isinstance(table, dict):
            inner = "\n".join(f"{key} = {toml(value)}" for key, value in table.items() if value is not None)
            tables.append(f"[{name}]\n{inner}")
    of_sweep = f'trials = 3\nrows = 48\nvalidations = 3\nat_once = {at_once}\npruner = "{pruner}"\nreduction = 2'
    tables.append(f"[sweep]\n{of_sweep}\n[sweep.space]")
    tables += [f"{key} = {toml(spec)}" for key, spec in SPACE.items()]
    file = tmp_path / "run.toml"
    file.write_text("\n".join(tables))
    command = [sys.executable, "-m", "veritune", "sweep", str(file)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    place, deadline = tmp_path / "run-sweep", time.monotonic() + 120
    while not any(b'"step": 3' in path.read_bytes() for path in place.glob("trials/*/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert any(trial["state"] == "paused" for trial in read(place)) is (pruner == "asha")
    assert cli.run(["sweep", str(file), "--sweep.at-once", "1"]) == 0
    again = read(place)
    assert untimed(again) == untimed(trials)
    more = [trial["attempts"] - before["attempts"] for trial, before in zip(again, trials, strict=True)]
    assert max(more) == 1
    assert list((place / "workers").iterdir()) == []


def test_a_stop_gives_the_trial_back(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = run_values(tmp_path / "run", data, tiny_folder)
    real = search.run_trial

    def stopped(board: Any, taken: Taken, *rest: Any, **options: Any) -> None:
        if taken.number == 1 and taken.info["attempts"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(board, taken, *rest, **options)

    monkeypatch.setattr(search, "run_trial", stopped)
    with pytest.raises(KeyboardInterrupt):
        swept(values, trials=2)
    trials, _, _ = swept(values, trials=2)
    assert [trial["state"] for trial in trials] == ["complete", "complete"]
    assert [trial["attempts"] for trial in trials] == [1, 2]


def stop_once(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    """Has the next sweep stopped before the validation at a step."""
    real, stops = trainer.measure, [before]

    def stopped(state: Any, at: Any, *rest: Any) -> None:
        if at.done in stops:
            stops.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        real(state, at, *rest)

    monkeypatch.setattr(trainer, "measure", stopped)


def test_a_trial_stopped_before_a_validation_goes_on_as_if_it_had_not_been(
    whole: tuple[list[dict[str, Any]], str, Path], values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_once(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        swept(values, trials=1)
    trials, _, folder = swept(values, trials=1)
    assert [it["from_step"] for it in status.read(folder / "trials" / "0000")["sessions"]] == [0, 4]
    assert untimed(trials) == untimed(whole[0][:1])


def test_a_trial_with_dropout_begins_again_where_rows_are_computed_otherwise(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_once(monkeypatch, 4)
    values |= {"lora": {"dropout": 0.1}}
    with pytest.raises(KeyboardInterrupt):
        swept(values, trials=1)
    trials, _, folder = swept(values | {"train": {"batch_size": 8, "micro_batch_tokens": 1024}}, trials=1)
    assert (trials[0]["state"], trials[0]["rows_done"], len(trials[0]["curve"])) == ("complete", 48, 3)
    assert "was 2048, is 1024" in (folder / "trials" / "0000.log").read_text()


def test_without_optuna_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("veritune.search.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    (tmp_path / "run.toml").write_text('out = "x"')
    assert cli.run(["sweep", str(tmp_path / "run.toml")]) == 2
    assert "pip install 'veritune[sweep]'" in capsys.readouterr().err
