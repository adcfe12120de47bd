"""`veritune plan`: what it prints is what would be done, and it needs no weights."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from veritune import config
from veritune.cli import run
from veritune.data import dataset
from veritune.data.generate import generate

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 rows to train on, 8 to validate on."""
    folder = tmp_path_factory.mktemp("data")
    rows = generate(44, solutions_per_question=2, seed=1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset.prepare([str(folder / "rows.jsonl")], folder / "prepared", config.Prepare(validation_rows=8))
    return folder / "prepared"


def run_file(folder: Path, data: Path, text: str = "") -> str:
    file = folder / "run.toml"
    file.write_text(f'out = "{folder}/run"\ndata.path = "{data}"\ntrain.batch_size = 8\nmodel.path = "./none"\n{text}')
    return str(file)


def test_phases_time_sessions_and_cost(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_file(tmp_path, data, '[strategy]\nkind = "cumulative"\nends = [32, 64, 500]\nprobe_rows = 4\n')
    flags = ["--rows-per-second", "0.01", "--price", "3.5", "--hours", "2", "--train.lr", "5e-4"]
    assert run(["plan", file, *flags]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["1:", "slice", "1", "32", "32", "4", "0.0005", "new", "new", "53", "min"] in lines
    assert ["2:", "slices", "1", "to", "2", "64", "64", "8", "0.0005", "new", "last", "1.8", "h"] in lines
    assert ["3:", "slices", "1", "to", "3", "80", "80", "10", "0.0005", "new", "last", "2.2", "h"] in lines
    assert "3 slices:" in shown
    assert "1 of 3 strategy.ends lie beyond the 80 rows: cut off" in shown
    assert "in all 22 steps, 176 row presentations (2.20 times the 80 rows), 60 rows scored" in shown
    # (176 + 0.4 x 60) / 0.01 s = 5.56 h
    assert "time: 5.6 h at 0.01 rows/s" in shown
    assert "3 sessions of 2 h; cost 19.44 at 3.5 an hour" in shown
    assert any(0x2800 < ord(letter) < 0x2900 for letter in shown)


def test_rows_that_are_not_there_are_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = "[[phases]]\nrows = [0, 40]\n[[phases]]\nrows = [40, 99999]\n"
    assert run(["plan", run_file(tmp_path, data, phases), "--data.rows", "1000"]) == 0
    shown = capsys.readouterr().out
    assert "data.rows = 1,000: there are 80\n" in shown
    assert "phase 2: rows = [40, 99999]: there are 80\n" in shown
    assert "phase 1: rows" not in shown
    assert run(["plan", run_file(tmp_path, data, phases), "--data.rows", "60"]) == 0
    shown = capsys.readouterr().out
    assert "data.rows = " not in shown
    assert "phase 2: rows = [40, 99999]: there are 60\n" in shown


def test_the_speed_of_a_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_file(tmp_path, data)
    assert run(["plan", file]) == 0
    assert "time: not known" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text('{"settings": {}, "resolved": {}}')
    assert run(["plan", file, "--like", str(other)]) == 2
    assert "no step of this run has ended" in capsys.readouterr().err
    steps = [{"step": i, "loss": 1.0, "rows": 8, "seconds": 100 if i < 11 else 0.5} for i in range(1, 31)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert run(["plan", file, "--like", str(other)]) == 0
    assert "at 16.0 rows/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--pricee", "3"], "did you mean '--price'?"),
        (["--hours", "0"], "session.hours = 0.0: input should be greater than 0"),
        (["--train.lrr", "3"], "did you mean '--train.lr'?"),
        (["--strategy.kind", "stream", "--strategy.cooldowns", "80"], "80 is not before the end"),
        (["--like", "nowhere"], "no such folder"),
        (["--prompt.answers", "Yes", "Yes"], "prompt.answers = ('Yes', 'Yes'): the two words must differ"),
        (["--prompt.instruction", "Check {x}."], "only {true} and {false} may stand in braces"),
    ],
)
def test_what_cannot_be_planned(
    flags: list[str], told: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", run_file(tmp_path, data), *flags]) == 2
    assert told in capsys.readouterr().err


def test_it_takes_seconds_and_no_torch(data: Path, tmp_path: Path) -> None:
    code = "import sys; from veritune.cli import run; print(run(sys.argv[1:])); assert 'torch' not in sys.modules"
    started = time.perf_counter()
    args = [sys.executable, "-c", code, "plan", run_file(tmp_path, data)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("0\n")
    assert time.perf_counter() - started < 30  # 2 s where nothing else runs
