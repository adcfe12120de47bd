"""Trials change hands: none is lost and none is there twice, whatever kills the workers; SQLite and PostgreSQL."""

import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from made_sweeps import board, point
from rich.console import Console

from veritune.errors import ConfigError, MissingError
from veritune.search import board as boards
from veritune.search import result
from veritune.search.board import Board, Lost, Taken
from veritune.search.result import line

pytestmark = pytest.mark.alone

FORK = multiprocessing.get_context("fork")


def taken(found: Taken | bool) -> Taken:
    assert isinstance(found, Taken)
    return found


def finish(it: Board, trial: Taken, *losses: float) -> None:
    for i, loss in enumerate(losses, 1):
        it.report(trial, point(i, loss), i, last=i == len(losses))
    it.finish(trial, "complete")


def worker(folder: Path, settings: dict[str, Any], pause: float) -> None:
    """Four validations a trial, a note before and after each end; with asha, the later trials are the better."""
    it = board(folder, **settings)

    def note(name: str, trial: Taken) -> None:
        with (folder / name).open("a") as file:
            file.write(f"{trial.number}\n")

    while (trial := it.take()) is not False:
        if trial is True:
            time.sleep(pause)
            continue
        try:
            with it.living(trial):
                # As a run does, a validation is done again if its report may not have come to its end.
                for step in range(max(len(trial.curve), 1), 5):
                    time.sleep(random.random() * pause)
                    if it.report(trial, point(step, auroc=trial.number / 100), step, last=step == 4):
                        it.release(trial)
                        break
                else:
                    note("ending", trial)
                    it.finish(trial, "complete")
        except Lost:
            continue
        if len(trial.curve) == 4:
            note("ended", trial)


def kill_many(folder: Path, settings: dict[str, Any], *, kills: int, workers: int, pause: float = 0.1) -> Board:
    """Kills random workers until the sweep is through or `kills` are done, then lets it end."""
    rng, killed = random.Random(0), 0
    start = lambda: FORK.Process(target=worker, args=(folder, settings, pause))  # noqa: E731
    running = [start() for _ in range(workers)]
    for process in running:
        process.start()
    while any(process.is_alive() for process in running):
        time.sleep(rng.random() * pause * 3)
        if killed < kills:
            place = rng.randrange(workers)
            if running[place].is_alive():  # one that has ended found the sweep through
                os.kill(running[place].pid or 0, signal.SIGKILL)
                killed += 1
                running[place].join()
                running[place] = start()
                running[place].start()
    assert killed == kills, "the sweep was through too early for this test"
    return board(folder, **settings)


def check_all_there(it: Board, folder: Path, trials: int) -> None:
    found = [line(trial) for trial in it.trials()]
    assert [trial["trial"] for trial in found] == list(range(trials))
    assert {trial["state"] for trial in found} == {"complete"}
    assert all([p["step"] for p in trial["curve"]] == [1, 2, 3, 4] for trial in found)
    ended, ending = (Counter((folder / name).read_text().split()) for name in ("ended", "ending"))
    assert set(ended.values()) == {1}
    assert set(ended) <= set(ending) == {str(number) for number in range(trials)}  # a kill may come between the two


def check_asha(it: Board, folder: Path, trials: int) -> None:
    """All are there, each as far as it was promoted, at least as many as reach each rung without any hurry."""
    found = [line(trial) for trial in it.trials()]
    assert [trial["trial"] for trial in found] == list(range(trials))
    reached = {"complete": [4], "pruned": [1, 2]}
    for trial in found:
        assert len(trial["curve"]) in reached[trial["state"]]
        assert [p["step"] for p in trial["curve"]] == list(range(1, len(trial["curve"]) + 1))
    lengths = [len(trial["curve"]) for trial in found]
    assert sum(n >= 2 for n in lengths) >= trials // 2
    assert lengths.count(4) >= sum(n >= 2 for n in lengths) // 2 >= 1
    assert lengths[-1] == 4  # the best of all
    ended = Counter((folder / "ended").read_text().split())
    assert set(ended.values()) == {1}
    assert set(ended) <= {str(trial["trial"]) for trial in found if trial["state"] == "complete"}
    assert it.take() is False


def test_configurations_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    one, other = board(tmp_path / "a"), board(tmp_path / "b")
    alone = []
    while isinstance(trial := one.take(), Taken):
        alone.append(trial.params)
        finish(one, trial, 0.5)
    for _ in range(3):  # two workers, the second of which takes what the first gives back
        second = board(tmp_path / "b")
        first = taken(other.take())
        other.release(first)
        finish(second, taken(second.take()), 0.5)
        finish(other, taken(other.take()), 0.5)
    assert [line(trial)["params"] for trial in second.trials()] == alone
    assert len({str(params) for params in alone}) == 6
    assert all(set(params) == {"train.lr", "train.batch_size", "lora.rank"} for params in alone)
    changed = board(tmp_path / "c", seed=1)
    assert taken(changed.take()).params != alone[0]


@pytest.mark.parametrize("name", ["what?", "a%20b", "a#b", "{x}", "ü b"])
def test_a_sweep_stands_in_its_folder_whatever_the_name(tmp_path: Path, name: str) -> None:
    assert taken(board(tmp_path / name).take()).number == 0
    assert (tmp_path / name / "study.db").is_file()
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    assert line(board(tmp_path / name, join=True).trials()[0])["attempts"] == 1


def test_a_sweep_ends_and_more_trials_go_on_with_it(tmp_path: Path) -> None:
    it, other = board(tmp_path / "s", trials=2), board(tmp_path / "s", trials=2)
    first, second = taken(it.take()), taken(other.take())
    assert board(tmp_path / "s", trials=2).take() is True
    finish(it, first, 0.5)
    other.finish(second, "diverged", "the loss is nan")
    assert it.take() is False
    assert [line(trial)["state"] for trial in it.trials()] == ["complete", "diverged"]
    assert line(it.trials()[1])["error"] == "the loss is nan"
    assert taken(board(tmp_path / "s", trials=3).take()).number == 2


def test_a_dead_workers_trial_is_taken_up_with_its_curve(tmp_path: Path) -> None:
    def dies() -> None:
        it = board(tmp_path / "s")
        trial = taken(it.take())
        it.report(trial, point(1), 1, last=False)
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=dies)
    process.start()
    process.join()
    it = board(tmp_path / "s")
    assert [line(trial)["state"] for trial in it.trials()] == ["waiting"]
    again = taken(it.take())
    assert again.number == 0
    assert again.curve == [point(1)]
    assert again.info["attempts"] == 2


def test_a_trial_that_kills_its_workers_has_failed(tmp_path: Path) -> None:
    def dies() -> None:
        board(tmp_path / "s", trials=1).take()
        os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(boards.TRIES):
        process = FORK.Process(target=dies)
        process.start()
        process.join()
    it = board(tmp_path / "s", trials=1)
    assert it.take() is False
    assert line(it.trials()[0])["state"] == "failed"


def next_after(dies: Callable[[bool], None], folder: Path) -> int:
    """The trial that a worker takes at once after one that died with it, and one that died early with that."""
    for early in (False, True):
        process = FORK.Process(target=dies, args=(early,))
        process.start()
        process.join()
    return taken(board(folder, trials=1).take()).number


def test_who_dies_while_it_takes_a_dead_workers_trial_is_not_waited_for(tmp_path: Path) -> None:
    def dies(early: bool) -> None:
        it = board(tmp_path / "s", trials=1)
        if early:
            optuna.Trial.set_user_attr = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        it.take()
        os.kill(os.getpid(), signal.SIGKILL)

    assert next_after(dies, tmp_path / "s") == 0


def test_who_dies_while_it_gives_up_a_dead_workers_trial_is_not_waited_for(tmp_path: Path) -> None:
    def dies(early: bool) -> None:
        if early:
            Board.give_up = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        board(tmp_path / "s", trials=1).take()
        os.kill(os.getpid(), signal.SIGKILL)

    assert next_after(dies, tmp_path / "s") == 0


def test_who_dies_while_another_opens_the_board_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def works(there: Any) -> None:
        it = board(tmp_path / "s", trials=1)
        it.take()
        there.set()
        time.sleep(60)

    there, reclaim = FORK.Event(), Board.reclaim
    process = FORK.Process(target=works, args=(there,))
    process.start()
    assert there.wait(30)

    def reclaims(it: Board) -> None:
        reclaim(it)
        process.kill()
        process.join()

    monkeypatch.setattr(Board, "reclaim", reclaims)
    it = board(tmp_path / "s", trials=1)
    monkeypatch.undo()
    assert taken(it.take()).number == 0


def test_who_dies_while_it_makes_the_tables_leaves_none(tmp_path: Path) -> None:
    """Without the index of its names, SQLite's table of studies would hold the sweep once more for each command."""

    def dies(*about: Any) -> None:
        if about[2].startswith("CREATE UNIQUE INDEX ix_studies_study_name"):
            os.kill(os.getpid(), signal.SIGKILL)

    def begins() -> None:
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", dies)
        board(tmp_path / "s")

    process = FORK.Process(target=begins)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for _ in range(2):
        assert taken(board(tmp_path / "s").take()).number == 0


def test_who_comes_back_after_its_trial_was_taken_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine: no lock file to look at, only signs of life, and none came."""
    monkeypatch.setattr(boards, "GRACE", 0.2)
    cut_off = board(tmp_path / "s", trials=1)
    trial = taken(cut_off.take())
    (tmp_path / "s" / "workers" / cut_off.me).unlink()
    other = board(tmp_path / "s", trials=1)
    assert other.take() is True
    time.sleep(0.3)
    again = taken(other.take())
    with pytest.raises(Lost):
        cut_off.report(trial, point(1), 1, last=False)
    with pytest.raises(Lost):
        cut_off.finish(trial, "complete")
    cut_off.release(trial)
    assert line(other.trials()[0])["state"] == "running"
    finish(other, again, 0.4)
    assert line(other.trials()[0])["curve"] == [point(1, 0.4)]


def test_signs_of_life_keep_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "GRACE", 0.5)
    monkeypatch.setattr(boards, "BEAT", 0.05)
    it = board(tmp_path / "s", trials=1)
    trial = taken(it.take())
    (tmp_path / "s" / "workers" / it.me).unlink()
    other = board(tmp_path / "s", trials=1)
    with it.living(trial):
        for _ in range(10):
            assert other.take() is True
            time.sleep(0.1)


def go_on(it: Board, trial: Taken, auroc: float) -> int:
    """Trains a trial to where it pauses or ends: the last of its four validations."""
    for step in range(len(trial.curve) + 1, 5):
        if it.report(trial, point(step, auroc=auroc), step, last=step == 4):
            it.release(trial)
            return step
    it.finish(trial, "complete")
    return 4


def states(it: Board) -> list[str]:
    return [line(trial)["state"] for trial in it.trials()]


def test_asha_lets_the_best_go_on_and_prunes_the_rest_at_the_end(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trials": 4, "pruner": "asha", "reduction": 2}
    it, events = board(tmp_path / "s", **settings), []
    figures = [0.6, 0.7, 0.5, 0.8]
    while isinstance(trial := it.take(), Taken):
        events.append((trial.number, go_on(it, trial, figures[trial.number])))
        if len(events) == 4:
            assert states(it) == ["paused", "paused", "paused"]
            it.close()
            it = board(tmp_path / "s", **settings)
    assert events == [(0, 1), (1, 1), (1, 2), (2, 1), (3, 1), (3, 2), (3, 4)]
    assert states(it) == ["pruned", "pruned", "pruned", "complete"]
    # Those that were pruned count at their rungs when the sweep goes on, and are not there twice.
    settings["trials"] = 6
    it, events = board(tmp_path / "s", **settings), []
    while isinstance(trial := it.take(), Taken):
        events.append((trial.number, go_on(it, trial, {4: 0.65, 5: 0.9}[trial.number])))
    assert events == [(4, 1), (5, 1), (5, 2), (5, 4)]
    assert states(it)[4:] == ["pruned", "complete"]


def test_asha_trains_one_to_its_end_whatever_breaks(tmp_path: Path) -> None:
    it = board(tmp_path / "s", trials=3, pruner="asha", reduction=2)
    it.finish(taken(it.take()), "diverged", "early")
    assert go_on(it, taken(it.take()), 0.6) == 1
    assert go_on(it, taken(it.take()), 0.9) == 1
    best = taken(it.take())
    assert (best.number, best.curve) == (2, [point(1, auroc=0.9)])
    it.finish(best, "diverged", "late")
    assert [go_on(it, taken(it.take()), 0.6) for _ in range(2)] == [2, 4]
    assert it.take() is False
    assert states(it) == ["diverged", "complete", "diverged"]


def test_a_worker_waits_while_a_promotion_may_come(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trials": 2, "pruner": "asha", "reduction": 2}
    one, other = board(tmp_path / "s", **settings), board(tmp_path / "s", **settings)
    first, second = taken(one.take()), taken(other.take())
    one.report(first, point(1, auroc=0.6), 1, last=False)
    go_on(other, second, 0.5)
    assert other.take() is True  # the first has its figures, but still saves its checkpoint
    one.release(first)
    again = taken(other.take())
    assert (again.number, one.take()) == (0, True)
    other.finish(again, "failed", "test")
    assert taken(one.take()).number == 1


def test_a_promoted_trial_that_begins_again_does_not_pause_again_before_its_rung(tmp_path: Path) -> None:
    """As on another machine, where its checkpoint is not."""
    it = board(tmp_path / "s", trials=1, pruner="asha", reduction=2)
    assert go_on(it, taken(it.take()), 0.6) == 1
    trial = taken(it.take())
    trial.curve = []
    assert go_on(it, trial, 0.6) == 2


def test_who_dies_between_its_report_and_its_checkpoint_leaves_a_paused_trial(tmp_path: Path) -> None:
    def dies() -> None:
        it = board(tmp_path / "s", trials=2, pruner="asha", reduction=2)
        it.report(taken(it.take()), point(1), 1, last=False)
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=dies)
    process.start()
    process.join()
    it = board(tmp_path / "s", trials=2, pruner="asha", reduction=2)
    assert states(it) == ["paused"]
    assert taken(it.take()).number == 1


def test_the_table_can_be_read_on_a_narrow_terminal(tmp_path: Path) -> None:
    it = board(tmp_path / "s", trials=2)
    for loss in (0.612345, 0.5):
        trial = taken(it.take())
        trial.info["seconds"] = 12345.6
        finish(it, trial, loss)
    out = io.StringIO()
    result.show(it, result.lines(it), Console(file=out, width=60))
    found = [line.split() for line in out.getvalue().splitlines()]
    assert found[0] == ["trial", "loss", "AUROC", "accuracy", "s", "settings"]
    assert found[1][:6] == ["1", "0.5000", "0.7000", "0.6000", "12346", "rank"]
    assert ["0", "0.6123", "0.7000", "0.6000", "12346", "rank"] in [words[:6] for words in found]
    assert "…" not in out.getvalue()


def test_tpe_learns_and_hyperband_stops(tmp_path: Path) -> None:
    """Ranks near 3 are best: after ten random trials, TPE draws nearer to it than a random search does."""

    def ranks(folder: Path, **settings: Any) -> list[int]:
        it = board(folder, trials=16, **settings)
        drawn = []
        while isinstance(trial := it.take(), Taken):
            drawn.append(trial.params["lora.rank"])
            loss = abs(drawn[-1] - 3) + 0.1
            if it.report(trial, point(1, loss), 1, last=False):
                it.finish(trial, "pruned")
            elif trial.number == 1:
                it.finish(trial, "diverged", "test")
            else:
                it.finish(trial, "complete")
        return drawn

    tpe, plain = ranks(tmp_path / "a", sampler="tpe", pruner="hyperband"), ranks(tmp_path / "b")
    assert tpe[:10] == plain[:10]
    assert sum(abs(rank - 3) for rank in tpe[10:]) < sum(abs(rank - 3) for rank in plain[10:])
    states = [line(trial)["state"] for trial in board(tmp_path / "a", sampler="tpe", pruner="hyperband").trials()]
    assert "pruned" in states


def test_other_settings_are_refused(tmp_path: Path) -> None:
    board(tmp_path / "s")
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        board(tmp_path / "s", seed=1)
    with pytest.raises(MissingError, match="no sweep to join"):
        board(tmp_path / "t", join=True)
    assert not (tmp_path / "t").exists()
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="other things and no sweep"):
        board(tmp_path)
    with pytest.raises(ConfigError, match="sqlite is not supported; use postgresql"):
        board(tmp_path / "u", storage="sqlite:///x.db")
    with pytest.raises(ConfigError, match="not a URL"):
        board(tmp_path / "u", storage="my team's")
    with pytest.raises(ConfigError) as caught:
        board(tmp_path / "u", storage="postgresql://me:geheim@127.0.0.1:1/x")
    assert "cannot be reached" in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    it = kill_many(tmp_path / "s", {"trials": 8}, kills=8, workers=2)
    check_all_there(it, tmp_path / "s", 8)


def test_kills_leave_paused_and_promoted_trials_as_they_are(tmp_path: Path) -> None:
    it = kill_many(tmp_path / "s", {"trials": 9, "pruner": "asha", "reduction": 2}, kills=9, workers=2)
    check_asha(it, tmp_path / "s", 9)


@pytest.mark.slow
def test_fifty_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    it = kill_many(tmp_path / "s", {"trials": 120}, kills=50, workers=4, pause=0.3)
    check_all_there(it, tmp_path / "s", 120)
    it = kill_many(tmp_path / "t", {"trials": 120, "pruner": "asha", "reduction": 2}, kills=50, workers=4, pause=0.3)
    check_asha(it, tmp_path / "t", 120)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a private PostgreSQL server, on a socket and a port of its own."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb") or (str(programs[-1]) if programs else None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    bin, base = Path(found).parent, tmp_path_factory.mktemp("pg")
    as_user: list[str] = []
    if os.getuid() == 0:  # the server refuses to run as root
        if shutil.which("setpriv") is None or subprocess.run(["id", "nobody"], capture_output=True).returncode:
            pytest.skip("PostgreSQL does not run as root, and there is no setpriv to become nobody")
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]
        home = Path("/tmp") / f"veritune-pg-{os.getpid()}"
        home.mkdir()
        shutil.chown(home, "nobody")
        base = home
    data = base / "data"
    call = lambda *words: subprocess.run([*as_user, *words], check=True, capture_output=True, cwd="/")  # noqa: E731
    try:
        call(str(bin / "initdb"), "-D", str(data), "-U", "veritune", "-A", "trust", "--no-sync", "-E", "UTF8")
        port = 20000 + os.getpid() % 20000
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {base} -c fsync=off"
        call(str(bin / "pg_ctl"), "-D", str(data), "-o", options, "-l", str(base / "log"), "-w", "start")
        try:
            yield f"postgresql://veritune:secret-word@127.0.0.1:{port}/postgres"
        finally:
            call(str(bin / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
    finally:
        if as_user:
            shutil.rmtree(base, ignore_errors=True)


def test_four_workers_on_postgresql(postgres: str, tmp_path: Path) -> None:
    settings = {"trials": 8, "storage": postgres}
    it = kill_many(tmp_path / "team", settings, kills=3, workers=4)
    check_all_there(it, tmp_path / "team", 8)
    assert len({line(trial)["worker"] for trial in it.trials()}) > 1
    assert not (tmp_path / "team" / "study.db").exists()
    with pytest.raises(MissingError, match="no sweep named 'else' to join"):
        board(tmp_path / "else", join=True, storage=postgres)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and re.search(b"secret-word", path.read_bytes())]
    assert left == []
    json.dumps([line(trial) for trial in it.trials()], allow_nan=False)
    settings |= {"pruner": "asha", "reduction": 2}
    check_asha(kill_many(tmp_path / "asha", settings, kills=3, workers=4), tmp_path / "asha", 8)


def test_sweeps_on_one_server_do_not_wait_for_each_other(postgres: str, tmp_path: Path) -> None:
    first, best = (board(tmp_path / name, storage=postgres) for name in ("first-sweep", "best-sweep"))
    other = threading.Thread(target=best.take)
    with first.locked():
        other.start()
        other.join(20)
        assert not other.is_alive()
    other.join()
