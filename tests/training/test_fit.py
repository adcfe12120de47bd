"""The choice of micro-batches and recomputed layers fits, recomputes no more than it must, and follows settings."""

from dataclasses import replace

import numpy as np
import pytest

from veritune import config
from veritune.model.shape import Shape
from veritune.training import fit, memory
from veritune.training.fit import Mix, choose, room_of
from veritune.training.memory import GIB, Job
from veritune.training.speed import CARDS, card_of

LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False)
NF4 = Job("nf4", config.Lora(), "adamw_torch", compiled=True)
STEP = Mix(tokens=20_000, longest=900, reach=150, parts=0.006, rows=0.005)


@pytest.mark.parametrize("cap", [15, 24, 40, 80, 139])
def test_what_is_chosen_fits_and_more_memory_is_never_slower(cap: float) -> None:
    found = choose(LLAMA_8B, NF4, config.Train(), STEP, room_of(200 * GIB, cap), CARDS["h200"])
    assert found.fits
    assert found.peak.total < cap * GIB
    assert STEP.longest <= found.budget <= fit.MOST_TOKENS
    more = choose(LLAMA_8B, NF4, config.Train(), STEP, room_of(200 * GIB, 2 * cap), CARDS["h200"])
    assert more.seconds <= found.seconds


def test_free_memory_counts_where_it_is_less_than_the_cap() -> None:
    cap = config.Train(memory_gib=20).memory_gib
    assert room_of(10 * GIB, 40) == room_of(10 * GIB, None) < room_of(40 * GIB, cap) < 20 * GIB


def test_no_more_layers_are_computed_again_than_needed() -> None:
    settings = config.Train(micro_batch_tokens=16_384)
    room = room_of(200 * GIB, 40)
    found = choose(LLAMA_8B, NF4, settings, STEP, room)
    assert 0 < found.recomputed < LLAMA_8B.layers
    assert found.fits
    batch = fit._batch(STEP, found.budget)
    assert memory.peak(LLAMA_8B, NF4, batch, found.recomputed - 1).total > room


def test_settings_are_followed() -> None:
    room = room_of(200 * GIB, 24)
    off = choose(LLAMA_8B, NF4, config.Train(gradient_checkpointing="off"), STEP, room)
    on = choose(LLAMA_8B, NF4, config.Train(gradient_checkpointing="on"), STEP, room)
    assert (off.recomputed, on.recomputed) == (0, 32)
    assert on.budget > off.budget
    assert choose(LLAMA_8B, NF4, config.Train(micro_batch_tokens=3000), STEP, room).budget == 3000
    # A row is never cut.
    assert choose(LLAMA_8B, NF4, config.Train(micro_batch_tokens=100), STEP, room).budget == STEP.longest


def test_where_nothing_fits_the_least_is_taken_and_it_says_so() -> None:
    found = choose(LLAMA_8B, replace(NF4, precision="bf16"), config.Train(), STEP, room_of(200 * GIB, 15))
    assert not found.fits
    assert (found.budget, found.recomputed) == (STEP.longest, least(replace(NF4, precision="bf16")))


def test_falling_back_takes_less_each_time_until_nothing_does() -> None:
    now = choose(LLAMA_8B, NF4, config.Train(gradient_checkpointing="off"), STEP, room_of(200 * GIB, None))
    peaks = [now.peak.total]
    while (found := fit.cheaper(LLAMA_8B, NF4, config.Train(), STEP, now)) is not None:
        now = found
        peaks.append(now.peak.total)
        assert len(peaks) < 50
    assert peaks == sorted(set(peaks), reverse=True)
    assert (now.budget, now.recomputed) == (STEP.longest, least(NF4))


def least(job: Job) -> int:
    """Layers that are computed again where a row at a time takes the least memory: all, or all but the last, whose MLP
    runs on label rows alone and which then keeps less than its input and that of another layer's second pass."""
    row = memory.Batch(STEP.longest, STEP.reach, int(STEP.parts * STEP.longest) + 1, int(STEP.rows * STEP.longest) + 1)
    found = min(range(33), key=lambda recomputed: memory.peak(LLAMA_8B, job, row, recomputed).total)
    assert found >= 31
    return found


def test_a_steps_sizes_are_those_of_its_tries() -> None:
    rng = np.random.default_rng(0)
    question = rng.integers(0, 99, 50, dtype=np.int32)
    rows = [np.concatenate((question, rng.integers(0, 99, 50, dtype=np.int32))) for _ in range(20)]
    found = fit.mix([rows])
    assert (found.tokens, found.longest) == (1050, 100)
    assert found.reach == pytest.approx((50 * 25.5 + 20 * 50 * 75.5) / 1050)
    # All 17 blocks of 64 tokens see the question's, 8 of them a part.
    assert (found.parts, found.rows) == (3 / 1050, 20 / 1050)
    assert fit.mix([rows], shared=False).tokens == 2000


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_driver_names_its_card(name: str, key: str | None) -> None:
    assert card_of(name) == (CARDS[key] if key else None)
