"""A trained verifier that scores solutions: `Verifier.load("runs/first/adapter").score(question, solutions)`."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import config
from ..tokens.encode import Encoder, encoder
from ..tokens.prompt import check_answers
from ..tokens.trie import split
from . import adapter, load
from .verdict import logits, p_correct

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Verifier:
    """A model, the encoder of its rows, and how it computes; build it with `Verifier.load`."""

    model: Any
    encoder: Encoder
    device: torch.device
    identity: str
    """Names all that a score depends on: weights, adapter, precision, prompt."""
    shared: bool
    """Rows share their beginnings; False for models whose attention paths cannot express."""
    budget: int
    """Tokens computed at once."""

    @staticmethod
    def load(
        path: str | Path,
        *,
        base: str | None = None,
        precision: str = "auto",
        device: str = "auto",
        warn: Callable[[str], None] = print,
    ) -> "Verifier":
        """Loads an adapter folder and the base it was trained on.

        base: the base model's place if it has moved. precision: of the base, as in `config.Model`; auto takes the one
        it was trained with, or fp32 for bf16 where there are no bf16 products. Raises MissingError, ModelError,
        ConfigError or RoomError.
        """
        about = adapter.read_about(path)
        found = load.pick_device(device)
        if precision == "auto":
            precision = about.precision if about.precision != "bf16" or load.multiplies_bf16(found) else "fp32"
        settings = config.build(
            config.Model, {"path": base or about.base, "base": precision, "device": device}, "verifier"
        )
        loaded = load.load_base(settings)
        load.check_length(loaded, about.frame.max_length)
        check_answers(about.frame, loaded.tokenizer)
        reason = load.check_paths(loaded, about.frame.max_length)
        if reason:
            warn(f"{settings.path}: rows are scored one by one, slowly, because {reason}")
        model = adapter.load_adapter(loaded, path)
        model.eval()
        digest = hashlib.sha256((Path(path).expanduser() / "adapter_model.safetensors").read_bytes())
        digest.update(json.dumps([about.frame.to_json(), settings.path, precision], sort_keys=True).encode())
        return Verifier(
            model=model,
            encoder=encoder(about.frame, loaded.tokenizer),
            device=loaded.device,
            identity=digest.hexdigest()[:16],
            shared=reason is None,
            budget=MICRO_BATCH_TOKENS[loaded.device.type],
        )

    def without_adapter(self) -> "Baseline":
        """The base model with the same prompt, to compare with."""
        return Baseline(self)

    def score(self, question: str, solutions: Sequence[str]) -> np.ndarray:
        """P(correct) of solutions of one question, float64 [solutions]."""
        return self.score_rows([question] * len(solutions), solutions)

    def score_rows(
        self, questions: Sequence[str], solutions: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """P(correct) of each row, float64 [rows], in their order. `progress` is told of newly scored rows.

        A score does not depend on the rows beside it, but for rounding.
        """
        if not len(questions):
            return np.zeros(0)
        rows, _ = self.encoder.rows(questions, solutions)
        return score_ids(
            self.model, rows, self.encoder.frame.answer_ids, self.device, self.budget, self.shared, progress
        )


@dataclass(frozen=True)
class Baseline:
    """A verifier's base model without its adapter."""

    verifier: Verifier

    @property
    def identity(self) -> str:
        return f"{self.verifier.identity} without adapter"

    def score_rows(
        self, questions: Sequence[str], solutions: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        with self.verifier.model.disable_adapter():
            return self.verifier.score_rows(questions, solutions, progress)


def score_ids(
    model: Any,
    rows: list[np.ndarray],
    answer_ids: tuple[int, int],
    device: torch.device,
    budget: int,
    shared: bool = True,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """P(correct) of encoded rows (int32 [length] each), float64 [rows], `budget` tokens at a time."""
    out = np.empty(len(rows))
    with torch.inference_mode():
        for part in split(rows, budget):
            scored = logits(model, [rows[i] for i in part], device, shared=shared)
            out[part] = p_correct(scored, answer_ids).cpu().numpy()
            if progress:
                progress(len(part))
    return out
