"""On a CUDA GPU: trie attention, compiled and not, against stock transformers + PEFT row by row, in bf16."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreted import printed
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from veritune import config
from veritune.model import adapter, graphs, load, precision, self_check
from veritune.model import compiled as compiled_layers
from veritune.model.compiled import compile_layers
from veritune.model.head import WideHead
from veritune.model.swiglu import FusedMLP
from veritune.model.verdict import label_logits, label_loss, rowwise_logits
from veritune.tokens.trie import build

pytestmark = pytest.mark.gpu
ANSWERS = (3, 4)


def make(heads: int, key_heads: int) -> load.Base:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=64,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    return load.Base(model, None, torch.device("cuda"), "bf16", "tiny")


def randomise(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.05)


def rows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(5, 1000, n).astype(np.int32)  # noqa: E731
    head = draw(40)
    questions = [np.concatenate((head, draw(30 + 11 * i))) for i in range(4)]
    return [np.concatenate((q, draw(int(n)))) for q in questions for n in rng.integers(3, 200, 6)]


def gradients(model: torch.nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    label_loss(logits, labels, ANSWERS).backward()
    out = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in b)


@pytest.mark.parametrize(("heads", "key_heads", "compiled"), [(4, 4, False), (8, 2, False), (8, 2, True)])
def test_trie_attention_and_compiled_layers_learn_what_stock_learns(heads, key_heads, compiled):
    given, device = rows(), torch.device("cuda")
    labels = torch.arange(len(given), device=device) % 3 == 0
    stock_base = make(heads, key_heads)
    stock = get_peft_model(stock_base.model, LoraConfig(r=8, lora_alpha=16, target_modules=list(config.Lora().targets)))
    randomise(stock)
    expected = gradients(stock, rowwise_logits(stock, given, device), labels)
    exact = stock.double()
    truth = gradients(exact, rowwise_logits(exact, given, device), labels)

    base = make(heads, key_heads)
    assert self_check.check_paths(base, 2048) is None
    model = adapter.add_adapter(base, config.Lora(rank=8, alpha=16), seed=0)
    randomise(model)
    load.set_training(model)
    if compiled:
        trie = build(given)
        loss = lambda: label_loss(label_logits(model, trie, device), labels, ANSWERS)  # noqa: E731
        torch._dynamo.utils.counters.clear()
        assert compile_layers(model, lambda: compiled_layers.gradients(model, loss)) is None
        assert not torch._dynamo.utils.counters["graph_break"]
    assert all(isinstance(layer.mlp, FusedMLP) for layer in load.layers(model))
    ours = gradients(model, label_logits(model, build(given), device), labels)
    # bf16 rounds; ours may be no further from float64 than stock's own bf16, give or take.
    assert worst(ours, truth) <= 1.5 * worst(expected, truth) + 0.01


def test_recorded_passes_give_the_gradients_of_plain_ones_for_any_trie():
    """What train.cuda_graphs records."""
    given, device = rows(), torch.device("cuda")
    graphs.own_stream(device)
    base = make(8, 2)
    assert self_check.check_paths(base, 2048) is None
    model = adapter.add_adapter(base, config.Lora(rank=8, alpha=16), seed=0)
    randomise(model)
    load.set_training(model)
    labels = np.arange(len(given)) % 3 == 0
    on_device = torch.from_numpy(labels).to(device)
    trie = build(given)
    plain = lambda trie, y: label_loss(label_logits(model, trie, device), y, ANSWERS)  # noqa: E731
    recorded, problem = graphs.record(model, device, ANSWERS, trie, labels, lambda: plain(trie, on_device))
    assert problem is None
    assert recorded is not None
    for count in (24, 21, 9, 24):  # one that is recorded already, one that fits into it, one that does not
        part, y = build(given[:count]), on_device[:count]
        model.zero_grad(set_to_none=False)
        first = recorded.backward(part, labels[:count], 0.5)
        second = recorded.backward(part, labels[:count], 0.5)
        found = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=False)
        loss = plain(part, y)
        loss.backward()
        expected = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}
        assert worst(found, expected) < 0.05
        for each in (first, second):
            assert each is not None
            torch.testing.assert_close(each, loss.detach() / 2, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_products_on_the_gpu_are_those_their_numbers_stand_for(compiled):
    device = torch.device("cuda")
    base = make(8, 2)
    base.precision = "fp8"
    model = adapter.add_adapter(base, config.Lora(rank=8, alpha=16), seed=0)
    layer = next(m for m in model.modules() if isinstance(m, precision.Fp8Linear))
    torch.manual_seed(0)
    x, grad = (torch.randn(100, n, device=device).bfloat16() for n in (layer.in_features, layer.out_features))
    low, up = (
        torch.randn(100, 8, device=device).bfloat16(),
        torch.randn(layer.out_features, 8, device=device).bfloat16(),
    )
    kind, parts = precision.frozen_parts(layer)
    y = precision.plus(kind, x, parts, None, low, up).double()
    spelt = lambda values, scale: values.double() * scale.double()  # noqa: E731
    exact = (
        spelt(*precision.quantise_rows(x)) @ spelt(layer.by_row, layer.row_scale.t()).t()
        + low.double() @ up.double().t()
    )
    assert (y - exact).norm() < 0.01 * exact.norm()
    nothing = torch.zeros(layer.in_features, 8, device=device).bfloat16()
    back = precision.plus_back(kind, [grad], [parts], low, nothing)
    exact = spelt(*precision.quantise_rows(grad)) @ spelt(layer.by_column, layer.column_scale.t()).t()
    assert (back.double() - exact).norm() < 0.01 * exact.norm()
    # and the whole model learns nearly what the bf16 one learns
    given = rows()
    labels = torch.arange(len(given), device=device) % 3 == 0
    plain_base = make(8, 2)
    plain = adapter.add_adapter(plain_base, config.Lora(rank=8, alpha=16), seed=0)
    found = []
    for each, of in ((model, base), (plain, plain_base)):
        self_check.use_paths(of.model)
        randomise(each)
        load.set_training(each)
        if compiled and each is model:
            trie = build(given)
            loss = lambda m=each, t=trie: label_loss(label_logits(m, t, device), labels, ANSWERS)  # noqa: E731
            found_by = lambda m=each, loss=loss: compiled_layers.gradients(m, loss)  # noqa: E731
            assert compile_layers(each, found_by, precision="fp8") is None
        found.append(gradients(each, label_logits(each, build(given), device), labels))
    everything = [torch.cat([g.flatten() for g in grads.values()]) for grads in found]
    assert (everything[0] - everything[1]).norm() < 0.3 * everything[1].norm()


SCORED_IN_FP8 = """
from test_gpu import build, compile_layers, label_logits, make, precision, rows, self_check, torch

base, trie = make(8, 2), build(rows())
self_check.use_paths(base.model)
precision.to_fp8(base.model, train=False)
with torch.inference_mode():
    print(compile_layers(base.model, lambda: label_logits(base.model, trie, base.device), "logits", precision="fp8"))
"""


def test_layers_compile_for_scoring_in_fp8_whether_or_not_an_earlier_process_has_compiled_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(Path(__file__).parent), *sys.path)))
    assert [printed(SCORED_IN_FP8, "cuda") for _ in range(2)] == [["None"], ["None"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_summed_and_kept_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(576, 10_000, bias=False, device="cuda", dtype=dtype).requires_grad_(False)
    exact = plain.weight.double()
    plain.__class__ = WideHead
    x = torch.randn(37, 576, device="cuda", dtype=dtype, requires_grad=True)
    found = plain(x)
    wanted = x.detach().double() @ exact.t()
    assert found.dtype == torch.float32
    assert float((found.detach() - wanted).abs().max()) < 1e-4
    labels = torch.arange(37, device="cuda")
    torch.nn.functional.cross_entropy(found, labels).backward()
    y = wanted.requires_grad_(True)
    torch.nn.functional.cross_entropy(y, labels).backward()
    assert x.grad is not None
    assert y.grad is not None
    grad = y.grad @ exact
    assert float((x.grad.double() - grad).norm() / grad.norm()) < 0.005
