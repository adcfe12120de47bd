"""The report on a sweep: what its trials say about the settings, and a page whatever became of them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_page import Parsed, assert_self_contained

from veritune import config
from veritune.errors import ConfigError, DataError
from veritune.report import page, sweep, trials
from veritune.search import space

SPACE = {
    "train.lr": {"log": [1e-6, 0.5]},
    "train.optimizer": {"choice": ["adamw_torch", "lion_8bit"]},
    "train.schedule": {"choice": ["linear", "cosine"]},
    "train.warmup_ratio": {"range": [0.0, 0.2]},
}
EDGE = 3e-3


def trial(number: int, rng: np.random.Generator, **over: Any) -> dict[str, Any]:
    """A trial as docs/sweep.md describes it, whose loss is a bowl over the learning rate, and diverged over EDGE."""
    lr = float(math.exp(rng.uniform(math.log(1e-6), math.log(0.5))))
    params = {
        "train.lr": lr,
        "train.optimizer": ["adamw_torch", "lion_8bit"][rng.integers(2)],
        "train.schedule": ["linear", "cosine"][rng.integers(2)],
        "train.warmup_ratio": float(rng.uniform(0, 0.2)),
    }
    diverged = lr > EDGE
    loss = 0.4 + 0.05 * math.log10(lr / 3e-4) ** 2 + 0.001 * rng.normal()
    curve = [
        {"step": s, "rows": s * 100, "seconds": float(s), "loss": loss + 0.3 / s, "auroc": 0.8, "accuracy": 0.7}
        for s in range(1, 3 if diverged else 7)
    ]
    return {
        "trial": number, "state": "diverged" if diverged else "complete", "params": params,
        "loss": curve[-1]["loss"], "auroc": 0.8, "accuracy": 0.7, "best_step": 6, "steps": 6, "steps_done": 6,
        "rows_done": 600, "seconds": 6.0, "curve": curve, "error": None, "attempts": 1, "worker": "gpu:1",
        "started": "2026-11-24T09:23:57", "finished": "2026-11-24T09:24:01",
    } | over  # fmt: skip


def write(folder: Path, found: list[dict[str, Any]], space: dict[str, Any] = SPACE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "trials.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    results = {"veritune": "0", "sweep": {"sampler": "random"}, "space": space, "run": {}, "rows": 100}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "best.toml").write_text('out = "<best>"\n')
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    return write(tmp_path / "run-sweep", [trial(i, rng) for i in range(40)])


def written(path: Path, out: Path) -> str:
    page.report([path], out, price=2.0)
    return out.read_text(encoding="utf-8")


def test_every_section_is_there(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    text = written(made, tmp_path / "r.html")
    assert_self_contained(text)
    found = Parsed(text)
    assert [attrs["id"] for tag, attrs in found.tags if tag == "section"] == [
        "summary", "what", "learning-rate", "importance", "together", "curves", "choices", "trials", "cost", "again",
    ]  # fmt: skip
    assert "run.toml stands for the sweep's run file" in found.text
    assert "nan" not in text
    best = trials.read(made).best()
    assert best
    assert f"{best['loss']:.4f}" in found.text
    assert 'out = "<best>"' in found.text
    assert "too high from 0.00" in found.text


def test_the_run_file_on_the_page_is_the_sweeps(made: Path) -> None:
    run = config.build(config.Run, {"out": "o", "phases": [{"rows": [0, 8]}], "lora": {"rank": 8}}, "test")
    settings = config.Sweep(trials=7, pruner="asha", storage="postgresql://me@db/x")
    results = json.loads((made / "results.json").read_text())
    results |= {"run": config.as_dict(run), "sweep": config.as_dict(settings) | {"storage": "postgresql"}}
    (made / "results.json").write_text(json.dumps(results))
    (made / "run.toml").write_text(sweep.run_file(trials.read(made)))
    found, its, declared = config.read_sweep(made / "run.toml")
    assert (found, its) == (run, dataclasses.replace(settings, storage=None))
    assert {axis.key: axis.as_json() for axis in space.read(declared, run, "test")} == SPACE
    assert "train.lr = { log = [1e-06, 0.5] }" in Parsed(written(made, made / "r.html")).text


def test_trials_of_every_kind_make_a_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    nothing = {"loss": None, "auroc": None, "accuracy": None, "best_step": None, "curve": [], "seconds": None}
    every = [
        trial(0, rng),
        trial(1, rng, state="pruned"),
        trial(2, rng, state="failed", error="ModelError: <why>", **nothing),
        trial(3, rng, state="waiting", **nothing, worker=None),
        trial(4, rng, state="running", **nothing),
        trial(5, rng, state="diverged", **nothing),
        trial(6, rng, state="paused"),
    ]
    for found in ([], every[:1], every[2:], every, every * 4):
        text = written(write(tmp_path / "s", found), tmp_path / "r.html")
        assert_self_contained(text)
        if len(found) > 4:
            assert "ModelError: &lt;why&gt;" in text
    odd = {"lora.targets": {"choice": [["q_proj"], ["q_proj", "<b>"]]}, "lora.rank": {"range": [4, 4]}}
    # As a board names the choices that are lists.
    params = [{"lora.targets": json.dumps(value), "lora.rank": 4} for value in odd["lora.targets"]["choice"]]
    found = [trial(i, rng, params=params[i % 2], state="complete") for i in range(10)]
    assert_self_contained(written(write(tmp_path / "odd", found, odd), tmp_path / "r.html"))
    assert [kind.trials for kind in trials.by_choice(trials.read(tmp_path / "odd"), "lora.targets")] == [5, 5]


def test_the_edge_is_where_trials_begin_to_diverge(made: Path) -> None:
    sweep = trials.read(made)
    lr = np.array([t["params"]["train.lr"] for t in sweep.trials])
    diverged = np.array([t["state"] == "diverged" for t in sweep.trials])
    found = trials.edge(lr, diverged)
    assert found
    value, low_high = found
    assert lr[~diverged].max() < value < lr[diverged].min()
    assert low_high
    assert low_high[0] <= value <= low_high[1]
    flipped = diverged.copy()
    flipped[np.argmin(lr)] = True  # one odd trial far from the edge does not move it
    again = trials.edge(lr, flipped)
    assert again
    assert again[0] == pytest.approx(value)
    assert trials.edge(lr, np.zeros(40, bool)) is None


def test_trials_that_came_back_to_chance_are_over_the_edge_and_those_too_slow_to_learn_are_not(tmp_path: Path) -> None:
    rng, found = np.random.default_rng(0), []
    for i, loss in enumerate([0.75, 0.70, 0.63, 0.55, 0.693, 0.694]):
        one = trial(i, rng, state="complete", loss=loss)
        one["params"]["train.lr"] = 10.0 ** (i - 6)
        found.append(one)
    made = trials.read(write(tmp_path / "s", found))
    value, _ = sweep.cut(made, made.trials) or (0.0, None)
    assert value == pytest.approx(10**-2.5)


def test_a_trial_pruned_early_that_tells_good_from_bad_is_not_over_the_edge(tmp_path: Path) -> None:
    rng, found = np.random.default_rng(0), []
    early = {"state": "pruned", "loss": 0.71}
    ends = [{"state": "complete", "loss": 0.55}, {**early, "auroc": 0.72}, *[{**early, "auroc": 0.51}] * 2]
    for i, end in enumerate(ends):
        one = trial(i, rng, **end)
        one["params"]["train.lr"] = 10.0 ** (i - 4)
        found.append(one)
    made = trials.read(write(tmp_path / "s", found))
    value, _ = sweep.cut(made, made.trials) or (0.0, None)
    assert value == pytest.approx(10**-2.5)


def test_what_the_loss_depends_on_matters_most(made: Path) -> None:
    pytest.importorskip("optuna")
    found = trials.importance(trials.read(made))
    assert found
    assert found[0][0] == "train.lr"
    assert sum(value for _, value, _ in found) == pytest.approx(1)
    assert all(low <= high for _, _, (low, high) in found)
    assert found[0][2][0] > found[1][1]
    assert trials.importance(trials.read(made)) == found


def test_choices_are_counted(made: Path) -> None:
    sweep = trials.read(made)
    kinds = trials.by_choice(sweep, "train.optimizer")
    assert [kind.choice for kind in kinds] == ["adamw_torch", "lion_8bit"]
    assert sum(kind.trials for kind in kinds) == 40
    assert sum(kind.diverged for kind in kinds) == sum(t["state"] == "diverged" for t in sweep.trials)
    assert min(kind.best for kind in kinds) == min(t["loss"] for t in sweep.measured())


def test_the_surface_is_lowest_where_trials_are(made: Path) -> None:
    sweep = trials.read(made)
    x, y = (trials.axis(key, SPACE[key]) for key in ("train.lr", "train.schedule"))
    used = sweep.measured()
    cells = trials.surface(x, y, used, np.array([t["loss"] for t in used]))
    assert cells.shape == (2, 16)
    low = math.log(3e-4 / 1e-6) / math.log(0.5 / 1e-6)  # the bowl's lowest place
    deepest = np.where(np.isnan(cells), np.inf, cells).min(0).argmin()
    assert abs((deepest + 0.5) / 16 - low) < 0.13


def test_a_sweep_is_shown_alone_and_a_damaged_one_named(made: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one sweep"):
        page.report([finished, made], tmp_path / "r.html")
    for name, text in (("trials.jsonl", "{"), ("trials.jsonl", '{"trial": 1}\n'), ("results.json", "[]")):
        before = (made / name).read_text()
        (made / name).write_text(text)
        with pytest.raises(DataError, match="cannot be read"):
            page.report([made], tmp_path / "r.html")
        (made / name).write_text(before)
