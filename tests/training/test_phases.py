"""Runs of several phases: exact over their boundaries and in a cooldown, appended to, and measured slice by slice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import assert_same, checkpoints, copied_until, metrics, prepared, settings, tensors, trained
from safetensors.torch import load_file

from veritune import config
from veritune.data.generate import generate
from veritune.errors import ConfigError, MissingError
from veritune.model import adapter, load
from veritune.quality.forgetting import average_forgetting, backward_transfer
from veritune.report import planned
from veritune.training import feed
from veritune.training.trainer import Training, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows to train on and 16 to validate on."""
    return prepared(generate(16, solutions_per_question=4, seed=1), tmp_path_factory.mktemp("data") / "d", 16)


def run_of(out: Path, data: Path, model: Path, **tables: Any) -> config.Run:
    """A run with dropout, a checkpoint after each step and steps of 8 rows."""
    small = settings(
        out,
        data,
        model,
        prompt={"max_length": 160},
        lora={"rank": 4, "dropout": 0.1},
        train={"lr": 2e-2, "batch_size": 8, **tables.pop("train", {})},
        checkpoint={"every": 1, "keep": 100},
    )
    return config.build(config.Run, {**config.as_dict(small), **tables}, "test")


BEST = {
    "phases": [
        {"rows": [0, 16], "lr": 0.3, "schedule": "constant"},
        {"rows": [16, 32], "start_from": "best", "optimizer_state": "keep"},
        {"rows": [32, 48], "replay_ratio": 0.5, "start_from": "best", "epochs": 1.5},
    ],
    "validation": {"every": 1},
    "strategy": {"probe_rows": 6},
}
COOLDOWN = {
    "strategy": {"kind": "stream", "slices": 2, "cooldowns": [20, 24], "probe_rows": 6},
    "train": {"decay_ratio": 0.5},
}


@pytest.fixture(scope="module", params=["best", "cooldown"])
def uninterrupted(
    request: pytest.FixtureRequest, data: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> config.Run:
    tables = {"best": BEST, "cooldown": COOLDOWN}[request.param]
    run = run_of(tmp_path_factory.mktemp(request.param) / "run", data, tiny_folder, **tables)
    trained(run)
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_stop_changes_nothing_wherever_it_comes(uninterrupted: config.Run, tmp_path: Path) -> None:
    last = int(checkpoints(Path(uninterrupted.out))[-1].name[5:])
    for step in range(1, last):
        again = copied_until(uninterrupted, step, tmp_path / f"after-{step}")
        (tmp_path / f"after-{step}" / "forgetting.json").unlink()
        trained(again)
        assert_same(Path(uninterrupted.out), Path(again.out))
        for name in ("forgetting.json", "best/README.md"):
            left, right = ((Path(run.out) / name).read_bytes() for run in (uninterrupted, again))
            assert left.replace(uninterrupted.out.encode(), again.out.encode()) == right


def test_a_plan_counts_the_rows_that_the_run_scored(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Also where a cooldown leaves a phase in its middle."""
    table = {**COOLDOWN["strategy"], "cooldowns": [16]}
    run = run_of(tmp_path / "run", data, tiny_folder, **{**COOLDOWN, "strategy": table})
    trained(run)
    lines, source = metrics(tmp_path / "run"), feed.read(run)
    assert [phase.kind for phase in source.plan.phases] == ["part", "cooldown", "whole", "whole"]
    forgetting = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    assert [phase["name"] for phase in forgetting["phases"]] == ["1: slice 1", "2: slice 2"]  # the part is no phase
    probes = sum(len(it.trained) + (0 if it.held_out is None else len(it.held_out)) for it in source.slices)
    scored = sum("validation" in line for line in lines) * len(source.validation.labels)
    scored += sum("probes" in line for line in lines) * probes
    assert planned._scored(run, source) == scored


def test_a_slice_too_small_for_a_probe_of_its_own_ends_no_run(tiny_folder: Path, tmp_path: Path) -> None:
    rows = generate(16, solutions_per_question=4, seed=1)
    small = {row["question"]: f"small {number // 4}" for number, row in enumerate(rows[:8])}
    rows = [{**row, "kind": small.get(row["question"], "large")} for row in rows]
    table = {"kind": "sequential", "slices": 3, "column": "kind", "probe_rows": 6}
    trained(run_of(tmp_path / "run", prepared(rows, tmp_path / "d", 4), tiny_folder, strategy=table))
    found = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    assert [it["name"] for it in found["slices"]] == ["large", "small 0", "small 1"]
    assert [[value is None for value in row] for row in found["accuracy"]["held_out"]] == [[False, True, True]] * 3
    assert found["average_forgetting"]["held_out"] is not None


def test_phases_start_from_the_best_adapter(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """With a rate that harms in the second phase, the best is not the last; the third, with no rate to speak of, stays
    there."""
    phases = [
        {"rows": [0, 48], "lr": 0.03},
        {"rows": [0, 48], "lr": 0.5, "schedule": "constant", "epochs": 0.5},
        {"rows": [0, 8], "lr": 1e-12, "start_from": "best"},
    ]
    run = run_of(tmp_path / "run", data, tiny_folder, phases=phases, validation={"every": 1})
    trained(run)
    found = {line["step"]: line["validation"]["loss"] for line in metrics(tmp_path / "run") if "validation" in line}
    best = min(range(1, 10), key=found.__getitem__)
    assert best < 9
    assert found[10] == pytest.approx(found[best], abs=1e-5)
    assert abs(found[10] - found[9]) > 1e-3


def test_a_cooldown_gives_an_adapter_and_leaves_the_main_line_alone(
    data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    for name, cooldowns in (("with", [24]), ("without", [])):
        table = {**COOLDOWN["strategy"], "cooldowns": cooldowns}
        _, printed = trained(run_of(tmp_path / name, data, tiny_folder, **{**COOLDOWN, "strategy": table}))
        assert "lr 0.02, wsd" in printed
    lines = {name: [line for line in metrics(tmp_path / name) if "loss" in line] for name in ("with", "without")}
    assert len(lines["without"]) == 6
    branch = lines["with"][3:5]  # half of the three steps so far, rounded to the even number
    assert branch[0]["lr"] == lines["without"][2]["lr"] > branch[1]["lr"] > 0
    main = lines["with"][:3] + lines["with"][5:]
    for ours, theirs in zip(main, lines["without"], strict=True):
        assert {**ours, "step": None} == {**theirs, "step": None}
    assert same(*(weights(tmp_path / name / "adapter") for name in ("with", "without")))
    assert (tmp_path / "with" / "cooldowns" / "step-00000005" / "veritune.json").is_file()


def test_appending_is_accepted_and_what_would_change_the_past_is_not(
    data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    first = {"rows": [0, 16], "optimizer_state": "reset"}
    more = {"rows": [16, 32], "lr": 1e-2}
    elsewhere = shutil.copytree(data, tmp_path / "elsewhere")
    trained(run_of(tmp_path / "run", elsewhere, tiny_folder, phases=[first]))
    shutil.rmtree(elsewhere)  # the rows may lie in another place by then
    told = r"phases\.1\.rows was \[0, 16\], is \[0, 24\]; phases\.2\.rows was None"
    with pytest.raises(ConfigError, match=told) as error:
        trained(run_of(tmp_path / "run", data, tiny_folder, phases=[{"rows": [0, 24]}, more]))
    assert "phases.1.lr" not in str(error.value)
    assert "instead of epochs" not in str(error.value)
    trained(run_of(tmp_path / "run", data, tiny_folder, phases=[first, more]))
    trained(run_of(tmp_path / "whole", data, tiny_folder, phases=[first, more]))
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "run"))
    ragged = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    assert [len(ragged["slices"]), *map(len, ragged["accuracy"]["trained"])] == [2, 2, 2]
    assert ragged["accuracy"]["trained"][0][1] is None  # the slice was not there yet
    constant = {"schedule": "constant", "warmup_ratio": 0.0}
    for epochs in (1, 2):
        trained(run_of(tmp_path / "epochs", data, tiny_folder, train={**constant, "epochs": epochs}))
    trained(run_of(tmp_path / "two", data, tiny_folder, train={**constant, "epochs": 2}))
    assert same(*(weights(tmp_path / name / "adapter") for name in ("epochs", "two")))
    trained(run_of(tmp_path / "cosine", data, tiny_folder))
    with pytest.raises(ConfigError, match=r"train\.epochs was 1\.0, is 2\.0") as error:
        trained(run_of(tmp_path / "cosine", data, tiny_folder, train={"epochs": 2.0}))
    assert "cosine" in str(error.value)  # says why


@pytest.mark.parametrize("kind", ["sequential", "cumulative", "replay"])
def test_each_phase_is_measured_on_every_slice(kind: str, data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    strategy = {"kind": kind, "ends": [16, 32, 48], "probe_rows": 10}
    strategy |= {"replay_ratio": 0.25} if kind == "replay" else {}
    _, printed = trained(run_of(tmp_path / "run", data, tiny_folder, strategy=strategy))
    found = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    assert [part["rows"] for part in found["slices"]] == [16, 16, 16]
    assert [phase["slice"] for phase in found["phases"]] == [0, 1, 2]
    for probe in ("trained", "held_out"):
        a = found["accuracy"][probe]
        assert (len(a), {len(row) for row in a}) == (3, {3})
        assert found["average_forgetting"][probe] == pytest.approx(average_forgetting(a, [0, 1, 2]))
        assert found["backward_transfer"][probe] == pytest.approx(backward_transfer(a, [0, 1, 2]))
    validations = [line["validation"]["accuracy"] for line in metrics(tmp_path / "run") if "validation" in line]
    assert [row[0] for row in found["accuracy"]["held_out"]] == validations
    assert f"after 3: slice{'s 1 to' if kind == 'cumulative' else ''} 3" in printed


def test_many_runs_share_one_base(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    base = load.load_base(config.Model(path=str(tiny_folder), base="fp32", device="cpu"))
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    seen = []

    def then(state: Training) -> None:
        seen.append(adapter.weights(state.model))

    for name, rank in (("a", 4), ("b", 2), ("c", 4)):
        run = run_of(tmp_path / name, data, tiny_folder, lora={"rank": rank})
        train(run, Console(quiet=True), base, then)
    after = base.model.state_dict()
    assert same(before, dict(after))
    trained(run_of(tmp_path / "alone", data, tiny_folder, lora={"rank": 4}))
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "alone"))
    assert same(tensors(tmp_path / "c"), tensors(tmp_path / "alone"))
    assert len(seen) == 3


def test_what_a_run_started_from_may_be_gone_once_it_has_a_checkpoint(
    data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    trained(settings(tmp_path / "first", data, tiny_folder))
    start, every = tmp_path / "start", {"every": 2, "keep": 100}
    shutil.copytree(tmp_path / "first" / "adapter", start)
    run = settings(tmp_path / "run", data, tiny_folder, train={"start_from": str(start)}, checkpoint=every)
    trained(run)
    begun = copied_until(run, 2, tmp_path / "begun")
    shutil.rmtree(start)
    trained(replace(begun, train=replace(begun.train, start_from=str(tmp_path / "where it lies elsewhere"))))
    assert_same(tmp_path / "begun", tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "adapter", start)  # another one in its place
    with pytest.raises(ConfigError, match=r"train.start_from was .*, is .*fingerprint"):
        trained(run)
    shutil.rmtree(start)
    with pytest.raises(ConfigError, match=r"train.start_from was .*, is None"):
        trained(replace(run, train=replace(run.train, start_from=None)))
    never = settings(tmp_path / "never", data, tiny_folder, train={"start_from": str(start)})
    with pytest.raises(MissingError, match=r"train.start_from.*no such adapter folder"):
        trained(never)


def test_what_a_run_started_from_is_needed_where_it_scales_as_no_setting_can_say(
    data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    trained(settings(tmp_path / "first", data, tiny_folder))
    start = tmp_path / "first" / "adapter"
    described = json.loads((start / "adapter_config.json").read_bytes()) | {"use_rslora": True}
    (start / "adapter_config.json").write_text(json.dumps(described))
    every = {"every": 2, "keep": 100}
    run = settings(tmp_path / "run", data, tiny_folder, train={"start_from": str(start)}, checkpoint=every)
    trained(run)
    begun = copied_until(run, 2, tmp_path / "begun")
    start.rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=r"train.start_from.*scaled by"):
        trained(begun)
    (tmp_path / "away").rename(start)
    trained(begun)
    assert_same(tmp_path / "begun", tmp_path / "run")
