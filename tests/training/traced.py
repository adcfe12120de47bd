"""Peak memory of a real training step without a GPU: the real layers run on the meta device while every storage that
comes to life and dies is counted. Only attention's own allocations are repeated by hand: its kernels need a GPU."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from veritune import config
from veritune.model import adapter, attention, load, self_check, swiglu
from veritune.model.verdict import label_logits, label_loss
from veritune.tokens.blocks import BLOCK, blocks_of
from veritune.tokens.trie import Trie, build

META = torch.device("meta")


class Tracker(TorchDispatchMode):
    """Bytes of the storages that are alive, but those of `known` tensors."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)


class _Attend(torch.autograd.Function):
    """`attention.attend` with the allocations of `trie_kernels`."""

    @staticmethod
    def forward(ctx: Any, parts: int, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Any:
        out, logs = torch.empty_like(q), q.new_empty((q.shape[1], len(q)), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logs)
        ctx.parts = parts
        return out, logs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, _, logs = ctx.saved_tensors
        grad = grads[0].contiguous()
        own = [torch.empty_like(logs)]
        own += [k.new_empty((ctx.parts * BLOCK, *k.shape[1:]), dtype=torch.float32) for _ in range(2)]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del grad
        return None, dq, dk, dv, *[None] * 6


@contextmanager
def kernels(trie: Trie) -> Iterator[None]:
    """Attention as it allocates on a GPU."""
    parts = blocks_of(trie.until).parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attend", lambda *inputs: _Attend.apply(parts, *inputs))
        yield


@dataclass(frozen=True)
class Step:
    """What a traced step took, bytes: gradients and copies of the adapter included, weights and optimiser not."""

    trie: Trie
    peak: int
    trained: int  # parameters


def model_of(family: str, **sizes: Any) -> Any:
    """A model on the meta device in bf16."""
    settings = AutoConfig.for_model(family, **sizes)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with META:
            return AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def rows_of(tokens: int, length: int, together: int) -> list[np.ndarray]:
    """Rows of a length that share a fifth of it with `together` others, up to so many tokens in a trie."""
    rng = np.random.default_rng(0)
    out: list[np.ndarray] = []
    shared, size = max(length // 5, 8), 0
    while True:
        question = rng.integers(0, 300, shared, dtype=np.int32)
        size += shared
        for _ in range(together):
            size += length - shared
            if out and size > tokens:
                return out
            out.append(np.concatenate((question, rng.integers(0, 300, length - shared, dtype=np.int32))))


def step(model: Any, settings: config.Lora, rows: list[np.ndarray], recomputed: int = 0) -> Step:
    """Two micro-batches of a step, and the highest moment of the second."""
    base = load.Base(model, None, META, "bf16", "traced")
    self_check.use_paths(model)
    made = adapter.add_adapter(base, settings, seed=0)
    swiglu.fuse(made)  # as it is on a GPU
    load.set_training(made, recomputed=recomputed)
    trie = build(rows)
    with kernels(trie), Tracker(made.parameters()) as tracker:
        labels = torch.zeros(len(rows), dtype=torch.bool, device=META)
        for _ in range(2):  # gradients are there from the second micro-batch of a step on
            tracker.peak = 0
            label_loss(label_logits(made, trie, META), labels, (5, 6)).backward()
    return Step(trie, tracker.peak, sum(p.numel() for p in made.parameters() if p.requires_grad))
