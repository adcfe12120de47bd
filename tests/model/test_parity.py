"""A trie batch has the loss and the adapter gradients that stock transformers and PEFT give row by row.

Stock: a fresh model with the same weights, transformers' own attention, PEFT's own layers, each row alone.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tiny_models import FAMILIES, PHI3_TARGETS, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from veritune import config
from veritune.data.generate import generate
from veritune.model import adapter, load, self_check
from veritune.model.lora import FastLinear, FastLinear4bit
from veritune.model.verdict import label_logits, label_loss, p_correct, rowwise_logits
from veritune.tokens.encode import encoder
from veritune.tokens.prompt import render
from veritune.tokens.trie import build

ANSWERS = (7, 11)
LONGEST = 256  # what the tiny models' prompt.max_length would be
Rows = list[np.ndarray]
Grads = dict[str, Tensor]


def row(*parts: tuple[int, int]) -> np.ndarray:
    """A row of random parts (seed, length): equal parts have equal ids."""
    return np.concatenate([np.random.default_rng(s).integers(3, 300, n, dtype=np.int32) for s, n in parts])


HEAD, ONE, TWO = (1, 30), (2, 20), (3, 26)
BATCHES: dict[str, Rows] = {
    "one level: rows that share nothing": [row((n, 20 + n)) for n in range(10, 14)],
    "two levels: an instruction": [row(HEAD, (n, 5 + n)) for n in range(10, 15)],
    "three levels: instruction, questions": [row(HEAD, ask, (n, 4 + n)) for ask in (ONE, TWO) for n in range(10, 13)],
    "one row": [row(HEAD, ONE, (10, 17))],
    "one question": [row(HEAD, ONE, (n, 3 * n)) for n in range(10, 16)],
    "identical rows": [row(HEAD, TWO, (10, 9))] * 4,
    "rows that others go on from": [
        row(HEAD),
        row(HEAD, ONE),
        row(HEAD, ONE, (9, 12)),
        row(HEAD, ONE, (9, 12), (8, 2)),
    ],
    "the longest row beside short ones": [row(HEAD, ONE, (10, LONGEST - 50)), row(HEAD, ONE, (11, 1)), row((12, 1))],
}


def labels_of(rows: Rows) -> Tensor:
    return torch.arange(len(rows)) % 3 != 1


def settings_of(family: str, rank: int = 8) -> config.Lora:
    if family == "phi3":
        return config.Lora(rank=rank, targets=PHI3_TARGETS)
    return config.Lora(rank=rank)


def random_adapter(model: Any, seed: int = 5) -> None:
    """Random A and B: with a fresh adapter's B = 0, A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = (torch.randn(value.shape, generator=generator) * 0.05).to(value)


def ours_of(base_model: Any, family: str, *, precision: str = "fp32", recomputed: int = 0) -> Any:
    base = load.Base(base_model, None, torch.device("cpu"), precision, family)
    assert self_check.check_paths(base, LONGEST) is None
    model = adapter.add_adapter(base, settings_of(family), seed=1)
    random_adapter(model)
    load.set_training(model, recomputed=recomputed)
    return model


def stock_of(base_model: Any, ours: Any) -> Any:
    """PEFT as it comes on a stock model, with the adapter of `ours`."""
    described: LoraConfig = copy.deepcopy(ours.peft_config["default"])
    model = get_peft_model(base_model, described)
    set_peft_model_state_dict(model, {name: value.clone() for name, value in adapter.weights(ours).items()})
    model.eval()
    assert not any(isinstance(module, FastLinear | FastLinear4bit) for module in model.modules())
    return model


def gradients(model: Any) -> Grads:
    """Adapter gradients under PEFT's names; and the model is left without."""
    found = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            assert value.grad is not None, name
            found[name] = value.grad.double()
            value.grad = None
    return found


def of_trie(model: Any, rows: Rows, labels: Tensor, answers: tuple[int, int] = ANSWERS) -> tuple[float, Grads]:
    loss = label_loss(label_logits(model, build(rows), torch.device("cpu")), labels, answers)
    loss.backward()
    return float(loss.detach()), gradients(model)


def row_by_row(
    model: Any, rows: Rows, labels: Tensor, answers: tuple[int, int] = ANSWERS, read: Callable[[int], Any] = lambda n: 1
) -> tuple[float, Grads]:
    """What anyone would write. `read`: which positions of a row of n tokens the head reads; the last is the label's."""
    total = 0.0
    for ids, label in zip(rows, labels.tolist(), strict=True):
        out = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], logits_to_keep=read(len(ids)))
        loss = F.cross_entropy(out.logits[0, -1:].float(), torch.tensor([answers[0] if label else answers[1]]))
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def distances(ours: Grads, stock: Grads) -> dict[str, float]:
    """Per tensor, the norm of the difference to the norm of the stock gradient."""
    assert ours.keys() == stock.keys()
    assert len(ours) > 0
    assert all(value.norm() > 0 for value in stock.values())
    return {name: float((ours[name] - stock[name]).norm() / stock[name].norm()) for name in stock}


def assert_equal(ours: tuple[float, Grads], stock: tuple[float, Grads], tolerance: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(stock[0], rel=tolerance)
    off = distances(ours[1], stock[1])
    worst = max(off, key=off.__getitem__)
    assert off[worst] <= tolerance, worst


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model of each family along paths, and its stock twin."""
    ours = ours_of(tiny(request.param), request.param)
    stock = tiny(request.param)
    assert stock.config._attn_implementation == "sdpa"
    return ours, stock_of(stock, ours)


@pytest.mark.parametrize("batch", list(BATCHES))
def test_trie_equals_row_by_row(pair: tuple[Any, Any], batch: str) -> None:
    ours, stock = pair
    rows = BATCHES[batch]
    assert_equal(of_trie(ours, rows, labels_of(rows)), row_by_row(stock, rows, labels_of(rows)))


def test_stock_eager_attention_agrees_too() -> None:
    ours = ours_of(tiny("llama"), "llama")
    stock = tiny("llama")
    stock.set_attn_implementation("eager")
    rows = BATCHES["three levels: instruction, questions"]
    assert_equal(of_trie(ours, rows, labels_of(rows)), row_by_row(stock_of(stock, ours), rows, labels_of(rows)))


def test_the_comparison_would_find_a_wrong_key() -> None:
    """Rows that wrongly read a token of their neighbour, or stand one position off, are far beyond the tolerance."""
    ours = ours_of(tiny("llama"), "llama")
    rows = BATCHES["two levels: an instruction"]
    right = of_trie(ours, rows, labels_of(rows))
    trie = build(rows)
    wrong_key, wrong_place = copy.deepcopy(trie), copy.deepcopy(trie)
    wrong_key.until[np.flatnonzero(np.diff(trie.until))[-1]] = trie.tokens  # the last token before the last row's own
    wrong_place.positions[-1] += 1
    for wrong in (wrong_key, wrong_place):
        loss = label_loss(label_logits(ours, wrong, torch.device("cpu")), labels_of(rows), ANSWERS)
        loss.backward()
        assert max(distances(gradients(ours), right[1]).values()) > 1e-3


def test_splitting_a_batch_changes_nothing() -> None:
    """Micro-batches sum their gradients; where a batch is cut must not matter."""
    ours = ours_of(tiny("llama"), "llama")
    rows = BATCHES["three levels: instruction, questions"]
    labels = labels_of(rows)
    whole = of_trie(ours, rows, labels)
    total = 0.0
    for part in ([4, 0], [2, 5, 1], [3]):
        loss = label_loss(
            label_logits(ours, build([rows[i] for i in part]), torch.device("cpu")), labels[part], ANSWERS
        )
        loss.backward()
        total += float(loss.detach())
    assert_equal((total, gradients(ours)), whole)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(family: str) -> None:
    rows = BATCHES["three levels: instruction, questions"]
    results, calls = [], []
    for recomputed in (0, 1, 2):
        model = ours_of(tiny(family, num_hidden_layers=2), family, recomputed=recomputed)
        seen = [0, 0]
        for number, layer in enumerate(load.layers(model)):

            def count(*_: Any, seen: list[int] = seen, number: int = number) -> None:
                seen[number] += 1

            layer.input_layernorm.register_forward_hook(count)
        results.append(of_trie(model, rows, labels_of(rows)))
        calls.append(seen)
    assert calls == [[1, 1], [2, 1], [2, 2]]
    for again in results[1:]:
        assert_equal(again, results[0], tolerance=1e-7)


def test_dropout_belongs_to_the_adapter_in_training_only() -> None:
    base = load.Base(tiny("llama", attention_dropout=0.5), None, torch.device("cpu"), "fp32", "llama")
    assert self_check.check_paths(base, LONGEST) is None
    model = adapter.add_adapter(base, config.Lora(rank=8, dropout=0.5), seed=1)
    random_adapter(model)
    rows = BATCHES["two levels: an instruction"]

    def read(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return label_logits(model, build(rows), torch.device("cpu"))

    load.set_training(model)
    assert torch.equal(read(1), read(1))
    assert not torch.allclose(read(1), read(2))
    model.eval()
    assert torch.equal(read(1), read(2))


def test_layers_that_are_computed_again_drop_nothing_of_the_base() -> None:
    opt = tiny("opt", ffn_dim=128, word_embed_proj_dim=64, dropout=0.5, attention_dropout=0.5)
    base = load.Base(opt, None, torch.device("cpu"), "fp32", "opt")
    model = adapter.add_adapter(base, config.Lora(rank=8, targets=("q_proj", "v_proj")), seed=1)
    random_adapter(model)
    found = []
    for recomputed in (0, 1, 2):
        load.set_training(model, recomputed=recomputed)
        loss = model(input_ids=torch.arange(30)[None]).logits.logsumexp(-1).sum()
        loss.backward()
        found.append((float(loss.detach()), gradients(model)))
    for again in found[1:]:
        assert_equal(again, found[0], tolerance=1e-7)
    adapter.remove(base)  # for the next trial of a sweep, whose self-check would meet it
    assert not any(module.training for module in opt.modules())


def test_bf16_is_as_exact_as_stock_bf16() -> None:
    """Both round; ours is no further from the float32 result than stock transformers and PEFT are."""
    rows = BATCHES["three levels: instruction, questions"]
    labels = labels_of(rows)
    off: dict[str, list[float]] = {"ours": [], "stock": []}
    for seed in range(3):
        base, twin, exact = (tiny("llama", seed=seed) for _ in range(3))
        for each in (base, twin):
            each.to(torch.bfloat16)
        exact.load_state_dict({name: value.float() for name, value in base.state_dict().items()})
        ours = ours_of(base, "llama", precision="bf16")
        truth = row_by_row(stock_of(exact, ours), rows, labels)
        rounded = {"ours": of_trie(ours, rows, labels), "stock": row_by_row(stock_of(twin, ours), rows, labels)}
        for name, (loss, grads) in rounded.items():
            assert loss == pytest.approx(truth[0], rel=0.01)
            off[name] += distances(grads, truth[1]).values()
    assert max(off["ours"]) < 0.06
    assert np.mean(off["ours"]) <= 1.3 * np.mean(off["stock"])


@pytest.fixture
def nf4(tiny_folder: Path) -> load.Base:
    return load.load_base(config.Model(path=str(tiny_folder), base="nf4", device="cpu"))


def test_nf4_has_the_gradients_of_its_dequantised_weights(nf4: load.Base, tiny_folder: Path) -> None:
    """After passes without gradients too (the check at load, a validation): bitsandbytes would then repack the weights
    for a kernel without a backward pass, and the gradients of all layers below were off by 90 %."""
    exact = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval().requires_grad_(False)
    exact.load_state_dict(
        {
            **{name: value.float() for name, value in nf4.model.state_dict().items() if name in exact.state_dict()},
            **{
                f"{name}.weight": dequantize_4bit(it.weight.data, it.quant_state).float()
                for name, it in nf4.model.named_modules()
                if isinstance(it, Linear4bit)
            },
        }
    )
    assert self_check.check_paths(nf4, LONGEST) is None
    model = adapter.add_adapter(nf4, config.Lora(rank=8), seed=1)
    random_adapter(model)
    load.set_training(model)
    rows = BATCHES["three levels: instruction, questions"]
    labels = labels_of(rows)
    with torch.inference_mode():
        label_logits(model, build(rows), nf4.device)
    loss, grads = of_trie(model, rows, labels)
    truth, expected = row_by_row(stock_of(exact, model), rows, labels)
    assert loss == pytest.approx(truth, rel=0.01)
    assert max(distances(grads, expected).values()) < 0.06


def test_nf4_trains_and_shares_rows(nf4: load.Base) -> None:
    assert type(nf4.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert self_check.check_paths(nf4, LONGEST) is None
    model = adapter.add_adapter(nf4, config.Lora(rank=8), seed=1)
    random_adapter(model)
    load.set_training(model)
    rows = BATCHES["three levels: instruction, questions"]
    labels = labels_of(rows)
    with torch.no_grad():
        shared = p_correct(label_logits(model, build(rows), nf4.device), ANSWERS)
        nf4.model.set_attn_implementation("sdpa")
        alone = p_correct(rowwise_logits(model, rows, nf4.device), ANSWERS)
        self_check.use_paths(nf4.model)
    assert shared.tolist() == pytest.approx(alone.tolist(), abs=0.03)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(12):
        loss = label_loss(label_logits(model, build(rows), nf4.device), labels, ANSWERS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture(scope="module")
def smollm2_case(smollm2_base: load.Base) -> tuple[Any, Rows, Tensor, tuple[int, int], Any, Any]:
    """SmolLM2 with a stock twin that has the same tensors, and two questions with two solutions each."""
    base = dataclasses.replace(smollm2_base, model=copy.deepcopy(smollm2_base.model))
    twin = copy.deepcopy(base.model)
    prompt = config.Prompt(template="plain", instruction="Check it. Say {true} or {false}.", max_length=512)
    frame = render(prompt, base.tokenizer)
    made = generate(2, solutions_per_question=2, seed=3)
    rows, _ = encoder(frame, base.tokenizer).rows([it["question"] for it in made], [it["solution"] for it in made])
    assert self_check.check_paths(base, 512) is None
    ours = adapter.add_adapter(base, config.Lora(rank=4), seed=1)
    generator = torch.Generator().manual_seed(5)
    for name, value in ours.named_parameters():
        if "lora_" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.02
    load.set_training(ours)
    labels = torch.tensor([bool(it["is_correct"]) for it in made])
    return base, rows, labels, frame.answer_ids, ours, stock_of(twin, ours)


def test_smollm2_float32(smollm2_case: Any) -> None:
    """Against stock with eager attention, whose rounding is the nearest to ours, and whose readout reads four positions
    as the trie's four rows do. Rounding is all there is between them: measured against float64, ours is off by 1.9e-5
    at most, eager by 1.9e-5, sdpa by 3.4e-5; and by 4.9e-4 with one position, where this CPU's kernels take the sum
    over 49,152 words in the backward pass in one go."""
    _, rows, labels, answers, ours, stock = smollm2_case
    trie = build(rows)
    assert np.count_nonzero(np.diff(trie.until)) + 1 == 1 + 2 + 4  # three levels of segments
    stock.set_attn_implementation("eager")
    expected = row_by_row(stock, rows, labels, answers, read=lambda n: 4)
    assert_equal(of_trie(ours, rows, labels, answers), expected)


@pytest.mark.slow
def test_smollm2_float64(smollm2_case: Any) -> None:
    """Held to what transformers itself computes in float32 whatever the weights are: rotary angles, and the logits
    that the loss reads."""
    _, rows, labels, answers, ours, stock = smollm2_case
    stock.set_attn_implementation("sdpa")
    ours.double()
    stock.double()
    expected = row_by_row(stock, rows, labels, answers)
    assert_equal(of_trie(ours, rows, labels, answers), expected, tolerance=2e-6)
