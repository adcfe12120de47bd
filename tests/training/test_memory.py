"""The memory that is foretold is what real layers take."""

from typing import Any

import pytest
import traced
from traced import rows_of

from veritune import config
from veritune.model.shape import Shape
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


def job(rank: int) -> Job:
    return Job("bf16", rank, config.Lora().targets, "adamw_torch", compiled=False)


def biases(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
