"""Expected time of a training step, from a model's shape, the settings and a card's data sheet.

    seconds = the larger of  products / rate + elementwise traffic / bandwidth + frozen weights read / bandwidth
                       and   what Python takes to start a layer's kernels

All constants stand in the tables below. Those of compiled layers were fitted to steps of the 8B shape on H100s and
H200s (docs/memory.md); the others are estimates.
"""

from dataclasses import dataclass

from ..model.shape import Shape
from .memory import ELEMENT, WEIGHT, Batch, Job, kept_bytes


@dataclass(frozen=True)
class Card:
    """A GPU: its memory as torch sees it, GiB; dense bf16 products, TFLOP/s; memory traffic, TB/s."""

    gib: float
    rate: float
    bandwidth: float
    fp8: bool = True
    """Whether it has FP8 products."""


CARDS = {
    "h200": Card(139.8, 989, 4.8),
    "h100": Card(79.1, 989, 3.35),
    "a100": Card(79.2, 312, 2.0, fp8=False),
    "a100-40gb": Card(39.4, 312, 1.55, fp8=False),
    "l40s": Card(44.4, 362, 0.86),
    "a10": Card(22.1, 125, 0.6, fp8=False),
    "l4": Card(22.0, 121, 0.3),
    "5090": Card(31.3, 209, 1.79),
    "4090": Card(23.5, 165, 1.01),
    "3090": Card(23.6, 71, 0.94, fp8=False),
    "t4": Card(14.6, 65, 0.32, fp8=False),  # of float16; it has no bf16 products
}
"""Cards by a part of the name that the driver gives them; rates and traffic from their makers' data sheets."""

SHARE = {"plain": 0.65, "compiled": 0.66}
"""Of a card's bf16 rate that a layer's products reach."""
SMALL = 1000
"""Tokens that every micro-batch takes as long as beside its own: products of few rows reach less of that rate."""
GAIN = {"fp32": 0.125, "bf16": 1.0, "nf4": 1.0, "fp8": 1.42}
"""Products in a precision, as a multiple of the bf16 rate."""
PASSES = {"plain": 6.0, "compiled": 4.4}
"""How often what autograd keeps of a layer crosses the memory bus in a forward and a backward pass."""
START = {"plain": 6e-3, "compiled": 1.4e-3}
"""Seconds for one layer's kernels, forward and backward, however little they do: started by Python, or recorded, as
those of a compiled model are that is small enough to show this (SmolLM2-135M: 8 ms on an H200, 1.4 ms on an H100)."""


def card_of(name: str) -> Card | None:
    """The card with a driver's name, such as "NVIDIA H200"."""
    lowered = name.lower()
    if "a100" in lowered and "40gb" in lowered:
        return CARDS["a100-40gb"]
    words = lowered.replace("-", " ").split()
    return next((card for key, card in CARDS.items() if key in words), None)


def seconds(shape: Shape, job: Job, batch: Batch, recomputed: int, card: Card) -> float:
    """Seconds of one micro-batch, forward and backward."""
    again = recomputed / shape.layers
    tokens = batch.tokens + SMALL
    # A forward pass, the input's gradient, and the part computed again; the adapter has its own gradients too.
    products = tokens * (
        2 * shape.inside * (2 + again) + 2 * shape.trained(job.lora.targets, job.lora.rank) * (3 + again)
    )
    products += tokens * 4 * shape.layers * shape.queries * batch.reach * (3.5 + again)
    rate = card.rate * 1e12 * SHARE[job.mode] * GAIN[job.precision]
    layer = kept_bytes(shape, job, tokens)
    traffic = shape.layers * layer * PASSES[job.mode] * (1 + again / 2)
    # NF4 is read, unpacked to bf16, and read again, at every product.
    weights = (WEIGHT[job.precision] + (2 * ELEMENT["nf4"] if job.precision == "nf4" else 0)) * shape.inside
    traffic += weights * (2 + again)
    on_card = products / rate + traffic / (card.bandwidth * 1e12)
    return max(on_card, shape.layers * START[job.mode] * (1 + again / 2))
