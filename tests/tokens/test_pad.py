"""Padding to one size: the rows' results stay, and nothing that is added sees or is seen by a row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny

from veritune.model.self_check import use_paths
from veritune.model.verdict import label_logits
from veritune.tokens.pad import Size, pad
from veritune.tokens.trie import Trie, build


def made(seed: int, rows: int) -> Trie:
    rng = np.random.default_rng(seed)
    head, questions = rng.integers(0, 90, 20), [rng.integers(0, 90, rng.integers(9, 40)) for _ in range(3)]
    parts = [(head, questions[rng.integers(3)], rng.integers(0, 90, rng.integers(1, 120))) for _ in range(rows)]
    return build([np.concatenate(p).astype(np.int32) for p in parts])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_a_roomy_size_holds_its_trie_and_padding_is_by_itself(seed, rows):
    trie = made(seed, rows)
    size = Size.of(trie).roomy()
    if not size.holds(Size.of(trie)):
        assert trie.tokens < 700  # a few tokens cannot be padded within 15 %
        return
    padded = pad(trie, size)
    assert Size.of(padded) == size
    added = np.arange(trie.tokens, size.tokens)
    assert (padded.until[: trie.tokens] == trie.until).all()
    assert padded.until.max() == size.tokens
    assert ((padded.until[added] > added) & (padded.until[added] <= added + 64)).all()


def test_tries_alike_share_a_size():
    sizes = [Size.of(made(seed, 30)) for seed in range(8)]
    biggest = max(sizes).roomy()
    assert sum(biggest.holds(size) for size in sizes) >= 3


@pytest.mark.parametrize("rows", [6, 30])
def test_padding_changes_no_logits_and_no_gradients(rows):
    model, device = tiny("llama"), torch.device("cpu")
    use_paths(model)
    trie = made(1, rows)
    padded = pad(trie, Size.of(trie).roomy())
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    found = []
    for given_trie in (trie, padded):
        logits = label_logits(model, given_trie, device)[:rows]
        logits.square().sum().backward()
        found.append((logits.detach(), weight.grad.clone()))
        weight.grad = None
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)
