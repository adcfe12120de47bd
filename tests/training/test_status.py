"""status.json and the kept scores: what a run says of itself after a finish, a failure, a kill and a resume."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from runs import metrics, prepared, settings, trained

from veritune import config
from veritune.data.generate import generate
from veritune.errors import NonFiniteError
from veritune.quality import metrics as figures
from veritune.track import Tracker
from veritune.training import plan, status

CPU = torch.device("cpu")


@pytest.fixture
def small() -> plan.Plan:
    return plan.make(config.Train(batch_size=2, per_question=1), np.arange(8), np.arange(8) % 2 == 0)


def last(folder: Path) -> dict[str, object]:
    return status.read(folder)["sessions"][-1]


def test_a_finished_run_and_its_second_start(tiny_folder: Path, tmp_path: Path) -> None:
    data = prepared(generate(16, solutions_per_question=4, seed=1), tmp_path / "d", 16)
    run = settings(tmp_path / "run", data, tiny_folder, validation={"every": 2})
    trained(run)
    folder = Path(run.out)
    about = status.read(folder)
    assert about["plan"]["steps"] == 6
    assert sum(phase["steps"] for phase in about["plan"]["phases"]) == 6
    assert about["parameters"] > 0
    (session,) = about["sessions"]
    assert (session["state"], session["from_step"], session["pid"]) == ("finished", 0, os.getpid())
    assert session["machine"]["torch"] == torch.__version__
    assert session["ended"] >= session["started"]

    # The kept scores are those that the logged figures were made of.
    logged = {line["step"]: line["validation"] for line in metrics(folder) if "validation" in line}
    best = min(logged, key=lambda step: logged[step]["loss"])
    for name, step in (("last", 6), ("best", best)):
        scores = pl.read_parquet(folder / status.SCORES[name])
        assert scores["step"].unique().to_list() == [step]
        p = scores["p_correct"].to_numpy().astype(float)
        again = figures.point(scores["is_correct"].to_numpy(), p)
        assert again == pytest.approx({key: logged[step][key] for key in again}, abs=1e-6)
    assert scores["id"].to_list() == pl.read_parquet(data / "validation.parquet")["id"].to_list()

    trained(run)
    assert [(s["state"], s["from_step"]) for s in status.read(folder)["sessions"]] == [("finished", 0), ("finished", 6)]


def test_a_failure_is_told_and_raised(tmp_path: Path, small: plan.Plan) -> None:
    with pytest.raises(NonFiniteError), status.running(tmp_path, small, CPU, step=0, parameters=1):
        raise NonFiniteError("step 3: the loss is not finite")
    assert last(tmp_path)["state"] == "failed"
    assert last(tmp_path)["reason"] == "NonFiniteError: step 3: the loss is not finite"


def test_a_stop_is_no_failure(tmp_path: Path, small: plan.Plan) -> None:
    with pytest.raises(KeyboardInterrupt), status.running(tmp_path, small, CPU, step=0, parameters=1):
        raise KeyboardInterrupt
    assert last(tmp_path)["state"] == "stopped"


def test_a_killed_session_ended_with_its_last_line(tmp_path: Path, small: plan.Plan) -> None:
    with status.running(tmp_path, small, CPU, step=0, parameters=1):
        pass  # as a kill leaves it: nobody called `finished`
    (tmp_path / "metrics.jsonl").write_text("")
    os.utime(tmp_path / "metrics.jsonl", (1e9, 1e9))
    Tracker(tmp_path / "metrics.jsonl", from_step=3).close()  # as a run that goes on does first
    with status.running(tmp_path, small, CPU, step=3, parameters=1):
        first, second = status.read(tmp_path)["sessions"]
    assert (first["state"], first["ended"]) == ("killed", "2001-09-09T01:46:40+00:00")
    assert (second["state"], second["from_step"]) == ("running", 3)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sessions": []}', '{"plan": null, "sessions": []}', "\x00"])
def test_a_damaged_file_is_as_none(tmp_path: Path, text: str, small: plan.Plan) -> None:
    (tmp_path / "status.json").write_text(text)
    assert status.read(tmp_path) == {"plan": None, "parameters": None, "sessions": []}
    with status.running(tmp_path, small, CPU, step=0, parameters=1):
        assert len(json.loads((tmp_path / "status.json").read_text())["sessions"]) == 1


def test_a_folder_that_is_gone_stops_nothing(tmp_path: Path, small: plan.Plan) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with status.running(folder, small, CPU, step=0, parameters=1):
        shutil.rmtree(folder)
        status.keep_scores(folder, 1, ["a"], np.array([True]), np.array([0.5]), best=True)
    status.finished(folder)
    assert not folder.exists()
