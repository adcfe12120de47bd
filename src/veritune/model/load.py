"""Weights from the hub, a folder or a GGUF file, held as fp32, bf16 or NF4: a frozen causal language model of
transformers' and its tokenizer."""

import contextlib
import hashlib
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.peft_utils import find_adapter_config_file

from .. import config
from ..errors import ConfigError, MissingError, ModelError, RoomError, first_line
from ..tokens.encode import Ids
from . import gguf, hub
from .head import widen
from .verdict import Way

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16, "fp8": torch.bfloat16}
HEAD, PIECES, PIECE = 1 << 20, 1 << 10, 1 << 12


@dataclass
class Base:
    """A frozen model, its tokenizer, and where and how it computes."""

    model: Any
    tokenizer: Any
    device: torch.device
    precision: str  # fp32 | bf16 | nf4 | fp8
    path: str
    weights: str | None = None
    """The fingerprint of the files it came from, for telling whether they have changed."""
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
            model, tokenizer, weights = _load(path, local, precision, device, say)
    except torch.OutOfMemoryError as error:
        raise RoomError(
            f"model.path = {path!r}: GPU memory ran out when loading it as {precision}: {first_line(error)} "
            "End what else runs on the GPU; model.base = 'nf4' takes a quarter of the memory of 'bf16'"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model.path = {path!r}: cannot be loaded: {first_line(error)}. It must be a hub id (with a network, or in "
            "the local cache), a folder with config.json, weights and tokenizer.json, or a .gguf file"
        ) from error
    model.requires_grad_(False)
    model.eval()
    widen(model)
    return Base(model, tokenizer, device, precision, path, weights)


def _load(
    path: str, local: Path, precision: str, device: torch.device, say: Callable[[str], None]
) -> tuple[Any, Any, str | None]:
    if local.is_file():
        hashed = gguf.content(local)
        return *_from_gguf(local, hashed, precision, device, say), hashed.hexdigest()[:16]
    name = str(local) if local.is_dir() else path
    if find_adapter_config_file(name):  # transformers would load its base, and training put another in its place
        raise ValueError("it is an adapter; name its base model here, and the adapter as train.start_from")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = _from_folder(name, precision, device, say)
    return model, tokenizer, fingerprint(local if local.is_dir() else hub.folder(path))


def fingerprint(folder: Path | None) -> str | None:
    """Of the weights in a model's folder: their files' names and sizes, and the content of each as far as it is read in
    a fraction of a second: the first MiB and 1,024 pieces of 4 KiB at equal distances. None if there are none."""
    if folder is None:
        return None
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(HEAD))
            for place in range(HEAD, size, max((size - HEAD) // PIECES, PIECE)):
                opened.seek(place)
                digest.update(opened.read(PIECE))
    return digest.hexdigest()[:16] if files else None


def _from_folder(name: str, precision: str, device: torch.device, say: Callable[[str], None]) -> Any:
    options: dict[str, Any] = {"dtype": DTYPES[precision], "device_map": {"": device}, "ignore_mismatched_sizes": True}
    if precision == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except RuntimeError as error:
        if reason := _logged(error):
            raise reason from None
        raise
    model = _whole(loaded)
    if left := sorted(loaded[1]["unexpected_keys"]):
        say(f"{name}: {len(left)} tensors of its files have no place in the model and are left out, {left[0]} for one")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with bf16 products it would repack its weights in the first pass without gradients, for a kernel
            # that from then on lets no gradient through.
            module.support_avx512bf16_for_cpu = False
    return model


def _from_gguf(
    file: Path, hashed: Any, precision: str, device: torch.device, say: Callable[[str], None]
) -> tuple[Any, Any]:
    """A GGUF's weights, dequantised. transformers refuses GGUF and NF4 at once, so NF4 goes through a saved folder."""
    found = gguf.kept(file, hashed, DTYPES[precision], _whole, say)
    if isinstance(found, Path):
        return _from_folder(str(found), precision, device, say), AutoTokenizer.from_pretrained(str(found))
    model, tokenizer = found
    if precision != "nf4":
        return model.to(device), tokenizer
    with tempfile.TemporaryDirectory(prefix="veritune-gguf-") as scratch:
        model.save_pretrained(scratch)
        return _from_folder(scratch, precision, device, say), tokenizer


def _logged(error: RuntimeError) -> RuntimeError | None:
    """What kept a weight from being converted, such as memory that ran out at its NF4, where transformers' error only
    points at a report that it has logged: among the variables of the function that raised."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name, text in getattr(frame.f_locals.get("loading_info"), "conversion_errors", {}).items():
            if said := re.search(r"^[\w.]*?(\w+Error): (.+)", text, re.MULTILINE):
                kind = torch.OutOfMemoryError if said[1] == "OutOfMemoryError" else RuntimeError
                return kind(said[2] if kind is torch.OutOfMemoryError else f"{name}: {said[2]}")
    return None


def _whole(loaded: Any) -> Any:
    """A model without the report of its loading. Raises ValueError for weights that are not there or have another
    shape: transformers would make them up at random."""
    model, report = loaded
    if report["mismatched_keys"]:
        name, there, wanted = min(report["mismatched_keys"])
        raise ValueError(
            f"{len(report['mismatched_keys'])} weights have another shape than config.json says, {name} for one: "
            f"{list(there)} instead of {list(wanted)}"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{len(missing)} weights are not there, {missing[0]} for one")
    return model


def check_length(base: Base, max_length: int) -> None:
    """Raises ConfigError if rows may be longer than the positions that the model was made for."""
    positions = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"prompt.max_length = {max_length}: {base.path} has positions for {positions} tokens; set "
            f"prompt.max_length = {positions} or less, or take another model.path"
        )


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
    if recomputed:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers(model)[:recomputed]:
        layer.training = True  # what transformers asks before it recomputes
        layer._gradient_checkpointing_func = partial(_evaluated, layer, layer._gradient_checkpointing_func)


def _evaluated(layer: Any, checkpoint: Callable[..., Any], call: Callable[..., Any], *inputs: Any) -> Any:
    """Recomputes a layer whose own dropout, such as OPT's, does not work in either pass."""

    def compute(*inputs: Any) -> Any:
        layer.training = False
        try:
            return call(*inputs)
        finally:
            layer.training = True

    return checkpoint(compute, *inputs)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
