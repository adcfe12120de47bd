"""Weights from the hub, a folder or a GGUF file, held as fp32, bf16 or NF4; and the check that paths work on them.

`load_base` gives a frozen causal language model of transformers' and its tokenizer; `check_paths` finds out whether
trie batches compute what the model computes row by row.
"""

import contextlib
import io
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import config
from ..errors import ConfigError, MissingError, ModelError
from ..tokens.trie import build
from . import attention
from .verdict import label_logits, rowwise_logits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}


@dataclass
class Base:
    """A frozen model, its tokenizer, and where and how it computes."""

    model: Any
    tokenizer: Any
    device: torch.device
    precision: str  # fp32 | bf16 | nf4
    path: str


def pick_device(name: str) -> torch.device:
    """The device of a setting. Raises ConfigError if a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device = 'cuda': no CUDA GPU is visible; use 'cpu' or 'auto'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 products in hardware; where it has, they are over twice as fast as float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, f"_is_{kind}_supported", None) for kind in ("avx512_bf16", "amx_tile"))
    return any(check() for check in checks if check)


def load_base(settings: config.Model) -> Base:
    """Loads frozen weights and their tokenizer.

    Raises MissingError if the path names nothing, ModelError if what it names is not a causal language model.
    """
    device = pick_device(settings.device)
    precision = settings.base if settings.base != "auto" else ("bf16" if multiplies_bf16(device) else "fp32")
    path = settings.path
    looks_local = path.startswith((".", "/", "~")) or path.endswith(".gguf") or path.count("/") > 1
    local = Path(path).expanduser()
    if looks_local and not local.exists():
        raise MissingError(f"model.path = {path!r}: no such file or folder")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of other libraries
            model, tokenizer = _load(path, local, precision, device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.path = {path!r}: cannot be loaded: {reason}. It must be a hub id (with a network, or in the local "
            "cache), a folder with config.json, weights and tokenizer.json, or a .gguf file"
        ) from error
    model.requires_grad_(False)
    model.eval()
    return Base(model, tokenizer, device, precision, path)


def _load(path: str, local: Path, precision: str, device: torch.device) -> tuple[Any, Any]:
    if local.is_file():
        return _from_gguf(local, precision, device)
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
    return AutoModelForCausalLM.from_pretrained(name, **options)


def _from_gguf(file: Path, precision: str, device: torch.device) -> tuple[Any, Any]:
    """A GGUF's weights, dequantised. transformers refuses GGUF and NF4 at once, so NF4 goes through a saved folder."""
    folder, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=DTYPES[precision]
    )
    if precision != "nf4":
        return model.to(device), tokenizer  # pyright: ignore[reportArgumentType]
    with tempfile.TemporaryDirectory(prefix="veritune-gguf-") as scratch:
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(scratch)
        return _from_folder(scratch, precision, device), tokenizer


def use_paths(model: Any) -> None:
    """Switches a model's attention to the one along trie paths."""
    model.set_attn_implementation(attention.NAME)


def check_paths(base: Base, max_length: int) -> str | None:
    """Switches `base.model` to path attention if it computes the same as row by row; otherwise says why it does not
    and leaves the model as it was.

    Windows shorter than `max_length` are read off the configuration; soft caps and sinks show in what a model asks of
    its attention function; recurrent and convolutional layers show in the numbers, on rows that share a beginning.
    """
    text = base.model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    window = getattr(text, "sliding_window", None)
    if window is not None and getattr(text, "use_sliding_window", True) and window < max_length:
        return f"it attends over a window of {window} tokens, less than prompt.max_length = {max_length}"
    rng = np.random.default_rng(0)

    def draw(tokens: int) -> np.ndarray:
        return rng.integers(0, text.vocab_size, tokens, dtype=np.int32)

    head, question = draw(24), draw(24)
    rows = [np.concatenate((head, question, draw(n))) for n in (9, 17)] + [np.concatenate((head, draw(33)))]
    before = base.model.config._attn_implementation
    with torch.no_grad():
        stock = rowwise_logits(base.model, rows, base.device)
        again = rowwise_logits(base.model, rows, base.device, after=draw(40))
        try:
            use_paths(base.model)
            ours = label_logits(base.model, build(rows), base.device)
        except (ModelError, TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            base.model.set_attn_implementation(before)
            return str(error).splitlines()[0]
    spread = (stock - stock.mean(-1, keepdim=True)).norm(dim=-1)
    difference = float(((ours - stock).norm(dim=-1) / spread).max())
    # What rounding does to the model's own results when other tokens stand after the row.
    rounding = float(((again - stock).norm(dim=-1) / spread).max())
    if not difference <= max(1e-3, min(5 * rounding, 0.3)):
        base.model.set_attn_implementation(before)
        return f"trie batches differ from row-by-row results by {difference:.1%} (rounding: {rounding:.1%})"
    return None


def layers(model: Any) -> list[Any]:
    """A model's decoder layers, first to last: those that transformers can recompute one by one."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: Any) -> None:
    """Compiles each decoder layer when it first runs, once for every number of tokens: a minute at the start of a run,
    and no kernel launch from Python for each small operation after that."""
    for layer in layers(model):
        layer.compile(dynamic=True)


def set_training(model: Any, *, checkpointing: bool) -> None:
    """Sets an adapter's dropout to work, and each layer to recompute its activations if `checkpointing`.

    The frozen base stays in evaluation mode: its own dropout, where it has any, is not ours to train with.
    """
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()
        elif isinstance(module, GradientCheckpointingLayer):
            module.training = checkpointing  # what transformers asks before it recomputes
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})


def read_config(path: str) -> Any:
    """A model's configuration without its weights."""
    local = Path(path).expanduser()
    if local.is_file():
        return AutoConfig.from_pretrained(str(local.parent), gguf_file=local.name)
    return AutoConfig.from_pretrained(str(local) if local.is_dir() else path)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
