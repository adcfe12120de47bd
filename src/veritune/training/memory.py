"""Peak GPU memory of a training step, from a model's shape and the settings, before anything is loaded.

    peak = weights + adapter (parameters, gradients, optimiser state) + what autograd keeps of every layer
         + the most that one moment of the backward pass needs beside that + what the CUDA libraries take

What autograd keeps was read off the layers (`tests/training/test_memory.py` traces real ones and compares); what the
libraries take was measured. All constants stand in the tables below; `benchmarks/memory_grid.py` compares them with a
GPU. Sizes in bytes.
"""

from dataclasses import dataclass

from .. import config
from ..model.shape import MOST_RANK, Shape
from ..tokens.blocks import BLOCK, blocks_of
from ..tokens.trie import Trie

MIB, GIB = 2**20, 2**30
LIBRARIES = 80 * MIB
"""Workspaces of cuBLAS, of the forward and of the backward thread."""

CONTEXT = 0.6 * GIB
"""What CUDA itself takes of a GPU, beside what torch allocates."""
SLACK = 0.03
"""What the allocator holds beside what is used, as a part of it."""

WEIGHT = {"fp32": 4.0, "bf16": 2.0, "nf4": 4.627 / 8, "fp8": 2.0}
"""Bytes of one weight in a decoder layer's products. nf4: 4 bits; scales of 8 bits for 64 weights, which share one of
32 bits for 256 (Dettmers et al. 2023, section 3), and the same scales unpacked to 32 bits. fp8: one byte for each
orientation."""
ELEMENT = {"fp32": 4, "bf16": 2, "nf4": 2, "fp8": 2}
"""Bytes of one activation."""
STATE = {"adamw_torch": 8.0, "adamw_8bit": 2.03, "paged_adamw_32bit": 8.0, "lion_8bit": 1.02}
"""Bytes of optimiser state for one trained parameter; 8-bit states have a float32 scale for 256."""


@dataclass(frozen=True)
class Widths:
    """Elements for each token of one layer, in units of the model's widths."""

    hidden: float = 0
    """x hidden size, in the activations' type."""
    wide: float = 0
    """x hidden size, in float32."""
    query: float = 0
    """x heads x head size."""
    key: float = 0
    """x key heads x head size."""
    inner: float = 0
    """x the width inside the MLP."""
    low: float = 0
    """x the sum of the ranks of a layer's adapters."""
    sums: float = 0
    """x (heads + 2), in float32: the softmax's sums, and one of each norm."""


KEPT = {
    # Norm inputs in float32 (2 wide) and outputs (2 hidden); queries, attention's outputs; keys, values; gate,
    # silu(gate), up and their product.
    "plain": Widths(hidden=2, wide=2, query=2, key=2, inner=4, low=1, sums=1),
    # The last two are computed again.
    "fused": Widths(hidden=2, wide=2, query=2, key=2, inner=2, low=1, sums=1),
    # Norm inputs as they come; their outputs and silu(gate) * up are computed again.
    **dict.fromkeys(("compiled", "compiled, fused"), Widths(hidden=2, query=2, key=2, inner=2, low=1, sums=1)),
}
"""What autograd keeps of one layer."""

FIRST = {"plain": Widths(wide=1), "compiled": Widths(hidden=1)}
"""What the first layer does not keep of that, since its input has no gradient: the first norm's input."""

MLP = {
    "plain": Widths(hidden=1, inner=2), "fused": Widths(hidden=2, inner=3), "compiled": Widths(hidden=2, inner=4),
    "compiled, fused": Widths(hidden=2, inner=3),
}  # fmt: skip
"""What lives beside that while the last product of a layer's MLP goes back: gradients, and what is computed again."""

FINAL_NORM = Widths(wide=6)
"""The same for the norm after the last layer, its input included, which is never compiled. A narrow last layer leaves
it the label rows; but that layer's own first norm, which all tokens go through, takes as much."""

LAST = Widths(hidden=1, wide=1, query=2, key=2, low=1, sums=1)
"""What autograd keeps of a narrow last layer, which is never compiled either: its attention's part."""

ATTENTION = Widths(hidden=1, query=2)
"""The same for attention, less that of keys: the gradients of its output and of the queries."""


@dataclass(frozen=True)
class Job:
    """What decides memory besides the model and the micro-batch."""

    precision: str  # fp32 | bf16 | nf4 | fp8
    lora: config.Lora
    optimizer: str
    compiled: bool

    @property
    def mode(self) -> str:
        """How layers are computed, as the tables of `speed` call it."""
        return "compiled" if self.compiled else "plain"


@dataclass(frozen=True)
class Batch:
    """The size of a micro-batch."""

    tokens: int
    reach: float
    """Tokens that a token sees, on average."""
    parts: int
    """See `tokens.blocks.Blocks`."""
    rows: int

    @staticmethod
    def of(trie: Trie) -> "Batch":
        return Batch(trie.tokens, float(trie.positions.mean()) + 1, blocks_of(trie.until).parts, len(trie.ends))


@dataclass(frozen=True)
class Peak:
    """Bytes at the highest moment of a step, by what they are for."""

    weights: float
    adapter: float
    kept: float
    working: float
    libraries: float = LIBRARIES

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.kept + self.working + self.libraries


def peak(shape: Shape, job: Job, batch: Batch, recomputed: int) -> Peak:
    """The highest moment of a step in which the first `recomputed` layers compute their activations again.

    Recomputing the first ones is best: the backward pass begins at the last, and what those kept is free again when the
    first of the others is computed.
    """
    element, mode = ELEMENT[job.precision], _mode(shape, job)
    trained = shape.trained(job.lora.targets, job.lora.rank)

    def size(widths: Widths) -> float:
        return _size(shape, job, batch.tokens, widths)

    copies = (element if element < 4 else 0) * trained / shape.layers  # of A and B, which products use
    kept = kept_bytes(shape, job, batch.tokens) + copies
    mlp = Widths(hidden=KEPT[mode].hidden / 2, wide=KEPT[mode].wide / 2, inner=KEPT[mode].inner)
    attention = size(ATTENTION) - size(mlp) + _keys(shape, batch, element)
    backward = max(size(MLP[mode]), attention)
    readout = batch.rows * shape.vocabulary * 3 * 4
    whole = shape.layers - recomputed
    # The inputs of recomputed layers; a narrow last one needs less than those before it, so its own is free by then.
    boundaries = (recomputed - (shape.narrow and not whole)) * batch.tokens * element * shape.hidden
    first = size(FIRST[job.mode]) if not recomputed else 0
    # The top of the backward pass; the last layer that kept all; one that was computed again.
    if shape.narrow and whole:
        whole -= 1
        below = whole * kept + copies
        moments = [
            (below + size(LAST) - first, max(readout, size(ATTENTION) + _keys(shape, batch, element))),
            (below - first, size(FINAL_NORM) + size(Widths(hidden=1))),
        ]
    else:
        moments = [(whole * kept - first, max(0 if shape.narrow else size(FINAL_NORM), readout))]
    moments.append((max(whole, 1) * kept - first, backward))
    of_layers, working = max(moments, key=sum)
    if job.precision == "nf4":
        working += 2 * shape.largest
    rotary = 2 * batch.tokens * element * shape.head_dim
    indices = 24 * batch.tokens
    return Peak(
        weights=WEIGHT[job.precision] * shape.inside + element * shape.outside,
        adapter=trained * (4 + 4 + STATE[job.optimizer]),  # parameters and gradients are float32
        kept=boundaries + of_layers + rotary + indices,
        working=working,
    )


def kept_bytes(shape: Shape, job: Job, tokens: int) -> float:
    """What autograd keeps of one layer."""
    return _size(shape, job, tokens, KEPT[_mode(shape, job)])


def _mode(shape: Shape, job: Job) -> str:
    """The tables' key for how layers are computed; "fused": their MLP is a `swiglu.FusedMLP`."""
    adapted, lora = {"gate_proj", "up_proj", "down_proj"} <= set(job.lora.targets), job.lora
    fused = shape.narrow and adapted and lora.rank <= MOST_RANK and not lora.dropout and job.precision != "fp32"
    return {"plain": "fused", "compiled": "compiled, fused"}[job.mode] if fused else job.mode


def _size(shape: Shape, job: Job, tokens: int, widths: Widths) -> float:
    element, low = ELEMENT[job.precision], job.lora.rank * shape.adapted(job.lora.targets)
    return tokens * (
        element * (widths.hidden * shape.hidden + widths.query * shape.queries + widths.key * shape.keys)
        + element * (widths.inner * shape.inner + widths.low * low)
        + 4 * (widths.wide * shape.hidden + widths.sums * (shape.heads + 2))
    )  # fmt: skip


def _keys(shape: Shape, batch: Batch, element: int) -> float:
    """What the backward pass of attention allocates for keys and values: their gradients, the parts of those of which
    many blocks see in float32, and one number for each query."""
    own = 2 * element * batch.tokens * shape.keys + 4 * batch.tokens * shape.heads
    return own + 2 * 4 * batch.parts * BLOCK * shape.keys
