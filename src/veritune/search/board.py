"""What a sweep's workers share: an Optuna study in SQLite or PostgreSQL, and the rules by which trials change hands.

Every trial belongs to one worker at a time. All that decides (taking a trial, reporting, finishing) happens under one
lock of the whole sweep and asks first whether the trial is still the worker's own, so a worker that was thought dead
and comes back changes nothing. A dead worker's trial waits for the next one under the same number: none is lost, none
is there twice. A trial that pauses at its rung (`asha`) stays Optuna's as running, in no worker's hands; one that is
promoted waits as a dead worker's does.
"""

import fcntl
import logging
import os
import shutil
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import sqlalchemy
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from .. import config
from ..errors import ConfigError, MissingError
from . import asha
from .space import Axis, name
from .storage import here_alone, open_storage

BEAT = 5.0
"""Seconds between two signs of life."""
GRACE = 60.0
"""Seconds without one after which a worker on another machine counts as dead."""
TRIES = 5
"""How often in a row a trial may end its worker's life without having validated once more."""
State = Literal["complete", "pruned", "diverged", "failed"]
TOLD = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "diverged": TrialState.PRUNED,
        "failed": TrialState.FAIL}  # fmt: skip


class Lost(Exception):
    """The trial has another worker by now."""


@dataclass
class Taken:
    """A trial in this worker's hands."""

    trial: Trial
    params: dict[str, Any]
    """Dotted keys and their values."""
    info: dict[str, Any]
    curve: list[dict[str, Any]]

    @property
    def number(self) -> int:
        return self.trial.number


@dataclass
class Board:
    """A sweep as one worker sees it; make it with `open_board`."""

    study: optuna.Study
    storage: optuna.storages.RDBStorage
    settings: config.Sweep
    axes: list[Axis]
    folder: Path
    me: str = field(default_factory=lambda: uuid.uuid4().hex)
    seen: dict[int, tuple[str, int, float]] = field(default_factory=dict)
    """Of trials on other machines: the worker, its last sign of life, and when that was first seen here."""
    mutex: threading.Lock = field(default_factory=threading.Lock)
    life: Any = None

    def take(self) -> Taken | bool:
        """The next trial. False: there is none left; True: none now, but a running one may yet come back."""
        with self.locked():
            self.reclaim()
            trials = self.trials()
            more = len(trials) < self.settings.trials
            number = next((trial.number for trial in trials if trial.state == TrialState.WAITING), None)
            if number is None:
                number = self.promote(trials, more=more)
            if number is None and not more:
                if any(asha.standing(trial).state == "under way" for trial in trials):
                    return True
                self.end(trials)
                return False
            number = len(trials) if number is None else number
            trial = self.study.ask()
            info = {"attempts": 0, "idle": 0, **trial.user_attrs.get("info", {})}
            info |= {"worker": self.me, "host": f"{socket.gethostname()}:{os.getpid()}"}
            info |= {"attempts": info["attempts"] + 1, "idle": info["idle"] + 1}
            trial.set_user_attr("info", info)
            drawn = {axis.key: self.draw(trial, axis, number, i) for i, axis in enumerate(self.axes)}
            return Taken(trial, self.params(drawn), info, trial.user_attrs.get("curve", []))

    def promote(self, trials: list[FrozenTrial], *, more: bool) -> int | None:
        """Lets a paused trial wait for whoever takes it to its next rung, if one may go on. Call under the lock."""
        number = asha.choose([asha.standing(trial) for trial in trials], self.settings.reduction, more=more)
        if number is not None:
            trial_id, info = trials[number]._trial_id, trials[number].user_attrs["info"]
            self.storage.set_trial_user_attr(trial_id, "info", info | {"goal": len(info["reached"]) + 1})
            self.storage.set_trial_state_values(trial_id, TrialState.WAITING)
        return number

    def end(self, trials: list[FrozenTrial]) -> None:
        """Those still paused are pruned, and their checkpoints on this machine go. Call under the lock."""
        for trial in trials:
            if asha.standing(trial).state == "paused":
                info = trial.user_attrs["info"] | {"state": "pruned", "error": None}
                self.storage.set_trial_user_attr(trial._trial_id, "info", info)
                self.study.tell(trial.number, state=TrialState.PRUNED)
            shutil.rmtree(self.folder / "trials" / f"{trial.number:04d}" / "checkpoints", ignore_errors=True)

    def draw(self, trial: Trial, axis: Axis, number: int, place: int) -> Any:
        """A trial's value on an axis: a function of the seed, the trial's number and, for TPE, the trials before it."""
        seed = int(np.random.SeedSequence((self.settings.seed, number, place)).generate_state(1)[0])
        self.study.sampler = sampler(self.settings, seed)
        if axis.kind == "choice":
            return trial.suggest_categorical(axis.key, [name(value) for value in axis.values])
        low, high = axis.values
        draw = trial.suggest_int if axis.whole else trial.suggest_float
        return draw(axis.key, low, high, log=axis.kind == "log")

    def params(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """Values of settings from what Optuna holds of a trial."""
        choices = {
            axis.key: {name(value): value for value in axis.values} for axis in self.axes if axis.kind == "choice"
        }
        return {key: choices[key][value] if key in choices else value for key, value in drawn.items()}

    def report(
        self, taken: Taken, entry: dict[str, Any], rung: int, *, last: bool
    ) -> Literal["pruned", "paused"] | None:
        """Keeps a validation; `rung` of `settings.validations` are behind it. Returns what the trial is now, if it is
        not to go on."""
        taken.curve = [point for point in taken.curve if point["step"] < entry["step"]] + [entry]
        with self.own(taken):
            if self.settings.pruner == "asha":
                at = asha.rungs(self.settings.validations, self.settings.reduction)
                taken.info["reached"] = asha.reach(taken.info.get("reached", []), at, rung, entry)
                taken.info |= {"goal": len(at) + 1} if last else {}
            taken.info["idle"] = 0
            taken.trial.set_user_attr("curve", taken.curve)
            if rung not in self.storage.get_trial(taken.trial._trial_id).intermediate_values:
                taken.trial.report(entry["loss"], rung)
            taken.trial.set_user_attr("info", taken.info)  # last, since with it the trial may be paused
            if asha.paused(taken.info):
                return "paused"
            return "pruned" if not last and taken.trial.should_prune() else None

    def finish(self, taken: Taken, state: State, error: str | None = None) -> None:
        """Records a trial's end."""
        with self.own(taken):
            taken.trial.set_user_attr("info", taken.info | {"state": state, "error": error})
            value = min(point["loss"] for point in taken.curve) if state == "complete" else None
            self.study.tell(taken.trial, value, TOLD[state])

    def release(self, taken: Taken, *, broken: bool = False) -> None:
        """Gives a trial back: for whoever takes one next, or paused if it stands at its rung. `broken`: it ends its
        worker's life, which counts as a kill does."""
        with suppress(Lost), self.own(taken):
            taken.info |= {} if broken else {"idle": 0}
            taken.trial.set_user_attr("info", taken.info)
            self.give_up(self.storage.get_trial(taken.trial._trial_id))

    def reclaim(self) -> None:
        """Gives up the trials of dead workers. Call under the lock."""
        for trial in self.trials(TrialState.RUNNING):
            if asha.standing(trial).state != "paused" and not self.alive(trial):
                self.give_up(trial)

    def give_up(self, trial: FrozenTrial) -> None:
        """A trial without a worker waits again, is paused if it stands at its rung, or has failed if it only waits."""
        # Whoever dies while it takes the trial must not pass for the worker before.
        info = trial.user_attrs.get("info", {}) | {"worker": None}
        self.storage.set_trial_user_attr(trial._trial_id, "info", info)
        if asha.paused(info):
            return
        if info.get("idle", 0) >= TRIES:
            error = f"ended {TRIES} workers in a row without a validation"
            self.storage.set_trial_user_attr(trial._trial_id, "info", info | {"state": "failed", "error": error})
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        else:
            self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def alive(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial lives. Call under the lock."""
        worker = trial.user_attrs.get("info", {}).get("worker")
        if worker is None or worker == self.me:
            return False  # it died while it took the trial, or this worker itself gave it up
        file = self.folder / "workers" / worker
        if file.exists():  # it runs, or ran, on this machine: its lock tells
            return not dead(file)
        beat = trial.user_attrs.get("beat", 0)
        known = self.seen.get(trial.number)
        if known is None or known[:2] != (worker, beat):
            self.seen[trial.number] = (worker, beat, time.monotonic())
            return True
        return time.monotonic() - known[2] < GRACE

    @contextmanager
    def living(self, taken: Taken) -> Iterator[None]:
        """Gives signs of life while a trial runs."""
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(BEAT):
                count += 1
                # A database that is away for a while costs this worker its trial only if it is away for GRACE.
                with suppress(Lost, OptunaError, SQLAlchemyError), self.own(taken):
                    self.storage.set_trial_user_attr(taken.trial._trial_id, "beat", count)
            self.storage.remove_session()

        thread = threading.Thread(target=beat, name="veritune-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def own(self, taken: Taken) -> Iterator[None]:
        """The sweep's lock, with the trial in this worker's hands. Raises Lost if it no longer is."""
        with self.locked():
            now = self.storage.get_trial(taken.trial._trial_id)
            if now.state != TrialState.RUNNING or now.user_attrs.get("info", {}).get("worker") != self.me:
                raise Lost(f"trial {taken.number} was taken over by another worker")
            yield

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One worker of the sweep at a time."""
        with self.mutex:
            if self.settings.storage is None:
                with here_alone(self.folder):
                    yield
            else:
                with self.storage.engine.begin() as connection:
                    # A machine that vanishes while it holds the lock must not keep it.
                    connection.execute(sqlalchemy.text("SET LOCAL idle_in_transaction_session_timeout = '60s'"))
                    key = zlib.crc32(self.study.study_name.encode())
                    connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
                    yield

    def agree(self, weights: str | None) -> None:
        """Raises ConfigError if trials were trained on a base of other weights; None: nothing tells."""
        with self.locked():
            before = self.study.user_attrs.get("weights")
            if before is None and weights is not None:
                self.study.set_user_attr("weights", weights)
            elif weights not in (None, before):
                raise ConfigError(
                    f"{self.folder} holds trials of a base with other weights: what model.path names has changed, or "
                    "is another model here. Put it back to go on with the sweep, or choose another sweep.out"
                )

    def close(self) -> None:
        """Leaves the sweep; a trial still in this worker's hands waits for the next."""
        with self.locked():
            self.reclaim()
            (self.folder / "workers" / self.me).unlink(missing_ok=True)
        self.life.close()
        self.storage.remove_session()
        self.storage.engine.dispose()

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)


def open_board(
    settings: config.Sweep, axes: list[Axis], folder: Path, agreed: dict[str, Any], *, join: bool = False
) -> Board:
    """Opens a sweep's study, or makes it.

    agreed: what all who work on it must have the same, as flat JSON values. join: the study must be there. Raises
    ConfigError if the study holds another sweep or cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    study_name, database = folder.name, folder / "study.db"
    if settings.storage is None and join and not database.exists():
        raise MissingError(
            f"{folder}: there is no sweep to join; start it without --worker, or name its --sweep.storage"
        )
    if settings.storage is None and not database.exists() and any((folder / "trials").glob("*")):
        raise ConfigError(f"{folder} holds trials of another sweep: choose another sweep.out, or move it away")
    if folder.is_dir() and any(folder.iterdir()) and not ((folder / "workers").is_dir() or database.exists()):
        raise ConfigError(f"{folder} holds other things and no sweep: choose another sweep.out")
    (folder / "workers").mkdir(parents=True, exist_ok=True)
    storage = open_storage(settings.storage, database)
    try:
        if join:
            study = optuna.load_study(study_name=study_name, storage=storage)
        else:
            study = optuna.create_study(study_name=study_name, storage=storage, load_if_exists=True)
    except KeyError:
        raise MissingError(
            f"the storage holds no sweep named {study_name!r} to join; start it without --worker, with this sweep.out"
        ) from None
    study.pruner = pruner(settings)
    board = Board(study, storage, settings, axes, folder)
    with board.locked():
        ended = [path for path in (folder / "workers").iterdir() if dead(path)]
        board.reclaim()
        for path in ended:  # only now, and no others: a trial whose worker has no file counts as another machine's
            path.unlink()
        board.life = (folder / "workers" / board.me).open("w")
        fcntl.flock(board.life, fcntl.LOCK_EX)  # until this process ends, however it does
        before = study.user_attrs.get("agreed")
        if before is None:
            study.set_user_attr("agreed", agreed)
        elif differing := [key for key in agreed | before if agreed.get(key) != before.get(key)]:
            said = "; ".join(f"{key} was {before.get(key)!r}, is {agreed.get(key)!r}" for key in differing)
            raise ConfigError(
                f"{folder} holds a sweep with other settings: {said}. Put them back to go on with it, or choose "
                "another sweep.out"
            )
    return board


def dead(file: Path) -> bool:
    """Whether the worker of this machine that a lock file belongs to has ended. Call under the sweep's lock."""
    with file.open() as handle, suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def sampler(settings: config.Sweep, seed: int) -> optuna.samplers.BaseSampler:
    """What draws one value."""
    if settings.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def pruner(settings: config.Sweep) -> optuna.pruners.BasePruner:
    """What stops a trial that falls behind, but for asha; its steps are validations."""
    if settings.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=1, max_resource=settings.validations, reduction_factor=settings.reduction
        )
    return optuna.pruners.NopPruner()
