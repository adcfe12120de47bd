"""On a CUDA GPU: the flash path, compiled and not, against stock transformers + PEFT row by row, in bf16."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from veritune import config
from veritune.model import adapter, load
from veritune.model.compiled import compile_layers
from veritune.model.verdict import label_logits, label_loss, rowwise_logits
from veritune.tokens.trie import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
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
def test_flash_paths_and_compiled_layers_learn_what_stock_learns(heads, key_heads, compiled):
    given, device = rows(), torch.device("cuda")
    labels = torch.arange(len(given), device=device) % 3 == 0
    stock_base = make(heads, key_heads)
    stock = get_peft_model(stock_base.model, LoraConfig(r=8, lora_alpha=16, target_modules=list(config.Lora().targets)))
    randomise(stock)
    expected = gradients(stock, rowwise_logits(stock, given, device), labels)
    exact = stock.double()
    truth = gradients(exact, rowwise_logits(exact, given, device), labels)

    base = make(heads, key_heads)
    assert load.check_paths(base, 2048) is None
    model = adapter.add_adapter(base, config.Lora(rank=8, alpha=16), seed=0)
    randomise(model)
    load.set_training(model, checkpointing=False)
    if compiled:
        trie = build(given)
        assert compile_layers(model, lambda: label_loss(label_logits(model, trie, device), labels, ANSWERS)) is None
    ours = gradients(model, label_logits(model, build(given), device), labels)
    # bf16 rounds; ours may be no further from float64 than stock's own bf16, give or take.
    assert worst(ours, truth) <= 1.5 * worst(expected, truth) + 0.01
