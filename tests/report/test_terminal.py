"""`veritune runs` and `veritune watch`, on a terminal and without one."""

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from veritune import cli
from veritune.errors import MissingError
from veritune.report import page
from veritune.report.braille import curve
from veritune.report.table import show_runs
from veritune.report.watch import watch

pytestmark = pytest.mark.alone


def printed(call, *args: object, width: int = 120) -> str:
    out = io.StringIO()
    call(*args, Console(file=out, width=width))
    return out.getvalue()


def test_runs_is_a_line_each(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "good")
    shutil.copytree(finished, tmp_path / "[bold]broke")
    about = json.loads((finished / "status.json").read_text())
    about["sessions"][-1] |= {"state": "failed", "reason": "NonFiniteError: step 4: [red]the loss"}
    (tmp_path / "[bold]broke" / "status.json").write_text(json.dumps(about))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text("{")
    text = printed(show_runs, tmp_path)
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    loss = min(json.loads((finished / "evaluation.json").read_text())["validation"]["loss"], 9)
    assert lines["good"][1:4] == ["finished", "all", "6/6"]
    assert float(lines["good"][5]) <= loss + 1e-3
    assert lines["[bold]broke"][1] == "failed"
    assert lines["odd"][1] == "damaged"
    assert "[bold]broke: NonFiniteError: step 4: [red]the loss" in text


def test_names_can_be_read_on_a_narrow_terminal(finished: Path, tmp_path: Path) -> None:
    names = ["llama-cumulative-20k-first", "first-sweep/trials/0007"]
    for name in names:
        shutil.copytree(finished, tmp_path / name)
        (tmp_path / name / "status.json").write_text(
            (finished / "status.json").read_text().replace('"all"', '"3: slices 1 to 3 and replay"')
        )
    lines = printed(show_runs, tmp_path, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert [line[:18] for line in lines if "finished" in line] == ["first-sweep/trials", "llama-cumulative-2"]
    piped = subprocess.run(
        [sys.executable, "-m", "veritune", "runs", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.split()[0] for line in piped[1:]] == sorted(names)
    assert all("3: slices 1 to 3 and replay" in line for line in piped[1:])


def test_a_validation_without_a_figure_is_shown_with_the_others(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "validation": {"loss": 0.001}}\n')
    text = printed(show_runs, tmp_path)
    assert text.splitlines()[1].split()[5:8] == ["0.001", "-", "-"]
    assert "accuracy -  AUROC -  loss 0.001" in printed(watch, tmp_path / "run")
    page.report([tmp_path / "run"], tmp_path / "r.html")
    assert "0.001" in (tmp_path / "r.html").read_text()


def test_no_runs_is_said(tmp_path: Path) -> None:
    assert "no runs under" in printed(show_runs, tmp_path)
    with pytest.raises(MissingError):
        show_runs(tmp_path / "none", Console(file=io.StringIO()))


def test_the_verbs(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["runs", str(finished.parent)]) == 0
    assert "finished" in capsys.readouterr().out
    assert cli.run(["watch", str(finished / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_watch_without_a_terminal_prints_lines_and_ends_with_the_run(finished: Path) -> None:
    lines = printed(watch, finished).splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4", "step 6", "finished"]


def test_watch_on_a_terminal_draws_and_ends_with_q(finished: Path) -> None:
    pid_side, program_side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "30", "PYTHONIOENCODING": "utf-8"}
    program = subprocess.Popen(
        [sys.executable, "-m", "veritune", "watch", str(finished)],
        stdin=program_side, stdout=program_side, stderr=program_side, env=environment, close_fds=True,
    )  # fmt: skip
    os.close(program_side)
    seen, until = b"", time.monotonic() + 60
    while "ends; the run goes on" not in seen.decode(errors="replace") and time.monotonic() < until:
        if select.select([pid_side], [], [], 1)[0]:
            seen += os.read(pid_side, 65536)
    os.write(pid_side, b"xq")
    drain = time.monotonic() + 30
    while program.poll() is None and time.monotonic() < drain:
        if select.select([pid_side], [], [], 0.2)[0]:
            try:
                os.read(pid_side, 65536)
            except OSError:
                break
    assert program.wait(timeout=30) == 0
    os.close(pid_side)
    text = seen.decode(errors="replace")
    assert "finished" in text
    assert "learning rate" in text
    assert any(0x2800 < ord(letter) < 0x2900 for letter in text)


def test_a_curve_goes_where_its_values_go() -> None:
    rising = curve([0.0, 1.0, 2.0, 3.0], 20, 3)
    assert len(rising) == 3
    assert {len(line) for line in rising} == {20}
    assert rising[0].startswith("3 ")
    assert rising[-1].startswith("0 ")
    assert rising[0][-1] != chr(0x2800)
    assert rising[-1][2] != chr(0x2800)
    assert rising[0][2] == chr(0x2800)


@pytest.mark.parametrize(
    "values", [[], [float("nan")], [1.0], [2.0, 2.0], [1.0, float("nan"), 3.0], [1e-30, 1e30], list(range(5000))]
)
def test_every_series_has_a_curve_of_its_size(values: list[float]) -> None:
    for width, height in ((40, 5), (12, 2), (8, 1)):
        lines = curve(values, width, height)
        assert len(lines) == height
        assert len({len(line) for line in lines}) == 1
