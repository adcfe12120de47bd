"""Weights from the hub, a folder or a GGUF file, held as fp32, bf16 or NF4; and the check that paths work on them.

`load_base` gives a frozen causal language model of transformers' and its tokenizer; `check_paths` finds out whether
trie batches compute what the model computes row by row.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import config
from ..errors import ConfigError, MissingError, ModelError, RoomError
from ..tokens.encode import Ids
from ..tokens.trie import build
from . import attention, gguf, hub
from .narrow import narrow
from .verdict import Way, label_logits, rowwise_logits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass
class Base:
    """A frozen model, its tokenizer, and where and how it computes."""

    model: Any
    tokenizer: Any
    device: torch.device
    precision: str  # fp32 | bf16 | nf4 | fp8
    path: str
    unpacked: bool = False
    """Its NF4 layers, those at least that an adapter was on, are held as bf16; see `precision.hold_unpacked`."""
    checked: dict[int, str | None] = field(default_factory=dict)
    """What `check_paths` has found, by the length of rows."""
    ways: dict[int, Way] = field(default_factory=dict)
    """How rows up to a length are computed, by that length."""
    stock: str | None = None
    """The attention that the model had before it."""
    ids: dict[str, Ids] | None = None
    """Token ids of the texts encoded so far, for who sets it to {} to train on the same rows again and again."""


def pick_device(name: str) -> torch.device:
    """The device of a setting. Raises ConfigError if a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device = 'cuda': no CUDA GPU is visible; use 'cpu' or 'auto'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())  # each thread has a current device of its own


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 products in hardware; where it has, they are over twice as fast as float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, f"_is_{kind}_supported", None) for kind in ("avx512_bf16", "amx_tile"))
    return any(check() for check in checks if check)


def load_base(settings: config.Model) -> Base:
    """Loads frozen weights and their tokenizer.

    Raises MissingError if the path names nothing, ModelError if what it names is not a causal language model, and
    RoomError if the GPU's memory does not hold it.
    """
    device = pick_device(settings.device)
    precision = settings.base if settings.base != "auto" else ("bf16" if multiplies_bf16(device) else "fp32")
    path = settings.path
    looks_local = path.startswith((".", "/", "~")) or path.endswith(".gguf") or path.count("/") > 1
    local = Path(path).expanduser()
    if looks_local and not local.exists():
        raise MissingError(f"model.path = {path!r}: no such file or folder")
    if not local.exists():
        hub.check(path)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    say = partial(print, file=sys.stderr)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of other libraries
            model, tokenizer = _load(path, local, precision, device, say)
    except torch.OutOfMemoryError as error:
        raise RoomError(
            f"model.path = {path!r}: GPU memory ran out when loading it as {precision}: {str(error).splitlines()[0]} "
            "End what else runs on the GPU; model.base = 'nf4' takes a quarter of the memory of 'bf16'"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.path = {path!r}: cannot be loaded: {reason}. It must be a hub id (with a network, or in the local "
            "cache), a folder with config.json, weights and tokenizer.json, or a .gguf file"
        ) from error
    model.requires_grad_(False)
    model.eval()
    return Base(model, tokenizer, device, precision, path)


def _load(path: str, local: Path, precision: str, device: torch.device, say: Callable[[str], None]) -> tuple[Any, Any]:
    if local.is_file():
        return _from_gguf(local, precision, device, say)
    name = str(local) if local.is_dir() else path
    tokenizer = AutoTokenizer.from_pretrained(name)
    return _from_folder(name, precision, device), tokenizer


def _from_folder(name: str, precision: str, device: torch.device) -> Any:
    options: dict[str, Any] = {"dtype": DTYPES[precision], "device_map": {"": device}}
    if precision == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = _whole(AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options))
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with bf16 products it would repack its weights in the first pass without gradients, for a kernel
            # that from then on lets no gradient through.
            module.support_avx512bf16_for_cpu = False
    return model


def _from_gguf(file: Path, precision: str, device: torch.device, say: Callable[[str], None]) -> tuple[Any, Any]:
    """A GGUF's weights, dequantised. transformers refuses GGUF and NF4 at once, so NF4 goes through a saved folder."""
    found = gguf.kept(file, DTYPES[precision], _whole, say)
    if isinstance(found, Path):
        return _from_folder(str(found), precision, device), AutoTokenizer.from_pretrained(str(found))
    model, tokenizer = found
    if precision != "nf4":
        return model.to(device), tokenizer
    with tempfile.TemporaryDirectory(prefix="veritune-gguf-") as scratch:
        model.save_pretrained(scratch)
        return _from_folder(scratch, precision, device), tokenizer


def _whole(loaded: Any) -> Any:
    """A model without the report of its loading. Raises ValueError for weights that are not there: transformers would
    make them up at random."""
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{len(missing)} weights are not there, {missing[0]} for one")
    return model


def use_paths(model: Any) -> None:
    """Switches a model's attention to the one along trie paths, and its last layer to the label rows."""
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
        from .compiled import uncompiled  # which needs `layers`

        with uncompiled(base.model):  # of an earlier run of this process
            base.checked[max_length], base.ways[max_length] = _check_paths(base, max_length)
    base.model.set_attn_implementation(base.stock if base.checked[max_length] else attention.NAME)
    return base.checked[max_length]


def slower(base: Base, max_length: int, reason: str) -> str:
    """What a user is told of a model that paths do not express."""
    how = {"padded": "rows do not share their beginnings", "single": "rows are computed one by one"}
    return f"{base.path}: {how[base.ways[max_length]]}, which is slower, because {reason}"


def _check_paths(base: Base, max_length: int) -> tuple[str | None, Way]:
    """Why paths do not express a model, if so, and how its rows are computed."""
    text = base.model.config.get_text_config()
    turned = _turned_by_longest(text, max_length)
    if turned:
        return turned, "single"
    reason = _beyond_paths(text, max_length)
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
        return str(error).splitlines()[0]
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


def check_length(base: Base, max_length: int) -> None:
    """Raises ConfigError if rows may be longer than the positions that the model was made for."""
    positions = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"prompt.max_length = {max_length}: {base.path} has positions for {positions} tokens; set "
            f"prompt.max_length = {positions} or less, or take another model.path"
        )


def _beyond_paths(text: Any, max_length: int) -> str | None:
    """What a configuration tells of layers that paths cannot express, in rows of up to `max_length` tokens."""
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    window = getattr(text, "sliding_window", None)
    if window is not None and getattr(text, "use_sliding_window", True) and window < max_length:
        return f"it attends over a window of {window} tokens, less than prompt.max_length = {max_length}"
    return None


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


def layers(model: Any) -> list[Any]:
    """A model's decoder layers, first to last: those that transformers can recompute one by one."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def set_training(model: Any, *, recomputed: int = 0) -> None:
    """Sets an adapter's dropout to work, and the first `recomputed` layers to compute their activations again in the
    backward pass, compiled or not.

    The frozen base stays in evaluation mode: its own dropout, where it has any, is not ours to train with.
    """
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()
    for number, layer in enumerate(layers(model)):
        layer.training = number < recomputed  # what transformers asks before it recomputes
    if recomputed:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})


os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
