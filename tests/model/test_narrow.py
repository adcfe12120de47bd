"""The last layer computes for the label rows alone, in families where that is known to be the same. That the numbers
are the stock model's is what test_parity.py shows."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny
from transformers import AttentionInterface

from veritune import config
from veritune.model import adapter, load, self_check
from veritune.model.attention import NAME, path_attention
from veritune.model.narrow import is_narrow, narrow
from veritune.model.shape import NARROW, Shape
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
    assert [all(bool(part.any()) for part in each) for each in given[count:]] == [False] + [True] * (count - 1)
    torch.testing.assert_close(apart, summed.detach())


@pytest.mark.parametrize("family", NARROW)
def test_the_last_layer_asks_of_attention_what_its_family_asks(family: str, request: pytest.FixtureRequest) -> None:
    window = {} if family == "llama" else {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}
    model = tiny(family, attention_dropout=0.5, **window)
    last = load.layers(model)[-1].self_attn.train()
    last.scaling = 0.3
    asked: list[dict[str, Any]] = []

    def attention(module: Any, *inputs: Any, **options: Any) -> Any:
        asked.append({name: options.pop(name, None) for name in ("dropout", "scaling", "sliding_window")})
        return path_attention(module, *inputs, **options)

    request.addfinalizer(lambda: AttentionInterface.register(NAME, path_attention))
    AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)
    label_logits(model, build(rows()), torch.device("cpu"))
    narrow(model)
    label_logits(model, build(rows()), torch.device("cpu"))
    count = len(load.layers(model))
    assert asked[-1] == asked[count - 1] == {"dropout": 0.5, "scaling": 0.3, "sliding_window": 100 if window else None}


def test_a_narrow_model_is_the_stock_one_without_paths() -> None:
    base, stock = load.Base(tiny("llama"), None, torch.device("cpu"), "fp32", "tiny"), tiny("llama")
    stock.load_state_dict(base.model.state_dict())
    assert self_check.check_paths(base, 256) is None
    base.model.set_attn_implementation(base.stock)
    ids: Any = torch.arange(3, 40)[None]
    assert torch.equal(base.model(ids).logits, stock(ids).logits)
