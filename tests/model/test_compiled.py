"""Compiled layers give plain layers' gradients, whatever the number of tokens, or are not used."""

import shutil
import traceback
from functools import partialmethod
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from tiny_models import kept, tiny
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.compile_worker.subproc_pool import SubprocException
from torch._inductor.exc import InductorError

from veritune import config
from veritune.model import adapter, attention, graphs, load, self_check
from veritune.model.compiled import compile_layers, gradients
from veritune.model.verdict import label_loss, logits_of
from veritune.tokens.blocks import blocks_of
from veritune.tokens.trie import build


def model(base: load.Base | None = None) -> Any:
    base = base or load.Base(tiny("llama"), None, torch.device("cpu"), "fp32", "tiny")
    assert self_check.check_paths(base, 256) is None
    made = adapter.add_adapter(base, config.Lora(rank=4), seed=0)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    load.set_training(made)
    return made


def loss_of(made: Any, size: int) -> Tensor:
    rng = np.random.default_rng(size)
    head = rng.integers(3, 300, 20 + size, dtype=np.int32)
    rows = [np.concatenate((head, rng.integers(3, 300, 10 + i, dtype=np.int32))) for i in range(3 + size)]
    labels = torch.arange(len(rows)) % 2 == 0
    trie = build(rows)
    # With the table of blocks that a GPU's kernels go by, which is of another length every time.
    blocks, (ids, positions) = blocks_of(trie.until), map(torch.from_numpy, (trie.ids, trie.positions))
    until, ends, table = map(torch.from_numpy, (trie.until, trie.ends, blocks.table))
    paths = attention.Paths(until, ends, trie.longest, table, blocks.pieces, blocks.sums, blocks.parts)
    return label_loss(logits_of(made, ids, positions, paths), labels, (7, 11))


def gradient(made: Any, size: int) -> Tensor:
    loss_of(made, size).backward()
    out = torch.cat([p.grad.flatten() for p in made.parameters() if p.requires_grad])
    made.zero_grad(set_to_none=True)
    return out


def test_gradients_that_were_summed_up_before_are_no_part_of_the_comparison() -> None:
    made = model()
    expected = gradient(made, 2)
    loss_of(made, 1).backward()
    torch.testing.assert_close(gradients(made, lambda: loss_of(made, 2)), expected, rtol=0, atol=0)
    assert all(p.grad is None for p in made.parameters())


def test_a_compiled_layer_takes_no_number_that_stands_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would need a kernel for a CPU, which takes a compiler of C++ and most of the time."""
    torch.compiler.reset()
    monkeypatch.setattr(torch._dynamo.config, "specialize_float", False)  # as torch comes
    taken: list[list[int]] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        taken.append([it.dim() for it in inputs if isinstance(it, Tensor)])
        return make_boxed_func(graph.forward)

    kind = type(load.layers(tiny("llama"))[0])
    compile_as = partialmethod(torch.nn.Module.compile, backend=aot_autograd(fw_compiler=compiler))
    monkeypatch.setattr(kind, "compile", compile_as)
    made = model()
    assert compile_layers(made, lambda: gradients(made, lambda: loss_of(made, 2))) is None
    assert len(taken) == 2  # forward and backward
    assert all(0 not in dims for dims in taken)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compiled_once_for_every_number_of_tokens_and_every_layer() -> None:
    torch.compiler.reset()
    counters.clear()
    base = load.Base(tiny("llama"), None, torch.device("cpu"), "fp32", "tiny")
    made = model(base)
    plain = [gradient(made, size) for size in range(5)]
    assert compile_layers(made, lambda: gradients(made, lambda: loss_of(made, 2))) is None
    for size, expected in enumerate(plain):
        assert float((gradient(made, size) - expected).norm() / expected.norm()) <= 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # The next run's adapter on the same base finds the layers compiled.
    adapter.remove(base)
    made = model(base)
    assert compile_layers(made, lambda: gradients(made, lambda: loss_of(made, 2))) is None
    for size, expected in enumerate(plain):
        assert float((gradient(made, size) - expected).norm() / expected.norm()) <= 1e-5
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers_recompute_from_outside_without_further_graphs(backend: str) -> None:
    torch.compiler.reset()
    counters.clear()
    made = model()
    plain = gradient(made, 1)
    for layer in load.layers(made):
        layer.compile(dynamic=True, backend=backend)
    gradient(made, 2)
    graphs = counters["stats"]["unique_graphs"]
    sizes = []
    for recomputed in (0, 1, 3):
        load.set_training(made, recomputed=recomputed)
        loss, size = kept(lambda: loss_of(made, 1))
        sizes.append(size)
        loss.backward()
        made.zero_grad(set_to_none=True)
        assert torch.allclose(gradient(made, 1), plain, rtol=1e-5, atol=1e-8)
    assert sizes[0] > sizes[1] > sizes[2]
    assert counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


@pytest.mark.parametrize("wrong", ["without gradients", "halved", "broken", "broken in a process of the compiler's"])
def test_layers_that_compile_to_something_else_stay_plain(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def miscompile(layer: Any, **options: Any) -> None:
        def call(states: Tensor, *inputs: Any, **named: Any) -> Tensor:
            if wrong == "broken":
                raise BackendCompilerFailed(call, RuntimeError("no kernel for this"), None)
            if wrong.startswith("broken"):
                try:
                    raise RuntimeError("no kernel for this\nRepro command: none")
                except RuntimeError:
                    raise InductorError(SubprocException(traceback.format_exc()), None) from None
            out = layer.forward(states, *inputs, **named)
            change = out - states
            return states + (change.detach() + 0 * change if wrong == "without gradients" else change / 2)

        layer._compiled_call_impl = call

    made = model()
    before = gradient(made, 1)
    monkeypatch.setattr(torch.nn.Module, "compile", miscompile)
    reason = compile_layers(made, lambda: gradients(made, lambda: loss_of(made, 1)))
    assert reason is not None
    assert ("no kernel for this" if wrong.startswith("broken") else "off by") in reason
    assert torch.equal(gradient(made, 1), before)


@pytest.mark.parametrize("wrong", [False, True])
def test_what_dropout_draws_is_not_held_against_compiled_layers(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(layer: Any, **options: Any) -> None:
        def call(states: Tensor, *inputs: Any, **named: Any) -> Tensor:
            out = layer.forward(states, *inputs, **named)
            return states + (out - states) / 2 if wrong else out

        layer._compiled_call_impl = call

    base = load.Base(tiny("llama"), None, torch.device("cpu"), "fp32", "tiny")
    assert self_check.check_paths(base, 256) is None
    made = adapter.add_adapter(base, config.Lora(rank=4, dropout=0.15), seed=0)  # a fresh one, as a run has it
    load.set_training(made)
    compute = lambda: gradients(made, lambda: loss_of(made, 8))  # noqa: E731
    plain = compute()
    assert (compute() - plain).norm() > 0.25 * plain.norm()
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    reason = compile_layers(made, compute)
    assert reason is None or wrong
    assert not wrong or "off by" in str(reason)


def test_without_memory_to_compare_with_plain_ones_layers_stay_plain() -> None:
    def compute() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    made = model()
    reason = compile_layers(made, compute)
    assert reason is not None
    assert "could not be compared with plain ones: CUDA out of memory" in reason
    assert gradient(made, 1).norm() > 0
    device, nothing = torch.device("cpu"), np.zeros(0)
    recorded, reason = graphs.record(made, device, (0, 1), None, nothing, compute)  # pyright: ignore[reportArgumentType]
    assert recorded is None
    assert reason is not None
    assert "could not be compared with plain ones: CUDA out of memory" in reason


def test_a_trie_beyond_a_recorded_size_is_not_recorded() -> None:
    made = model()
    rows = build([np.arange(4096, dtype=np.int32) % 300])  # one row that takes more parts than its size has room for
    assert graphs.Graphs(made, torch.device("cpu"), (7, 11)).backward(rows, np.array([True]), 1.0) is None
