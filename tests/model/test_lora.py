"""Layers that take the same input are computed at once, and only those."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny

from veritune import config
from veritune.model import adapter, compiled, load, lora, self_check
from veritune.model.verdict import label_logits
from veritune.tokens.trie import build


def made(**changes: Any) -> Any:
    base = load.Base(tiny("llama"), None, torch.device("cpu"), "fp32", "tiny")
    self_check.use_paths(base.model)
    model = adapter.add_adapter(base, config.Lora(rank=4, **changes), seed=0)
    load.set_training(model)
    return model


def sizes(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many layers each call was, in one pass."""
    found: list[int] = []
    alone = lora._linears

    def counted(x: torch.Tensor, parts: list[Any]) -> Any:
        found.append(len(parts))
        return alone(x, parts)

    monkeypatch.setattr(lora, "_linears", counted)
    label_logits(model, build([np.arange(20, dtype=np.int32)]), torch.device("cpu")).sum().backward()
    return found


@pytest.mark.parametrize(
    ("changes", "layer", "last"),
    [
        ({}, [3, 1, 2, 1], [1, 2, 1, 2, 1]),
        ({"targets": ("q_proj", "v_proj")}, [1, 1], [1, 1]),
        ({"targets": ("gate_proj", "up_proj")}, [2], [2]),
    ],
    ids=str,
)
def test_q_k_and_v_are_one_call_and_so_are_gate_and_up(
    changes: dict[str, Any], layer: list[int], last: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(**changes)
    assert sizes(model, monkeypatch) == layer * (len(load.layers(model)) - 1) + last


def test_another_input_is_computed_by_itself_and_an_error_leaves_nothing_behind() -> None:
    model = made()
    attention: Any = load.layers(model)[0].self_attn
    generator = torch.Generator().manual_seed(0)
    for value in attention.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.1
    x, other = (torch.randn(1, 7, attention.q_proj.in_features, generator=generator) for _ in range(2))
    with torch.no_grad():
        wanted = [attention.k_proj(given) for given in (x, other)]
    attention.q_proj(x)  # k's and v's results wait
    torch.testing.assert_close(attention.k_proj(other), wanted[1])
    torch.testing.assert_close(attention.k_proj(x), wanted[0])
    attention.q_proj(other)  # an error came before v
    torch.testing.assert_close(attention.k_proj(x), wanted[0])
    attention.v_proj(other)
    assert attention.q_proj.group.input is None
    assert attention.q_proj.group.found == ()


def test_a_pass_that_ends_in_an_error_between_two_of_them_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    second: Any = load.layers(model)[1].mlp
    act = second.act_fn.forward  # called between gate and up

    def full(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(second.act_fn, "forward", full)
    rows = build([np.arange(20, dtype=np.int32)])
    with pytest.raises(torch.OutOfMemoryError):
        compiled.gradients(model, lambda: label_logits(model, rows, torch.device("cpu")).sum())
    assert second.gate_proj.group.found == ()
    monkeypatch.setattr(second.act_fn, "forward", act)
    second.gate_proj(torch.ones(1, 7, second.gate_proj.in_features))
    assert second.gate_proj.group.found != ()
    lora.forget(model)
    assert second.gate_proj.group.found == ()
    assert second.gate_proj.group.input is None
