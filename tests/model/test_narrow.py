"""The last layer computes for the label rows alone, in families where that is known to be the same. That the numbers
are the stock model's is what test_parity.py shows."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny

from veritune import config
from veritune.model import adapter, load, self_check
from veritune.model.narrow import is_narrow
from veritune.model.shape import Shape
from veritune.model.verdict import label_logits
from veritune.tokens.trie import build


def rows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    head = rng.integers(3, 300, 20, dtype=np.int32)
    return [np.concatenate((head, rng.integers(3, 300, 10 + i, dtype=np.int32))) for i in range(5)]


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", True), ("qwen2", True), ("qwen3", True), ("mistral", True), ("phi3", False)],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_how_many_tokens_the_last_layer_sees(family: str, expected: bool, adapted: bool) -> None:
    base = load.Base(tiny(family), None, torch.device("cpu"), "fp32", "tiny")
    assert Shape.of(base.model.config.to_dict()).narrow == expected
    assert self_check.check_paths(base, 256) is None
    targets = ("qkv_proj",) if family == "phi3" else config.Lora().targets
    model = adapter.add_adapter(base, config.Lora(rank=4, targets=targets), seed=0) if adapted else base.model
    assert is_narrow(model) == expected
    trie = build(rows())
    for name in ("mlp", "self_attn.o_proj", *(["self_attn.q_proj"] if expected else [])):
        seen: list[int] = []
        for layer in load.layers(model):
            part = layer.get_submodule(name)
            part.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].shape[1]))
        logits = label_logits(model, trie, base.device)
        assert len(logits) == len(trie.ends)
        assert seen == [trie.tokens] * (len(seen) - 1) + [len(trie.ends) if expected else trie.tokens]


@pytest.mark.parametrize("recomputed", [0, 1])
def test_sums_are_left_to_the_next_layer_only_where_no_gradient_is_asked_for(recomputed: int) -> None:
    base = load.Base(tiny("llama"), None, torch.device("cpu"), "fp32", "tiny")
    assert self_check.check_paths(base, 256) is None
    model = adapter.add_adapter(base, config.Lora(rank=4), seed=0)
    load.set_training(model, recomputed=recomputed)
    given: list[Any] = []
    for layer in load.layers(model):
        layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    trie = build([*rows(), *rows()[:2]])
    summed = label_logits(model, trie, base.device)
    count = len(given)
    assert count == len(load.layers(model))
    assert all(isinstance(each, torch.Tensor) for each in given)
    with torch.inference_mode():
        apart = label_logits(model, trie, base.device)
    assert all(isinstance(each, tuple) for each in given[count:])
    torch.testing.assert_close(apart, summed.detach())


def test_a_narrow_model_is_the_stock_one_without_paths() -> None:
    base, stock = load.Base(tiny("llama"), None, torch.device("cpu"), "fp32", "tiny"), tiny("llama")
    stock.load_state_dict(base.model.state_dict())
    assert self_check.check_paths(base, 256) is None
    base.model.set_attn_implementation(base.stock)
    ids: Any = torch.arange(3, 40)[None]
    assert torch.equal(base.model(ids).logits, stock(ids).logits)
