"""One run on several processes: torch's own distributed runtime, a process (rank) for each GPU, or on a CPU.

Every rank holds the whole model and makes the same plan. Of a step's rows each computes a share; one all-reduce of the
adapter's gradients, in one flat float32 vector with the loss and what a rank has to tell the others at its end, then
leaves all with the same sums, so that all take the same step and the same decision. Only the first rank writes and
talks. A process that is alone is a `World` of one, in which nothing here costs anything.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ..errors import ConfigError, PeerError, first_line
from ..model import load
from ..tokens.trie import MIN_SHARED, order, shared
from .launch import STORE

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for another that lives but does not answer. The end of one is noticed at once."""


class Nobody:
    """Stands where only the first rank has something: a tracker, a saver. Every call does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *unused, **also_unused: None


@dataclass(frozen=True)
class World:
    """The processes that train one run, seen from one of them."""

    rank: int = 0
    size: int = 1
    store: Any = None
    """torch's key-value store, which outlives any rank but the one that holds it."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and talks."""
        return self.rank == 0

    def share(self, rows: Sequence[np.ndarray]) -> list[int]:
        """The numbers of the rows (int32 ids each) that this rank computes; none, where there are fewer than ranks."""
        return list(range(len(rows))) if self.size == 1 else shares(rows, self.size)[self.rank]

    def reduce(self, parameters: Sequence[torch.nn.Parameter], *numbers: Tensor | float) -> Tensor:
        """Sums the gradients, and some numbers, over all ranks: one all-reduce, after which each parameter has its
        gradient. Returns the numbers' sums, float32 [numbers], on the parameters' device.

        A rank that computed no row joins with zeros. What one rank has as NaN or infinite, all have afterwards.
        """
        device = parameters[0].device
        own = torch.stack([torch.as_tensor(it, dtype=torch.float32, device=device) for it in numbers])
        if self.size == 1:
            return own
        flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters), own])
        with self._together():
            dist.all_reduce(flat)
        at = 0
        for p in parameters:
            summed = flat[at : (at := at + p.numel())].view_as(p)
            if p.grad is None:
                p.grad = summed
            else:
                p.grad.copy_(summed)  # in its place: recorded passes add to that memory
        return flat[at:]

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Gives every rank the first one's values, bit for bit."""
        if self.size == 1:
            return
        with torch.no_grad(), self._together():
            for tensor in tensors:
                dist.broadcast(tensor.data, 0)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank, the only one that calls it, on all of them."""
        if self.size == 1:
            return make()
        made = [make() if self.first else None]
        with self._together():
            dist.broadcast_object_list(made, 0)
        return made[0]  # pyright: ignore[reportReturnType]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Returns when all ranks are here."""
        self.gather(None)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around everything that waits for other ranks. Raises PeerError when one of them is gone."""
        try:
            yield
        except RuntimeError as error:
            said = first_line(error)
            with suppress(RuntimeError):  # the store's own machine may be the one that is gone
                said = self.store.get(ENDED).decode() if self.store.check([ENDED]) else said
            raise PeerError(
                f"another process of this run has ended or does not answer: {said}. The same command goes on from the "
                "last checkpoint"
            ) from error


ALONE = World()
ENDED = "veritune/ended"  # the store's key under which a rank that ends with an error leaves it for the first one


@contextmanager
def join(device: str) -> Iterator[World]:
    """The world that torchrun or `--gpus` put this process into, as the environment tells; alone without them.

    device: as in `config.Model`. On CUDA every rank takes the GPU of its number on the machine, and gradients travel by
    NCCL; all else goes by gloo. Raises ConfigError for more ranks on a machine than it has GPUs, and PeerError, here or
    later, when other ranks are gone.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    backend = "gloo"
    if load.pick_device(device).type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.cuda.device_count()
        if here > gpus:
            raise ConfigError(
                f"{here} processes are to train on this machine, which shows {gpus} CUDA GPU{'s' * (gpus != 1)}: start "
                "as many as there are (--gpus N, or torchrun's --nproc-per-node N), or set model.device = 'cpu'"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    place = os.environ.get(STORE)
    if place:
        _end_with_launcher()
    try:
        if place:
            _wait_for_all(place, rank, size)
        url = f"file://{place}?rank={rank}&world_size={size}" if place else "env://"
        store, _, _ = next(rendezvous(url, timeout=TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise PeerError(f"the {size} processes of this run do not find each other: {error}") from error
    world = World(rank, size, store)
    try:
        yield world
    except Exception as error:
        if not world.first and not isinstance(error, PeerError):
            world.store.set(ENDED, f"rank {rank}: {error or type(error).__name__}".encode())
        raise  # without taking leave of the others, who may never answer
    except KeyboardInterrupt:
        if backend == "gloo":  # its threads can abort an interpreter that ends before them; NCCL might wait for others
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _wait_for_all(place: str, rank: int, size: int) -> None:
    """Waits until every rank has come here. torch's own wait hears no signal, and a rank that one ended while it read
    its libraries never comes."""
    Path(f"{place}.{rank}").touch()
    end = time.monotonic() + TIMEOUT.total_seconds()
    while not all(Path(f"{place}.{other}").exists() for other in range(size)):
        if time.monotonic() > end:
            raise RuntimeError("one has not come")
        time.sleep(0.02)


def _end_with_launcher() -> None:
    """Asks this process to save and stop if the one that started it dies: then its standard input ends."""

    def listen() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, name="veritune-launcher", daemon=True).start()


def shares(rows: Sequence[np.ndarray], ranks: int) -> list[list[int]]:
    """Deals rows (int32 ids each) out to ranks: row numbers for each, about as many tokens to compute for all.

    The rows stand in trie order and are cut at `ranks - 1` places, each near where even shares would end and where the
    two rows beside it have little in common, since that is computed twice: between questions rather than within one.
    """
    if not rows:
        return [[] for _ in range(ranks)]
    by_ids = order(rows)
    common = np.array([0, *(shared(rows[a], rows[b]) for a, b in pairwise(by_ids)), 0])
    common[common < MIN_SHARED] = 0
    lengths = np.array([len(rows[i]) for i in by_ids])
    before = np.concatenate(([0], np.cumsum(lengths - common[:-1])))  # tokens of the trie up to each place
    ideal = before[-1] * np.arange(1, ranks) / ranks
    cuts = [0, *(int(np.argmin(np.abs(before - it) + common)) for it in ideal), len(rows)]
    return [by_ids[a:b] for a, b in pairwise(cuts)]


def check_same(world: World, values: dict[str, Any]) -> None:
    """Raises ConfigError, naming the keys, on a rank whose settings or data are not the first one's."""
    wanted = world.from_first(lambda: values)
    differing = [f"{key} is {values.get(key)!r}, there {it!r}" for key, it in wanted.items() if values.get(key) != it]
    if differing:
        raise ConfigError(f"not what the first process trains: {'; '.join(differing)}")
