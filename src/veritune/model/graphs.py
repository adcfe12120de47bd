"""Training passes recorded as CUDA graphs, for models so small that a GPU would wait for Python between its kernels.

A graph repeats the kernels of one forward and backward pass on the same memory. Tries are padded to a few sizes
(`tokens.pad`), one graph for each; gradients add up in the parameters' `grad`, which must stay where it is: zero it,
never drop it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import first_line
from ..tokens.blocks import Blocks, blocks_of
from ..tokens.pad import Size, pad
from ..tokens.trie import Trie
from .attention import Paths
from .compiled import gradients, tolerance
from .load import layers
from .verdict import logits_of

MOST = 24
"""Sizes that are recorded; a trie of yet another size is computed the plain way."""


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    numbers: Tensor  # int64: ids, positions, until, ends, answers and the table of blocks, one after the other
    weights: Tensor  # float32 [rows]
    loss: Tensor


def launch_bound(model: Any, tokens: int) -> bool:
    """Whether a GPU would spend less time on a pass of so many tokens than Python on launching it: by 4 FLOP a weight
    and token at 400 TFLOP/s, against 6 ms a layer for both directions."""
    if torch.are_deterministic_algorithms_enabled():  # a size found by history is not
        return False
    layer = layers(model)
    linear = [module for each in layer for module in each.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(module.in_features * module.out_features for module in linear)
    return 4 * weights * tokens / 4e14 < 6e-3 * len(layer)


def own_stream(device: torch.device) -> None:
    """Moves this thread's work off the GPU's default stream, which nothing that is recorded may touch: a parameter's
    gradient is added up on the stream of its first use, so this comes before any."""
    if torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        own = torch.cuda.Stream(device)
        own.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(own)


@contextmanager
def default_stream(device: torch.device) -> Iterator[None]:
    """The GPU's default stream inside the block, for libraries that use no other: bitsandbytes' optimisers. A thread
    that has recorded passes once, an earlier trial's say, is on its own stream ever after."""
    if device.type != "cuda":
        yield
        return
    own, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(own)
    with torch.cuda.stream(default):
        yield
    own.wait_stream(default)


class Graphs:
    """Passes of one model with one adapter."""

    def __init__(self, model: Any, device: torch.device, answer_ids: tuple[int, int]) -> None:
        self._model, self._device, self._answers = model, device, answer_ids
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._recorded: dict[Size, _Recorded] = {}
        self._most = MOST
        self._pool: Any = None

    def backward(self, trie: Trie, labels: np.ndarray, scale: float) -> Tensor | None:
        """Adds the gradients of scale x the summed label loss to the parameters' `grad`, and returns that loss; None if
        this trie's size is not recorded and no more sizes are taken, or its rows are longer than is provided for.
        labels: bool [rows]."""
        mine = Size.of(trie)
        size = min((size for size in self._recorded if size.holds(mine)), default=None)
        if size is None:
            if len(self._recorded) >= self._most:
                return None
            size = mine.roomy()
            if not size.holds(mine):
                return None
        padded = pad(trie, size)
        blocks = blocks_of(padded.until, room=True)
        if blocks.over:
            return None
        more = np.zeros(size.rows - len(labels))
        answers = np.concatenate((np.where(labels, *self._answers), more))
        parts = (padded.ids, padded.positions, padded.until, padded.ends, answers, blocks.table)
        numbers = np.concatenate(parts).astype(np.int64)
        weights = np.concatenate((np.full(len(labels), scale), more)).astype(np.float32)
        if size not in self._recorded:
            try:
                self._recorded[size] = self._record(size, trie.longest, blocks, numbers, weights)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if not self._recorded:
                    raise
                self._most = len(self._recorded)  # what is recorded works; this trie is computed the plain way
                return None
        run = self._recorded[size]
        run.numbers.copy_(torch.from_numpy(numbers).pin_memory(), non_blocking=True)
        run.weights.copy_(torch.from_numpy(weights).pin_memory(), non_blocking=True)
        run.graph.replay()
        return run.loss.clone()

    def _record(self, size: Size, longest: int, blocks: Blocks, numbers: np.ndarray, weights: np.ndarray) -> _Recorded:
        for p in self._parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        before = [p.grad.clone() for p in self._parameters if p.grad is not None]
        inputs = torch.from_numpy(numbers).to(self._device), torch.from_numpy(weights).to(self._device)
        try:
            # Lazy set-up of libraries must not fall into the recording.
            self._loss(size, longest, blocks, *inputs).backward()
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                loss = self._loss(size, longest, blocks, *inputs)
                loss.backward()
        finally:
            for p, grad in zip(self._parameters, before, strict=True):
                p.grad.copy_(grad)  # pyright: ignore[reportOptionalMemberAccess]
        self._pool = graph.pool()
        return _Recorded(graph, *inputs, loss.detach())

    def _loss(self, size: Size, longest: int, of: Blocks, numbers: Tensor, weights: Tensor) -> Tensor:
        counts = [size.tokens] * 3 + [size.rows] * 2 + [len(of.table)]
        ids, positions, until, ends, answers, table = numbers.split(counts)
        paths = Paths(until.int(), ends, longest, table.int(), of.pieces, of.sums, of.parts)
        logits = logits_of(self._model, ids, positions, paths)
        return (F.cross_entropy(logits, answers, reduction="none") * weights).sum()


def record(
    model: Any,
    device: torch.device,
    answer_ids: tuple[int, int],
    trie: Trie,
    labels: np.ndarray,
    plain: Callable[[], Tensor],
    *,
    precision: str = "bf16",
) -> tuple[Graphs | None, str | None]:
    """Graphs of a model, if the first one gives the gradients of `plain()`, a loss of the same few real rows; or None
    and why not. Leaves `grad` at zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        expected = gradients(model, plain)
    except torch.OutOfMemoryError as error:
        return None, f"they could not be compared with plain ones: {first_line(error)}"
    graphs = Graphs(model, device, answer_ids)
    try:
        graphs.backward(trie, labels, 1.0)
        found = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        for p in trained:
            p.grad = None
        return None, f"recording failed: {first_line(error)}"
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
    off = float((found - expected).norm() / expected.norm())
    if off <= tolerance(precision):  # padding can change the order in which a kernel sums
        return graphs, None
    return None, f"recorded passes give gradients that are off by {off:.0%}"
