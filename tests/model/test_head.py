"""Logits are summed and kept in float32 whatever the base is held in; scores do not come in steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_adapters import loaded
from torch import nn

from veritune import config
from veritune.model import adapter, load, self_check
from veritune.model.head import BLOCK, WideHead, widen
from veritune.model.verdict import label_logits, label_loss
from veritune.tokens.prompt import render
from veritune.tokens.trie import build
from veritune.training.checkpoint import publish


def heads(dtype: torch.dtype, *, bias: bool = False) -> tuple[WideHead, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(64, BLOCK + 100, bias=bias, dtype=dtype).requires_grad_(False)
    plain.weight.mul_(8)
    head = nn.Linear(64, BLOCK + 100, bias=bias, dtype=dtype).requires_grad_(False)
    head.load_state_dict(plain.state_dict())
    head.__class__ = WideHead
    return head, plain  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_float64(dtype: torch.dtype, bias: bool) -> None:
    head, plain = heads(dtype, bias=bias)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    exact = plain.double()(x.detach().double())
    found = head(x).detach()
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    assert float((found - exact).abs().max()) < 1e-4
    assert float((exact.to(dtype) - exact).abs().max()) > 1e-3  # what it is to be better than


def test_gradients_are_those_of_the_plain_layer() -> None:
    head, plain = heads(torch.bfloat16)
    found = []
    for each in (head, plain.double()):
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).bfloat16().to(each.weight.dtype)
        x.requires_grad_(True)
        torch.nn.functional.cross_entropy(each(x).double(), torch.arange(7), reduction="sum").backward()
        assert x.grad is not None
        found.append(x.grad.double())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.005


def test_a_head_that_is_trained_keeps_its_gradient() -> None:
    head, _ = heads(torch.bfloat16)
    head.requires_grad_(True)
    head(torch.randn(3, 64).bfloat16()).sum().backward()
    assert head.weight.grad is not None


def test_a_head_in_float32_stays_as_it_is(tiny_folder: Path) -> None:
    base = load.load_base(config.Model(path=str(tiny_folder), base="fp32", device="cpu"))
    widen(base.model)
    assert type(base.model.lm_head) is nn.Linear


@pytest.mark.parametrize("precision", ["bf16", "nf4", "fp8"])
def test_the_logits_of_a_verifier_are_no_bf16_numbers(folder: Path, precision: str) -> None:
    verifier = loaded(folder, precision=precision)
    ids, _ = verifier.encoder.rows(["What is 2 + 3?"] * 2, ["2 + 3 = 5", "2 + 3 = 6"])
    with torch.no_grad():
        logits = label_logits(verifier.model, build(ids), verifier.device)
    assert logits.dtype == torch.float32
    assert float((logits == logits.bfloat16().float()).float().mean()) < 0.1


def test_an_adapter_on_the_head_still_trains_and_saves(tiny_folder: Path, tmp_path: Path) -> None:
    """PEFT wraps the head; its own forward adds the update to the float32 results."""
    base = load.load_base(config.Model(path=str(tiny_folder), base="bf16", device="cpu"))
    assert self_check.check_paths(base, 256) is None
    model = adapter.add_adapter(base, config.Lora(rank=4, targets=("q_proj", "lm_head")), seed=0)
    rows = [np.arange(3, 30 + i, dtype=np.int32) for i in range(3)]
    logits = label_logits(model, build(rows), base.device)
    label_loss(logits, torch.tensor([True, False, True]), (7, 11)).backward()
    (b,) = (p for name, p in model.named_parameters() if "lm_head.lora_B" in name)
    assert b.grad is not None
    assert float(b.grad.norm()) > 0
    assert logits.dtype == torch.float32
    assert float((logits == logits.bfloat16().float()).float().mean()) < 0.1
    with torch.no_grad():
        b.normal_(std=0.1)
        changed = label_logits(model, build(rows), base.device)
    frame = render(config.Prompt(max_length=256), base.tokenizer)
    publish(tmp_path / "a", adapter.files(model, adapter.About(frame, str(tiny_folder), "bf16", "", 0.5), "# Card"))
    again = load.load_base(config.Model(path=str(tiny_folder), base="bf16", device="cpu"))
    assert self_check.check_paths(again, 256) is None
    with torch.no_grad():
        found = label_logits(adapter.load_adapter(again, tmp_path / "a"), build(rows), again.device)
    assert torch.equal(found, changed)
    assert float((changed - logits).abs().max()) > 0.1


def test_every_solution_of_real_weights_has_its_own_score(smollm2: Path) -> None:
    """SmolLM2 in bf16 as `load_base` gives it: of rows that differ in one number no two tie."""
    base = load.load_base(config.Model(path=str(smollm2), base="bf16", device="cpu"))
    assert self_check.check_paths(base, 512) is None
    text = "A box holds 12 eggs. How many do 7 boxes hold? Seven boxes hold "
    rows = [np.asarray(base.tokenizer(f"{text}{n}")["input_ids"], dtype=np.int32) for n in range(40, 104)]
    true, false = (base.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("True", "False"))
    with torch.no_grad():
        logits = label_logits(base.model, build(rows), base.device)
    differences = (logits[:, true] - logits[:, false]).unique()
    assert len(differences) == len(rows)
