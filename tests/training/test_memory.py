"""The memory that is foretold is what real layers take."""

from functools import partialmethod
from typing import Any

import numpy as np
import pytest
import torch
import traced
from tiny_models import kept, tiny
from torch import Tensor
from traced import rows_of

from veritune import config
from veritune.model import adapter, load, self_check, swiglu
from veritune.model.compiled import compile_layers, gradients
from veritune.model.shape import Shape
from veritune.model.verdict import label_logits, label_loss
from veritune.tokens.trie import build
from veritune.training import memory
from veritune.training.memory import Batch, Job

LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_05B = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


MODELS = {"llama-8b": ("llama", LLAMA_8B), "qwen-0.5b": ("qwen2", QWEN_05B), "smollm2": ("llama", SMOLLM2)}
LONG, MIXED, SHORT = (4096, 4096, 1), (16384, 320, 8), (8192, 64, 1)
CASES = [
    ("llama-8b", MIXED, 16, 0), ("llama-8b", MIXED, 16, 1), ("llama-8b", LONG, 64, 3),
    ("qwen-0.5b", LONG, 16, 0), ("qwen-0.5b", MIXED, 64, 2),
    ("smollm2", SHORT, 16, 0), ("smollm2", SHORT, 16, 2), ("smollm2", MIXED, 128, 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "size", "rank", "recomputed"), CASES)
def test_peak_of_plain_layers(name: str, size: tuple[int, int, int], rank: int, recomputed: int) -> None:
    family, sizes = MODELS[name]
    model = traced.model_of(family, num_hidden_layers=3, **sizes)
    shape = Shape.of(model.config.to_dict())
    assert shape.inside + shape.outside == sum(p.numel() for p in model.parameters()) - biases(model)
    step = traced.step(model, config.Lora(rank=rank), rows_of(*size), recomputed)
    assert shape.trained(config.Lora().targets, rank) == step.trained
    foretold = memory.peak(shape, job(rank), Batch.of(step.trie), recomputed)
    # Weights, parameters and optimiser state are there before; the libraries are not traced.
    took = foretold.total - foretold.libraries - foretold.weights - step.trained * (4 + 8)
    assert took == pytest.approx(step.peak, rel=0.02)


def test_what_compiled_layers_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    partitioned = partialmethod(torch.nn.Module.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch.nn.Module, "compile", partitioned)
    (_, few), (shape, more) = kept_by_compiled(3), kept_by_compiled(5)
    compiled = Job("bf16", config.Lora(), "adamw_torch", compiled=True)
    assert (more - few) / 2 == pytest.approx(memory.kept_bytes(shape, compiled, len(ROW)), rel=0.02)
    torch.compiler.reset()


ROW = np.random.default_rng(0).integers(5, 300, 400, dtype=np.int32)


def kept_by_compiled(layers: int) -> tuple[Shape, int]:
    """Bytes that autograd keeps of a model whose layers, but for the narrow last one, are compiled."""
    cpu, sizes = torch.device("cpu"), {"hidden_size": 256, "intermediate_size": 896, "head_dim": 64}
    base = load.Base(tiny("llama", dtype="bfloat16", num_hidden_layers=layers, **sizes), None, cpu, "bf16", "tiny")
    self_check.use_paths(base.model)
    model = adapter.add_adapter(base, config.Lora(rank=16), seed=0)
    swiglu.fuse(model)  # as it is on a GPU
    load.set_training(model)
    trie = build([ROW])

    def loss() -> Tensor:
        return label_loss(label_logits(model, trie, cpu), torch.tensor([True]), (7, 11))

    assert compile_layers(model, lambda: gradients(model, loss)) is None
    return Shape.of(base.model.config.to_dict()), kept(loss, model.state_dict().values())[1]


def job(rank: int) -> Job:
    return Job("bf16", config.Lora(rank=rank), "adamw_torch", compiled=False)


def biases(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
