"""The command line as its users meet it: help for every verb, one line and exit code 2 for each mistake, and the whole
way from labelled rows to a submission."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from veritune import __version__, config
from veritune.cli import VERBS, run
from veritune.data import generate
from veritune.model.verifier import Verifier

pytestmark = pytest.mark.alone


@dataclass(frozen=True)
class Place:
    """A folder in which the verbs have been run, and what they are given."""

    folder: Path
    rows: Path
    held_out: Path
    prepared: Path
    run_file: Path
    run: Path

    @property
    def best(self) -> Path:
        return self.run / "best"


def toml(path: Path, prepared: Path, model: Path, out: Path, *, train: str = "") -> Path:
    path.write_text(
        f"""out = "{out}"
[data]
path = "{prepared}"
[model]
path = "{model}"
base = "fp32"
device = "cpu"
[prompt]
max_length = 512
[lora]
rank = 4
[train]
batch_size = 8
{train}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def place(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Rows prepared and an adapter trained for three steps, by the command line."""
    folder = tmp_path_factory.mktemp("place")
    it = Place(
        folder, *(folder / name for name in ("rows.jsonl", "held-out.jsonl", "prepared", "run.toml", "runs/first"))
    )
    generate.write(it.rows, 14, seed=1)
    generate.write(it.held_out, 8, solutions_per_question=2, seed=2)
    assert run(["prepare", str(it.rows), "--out", str(it.prepared), "--validation-rows", "16"]) == 0
    toml(it.run_file, it.prepared, tiny_folder, it.run)
    assert run(["train", str(it.run_file), "--data.rows", "24", "--train.lr", "1e-3"]) == 0
    return it


def told(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Runs a command line that holds a mistake, and gives the one line that says what it was."""
    capsys.readouterr()
    assert run([str(arg) for arg in args]) == 2
    said = capsys.readouterr().err
    assert said.startswith("veritune: ")
    assert said.count("\n") == 1
    return said


# Help.


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"usage: veritune {verb}" in out
    assert "(default: " in out or verb == "watch"
    run_keys = [key for key in config.keys(config.Run) if key != "phases"]  # tables of a run file only
    settings = {"train": run_keys, "plan": run_keys, "sweep": run_keys, "prepare": config.keys(config.Prepare)}
    assert [key for key in settings.get(verb, []) if f"--{key.replace('_', '-')}" not in out] == []
    assert run([]) == 2
    assert f"veritune {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "shows"),
    [
        ("prepare", ["of questions that hold at most a quarter of the rows", "hf:// datasets. (required)"]),
        ("evaluate", ["and with it the verdict at 0.5, is then for that share"]),
        ("report", ["one sweep's folder. (required)"]),
        ("train", ["where the GPU or CPU multiplies in it, else fp32"]),
        ("sweep", ["name of sweep.out, as one more worker", "where the GPU or CPU multiplies in it, else fp32"]),
    ],
)
def test_help_tells_a_meaning_in_one_paragraph(
    verb: str, shows: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert run([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert [text for text in shows if text not in out] == []


@pytest.mark.parametrize(
    ("args", "shows"),
    [(["--help"], "veritune train RUN.toml"), (["--help"], "AUROC, Brier, log loss"), (["--version"], __version__)],
)
def test_help_and_version(args: list[str], shows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == 0
    assert shows in capsys.readouterr().out


def test_help_waits_for_no_library() -> None:
    code = (
        "import sys; from veritune.cli import VERBS, run\n"
        "for verb in VERBS: assert run([verb, '--help']) == 0\n"
        "print(sorted({'torch', 'transformers', 'polars', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Mistakes.


def test_a_verb_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, "trian")
    assert "'trian' (did you mean 'train'?)" in said
    assert all(verb in said for verb in VERBS)


@pytest.mark.parametrize(
    ("args", "shows"),
    [
        (["train", "--out", "o", "--train.lrr", "1"], ["--train.lrr", "did you mean '--train.lr'?"]),
        (["train", "--out", "o", "--train.lr", "fast"], ["--train.lr", "'fast'"]),
        (["train", "--out", "o", "--train.lr", "-1"], ["flags: train.lr = -1.0: ", "greater than 0"]),
        (["train", "--out", "o", "--train.optimizer", "adam"], ["--train.optimizer", "adamw_torch"]),
        (["train"], ["veritune train RUN.toml", "--out"]),
        (["plan", "--price", "3", "run.toml"], ["named before all flags: veritune plan RUN.toml"]),
        (["plan", "--out", "o", "--price", "much"], ["--price", "'much'"]),
        (["plan", "--out", "o", "--price", "nan"], ["price = nan"]),
        (["plan", "--out", "o", "--gpus", "4"], ["--gpu NAME"]),
        (["train", "--out", "o", "--phases", "x"], ["[[phases]] tables stand in the run file"]),
        (["sweep", "--sweep.trials", "3"], ["veritune sweep RUN.toml"]),
        (["report", "--out", "o"], ["veritune report RUN"]),
        (["watch"], ["RUN"]),
        (["prepare", "rows.csv"], ["--out"]),
        (["prepare", "rows.csv", "--out", "o", "--sead", "1"], ["--sead", "--seed"]),
        (["score", "adapter"], ["--out"]),
        (["evaluate"], ["ADAPTER", "DATA"]),
        (["submit", "a", "b", "--out", "c", "--base", "int8"], ["--base", "nf4"]),
    ],
)
def test_flags_that_are_none(args: list[str], shows: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert all(text in err for text in shows), err


@pytest.mark.parametrize(
    ("text", "shows"),
    [
        ("[train]\nlrr = 1", ["'train.lrr'", "did you mean 'train.lr'?"]),
        ("lr = 1", ["'lr'", "did you mean 'train.lr'?"]),
        ("[train]\nrank = 8", ["'train.rank'", "did you mean 'lora.rank'?"]),
        ("[trian]\nlr = 1", ["'trian'", "did you mean 'train'?"]),
        ("[lora]\nrang = 8", ["'lora.rang'", "did you mean 'lora.rank'?"]),
        ('[train]\nlr = "fast"', ["train.lr = 'fast'", "number"]),
        ("[train]\nlr = -1", ["train.lr = -1", "greater than 0"]),
        ("[train]\nbatch_size = 1.5", ["train.batch_size = 1.5", "integer"]),
        ('[train]\noptimizer = "adam"', ["train.optimizer = 'adam'", "'adamw_torch'"]),
        ("train = 3", ["train = 3"]),
        ("[train\nlr = 1", ["not valid TOML"]),
        ("[data]\nrows = 0", ["data.rows = 0", "greater than or equal to 1"]),
    ],
)
def test_run_files_with_a_mistake(
    text: str, shows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'out = "o"\n{text}\n')
    said = told(capsys, "train", file)
    assert all(part in said for part in [str(file), *shows]), said


def test_a_run_file_that_lacks_out_or_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    assert f"{file}: no such run file" in told(capsys, "train", file)
    file.write_text("[train]\nlr = 1\n")
    assert "'out' is not set" in told(capsys, "train", file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "not valid TOML" in told(capsys, "train", file)


def test_what_training_needs(
    place: Place, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "run.toml", tmp_path / "run"

    def said(prepared: Path, model: Path, *flags: str) -> str:
        return told(capsys, "train", toml(file, prepared, model, out), *flags)

    assert "no such prepared dataset; make it with `veritune prepare" in said(tmp_path / "none", tiny_folder)
    assert f"{place.folder}: not a prepared dataset" in said(place.folder, tiny_folder)
    assert f"{place.rows}: " in said(place.rows, tiny_folder)
    assert "no such file or folder" in said(place.prepared, tmp_path / "none")
    assert "cannot be loaded" in said(place.prepared, place.prepared)
    assert "its linear layers are" in said(place.prepared, tiny_folder, "--lora.targets", "wqkv")
    assert "must differ in their token" in said(place.prepared, tiny_folder, "--prompt.answers", "True", "True")
    assert "prompt.max_length = 1025" in said(place.prepared, tiny_folder, "--prompt.max-length", "1025")
    assert "positions for 1024 tokens" in said(place.prepared, tiny_folder, "--prompt.max-length", "1025")
    assert "not an adapter folder" in said(place.prepared, tiny_folder, "--train.start-from", str(tmp_path))
    meant = said(place.prepared, tiny_folder, "--train.start-from", str(place.run))
    assert f"{place.run}: not an adapter folder" in meant
    assert meant.endswith(f"; did you mean {place.best}?\n")
    assert not out.exists()
    changed = told(capsys, "train", place.run_file, "--data.rows", "24", "--train.lr", "2e-3")
    assert "train.lr was 0.001, is 0.002" in changed


def test_data_that_cannot_be_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, empty, header, other = (tmp_path / name for name in ("out", "empty.csv", "header.csv", "notes.txt"))
    empty.write_bytes(b"")
    header.write_text("question,solution,is_correct\n")
    other.write_text("some text")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"a": 1, "b": 2}\n')
    assert "no source is named" in told(capsys, "prepare", "--out", out)
    assert "no such file or folder" in told(capsys, "prepare", tmp_path / "none.csv", "--out", out)
    assert f"{empty}: " in told(capsys, "prepare", empty, "--out", out)
    assert "it has no rows" in told(capsys, "prepare", header, "--out", out)
    assert f"{other}: unknown kind of file" in told(capsys, "prepare", other, "--out", out)
    assert "Name it with --columns." in told(capsys, "prepare", wrong, "--out", out)
    assert "balance" in told(capsys, "prepare", header, "--out", out, "--balance", "1.5")
    assert "no column 'a'" in told(capsys, "prepare", header, "--out", out, "--columns.question", "a")
    assert "holds other things" in told(capsys, "prepare", header, "--out", tmp_path)
    assert not out.exists()


@pytest.mark.parametrize("verb", ["evaluate", "score", "submit"])
def test_files_that_cannot_be_measured(
    place: Place, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, out = tmp_path / "empty.jsonl", tmp_path / "out.jsonl"
    empty.write_bytes(b"")
    to = () if verb == "evaluate" else ("--out", out)
    assert f"{empty}: " in told(capsys, verb, place.best, empty, *to)
    assert "no such file" in told(capsys, verb, place.best, tmp_path / "none.jsonl", *to)
    assert f"{place.run}: there is no veritune.json in it; did you mean {place.run}/best?" in told(
        capsys, verb, place.run, place.held_out, *to
    )
    assert "no such adapter folder" in told(capsys, verb, tmp_path / "none", place.held_out, *to)
    assert "was not made by" in told(capsys, verb, place.prepared, place.held_out, *to)
    assert not out.exists()


def test_rows_that_nothing_can_be_measured_on(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in place.held_out.read_text(encoding="utf-8").splitlines()]
    all_true, unlabelled = tmp_path / "true.jsonl", tmp_path / "unlabelled.jsonl"
    all_true.write_text("".join(json.dumps({**row, "is_correct": True}) + "\n" for row in rows))
    unlabelled.write_text(
        "".join(json.dumps({key: row[key] for key in ("question", "solution")}) + "\n" for row in rows)
    )
    assert "are True, so nothing can be measured" in told(capsys, "evaluate", place.best, all_true)
    assert "--columns.label" in told(capsys, "evaluate", place.best, unlabelled)
    assert "did you mean 'solver'?" in told(capsys, "evaluate", place.best, place.held_out, "--by", "slover")
    assert "not a prepared dataset" in told(capsys, "evaluate", place.best, place.folder)


def test_what_is_there_is_not_overwritten(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    for verb in ("score", "submit"):
        assert str(out) in told(capsys, verb, place.best, place.held_out, "--out", out)
    assert out.read_text() == "mine"
    shutil.copy(place.held_out, out)
    assert f"{out}: is the input" in told(capsys, "evaluate", place.best, out, "--out", tmp_path / "." / "out.jsonl")
    assert out.read_bytes() == place.held_out.read_bytes()
    manifest = place.prepared / "manifest.json"
    before = manifest.read_bytes()
    assert f"{manifest}: is the input" in told(capsys, "evaluate", place.best, place.prepared, "--out", manifest)
    assert manifest.read_bytes() == before
    within = out / "figures.json"
    said = told(capsys, "evaluate", place.best, place.held_out, "--out", within)
    assert f"{within}: nothing can be written in {out}" in said


# The whole way.


def test_from_rows_to_an_adapter(place: Place) -> None:
    assert {path.name for path in place.run.iterdir()} == {
        "adapter", "best", "checkpoints", "evaluation.json", "metrics.jsonl", "run.json", "status.json",
        "scores-best.parquet", "scores-last.parquet",
    }  # fmt: skip
    settings = json.loads((place.run / "run.json").read_text())["settings"]
    assert settings["train"]["lr"] == 1e-3  # a flag
    assert settings["train"]["batch_size"] == 8  # the file
    assert settings["lora"]["alpha"] == 32  # the default
    steps = [json.loads(line)["step"] for line in (place.run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3]


def test_the_next_command_is_one_for_a_shell(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = shutil.copytree(place.run, tmp_path / "my run")
    capsys.readouterr()
    again = ["train", str(place.run_file), "--data.rows", "24", "--train.lr", "1e-3", "--out", str(moved)]
    assert run(again) == 0
    assert f"Next: veritune evaluate '{moved}/best' FILE" in capsys.readouterr().out
    assert run(["init", str(tmp_path / "my run.toml")]) == 0
    assert f"; veritune train '{tmp_path / 'my run.toml'}'" in capsys.readouterr().out


def test_evaluate(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    args = ["evaluate", place.best, place.held_out, "--baseline", "--by", "solver", "--out", out]
    assert run([str(arg) for arg in args]) == 0
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["rows"] == found["adapter"]["rows"] == found["baseline"]["rows"] == 16
    assert found["adapter"]["log_loss"] != found["baseline"]["log_loss"]
    assert sum(entry["rows"] for entry in found["by"]["solver"]) == 16
    assert f"{found['adapter']['accuracy']:.4f}" in shown
    assert "meant for rows of which 50.0% are correct" in shown
    assert found["train_share"] == 0.5
    # For another share of correct solutions: more are called so, none changes its place.
    assert run(["evaluate", str(place.best), str(place.held_out), "--share", "0.95", "--out", str(out)]) == 0
    moved, table = json.loads(out.read_text())["adapter"], found["adapter"]["confusion"]
    assert moved["auroc"] == pytest.approx(found["adapter"]["auroc"])
    called = [each["true_positive"] + each["false_positive"] for each in (moved["confusion"], table)]
    assert called[0] > called[1]
    assert json.loads(out.read_text())["share"] == 0.95
    assert "95.0% are correct" in capsys.readouterr().out
    assert run(["evaluate", str(place.best), str(place.held_out), "--share", "0.9", "--baseline"]) == 2
    assert "--share with --baseline" in capsys.readouterr().err
    assert run(["evaluate", str(place.best), str(place.held_out), "--share", "95"]) == 2
    assert "share = 95.0" in capsys.readouterr().err
    # A prepared folder's validation rows give what the run measured on them.
    assert run(["evaluate", str(place.best), str(place.prepared), "--out", str(out)]) == 0
    measured = json.loads((place.run / "evaluation.json").read_text())["validation"]
    assert json.loads(out.read_text())["adapter"]["log_loss"] == pytest.approx(measured["log_loss"], abs=1e-5)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_score(place: Place, kind: str, tmp_path: Path) -> None:
    source, out = tmp_path / f"rows.{kind}", tmp_path / f"scored.{kind}"
    rows = pl.read_ndjson(place.held_out).drop("is_correct")
    (rows.write_csv if kind == "csv" else rows.write_ndjson)(source)
    args = ["score", str(place.best), str(source), "--out", str(out)]
    assert run(args) == 0
    scored = (pl.read_csv if kind == "csv" else pl.read_ndjson)(out)
    assert scored["solution"].to_list() == rows["solution"].to_list()
    p = Verifier.load(place.best, device="cpu").score_rows(rows["question"].to_list(), rows["solution"].to_list())
    assert scored["p_correct"].to_numpy() == pytest.approx(p, abs=1e-6)
    assert run([*args, "--overwrite"]) == 0


def test_submit(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test, sample, out = (tmp_path / name for name in ("test.csv", "sample.csv", "submission.csv"))
    rows = pl.read_ndjson(place.held_out).with_columns(is_correct=True)
    rows.write_csv(test)
    sample.write_text("ID,is_correct\n" + "".join(f"{i},True\n" for i in range(len(rows))))
    args = ["submit", str(place.best), str(test), "--sample", str(sample), "--out", str(out)]
    assert run(args) == 0
    p = Verifier.load(place.best, device="cpu").score_rows(rows["question"].to_list(), rows["solution"].to_list())
    said = [line.split(",") for line in out.read_text().splitlines()]
    assert said == [["ID", "is_correct"], *([str(i), str(bool(value >= 0.5))] for i, value in enumerate(p))]
    sample.write_text("ID,is_correct\n0,True\n")
    assert "fewer than the test file's 16" in told(capsys, *args, "--overwrite")
    assert len(out.read_text().splitlines()) == 17


# Processes.


def test_a_mistake_ends_the_process_with_2(tmp_path: Path) -> None:
    args = [sys.executable, "-m", "veritune", "prepare", str(tmp_path / "none.csv"), "--out", str(tmp_path / "out")]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"veritune: {tmp_path / 'none.csv'}: no such file or folder\n"


def test_a_signal_outside_a_session_ends_the_process_with_130() -> None:
    code = """
import os, signal, sys
from veritune import cli
sys.argv = ["veritune", "train", "run.toml"]
cli.VERBS["train"] = lambda args: os.kill(os.getpid(), signal.SIGTERM)
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("args", [["schema"], ["sweep", "--help"], ["--help"], ["runs"]])
def test_a_pipe_that_nobody_reads_ends_the_process_in_silence(args: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "veritune", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdout
    process.stdout.close()
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_libraries_are_read_is_said(tmp_path: Path, name: str) -> None:
    file = toml(tmp_path / "run.toml", tmp_path / "prepared", tmp_path / "model", tmp_path / "run")
    code = f"""
import os, signal, sys
from veritune import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts this process may have it ignored
class Reading:
    def find_spec(self, module, *unused):
        if module == "torch":
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Reading())
sys.argv = ["veritune", "train", {str(file)!r}]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"stopped by {name} before the first step; the same command goes on\n"
    assert (done.returncode, done.stderr) == (130, "")


def test_a_process_ends_before_its_hours_with_all_saved(place: Place, tiny_folder: Path, tmp_path: Path) -> None:
    out, limit = tmp_path / "run", 20.0
    file = toml(tmp_path / "run.toml", place.prepared, tiny_folder, out, train="epochs = 3000")
    args = [sys.executable, "-m", "veritune", "train", str(file), "--hours", str(limit / 3600)]
    began = time.monotonic()
    done = subprocess.run(args, capture_output=True, text=True, timeout=90)
    took = time.monotonic() - began
    assert done.returncode == 130, done.stderr
    assert took < limit
    assert "the limit of" in done.stdout
    steps = [line["step"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]
    assert (out / "checkpoints" / f"step-{steps[-1]:08d}" / "manifest.json").exists()


def test_a_limit_too_short_for_a_step_is_a_mistake(
    place: Place, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loop of restarts would never end: no session would get further."""
    out = tmp_path / "run"
    file = toml(tmp_path / "run.toml", place.prepared, tiny_folder, out)
    args = ["train", str(file), "--checkpoint.every", "1", "--checkpoint.keep", "9"]
    limit = ["--hours", "0.0001"]  # this process is older
    said = told(capsys, *args, *limit)
    assert "stopped by the limit of 0.0001 hours before anything was done: of its 0 s, loading took " in said
    assert "Give it more hours" in said
    assert run(args) == 0
    first, *later = sorted((out / "checkpoints").iterdir())
    for path in later:
        shutil.rmtree(path)
    assert "before anything was done" in told(capsys, *args, *limit)
    assert list((out / "checkpoints").iterdir()) == [first]
    assert run(args) == 0


def test_a_stopped_process_goes_on_with_the_same_command(place: Place, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    file = toml(tmp_path / "run.toml", place.prepared, tiny_folder, out, train="epochs = 4")
    args = [sys.executable, "-m", "veritune", "train", str(file)]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    log, until = out / "metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in printed
    assert "Traceback" not in said
    assert run(["train", str(file)]) == 0
    steps = [line["step"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert (out / "adapter" / "adapter_model.safetensors").exists()
