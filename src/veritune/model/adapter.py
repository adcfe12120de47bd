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
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from .. import __version__, config
from ..errors import ConfigError, MissingError, ModelError
from ..tokens.prompt import Frame
from . import lora
from .load import Base

ABOUT = "veritune.json"


@dataclass(frozen=True)
class About:
    """What an adapter needs to be used as it was trained."""

    frame: Frame
    base: str
    """The base model's path or hub id."""
    precision: str
    data: str
    """The fingerprint of the dataset it was trained on."""


def add_adapter(base: Base, settings: config.Lora, *, seed: int, start_from: str | None = None) -> Any:
    """A trainable LoRA adapter on a base: fresh (B = 0), or an existing PEFT adapter. Returns a PEFT model.

    Raises ConfigError if the targets match nothing or an existing adapter has other shapes than the settings.
    """
    torch.manual_seed(seed)
    if start_from is not None:
        model = load_adapter(base, start_from, trainable=True)
        found = model.peft_config["default"]
        differing = [
            f"{name} {have} instead of {want}"
            for name, have, want in (
                ("rank", found.r, settings.rank),
                ("alpha", found.lora_alpha, settings.alpha),
                ("targets", sorted(found.target_modules or ()), sorted(settings.targets)),
            )
            if have != want
        ]
        if differing:
            raise ConfigError(f"train.start_from = {start_from!r}: the adapter has {'; '.join(differing)} as in [lora]")
        return model
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
        raise ConfigError(f"lora.targets = {list(settings.targets)}: {str(error).splitlines()[0]}") from None
    lora.speed_up(model)
    return model


def load_adapter(base: Base, path: str | Path, *, trainable: bool = False) -> Any:
    """An adapter in PEFT's format on a base. Raises MissingError or ModelError."""
    folder = Path(path).expanduser()
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise MissingError(f"{path}: not an adapter folder (adapter_config.json and adapter_model.safetensors)")
    try:
        model = PeftModel.from_pretrained(
            base.model, str(folder), is_trainable=trainable, torch_device=str(base.device)
        )
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: this adapter does not fit the base model {base.path!r}: {reason}") from error
    lora.speed_up(model)
    return model


def weights(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names PEFT saves them by; the tensors themselves, not copies."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


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
        described = (Path(scratch) / "adapter_config.json").read_bytes()
    settings.inference_mode = was
    values = {
        "frame": about.frame.to_json(),
        "base": about.base,
        "precision": about.precision,
        "data": about.data,
        "veritune": __version__,
    }
    return {
        "adapter_model.safetensors": weights(model),
        "adapter_config.json": described,
        ABOUT: json.dumps(values, indent=1, ensure_ascii=False).encode(),
        "README.md": card.encode(),
    }


def read_about(path: str | Path) -> About:
    """What `files` wrote beside an adapter. Raises MissingError or ModelError."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise MissingError(f"{path}: no such adapter folder")
    if not (folder / ABOUT).is_file():
        inner = [name for name in ("adapter", "best") if (folder / name / ABOUT).is_file()]
        hint = f"; did you mean {folder / inner[0]}?" if inner else ", or it was not made by `veritune train`"
        raise MissingError(f"{path}: there is no {ABOUT} in it{hint}")
    try:
        values = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        frame = Frame.from_json(values["frame"])
        return About(frame, values["base"], values["precision"], values["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / ABOUT}: damaged ({error})") from None
