"""GGUF files: read by transformers, dequantised in Python, which takes 20 s for 135 million weights; so what comes out
is kept as an ordinary model folder and read from there the next time, in about a second and bit for bit the same.

The folders stand in `VERITUNE_CACHE` (a folder, or `off`), by default `~/.cache/veritune`; any of them may be deleted
at any time. A name holds the hash of the GGUF's content, so a moved or copied file is found again and a changed one
is not mistaken.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .. import durable
from . import header

FORMAT = 2
VARIABLE = "VERITUNE_CACHE"
FACTORS = "rope_freqs.weight"
"""The tensor by which a GGUF tells of Llama 3's scaling of positions: what each frequency is divided by."""
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""That scaling as all of Llama 3.1 to 3.3 have it, but for its `factor`."""


def cache_folder() -> Path | None:
    """Where converted weights are kept; None if they are not to be."""
    named = os.environ.get(VARIABLE, "")
    if named.lower() in ("off", "0", "no", "none"):
        return None
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "veritune"


def read(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """What transformers makes of a GGUF: the model on the CPU with transformers' report of its loading, and the
    tokenizer. The model no longer says that it was quantised.

    Raises ValueError for biases that the model is made without, which transformers leaves out, beside what it raises.
    """
    options: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True), "dtype": dtype}
    folder, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if scaled := scaling(file, AutoConfig.from_pretrained(folder, gguf_file=name)):
        options["config"] = scaled
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, output_loading_info=True, **options)
    biases = [tensor for tensor in header.read(file)[1] if tensor.endswith(".bias")]
    if biases and not any("bias" in weight for weight in loaded[0].state_dict()):
        raise ValueError(
            f"{len(biases)} biases have no place in the model that its header tells of, {biases[0]} for one; name the "
            "model's hub id or folder instead"
        )
    loaded[0].config.__dict__.pop("quantization_config", None)
    return loaded, tokenizer


def scaling(file: Path, config: Any) -> Any:
    """The configuration with the scaling of positions that transformers leaves out of a GGUF's; None if there is none.

    Raises ValueError for another one than Llama 3's: the model would compute something else than the file is for.
    """
    values, tensors = header.read(file)
    told = values.get(f"{values.get('general.architecture')}.rope.scaling.type", "none")
    found = [told] if told != "none" else [name for name in tensors if name.startswith("rope_f")]
    turns = getattr(config, "rope_parameters", None) or {}
    every = [turns, *(turn for turn in turns.values() if isinstance(turn, dict))]
    if not found or any(turn.get("rope_type", "default") != "default" for turn in every):
        return None
    if found == [FACTORS]:
        factors = torch.tensor(next(tensor.data for tensor in GGUFReader(file).tensors if tensor.name == FACTORS))
        plain = turns["rope_theta"] ** -(torch.arange(len(factors)) / len(factors))
        config.rope_parameters = {**turns, **LLAMA3, "factor": float(factors.max())}
        if torch.allclose(plain / ROPE_INIT_FUNCTIONS["llama3"](config)[0], factors, rtol=1e-3):
            return config
    raise ValueError(f"its positions are scaled ({found[0]}) in a way that is not read from a GGUF; name the model's "
                     "hub id or folder instead")  # fmt: skip


def content(file: Path) -> Any:
    """The SHA-256 of a file, as hashlib holds it."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256")


def place_of(file: Path, hashed: Any, dtype: torch.dtype, root: Path) -> Path:
    """The folder for a GGUF's weights: named by its content, the type of number, and who converts."""
    digest = hashed.copy()
    digest.update(f"{FORMAT} {transformers.__version__}".encode())
    return root / "gguf" / f"{file.stem}-{str(dtype).removeprefix('torch.')}-{digest.hexdigest()[:32]}"


def kept(
    file: Path, hashed: Any, dtype: torch.dtype, whole: Callable[[Any], Any], say: Callable[[str], None]
) -> Path | tuple[Any, Any]:
    """The folder with a GGUF's weights and tokenizer, made if it is not there; or, where it cannot be kept, model and
    tokenizer.

    hashed: the file's `content`. whole: takes transformers' model and report and gives the model, or raises. Processes
    that want the same folder wait for the one that makes it. Raises what transformers raises for a file that is no
    GGUF; trouble with the disk is said and costs no more than the time.
    """
    root = cache_folder()
    made: tuple[Any, Any] | None = None
    try:
        if root is not None:
            place = place_of(file, hashed, dtype, root)
            if durable.looks_whole(place):
                return place
            durable.make_folder(place.parent)
            with FileLock(durable.beside(place, "lock")):
                if durable.looks_whole(place):  # another process made it meanwhile
                    return place
                loaded, tokenizer = _reading(file, dtype)
                made = whole(loaded), tokenizer
                size = _keep(*made, place)
            say(f"{file}: its weights are kept in {place} ({size / 1e6:,.0f} MB), so that they load faster the next "
                f"time; {VARIABLE}=off keeps none")  # fmt: skip
            return place
    except _Unread as error:
        raise error.args[0] from None
    except OSError as error:
        say(f"{file}: its converted weights cannot be kept in {root}: {error.strerror or error}. It takes longer to "
            "load each time")  # fmt: skip
    if made is None:
        loaded, tokenizer = read(file, dtype)
        made = whole(loaded), tokenizer
    return made


class _Unread(Exception):
    """The GGUF cannot be read; its argument says why. Not the disk of the cache."""


def _reading(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        return read(file, dtype)
    except Exception as error:
        raise _Unread(error) from error


def _keep(model: Any, tokenizer: Any, place: Path) -> int:
    """Writes the folder, whole or not at all, and gives its size in bytes. Raises OSError."""
    durable.settle(place)
    size = sum(value.nbytes for value in model.state_dict().values())
    free = shutil.disk_usage(place.parent).free
    if free < 1.05 * size + (1 << 30):
        raise OSError(f"{free / 1e9:,.1f} GB are free, {size / 1e9:,.1f} GB and 1 GB to spare are wanted")
    new = durable.beside(place, "new")
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        durable.adopt_folder(place)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(new)
        raise
    return sum(file.stat().st_size for file in place.iterdir())
