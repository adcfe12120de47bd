"""One run in several processes: what a step's shares are, what travels, that the number of processes does not change
what is learnt, and that all stop together, whoever was asked to or has died."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.run as torchrun
from hypothesis import given
from hypothesis import strategies as st
from runs import checkpoints, copied_until, losses, metrics, prepared, settings
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from veritune import cli, config
from veritune.data.generate import generate
from veritune.errors import ConfigError
from veritune.tokens.trie import build
from veritune.training import distributed, launch
from veritune.training.distributed import World, join, shares
from veritune.training.launch import STORE
from veritune.training.session import Stop, session

pytestmark = pytest.mark.alone

# Shares of a step.


def asked(rng: np.random.Generator, questions: int, together: int) -> list[np.ndarray]:
    """Rows of ids: an instruction common to all, a question common to some, a solution."""
    head = rng.integers(0, 1000, 30)
    rows = []
    for _ in range(questions):
        question = rng.integers(0, 1000, rng.integers(20, 120))
        rows += [
            np.concatenate((head, question, rng.integers(0, 1000, rng.integers(60, 300)))) for _ in range(together)
        ]
    return [rows[i].astype(np.int32) for i in rng.permutation(len(rows))]


@given(st.integers(0, 12), st.integers(1, 8), st.integers(1, 9), st.integers(0, 10**6))
def test_every_row_is_computed_once(questions: int, together: int, ranks: int, seed: int) -> None:
    rows = asked(np.random.default_rng(seed), questions, together)
    dealt = shares(rows, ranks)
    assert len(dealt) == ranks
    assert sorted(row for share in dealt for row in share) == list(range(len(rows)))


@given(st.integers(2, 8), st.integers(0, 10**6))
def test_shares_are_even_and_keep_questions_whole_where_they_can(ranks: int, seed: int) -> None:
    rows = asked(np.random.default_rng(seed), 6 * ranks, 8)
    tokens = [build([rows[i] for i in share]).tokens for share in shares(rows, ranks)]
    whole = build(rows).tokens
    # At both ends half a row too much, and as much again as a beginning that would be computed twice.
    assert max(tokens) < whole / ranks + 2 * (150 + 150)
    assert sum(tokens) < whole + (ranks - 1) * 150


def test_one_long_row_leaves_ranks_without_work() -> None:
    rows = [np.arange(500, dtype=np.int32), np.arange(1000, 1010, dtype=np.int32)]
    dealt = shares(rows, 4)
    assert sorted(map(len, dealt)) == [0, 0, 1, 1]
    assert shares([], 3) == [[], [], []]


# What ranks tell each other. Forked processes: they need nothing but torch.


def ranks(folder: Path, count: int, work: Callable[[World], Any], *, timeout: float = 20.0) -> list[Any]:
    """What `work` returns in each of `count` processes, or the text of what it raised; None for one that was killed."""
    inputs, _held = os.pipe()
    pids = []
    for rank in range(count):
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            os.dup2(inputs, 0)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), STORE: str(folder / "store")}
            try:
                with join("cpu") as world:
                    found = work(world)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            (folder / f"{rank}.json").write_text(json.dumps(found))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    end = time.monotonic() + timeout
    while pids and time.monotonic() < end:
        pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        time.sleep(0.005)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.close(inputs)
    os.close(_held)
    files = [folder / f"{rank}.json" for rank in range(count)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def test_sums_are_the_same_on_every_rank(tmp_path: Path) -> None:
    def work(world: World) -> Any:
        weights = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(5))]
        if world.rank != 2:  # the third one has no rows
            weights[0].grad = torch.full((2, 3), 1.0 + world.rank)
        if world.rank == 1:
            weights[1].grad = torch.arange(5.0)
        summed = world.reduce(weights, torch.tensor(0.25), world.rank)
        return [summed.tolist(), *(p.grad.tolist() for p in weights if p.grad is not None)]

    assert ranks(tmp_path, 3, work) == [[[0.75, 3.0], [[3.0] * 3] * 2, [0.0, 1.0, 2.0, 3.0, 4.0]]] * 3


def test_alone_nothing_is_touched() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    assert World().reduce([weight], 0.5, 1.0).tolist() == [0.5, 1.0]
    assert weight.grad is None
    assert World().share([np.zeros(3, dtype=np.int32)] * 4) == [0, 1, 2, 3]


def test_what_is_not_finite_on_one_is_so_on_all(tmp_path: Path) -> None:
    def work(world: World) -> Any:
        weight = torch.nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([1.0, math.inf if world.rank else 0.0])
        loss, stop = world.reduce([weight], math.nan if world.rank == 1 else 1.0, 0.0).tolist()
        assert weight.grad is not None
        return [math.isnan(loss), stop, bool(weight.grad.isfinite().all())]

    assert ranks(tmp_path, 2, work) == [[True, 0.0, False]] * 2


def test_the_first_rank_decides(tmp_path: Path) -> None:
    def work(world: World) -> Any:
        made = world.from_first(lambda: f"made by {world.rank}")
        weight = torch.full((2,), float(world.rank))
        world.same([weight])
        return [made, weight.tolist(), world.gather(world.rank), world.first]

    assert ranks(tmp_path, 2, work) == [["made by 0", [0.0, 0.0], [0, 1], first] for first in (True, False)]


def test_ranks_with_other_data_are_refused(tmp_path: Path) -> None:
    def work(world: World) -> Any:
        distributed.check_same(world, {"fingerprint": "ab" if world.rank < 2 else "cd", "train.lr": 1.0})
        world.wait()

    found = ranks(tmp_path, 3, work)
    assert found[2] == "ConfigError: not what the first process trains: fingerprint is 'cd', there 'ab'"
    assert "rank 2: not what the first process trains: fingerprint" in found[0]
    assert found[0].startswith("PeerError: ")
    assert "the last checkpoint" in found[0]


def test_the_death_of_one_is_noticed_by_all(tmp_path: Path) -> None:
    def work(world: World) -> Any:
        world.wait()
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.reduce([torch.nn.Parameter(torch.zeros(1000))], 1.0)

    found = ranks(tmp_path, 3, work)
    assert found[1] is None
    for text in (found[0], found[2]):
        assert text.startswith("PeerError: another process of this run has ended or does not answer")


def test_who_waits_for_one_that_never_comes_hears_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", STORE: str(tmp_path / "store")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=10))
    monkeypatch.setattr(distributed, "_end_with_launcher", lambda: None)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(Stop, match="SIGTERM"), session(), join("cpu"):
        pytest.fail("nobody else is there")
    assert time.monotonic() - began < 5


def test_waiting_for_one_that_does_not_answer_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=2))

    def work(world: World) -> Any:
        world.wait()
        if world.rank == 1:
            time.sleep(60)
        world.reduce([torch.nn.Parameter(torch.zeros(10))], 1.0)

    found = ranks(tmp_path, 2, work, timeout=5)
    assert "does not answer" in found[0]
    assert found[1] is None


def test_who_stops_leaves_no_threads_of_gloo(tmp_path: Path) -> None:
    code = (
        "import torch.distributed as dist\nfrom veritune.training.distributed import join\n"
        "try:\n    with join('cpu'):\n        raise KeyboardInterrupt\n"
        "except KeyboardInterrupt:\n    print(dist.is_initialized())"
    )
    env = {**os.environ, "WORLD_SIZE": "2", STORE: str(tmp_path / "store")}
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=env | {"RANK": rank}, stdin=pipe, stdout=pipe, text=True)
        for rank in "01"
    ]
    assert [process.stdout.read() for process in both if process.stdout] == ["False\n", "False\n"]
    for process in both:  # whose standard input stays open until here: its end would end them
        process.communicate()


def test_a_signal_that_comes_while_processes_are_started_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(*unused: Any) -> "subprocess.Popen[bytes]":
        os.kill(os.getpid(), signal.SIGTERM)
        started.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        return started[-1]

    monkeypatch.setattr(launch, "_start", start)
    monkeypatch.setattr(launch, "GRACE", 0.5)
    assert launch.launch(3, []) == 130
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(distributed.load, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(ConfigError, match="4 processes are to train on this machine, which shows 2 CUDA GPUs"),
        join(""),
    ):
        pass


# Whole runs.


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> config.Run:
    """A run of 12 steps in one process, through the command line."""
    folder = tmp_path_factory.mktemp("alone")
    data = prepared(generate(16, solutions_per_question=4, seed=1), folder / "d", 16)
    run = settings(
        folder / "one",
        data,
        tiny_folder,
        train={"lr": 1e-3, "batch_size": 8, "per_question": 4, "epochs": 2},
        validation={"every": 5},
        checkpoint={"every": 1, "keep": 100},
    )
    assert cli.run(command(run)) == 0
    return run


def command(run: config.Run, out: Path | None = None) -> list[str]:
    """`veritune train` with a run file of these settings."""
    values = config.as_dict(run)
    lines = [f"out = {json.dumps(str(out or run.out))}"]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items() if v is not None)]
    file = Path(f"{out or run.out}.toml")
    file.write_text("\n".join(lines), encoding="utf-8")
    return ["train", str(file)]


@pytest.fixture(scope="module")
def two(alone: config.Run) -> Path:
    """The same run in two processes that torchrun starts."""
    out = Path(alone.out).with_name("two")
    torchrun.main(["--standalone", "--nproc-per-node", "2", "-m", "veritune", *command(alone, out)])
    return out


def assert_equal_to_rounding(ours: Path, wanted: Path) -> None:
    """The same rows and learning rates, losses within 1e-5, the same adapters but for rounding."""
    for a, b in zip(metrics(ours), metrics(wanted), strict=True):
        if "loss" in b:
            assert (a["step"], a["rows"], a["lr"]) == (b["step"], b["rows"], b["lr"])
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        else:
            assert a["validation"]["log_loss"] == pytest.approx(b["validation"]["log_loss"], abs=1e-5)
    left, right = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (ours, wanted))
    for name in right:
        torch.testing.assert_close(left[name], right[name], atol=2e-5, rtol=1e-4)


def test_two_processes_learn_what_one_does(alone: config.Run, two: Path) -> None:
    assert_equal_to_rounding(two, Path(alone.out))
    assert losses(two) != losses(Path(alone.out))  # it was not computed in one process


def test_four_processes_learn_what_one_does(alone: config.Run) -> None:
    """Started by torchrun's own functions, as forks of one process that has imported everything: four times cheaper."""
    out = Path(alone.out).with_name("four")
    multiprocessing.set_forkserver_preload(["veritune.training.trainer"])
    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=4, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="four", max_restarts=0, monitor_interval=0.05, start_method="forkserver",
    )  # fmt: skip
    assert elastic_launch(settings, cli.run)(command(alone, out)) == dict.fromkeys(range(4), 0)
    assert_equal_to_rounding(out, Path(alone.out))


def veritune(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "veritune", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def started() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """`veritune`, none of which outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        processes.append(veritune(*arguments))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def process_of(launcher: int, rank: int) -> int:
    """The process id of a rank that `--gpus` started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(
        int(pid) for pid in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    )


def wait_for_step(out: Path, step: int) -> None:
    file, end = out / "metrics.jsonl", time.monotonic() + 90
    while not file.exists() or f'"step": {step}, "loss"'.encode() not in file.read_bytes():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_signal_to_one_stops_all_and_the_run_goes_on_with_any_number(
    alone: config.Run, two: Path, tmp_path: Path, started: Callable[..., Any]
) -> None:
    whole = config.build(config.Run, {**config.as_dict(alone), "out": str(two)}, "test")
    again = copied_until(whole, 2, tmp_path / "again")
    lines = (Path(again.out) / "metrics.jsonl").read_text().splitlines(keepends=True)
    (Path(again.out) / "metrics.jsonl").write_text("".join(lines[:2]))
    process = started(*command(again), "--gpus", "2")
    wait_for_step(Path(again.out), 4)
    os.kill(process_of(process.pid, 1), signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "going on after step 2" in out
    assert "stopped by a signal to another process after step" in out
    # As far as it came it is what it would have been without the stop, bit for bit.
    steps = len(losses(Path(again.out)))
    assert 4 <= steps < 12
    assert metrics(Path(again.out)) == metrics(two)[: len(metrics(Path(again.out)))]
    last = checkpoints(Path(again.out))[-1]
    assert last.name == f"step-{steps:08d}"
    assert (last / "adapter.safetensors").read_bytes() == (
        two / "checkpoints" / last.name / "adapter.safetensors"
    ).read_bytes()
    # On from there in one process.
    assert cli.run(command(again)) == 0
    assert_equal_to_rounding(Path(again.out), Path(alone.out))


def test_the_death_of_one_ends_the_run_which_can_go_on(
    alone: config.Run, tmp_path: Path, started: Callable[..., Any]
) -> None:
    out = tmp_path / "run"
    process = started(*command(alone, out), "--gpus", "2")
    wait_for_step(out, 3)
    os.kill(process_of(process.pid, 1), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "veritune: another process of this run has ended" in err
    assert "veritune: rank 1 of 2 processes was ended by SIGKILL" in err
    assert "Traceback" not in err
    assert cli.run(command(alone, out)) == 0
    assert_equal_to_rounding(out, Path(alone.out))
