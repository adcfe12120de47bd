"""Whether trie batches compute what a model computes row by row, tried on the model itself when it is loaded."""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError, first_line
from ..tokens.trie import build
from . import attention
from .compiled import uncompiled
from .load import Base
from .narrow import narrow
from .verdict import Way, label_logits, rowwise_logits


def use_paths(model: Any) -> None:
    """Switches a model's attention to the one along trie paths, and its layers to those of `narrow`."""
    model.set_attn_implementation(attention.NAME)
    narrow(model)


def check_paths(base: Base, max_length: int) -> str | None:
    """Switches `base.model` to path attention if it computes the same as row by row; otherwise says why it does not
    and leaves the model as it was.

    What shows in long rows only is read off the configuration; soft caps and sinks show in what a model asks of its
    attention function; a layer that does not attend through that function has not called it; and all else shows in the
    numbers, on rows that share a beginning. What was found out once is not computed again.
    """
    if base.stock is None:
        base.stock = base.model.config._attn_implementation
    if max_length not in base.checked:
        with uncompiled(base.model):  # of an earlier run of this process
            base.checked[max_length], base.ways[max_length] = _check_paths(base, max_length)
    base.model.set_attn_implementation(base.stock if base.checked[max_length] else attention.NAME)
    return base.checked[max_length]


def slower(base: Base, max_length: int) -> str | None:
    """What a user is told of a model, or a GPU, on which rows cannot be computed along paths."""
    reason = base.checked[max_length]
    if reason is None:
        return None
    how = {"padded": "rows do not share their beginnings", "single": "rows are computed one by one"}
    return f"{base.path}: {how[base.ways[max_length]]}, which is slower, because {reason}"


def _check_paths(base: Base, max_length: int) -> tuple[str | None, Way]:
    """Why paths do not express a model, if so, and how its rows are computed."""
    text = base.model.config.get_text_config()
    turned = _turned_by_longest(text, max_length)
    if turned:
        return turned, "single"
    reason = _beyond_paths(text, max_length) or _beyond_kernels(base, text)
    head, question, *solutions, other, behind = (_tokens(base, part, number) for number, part in enumerate(TEXTS))
    rows = [np.concatenate((head, question, solution)) for solution in solutions] + [np.concatenate((head, other))]
    base.model.set_attn_implementation(base.stock)
    with torch.no_grad():
        stock = rowwise_logits(base.model, rows, base.device)
        with contextlib.suppress(ValueError, ImportError):  # what a family does not offer
            base.model.set_attn_implementation("eager" if base.stock != "eager" else "sdpa")
        again = rowwise_logits(base.model, rows, base.device, after=behind)
        reason = reason or _off_paths(base, rows, stock, again)
        if reason is None:
            return None, "paths"
        base.model.set_attn_implementation(base.stock)
        try:
            beside = rowwise_logits(base.model, rows, base.device, "padded")
        except torch.OutOfMemoryError:
            raise
        except UNFIT:  # its forward takes one row at a time
            return reason, "single"
    exact = base.precision == "fp32"
    return reason, "single" if _differ(stock, again, beside, exact=exact) else "padded"


def _off_paths(base: Base, rows: list[np.ndarray], stock: Tensor, again: Tensor) -> str | None:
    """Switches to path attention; why it does not give what the model gives row by row, if so."""
    try:
        use_paths(base.model)
        with attention.witness() as attended:
            ours = label_logits(base.model, build(rows), base.device)
    except torch.OutOfMemoryError:
        raise
    except UNFIT as error:
        return first_line(error)
    count = base.model.config.get_text_config().num_hidden_layers
    missing = f"{len(attended)} of its {count} layers attend through transformers' interface"
    reason = _differ(stock, again, ours, exact=base.precision == "fp32")
    return reason or (missing if len(attended) != count else None)


UNFIT = (ModelError, TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError)
"""What a model may raise that does not compute rows in some way; running out of memory, a RuntimeError too, is none."""

TEXTS = (
    "Each solution is read once, from its first line to its last.\n",
    "A shop sells 12 loaves in the morning and twice as many after noon. How many loaves does it sell in all?\n",
    "After noon it sells 2 * 12 = 24 loaves. That makes 12 + 24 = 36.",
    "Twice 12 is 24: the shop sells 24 loaves, so the answer is 24.",
    "What is 7 + 8? Seven and eight make fifteen: 15.",
    "\nIs this solution correct? Answer with one word. The answer is",
)
"""What paths are checked on: the head of all rows, a question, two solutions of it, another row, and what may stand
behind a row. On random tokens low precision is mostly rounding."""


def _tokens(base: Base, text: str, seed: int) -> np.ndarray:
    """A text's tokens; random ones for a model without a tokenizer."""
    if base.tokenizer is not None:
        return np.asarray(base.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    vocabulary = base.model.config.get_text_config().vocab_size
    return np.random.default_rng(seed).integers(0, vocabulary, len(text) // 4, dtype=np.int32)


def _beyond_paths(text: Any, max_length: int) -> str | None:
    """What a configuration tells of layers that paths cannot express, in rows of up to `max_length` tokens."""
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    window = getattr(text, "sliding_window", None)
    if window is not None and getattr(text, "use_sliding_window", True) and window < max_length:
        return f"it attends over a window of {window} tokens, less than prompt.max_length = {max_length}"
    return None


def _beyond_kernels(base: Base, text: Any) -> str | None:
    """Why a GPU cannot attend along paths. By plain products, segment after segment, it would be slower than its stock
    attention on rows in full; float32 has no other."""
    if base.device.type != "cuda" or base.precision == "fp32":
        return None
    heads = getattr(text, "num_attention_heads", None)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if not (isinstance(heads, int) and isinstance(key_heads, int)):
        return None  # no attention, or not the same in every layer: what the model computes will tell
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    problem = attention.problem_of_kernels(heads, key_heads, width, base.model.get_input_embeddings().weight.dtype)
    return problem and f"this GPU's attention kernels do not work: {problem}"


def _turned_by_longest(text: Any, max_length: int) -> str | None:
    """What a configuration tells of rows that change with those beside them."""
    rotary = getattr(text, "rope_parameters", None) or {}
    for turn in (rotary, *(value for value in rotary.values() if isinstance(value, dict))):
        if turn.get("rope_type") in ("dynamic", "longrope"):
            limit = turn.get("original_max_position_embeddings") or text.max_position_embeddings
            if limit < max_length:
                return f"the longest row of a batch turns the positions of all beyond {limit} tokens"
    return None


def _differ(stock: Tensor, again: Tensor, ours: Tensor, *, exact: bool) -> str | None:
    """Whether label logits [rows, vocabulary] of a trie are off by more than rounding. `again`: the stock ones through
    another of transformers' attention functions and with other tokens behind each row, which tells how far low
    precision carries a rounding error. Logits of another row are off by 2 or so."""
    if ours.shape != stock.shape:
        return "it does not take the positions at which logits are wanted"
    spread = (stock - stock.mean(-1, keepdim=True)).norm(dim=-1)
    difference, rounding = (float(((other - stock).norm(dim=-1) / spread).max()) for other in (ours, again))
    allowed = 1e-3 if exact else max(0.1, min(3 * rounding, 0.6))
    if difference <= allowed:
        return None
    return f"trie batches differ from row-by-row results by {difference:.1%} (rounding: {rounding:.1%})"
