"""SwiGLU under LoRA as one function: the numbers of the layers it replaces, where it is used, and what it keeps. Its
kernels give the numbers of plain products in float64, and the same bits every time; run by Triton's interpreter where
there is no GPU."""

from typing import Any

import pytest
import torch
from interpreted import DEVICES, printed
from peft import get_peft_model_state_dict
from tiny_models import kept, tiny

from veritune import config
from veritune.model import adapter, load, swiglu
from veritune.model.swiglu import FusedMLP

CODE = """
import sys

import torch

from veritune.model import swiglu, swiglu_kernels

device = torch.device(sys.argv[1])
# The interpreter cuts bf16 results instead of rounding them: float32 there.
dtype, allowed = (torch.bfloat16, 0.01) if device.type == "cuda" else (torch.float32, 1e-5)
sizes = [(70, 200, 24), (3, 600, 4)]
if device.type == "cuda":
    sizes.append((1000, 4864, 64))
else:  # fewer blocks a program: so small, most would be empty, and each takes the interpreter a while
    swiglu_kernels.FORWARD, swiglu_kernels.BACKWARD = (64, 64, 2, 4, 3), (32, 64, 2, 2, 1)
    swiglu_kernels.BACKWARD_WIDE = (64, 64, 2, 4, 1)
for tokens, width, rank in sizes:
    torch.manual_seed(0)
    shapes = [(tokens, rank), *[(tokens, width)] * 2, *[(tokens, rank)] * 2, *[(width, rank)] * 2, (rank, width)]
    grad, *given = (torch.randn(shape, device=device).to(dtype) for shape in ((tokens, width), *shapes))
    found = *swiglu_kernels.forward(*given[1:]), *swiglu_kernels.backward(grad, *given)
    exact = [x.double() for x in (grad, *given)]
    off = swiglu.furthest(found, (*swiglu._plain(*exact[2:]), *swiglu._plain_backward(*exact)))
    assert off < allowed, f"{tokens} x {width}, rank {rank}: off by {off:.1e}"
    again = swiglu_kernels.backward(grad, *given)
    assert all(torch.equal(x, y) for x, y in zip(found[2:], again, strict=True))
    print(tokens)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_give_what_plain_products_give(device: str) -> None:
    assert len(printed(CODE, device)) == (2 if device == "cpu" else 3)


IDS = torch.arange(5, 45)[None]


def made(family: str = "llama", held: str = "fp32", **changes: Any) -> Any:
    """A tiny model with an adapter of random numbers, ready to train; its MLPs are fused by hand, as on a GPU."""
    base = load.Base(tiny(family), None, torch.device("cpu"), held, "tiny")
    model = adapter.add_adapter(base, config.Lora(**{"rank": 4, **changes}), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.1
    load.set_training(model)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=IDS).logits.float().logsumexp(-1).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fused(model: Any) -> list[FusedMLP]:
    return [module for module in model.modules() if isinstance(module, FusedMLP)]


def calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many MLPs of a pass with gradients are computed as one function."""
    count = 0
    alone = swiglu._LoraMLP.apply

    def counted(*inputs: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return alone(*inputs)

    monkeypatch.setattr(swiglu._LoraMLP, "apply", counted)
    gradients(model)
    return count


@pytest.mark.parametrize("held", ["fp32", "fp8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_it_learns_what_the_layers_it_replaces_learn(family: str, held: str) -> None:
    model = made(family, held)
    expected, names = gradients(model), get_peft_model_state_dict(model).keys()
    swiglu.fuse(model)
    assert len(fused(model)) == len(load.layers(model))
    found = gradients(model)
    assert found.keys() == expected.keys()
    # FP8 rounds what it multiplies: a sum in another order may fall on the next of its numbers.
    allowed = 1e-5 if held == "fp32" else 0.05
    for name, wanted in expected.items():
        assert float((found[name] - wanted).norm() / wanted.norm()) < allowed, name
    assert get_peft_model_state_dict(model).keys() == names


def test_biases_and_layers_scaled_apart_are_taken_as_they_are() -> None:
    model = made()
    for mlp in (layer.mlp for layer in load.layers(model)):
        mlp.gate_proj.scaling["default"], mlp.down_proj.scaling["default"] = 1.0, 3.0
        for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            bias = torch.linspace(-1, 1, layer.out_features)
            layer.base_layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    expected = gradients(model)
    swiglu.fuse(model)
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "count"),
    [({}, 3), ({"targets": ("gate_proj", "up_proj")}, 0), ({"dropout": 0.1}, 0), ({"rank": 64}, 3), ({"rank": 65}, 0)],
    ids=str,
)
def test_it_is_used_where_all_three_layers_have_an_adapter_of_the_usual_kind(
    changes: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(**changes)
    swiglu.fuse(model)
    assert calls(model, monkeypatch) == count


def test_other_gated_units_and_other_families_are_left_as_they_are() -> None:
    models = {"llama": tiny("llama", hidden_act="gelu"), "gemma": tiny("gemma"), "phi3": tiny("phi3")}
    for family, model in models.items():
        base = load.Base(model, None, torch.device("cpu"), "fp32", "tiny")
        lora = config.Lora(targets=("gate_up_proj", "down_proj")) if family == "phi3" else config.Lora()
        adapted = adapter.add_adapter(base, lora, seed=0)
        swiglu.fuse(adapted)
        assert not fused(adapted), family


def test_without_gradients_without_adapter_and_on_a_cpu_the_layers_compute_as_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made()
    assert not fused(model)  # on a CPU it would be slower
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with model.disable_adapter():
            bare = model(input_ids=IDS).logits
    swiglu.fuse(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, bare)
    assert calls(model, monkeypatch) == 3
    base = load.Base(model.get_base_model(), None, torch.device("cpu"), "fp32", "tiny")
    adapter.remove(base)  # as between the trials of a sweep
    assert not fused(base.model)
    assert torch.equal(base.model(input_ids=IDS).logits, bare)
    again = adapter.add_adapter(base, config.Lora(rank=8), seed=0)
    swiglu.fuse(again)
    assert calls(again, monkeypatch) == 3


def test_two_of_the_four_widths_that_plain_layers_keep_are_computed_again() -> None:
    model = made()
    state = list(model.state_dict().values())
    before = kept(lambda: model(input_ids=IDS).logits.sum(), state)[1]
    swiglu.fuse(model)
    after = kept(lambda: model(input_ids=IDS).logits.sum(), state)[1]
    wide = 4 * IDS.numel() * model.config.intermediate_size  # bytes of one
    assert (before - after) / len(load.layers(model)) == pytest.approx(2 * wide, rel=0.02)


def test_a_gpu_whose_kernels_do_not_work_computes_layer_by_layer_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    assert swiglu.problem(model) is None  # a CPU is not asked
    monkeypatch.setattr(swiglu, "_fast", lambda wide: True)
    monkeypatch.setattr(swiglu, "problem_of_kernels", lambda rank: f"no compiler for rank {rank}")
    swiglu.speed_up(model)
    assert not fused(model)
    assert swiglu.problem(model) == "no compiler for rank 4"
    monkeypatch.setattr(swiglu, "problem_of_kernels", lambda rank: None)
    swiglu.speed_up(model)
    assert len(fused(model)) == len(load.layers(model))
    assert swiglu.problem(model) is None
