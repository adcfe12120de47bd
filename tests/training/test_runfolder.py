"""run.json, and what may change between two sessions of a run."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import checkpoints, losses, prepared, settings, trained
from tiny_models import byte_level, worked_text, write_folder

from veritune import config
from veritune.data.generate import generate
from veritune.errors import ConfigError
from veritune.training import runfolder


def run(folder: Path, **train: Any) -> config.Run:
    return config.build(config.Run, {"out": str(folder), "train": train}, "test")


def start(folder: Path, resolved: dict[str, Any], **train: Any) -> None:
    runfolder.start(folder, runfolder.described(run(folder, **train), resolved))


def test_a_folder_in_which_nothing_was_saved_takes_other_settings(tmp_path: Path) -> None:
    start(tmp_path, {"fingerprint": "a"}, lr=1e-3)
    start(tmp_path, {"fingerprint": "b"}, lr=1e-4)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["train"]["lr"] == 1e-4
    for name in ("checkpoints/step-00000001", "best", "adapter"):
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(ConfigError, match=r"lr was 0\.0001, is 0\.001; fingerprint was 'b', is 'c' \(of the"):
            start(tmp_path, {"fingerprint": "c"}, lr=1e-3)
        (tmp_path / name).rmdir()


def test_a_resolved_value_stands_in_place_of_its_setting(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        start(tmp_path, {})
    (tmp_path / "run.json").unlink()
    (tmp_path / "best").rmdir()
    start(tmp_path, {"train.micro_batch_tokens": 2048})
    (tmp_path / "best").mkdir()
    start(tmp_path, {"train.micro_batch_tokens": 2048}, micro_batch_tokens=2048)
    with pytest.raises(ConfigError, match=r"train\.micro_batch_tokens was 2048, is 512"):
        start(tmp_path, {"train.micro_batch_tokens": 512}, micro_batch_tokens=512)


def test_validation_may_change_unless_it_chooses_what_a_phase_starts_from(tmp_path: Path) -> None:
    def values(every: int, **tables: Any) -> dict[str, Any]:
        return runfolder.described(
            config.build(config.Run, {"out": "x", "validation": {"every": every}, **tables}, "test"), {}
        )

    best = {"start_from": "best"}
    for number, tables in enumerate(
        ({"strategy": {"kind": "sequential", **best}}, {"phases": [{"rows": [0, 4]}, {"rows": [4, 8], **best}]})
    ):
        folder = tmp_path / f"{number}"
        (folder / "best").mkdir(parents=True)
        runfolder.write_json(folder / "run.json", values(10, **tables))
        runfolder.start(folder, values(10, **tables))
        with pytest.raises(ConfigError, match=r"validation\.every was 10, is 20"):
            runfolder.start(folder, values(20, **tables))
        # What is appended may be the first to ask for the best.
        runfolder.write_json(folder / "run.json", values(10))
        runfolder.start(folder, values(10, **tables), lambda earlier: True)
    (tmp_path / "plain" / "best").mkdir(parents=True)
    runfolder.write_json(tmp_path / "plain" / "run.json", values(10, strategy=best))
    runfolder.start(tmp_path / "plain", values(20, strategy=best))  # no phase follows, so none starts from it


def test_a_start_that_was_cut_off_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*unused: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut_off)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, {})
    start(tmp_path, {})


def test_what_is_written_is_strict_json(tmp_path: Path) -> None:
    runfolder.write_json(tmp_path / "x.json", {"auroc": math.nan, "range": (1.0, math.inf)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"auroc": None, "range": [1.0, None]}


def test_with_dropout_how_a_step_is_cut_may_not_change(tiny_folder: Path, tmp_path: Path) -> None:
    """What is dropped depends on it, so the resumed run would not be the run."""
    data = prepared(generate(8, solutions_per_question=4, seed=1), tmp_path / "d", 8)
    for dropout, name in ((0.1, "dropped"), (0.0, "plain")):
        cut = {"train": {"lr": 1e-3, "batch_size": 8, "per_question": 4, "micro_batch_tokens": 400}}
        it = {"lora": {"rank": 8, "alpha": 16, "dropout": dropout}, "checkpoint": {"every": 1, "keep": 9}}
        trained(settings(tmp_path / name, data, tiny_folder, **it, **cut))
        cut["train"]["micro_batch_tokens"] = 4000
        again = settings(tmp_path / name, data, tiny_folder, **it, **cut)
        if dropout:
            with pytest.raises(ConfigError, match=r"train\.micro_batch_tokens was 400, is 4000"):
                trained(again)
        else:
            trained(again)


def test_other_weights_under_the_same_path_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    data = prepared(generate(8, solutions_per_question=4, seed=1), tmp_path / "d", 8)
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    trained(settings(tmp_path / "run", data, model))
    copied = Path(shutil.copytree(tmp_path / "run", tmp_path / "copied"))
    write_folder(model, seed=1)
    with pytest.raises(ConfigError, match=r"model\.weights was '\w+', is '\w+' \(the fingerprint of what model.path"):
        trained(settings(tmp_path / "run", data, model))
    # The same weights elsewhere; and a run of an earlier version, of which only the path is known.
    trained(settings(tmp_path / "run", data, tiny_folder))
    values = json.loads((copied / "run.json").read_text())
    assert values["resolved"].pop("model.weights")
    runfolder.write_json(copied / "run.json", values)
    with pytest.raises(ConfigError, match=r"other settings: model\.path was '.*model', is '.*'\. Put"):
        trained(settings(copied, data, tiny_folder))
    trained(settings(copied, data, model))
    assert json.loads((copied / "run.json").read_text())["resolved"]["model.weights"]


def test_a_tokenizer_that_read_other_rows_is_not_called_another(tmp_path: Path) -> None:
    start(tmp_path, {"fingerprint": "a", "model.tokenizer": "of the rows a"})
    (tmp_path / "best").mkdir()
    with pytest.raises(ConfigError, match=r"fingerprint was 'a', is 'b'") as refused:
        start(tmp_path, {"fingerprint": "b", "model.tokenizer": "of the rows b"})
    assert "model.tokenizer" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"settings: model\.tokenizer was"):
        start(tmp_path, {"fingerprint": "a", "model.tokenizer": "of the rows b"})


def test_another_tokenizer_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """With the same weights, as where a hub's repository has changed: rows would be other tokens from then on."""
    data = prepared(generate(8, solutions_per_question=4, seed=1), tmp_path / "d", 8)
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    it = settings(tmp_path / "run", data, model)
    trained(it)
    byte_level(worked_text(), vocabulary=500).save_pretrained(model)
    with pytest.raises(ConfigError, match=r"settings: model\.tokenizer was '\w+', is '\w+' \(the fingerprint of how"):
        trained(it)
    values = json.loads((tmp_path / "run" / "run.json").read_text())
    assert values["resolved"].pop("model.tokenizer")
    runfolder.write_json(tmp_path / "run" / "run.json", values)
    trained(it)  # a run of an earlier version, which did not look


def test_a_finished_run_whose_metrics_were_deleted_is_finished_still(tiny_folder: Path, tmp_path: Path) -> None:
    """And rows of one label, whose AUROC is undefined, leave files that any reader of JSON takes."""
    rows = generate(16, solutions_per_question=4, seed=1)
    questions = list(dict.fromkeys(row["question"] for row in rows))
    single = [row for row in rows if row["is_correct"] == bool(questions.index(row["question"]) % 2)]
    data = prepared(single, tmp_path / "d", 8)
    it = settings(tmp_path / "run", data, tiny_folder, validation={"rows": 1})
    quality, printed = trained(it)
    assert math.isnan(quality["auroc"])
    assert re.search(r"note: all \d validation rows are (True|False): there is no AUROC", printed)
    out = tmp_path / "run"
    before = (out / "evaluation.json").read_text()
    assert json.loads(before)["validation"]["auroc"] is None
    for file in (out / "metrics.jsonl", *out.rglob("*.json")):
        for line in file.read_text(encoding="utf-8").splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(line, parse_constant=pytest.fail)
    (out / "metrics.jsonl").unlink()
    again, _ = trained(it)
    assert again.keys() == quality.keys()
    assert again["log_loss"] == quality["log_loss"]
    assert math.isnan(again["auroc"])
    assert (out / "evaluation.json").read_text() == before
    assert losses(out) == []
    assert len(checkpoints(out)) == 1
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(ConfigError, match=r"holds a finished run whose checkpoints are gone.*train\.start_from"):
        trained(it)
    assert (out / "evaluation.json").read_text() == before
