"""The LoRA adapter on a base: fresh, loaded, and as files in PEFT's own format.

An adapter folder is PEFT's (`adapter_model.safetensors`, `adapter_config.json`) with `veritune.json` beside them: the
frame of the prompt, the base it was trained on and the data's fingerprint. Scoring reads the prompt from there and can
use no other.
"""

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from transformers.pytorch_utils import Conv1D

from .. import __version__, config
from ..errors import ConfigError, MissingError, ModelError, first_line
from ..tokens.prompt import Frame
from . import lora, precision, swiglu
from .load import Base
from .merge import unmergeable

ABOUT = "veritune.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class About:
    """What an adapter needs to be used as it was trained."""

    frame: Frame
    base: str
    """The base model's path or hub id."""
    precision: str
    data: str
    """The fingerprint of the dataset it was trained on."""
    share: float | None
    """Of the rows it was trained on, how many are correct; None if an earlier version did not write it down."""
    weights: str | None = None
    """The base's `Base.weights`; None if an earlier version did not write it down."""


def add_adapter(base: Base, settings: config.Lora, *, seed: int, start_from: str | None = None) -> Any:
    """A trainable LoRA adapter on a base: fresh (B = 0), or an existing PEFT adapter. Returns a PEFT model.

    Raises ConfigError if a target matches nothing or an existing adapter has other shapes than the settings.
    """
    torch.manual_seed(seed)
    if start_from is not None:
        model = load_adapter(base, start_from, trainable=True, dropout=settings.dropout)
        found = model.peft_config["default"]
        targets = found.target_modules or ()
        differing = [
            f"{name} {have} instead of {want}"
            for name, have, want in (
                ("rank", found.r, settings.rank),
                ("alpha", found.lora_alpha, settings.alpha),
                ("targets", [targets] if isinstance(targets, str) else sorted(targets), sorted(settings.targets)),
            )
            if have != want
        ]
        if differing:
            raise ConfigError(f"train.start_from = {start_from!r}: the adapter has {'; '.join(differing)} as in [lora]")
        return model
    names = dict(base.model.named_modules())
    unmatched = [target for target in settings.targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unmatched:
        have = {name.rpartition(".")[2] for name, it in names.items() if isinstance(it, torch.nn.Linear | Conv1D)}
        raise ConfigError(
            f"lora.targets: {', '.join(unmatched)} {'name' if len(unmatched) > 1 else 'names'} no layer of this model; "
            f"its linear layers are {', '.join(sorted(have - {'lm_head'}))}"
        )
    wanted = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
        bias="none",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base.model, wanted)
    except ValueError as error:
        raise ConfigError(f"lora.targets = {list(settings.targets)}: {first_line(error)}") from None
    _speed_up(model, base)
    return model


def _speed_up(model: Any, base: Base, *, train: bool = True) -> None:
    """Our products in place of PEFT's; the base in FP8 only now, since PEFT wraps plain layers."""
    lora.speed_up(model)
    if train:
        swiglu.speed_up(model)
    if base.precision == "fp8":
        precision.to_fp8(model, train=train)


def load_adapter(
    base: Base, path: str | Path, *, trainable: bool = False, dropout: float | None = None, merge: bool | None = False
) -> Any:
    """A LoRA adapter in PEFT's format on a base, whole or not at all. `dropout`: in place of the adapter's own.

    With `merge` it is added to the base's weights, which rounds each sum once to their precision and saves the products
    with the adapter: a plain transformers model, and the base is no longer what it was. None: if `merge.unmergeable`
    finds nothing against it. Raises MissingError or ModelError.
    """
    folder = Path(path).expanduser()
    file = folder / WEIGHTS
    if not (folder / "adapter_config.json").is_file() or not file.is_file():
        hint = _inner(folder, WEIGHTS)
        raise MissingError(f"{path}: not an adapter folder (adapter_config.json and {WEIGHTS}){hint}")
    try:
        described: Any = PeftConfig.from_pretrained(str(folder))
        if described.peft_type != PeftType.LORA:
            raise ValueError(f"it is of the kind {described.peft_type.value}, not LORA")
        if dropout is not None:
            described.lora_dropout = dropout
        with safe_open(file, "pt") as stored:
            there = set(stored.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is checked below
            model = PeftModel.from_pretrained(
                base.model, str(folder), config=described, is_trainable=trainable, torch_device=str(base.device)
            )
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, KeyError, OSError, TypeError, SafetensorError) as error:
        reason = " ".join((str(error).splitlines() or [type(error).__name__])[:2])
        raise ModelError(f"{path}: this adapter does not fit the base model {base.path!r}: {reason}") from error
    # PEFT leaves out, or makes up, what it finds no counterpart for.
    wanted = weights(model)
    astray = sorted(wanted.keys() - there) + sorted(name for name in there - wanted.keys() if "lora_" in name)
    if astray:
        raise ModelError(
            f"{path}: this adapter does not fit the base model {base.path!r}: {len(astray)} tensors are there in one "
            f"and not in the other, {astray[0]} for one"
        )
    broken = [name for name, value in wanted.items() if not bool(value.isfinite().all())]
    if broken:
        raise ModelError(f"{path}: {len(broken)} of the adapter's tensors are not finite, {broken[0]} for one")
    against = unmergeable(model) if merge is not False else None
    if merge and against:
        raise ModelError(f"{path}: this adapter cannot be merged: {against}")
    if merge is not False and against is None:
        model = model.merge_and_unload()
        if base.precision == "fp8":
            precision.to_fp8(model, train=False)
        return model
    _speed_up(model, base, train=trainable)
    return model


def remove(base: Base) -> None:
    """Takes off its base whatever adapter is there, also one that was put there only in part. The base is then as it
    was before, but that layers stay in FP8, or in bf16 if they were unpacked from NF4."""
    for parent in list(base.model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, BaseTunerLayer):
                setattr(parent, name, layer.get_base_layer())
    swiglu.separate(base.model)  # the next adapter's rank may be one for which the kernels do not work
    if hasattr(base.model, "peft_config"):
        del base.model.peft_config
    base.model.gradient_checkpointing_disable()
    base.model.eval()  # a layer that was computed again was told that it trains


def weights(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names PEFT saves them by; the tensors themselves, not copies."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def scalings(model: Any) -> list[float]:
    """What the adapter's updates are scaled by: alpha / rank, but where an adapter of PEFT's says otherwise."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return sorted({layer.scaling[name] for layer in layers for name in layer.active_adapters})


def set_weights(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts saved tensors back. Raises ModelError if they are not exactly this adapter's."""
    have = weights(model)
    if have.keys() != tensors.keys() or any(have[name].shape != tensors[name].shape for name in have):
        raise ModelError("the saved adapter has other tensors than the run's [lora] settings make")
    set_peft_model_state_dict(model, dict(tensors))


def files(model: Any, about: About, card: str) -> dict[str, bytes | dict[str, torch.Tensor]]:
    """The files of an adapter folder: name -> bytes, or tensors to be written as safetensors."""
    settings = model.peft_config["default"]
    was, settings.inference_mode = settings.inference_mode, True
    settings.base_model_name_or_path = about.base
    with tempfile.TemporaryDirectory() as scratch:
        settings.save_pretrained(scratch)
        described = json.loads((Path(scratch) / "adapter_config.json").read_bytes())
    settings.inference_mode = was
    if isinstance(described["target_modules"], list):
        described["target_modules"].sort()  # PEFT writes a set, whose order differs from process to process
    values = {
        "frame": about.frame.to_json(),
        "base": about.base,
        "weights": about.weights,
        "precision": about.precision,
        "data": about.data,
        "share": about.share,
        "veritune": __version__,
    }
    return {
        WEIGHTS: weights(model),
        "adapter_config.json": json.dumps(described, indent=2).encode(),
        ABOUT: json.dumps(values, indent=1, ensure_ascii=False).encode(),
        "README.md": card.encode(),
    }


def read_about(path: str | Path) -> About:
    """What `files` wrote beside an adapter. Raises MissingError or ModelError."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise MissingError(f"{path}: no such adapter folder")
    if not (folder / ABOUT).is_file():
        hint = _inner(folder, ABOUT) or ", or it was not made by `veritune train`"
        raise MissingError(f"{path}: there is no {ABOUT} in it{hint}")
    try:
        values = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        frame = Frame.from_json(values["frame"])
        share = None if values.get("share") is None else float(values["share"])
        return About(frame, values["base"], values["precision"], values["data"], share, values.get("weights"))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / ABOUT}: damaged ({error})") from None


def _inner(folder: Path, file: str) -> str:
    """`; did you mean RUN/best?` where a run's folder stands for its adapter's, which holds that file; or nothing."""
    inner = [name for name in ("best", "adapter") if (folder / name / file).is_file()]
    return f"; did you mean {folder / inner[0]}?" if inner else ""
