"""Trackers show a run's lines, each once whatever happened between sessions; and nothing they do touches the run."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from readers import Logged, from_tensorboard, from_trackio, from_wandb, pictures, wandb_runs

from veritune import config
from veritune.errors import ConfigError
from veritune.track import Tracker
from veritune.trackers import follow
from veritune.trackers.picture import CELL, HEIGHT, LABEL
from veritune.trackers.worker import numbers

pytestmark = pytest.mark.alone

TABLE = {"true_positive": 5, "false_positive": 6, "true_negative": 7, "false_negative": 8}
FORGETTING = {
    "slices": [{"name": "first"}, {"name": "second"}],
    "phases": [{"name": "one"}, {"name": "two"}],
    "accuracy": {"trained": [[0.75, None], [0.5, 0.875]], "held_out": [[0.5, 0.5], [0.25, 0.625]]},
}
KEY = "f" * 40


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(follow, "failures", {})


def settings(folder: Path, to: str, **track: Any) -> config.Run:
    return config.build(config.Run, {"out": str(folder), "track": {"to": [to], **track}}, "test")


def session(run: config.Run, first: int, last: int, *, between: Callable[[], Any] = lambda: None) -> list[str]:
    """One session of a run that logs the steps from `first` to `last`; what was said meanwhile."""
    folder, said = Path(run.out), []
    folder.mkdir(exist_ok=True, parents=True)
    tracker = Tracker(folder / "metrics.jsonl", from_step=first - 1)
    try:
        with follow.following(run, folder, said.append):
            for step in range(first, last + 1):
                tracker.log(step, loss=1 / step, lr=1e-3)
                if step % 5 == 0:
                    tracker.log(step, validation={"accuracy": step / 100, "auroc": None, "confusion": TABLE})
                if step == (first + last) // 2:
                    between()
    finally:
        tracker.close()
    return said


def expected(last: int) -> list[tuple[int, str, float]]:
    losses = [(step, "loss", round(1 / step, 6)) for step in range(1, last + 1)]
    return sorted(losses + [(step, "validation/accuracy", step / 100) for step in range(5, last + 1, 5)])


def figures(logged: Logged) -> list[tuple[int, str, float]]:
    wanted = ("loss", "validation/accuracy")
    items = [(step, name, value) for step, values in logged for name, value in values.items() if name in wanted]
    return sorted((step, name, round(value, 6)) for step, name, value in items)


def read(to: str, folder: Path, tmp_path: Path) -> Logged:
    if to == "trackio":
        return from_trackio(tmp_path / "home" / "TRACKIO_DIR", "some project")
    place = folder / follow.FOLDER / to
    return from_wandb(place) if to == "wandb" else from_tensorboard(place)


@pytest.mark.parametrize("to", ["wandb", "trackio", "tensorboard"])
def test_every_line_is_shown_once_over_sessions(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(to)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = settings(tmp_path / "run", to, project="some project", name="mine", group="trials")
    folder = Path(run.out)
    told = session(run, 1, 20)
    assert told == ([] if to != "wandb" else [told[0]])
    session(run, 16, 22)  # goes on from a checkpoint after step 15; the lines of 16 to 20 were shown already
    (folder / "forgetting.json").write_text(json.dumps(FORGETTING))
    session(run, 23, 23)
    logged = read(to, folder, tmp_path)
    assert figures(logged) == expected(23)
    last = {name: value for step, values in logged if step == 23 for name, value in values.items()}
    # The confusion table (2 x 2) at each session's end, the forgetting matrix (2 x 2) at the last one's.
    sizes = list(pictures(to, folder / follow.FOLDER / to, tmp_path / "home").values())
    assert sizes == [(LABEL + 2 * CELL, 3 * HEIGHT)] * len(sizes)
    assert len(sizes) >= (2 if to == "tensorboard" else 4)
    if to == "wandb":
        assert last["confusion/nrows"] == 2
        tables = [json.loads(file.read_bytes()) for file in folder.rglob("forgetting/trained_23*.table.json")]
        assert tables == [
            {"columns": ["accuracy after phase", "first", "second"], "data": [["one", 0.75, None], ["two", 0.5, 0.875]]}
        ]
        kept = wandb_runs(folder / follow.FOLDER / to)
        runs = [next(it.run for it in records if it.WhichOneof("record_type") == "run") for records in kept]
        assert len(runs) == 3
        assert {(it.run_id, it.project, it.display_name, it.run_group) for it in runs} == {
            (runs[0].run_id, "some project", "mine", "trials")
        }
        assert {item.key: item.value_json for item in runs[0].config.update}["train.lr"] == "0.0002"
    else:
        table = str(last["forgetting/trained"])
        assert "| accuracy after phase | first | second |" in table
        assert "| two | 0.5 | 0.875 |" in table
        assert "| correct | 5 | 8 |" in str(last["confusion"])


@pytest.mark.parametrize("to", ["wandb", "tensorboard"])
def test_a_session_that_is_killed_is_shown_to_its_end_and_gone_on_with(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(to)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = settings(tmp_path / "run", to)
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_trackers import session, settings\n"
        "session(settings(Path(sys.argv[2]), sys.argv[3]), 1, 19, between=lambda: os.kill(os.getpid(), 9))"
    )
    args = [sys.executable, "-c", code, str(Path(__file__).parent), run.out, to]
    done = subprocess.run(args, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    session(run, 8, 12)
    assert figures(read(to, Path(run.out), tmp_path)) == expected(12)


def test_a_worker_that_is_killed_costs_a_warning_and_the_next_session_sends_the_rest(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = settings(tmp_path / "run", "tensorboard")

    def kill() -> None:
        at_work(run)
        for number in workers():
            os.kill(number, signal.SIGKILL)

    (said,) = session(run, 1, 10, between=kill)
    rest = "and the same command sends the rest"
    assert said == f"tensorboard: failed; the run is whole in {run.out}/metrics.jsonl, {rest}"
    assert session(run, 11, 11) == []
    assert figures(read("tensorboard", Path(run.out), tmp_path)) == expected(11)


def at_work(run: config.Run) -> None:
    """Waits until the run's worker has begun."""
    until = time.monotonic() + 30
    while not list((Path(run.out) / follow.FOLDER).glob("*/sent.json")):
        assert time.monotonic() < until
        time.sleep(0.02)


def workers() -> list[int]:
    """The worker processes that this one has started."""
    found = []
    for number in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            about = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{number}/cmdline").read_bytes()
            if int(about[1]) == os.getpid() and b"veritune.trackers.worker" in command:
                found.append(int(number))
    return found


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_tracker_that_hangs_is_left_behind(silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", silent)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(follow, "DEADLINE", 1.0)
    run = settings(tmp_path / "run", "wandb")
    started = time.monotonic()
    said = session(run, 1, 300)
    assert time.monotonic() - started < 10
    assert [text for text in said if "had not finished after 1 s" in text] == said
    assert workers() == []
    lines = (Path(run.out) / "metrics.jsonl").read_bytes().splitlines()
    assert len(lines) == 300 + 60
    monkeypatch.setattr(follow, "STOPPED", 0.5)  # and for the same process's next run, waited for no longer than that
    said = session(settings(tmp_path / "next", "wandb"), 1, 1)
    assert [text for text in said if "had not finished after 0.5 s" in text] == said


@pytest.mark.parametrize(("error", "code"), [(follow.Ended, 0), (KeyboardInterrupt, 0), (RuntimeError, 1)])
def test_a_run_that_is_ended_early_has_not_failed(
    error: type[BaseException], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(follow, "STOPPED", 60.0)
    run = settings(tmp_path / "run", "wandb")

    def end() -> None:
        raise error

    with pytest.raises(error):
        session(run, 1, 4, between=end)
    (records,) = wandb_runs(Path(run.out) / follow.FOLDER / "wandb")
    assert [it.exit.exit_code for it in records if it.WhichOneof("record_type") == "exit"] == [code]


def test_a_network_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(follow, "DEADLINE", 3.0)
    run = settings(tmp_path / "run", "wandb")
    said = session(run, 1, 10)
    assert len(said) >= 1
    assert "the run is whole in" in said[-1]
    assert KEY not in "".join(said)
    monkeypatch.setenv("WANDB_MODE", "offline")  # and later somewhere that needs none
    monkeypatch.setattr(follow, "DEADLINE", 30.0)
    session(run, 11, 12)
    assert figures(read("wandb", Path(run.out), tmp_path)) == expected(12)


@pytest.mark.parametrize("to", ["tensorboard", "trackio"])
def test_a_disk_that_takes_no_more(to: str, tmp_path: Path) -> None:
    pytest.importorskip(to)
    run = settings(tmp_path / "run", to, project="some project")

    def fill() -> None:
        at_work(run)
        for number in workers():
            resource.prlimit(number, resource.RLIMIT_FSIZE, (100, 100))

    said = session(run, 1, 2000, between=fill)
    assert "the run is whole in" in said[-1]
    assert len((Path(run.out) / "metrics.jsonl").read_bytes().splitlines()) == 2400
    if to == "trackio":  # what it lost is sent by the next session
        session(run, 2001, 2001)
        assert figures(read(to, Path(run.out), tmp_path)) == expected(2001)


def test_a_folder_that_trackio_cannot_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    run = settings(tmp_path / "run", "trackio", project="some project")
    monkeypatch.setenv("TRACKIO_DIR", "/proc/none")
    why, rest = session(run, 1, 20)
    assert "No such file or directory: '/proc/none'" in why
    assert "the same command sends the rest" in rest
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "home" / "TRACKIO_DIR"))
    assert session(run, 21, 21) == []
    assert figures(read("trackio", Path(run.out), tmp_path)) == expected(21)


def test_without_an_account_it_is_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = settings(tmp_path / "run", "wandb")
    (said,) = session(run, 1, 3)
    place = f"{run.out}/trackers/wandb/wandb"
    assert said == f"wandb: no network is used; the files are in {place}, `wandb sync` sends them"
    assert figures(read("wandb", Path(run.out), tmp_path)) == expected(3)


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'veritune\[trackio\]'"):
        follow.check(config.Track(to=("trackio",)))
    follow.check(config.Track())


def test_numbers_of_a_line() -> None:
    line = {"step": 3, "loss": 0.5, "validation": {"auroc": None, "accuracy_interval": [0.25, 0.75]}, "phase": "a"}
    assert numbers(line) == {
        "loss": 0.5, "validation/accuracy_interval/0": 0.25, "validation/accuracy_interval/1": 0.75
    }  # fmt: skip
