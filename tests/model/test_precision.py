"""Products with NF4 and FP8 bases: the numbers they stand for, in both directions, and what is saved and freed."""

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from tiny_models import tiny
from torch import nn

from veritune import config
from veritune.model import adapter, load, precision, self_check
from veritune.model.verdict import label_logits
from veritune.tokens.trie import build


def quantised(module: precision.Fp8Linear, grad: torch.Tensor, x: torch.Tensor):
    """Output and input gradient with the FP8 numbers spelt out in float64."""
    spelt = lambda values, scale: values.double() * scale.double()  # noqa: E731
    row = spelt(module.by_row, module.row_scale.t())
    column = spelt(module.by_column, module.column_scale.t())
    x8, g8 = (spelt(*precision.quantise_rows(t)) for t in (x, grad))
    return x8 @ row.t(), g8 @ column.t()


def test_fp8_is_what_its_numbers_say_and_near_what_it_replaces():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False)
    block = nn.Module()
    block.add_module("inner", linear)
    x, grad = torch.randn(20, 64), torch.randn(20, 48)
    weight = linear.weight.detach().clone()
    layer = tiny("llama")  # any decoder layer will do as the place that to_fp8 looks into
    next(iter(load.layers(layer))).add_module("probe", linear)
    precision.to_fp8(layer)
    assert type(linear) is precision.Fp8Linear
    assert linear.weight.numel() == 0
    expected_y, expected_back = quantised(linear, grad, x)
    kind, parts = precision.frozen_parts(linear)
    low, up, up_back = torch.randn(20, 4), torch.randn(48, 4), torch.randn(64, 4)
    y = precision.plus(kind, x, parts, None, low, up)
    back = precision.plus_back(kind, [grad], [parts], low, up_back)
    torch.testing.assert_close(y.double(), expected_y + low.double() @ up.double().t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back.double(), expected_back + low.double() @ up_back.double().t(), rtol=1e-4, atol=1e-4)
    assert (expected_y - x.double() @ weight.double().t()).norm() < 0.05 * expected_y.norm()
    torch.testing.assert_close(linear(x).double(), expected_y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"targets": ("q_proj", "v_proj")}, {"dropout": 0.3}], ids=str)
def test_an_fp8_model_trains_and_saves_an_adapter_like_any_other(changes):
    base, lora = load.Base(tiny("qwen2"), None, torch.device("cpu"), "fp8", "tiny"), config.Lora(rank=4, **changes)
    model = adapter.add_adapter(base, lora, seed=0)
    plain = adapter.add_adapter(load.Base(tiny("qwen2"), None, base.device, "fp32", "tiny"), lora, seed=0)
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(plain).keys()
    layers = [m for m in model.modules() if type(m) is precision.Fp8Linear]
    assert len(layers) == 7 * 2
    ids = torch.arange(30)[None]
    grads = []
    for each in (model, plain):
        load.set_training(each)
        torch.manual_seed(0)  # the same is dropped
        (1e-3 * each(input_ids=ids).logits.float().logsumexp(-1).sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    assert grads[0].norm() > 0
    assert (grads[0] - grads[1]).norm() < 0.2 * grads[1].norm()


def test_fp8_weights_are_held_once_to_score_with_an_adapter_beside_them(tmp_path):
    made = [load.Base(tiny("qwen2"), None, torch.device("cpu"), "fp8", "tiny") for _ in range(2)]
    trained = adapter.add_adapter(made[0], config.Lora(rank=4, targets=("q_proj", "gate_proj", "down_proj")), seed=0)
    for name, value in trained.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.1)
    trained.save_pretrained(tmp_path)
    loaded = adapter.load_adapter(made[1], tmp_path)
    held = [module for module in loaded.modules() if type(module) is precision.Fp8Linear]
    assert len(held) == 7 * 2
    assert not any("column" in name for module in held for name, _ in module.named_buffers())
    with torch.no_grad():
        expected, found = (model(input_ids=torch.arange(30)[None]).logits for model in (trained, loaded))
        with loaded.disable_adapter():
            assert not torch.equal(loaded(input_ids=torch.arange(30)[None]).logits, found)
    assert torch.equal(found, expected)


def test_layers_whose_widths_a_gpu_does_not_multiply_in_fp8_stay_as_they_are():
    model = tiny("qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    precision.to_fp8(model)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert kinds["q_proj"] is kinds["down_proj"] is precision.Fp8Linear
    assert kinds["shared_expert_gate"] is nn.Linear  # of one number for each token
    assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


@pytest.fixture
def nf4(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    model = load._from_folder(str(tmp_path), "nf4", torch.device("cpu"), print).requires_grad_(False).eval()
    return adapter.add_adapter(load.Base(model, None, torch.device("cpu"), "nf4", "tiny"), config.Lora(rank=4), seed=0)


def test_nf4_held_unpacked_gives_the_same_numbers(nf4):
    ids = torch.arange(30)[None]
    for p in nf4.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)

    def run():
        logits = nf4(input_ids=ids).logits
        logits.float().logsumexp(-1).sum().backward()
        grads = [p.grad.clone() for p in nf4.parameters() if p.grad is not None]
        nf4.zero_grad(set_to_none=True)
        return [logits.detach(), *grads]

    packed = run()
    names = get_peft_model_state_dict(nf4).keys()
    precision.hold_unpacked(nf4)
    assert not any(
        "4bit" in type(m).__name__ for m in nf4.modules() if m.__class__.__module__.startswith("bitsandbytes")
    )
    for one, other in zip(packed, run(), strict=True):
        assert torch.equal(one, other)
    assert get_peft_model_state_dict(nf4).keys() == names


def test_nf4_layers_compile_for_scoring(nf4) -> None:
    """What `Verifier.compile` does on a GPU; torch's compiler took the adapter apart wrongly for just NF4."""
    torch._dynamo.reset()
    rows = [np.arange(5, 5 + n, dtype=np.int32) for n in (9, 14)]
    self_check.use_paths(nf4.get_base_model())
    with torch.inference_mode():
        plain = label_logits(nf4, build(rows), torch.device("cpu"))
        for layer in load.layers(nf4)[:-1]:
            layer.compile(dynamic=True, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(label_logits(nf4, build(rows), torch.device("cpu")), plain)
