"""A trained verifier that scores solutions: `Verifier.load("runs/first/adapter").score(question, solutions)`."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from .. import config
from ..errors import ConfigError, DataError, MissingError, ModelError
from ..tokens.encode import Encoder, encoder
from ..tokens.prompt import check_answers
from ..tokens.trie import build, split
from . import adapter, load, self_check
from .compiled import compile_layers, uncompiled
from .verdict import Way, at_share, label_logits, p_correct, rowwise_logits

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
COMPILE_AFTER = 60.0
"""Seconds of scoring. On a GPU, compiling takes some 20."""


@dataclass
class Pace:
    """How long a verifier has scored, whether it was sped up for it, and how often memory ran out."""

    seconds: float = 0.0
    compiled: bool = False
    halved: int = 0
    """How often fewer tokens had to be computed at once."""


@dataclass(frozen=True)
class Verifier:
    """A model, the encoder of its rows, and how it computes; build it with `Verifier.load`."""

    model: Any
    encoder: Encoder
    device: torch.device
    identity: str
    """Names all that a score depends on: weights, adapter, precision, prompt."""
    way: Way
    """How rows are computed: along paths, unless the model's attention is more than they express."""
    budget: int
    """Tokens computed at once, while memory suffices for them."""
    precision: str = "bf16"
    """How the base is held; see `config.Model.base`."""
    train_share: float | None = None
    """Of train's rows, how many are correct, if that is known."""
    share: float | None = None
    """The same of the rows to be scored, to which scores are moved (`verdict.at_share`)."""
    pace: Pace = field(default_factory=Pace)
    warn: Callable[[str], None] = print

    @staticmethod
    def load(
        path: str | Path,
        *,
        base: str | None = None,
        precision: str = "auto",
        device: str = "auto",
        merge: bool | None = None,
        share: float | None = None,
        warn: Callable[[str], None] = print,
    ) -> "Verifier":
        """Loads an adapter folder and the base it was trained on.

        base: the base model's place if it has moved. precision: of the base, as in `config.Model`; auto takes the one
        it was trained with, or fp32 for bf16 where there are no bf16 products. merge: whether the adapter is added to
        the weights, which is faster; by default on a GPU in bf16 or FP8 where rounding does not take it (see `merge`).
        Then there is no `without_adapter`. share: of the solutions to be scored, how many are thought to be correct;
        scores are then for that share instead of train's. Raises MissingError, ModelError, ConfigError or RoomError.
        """
        about = adapter.read_about(path)
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"share = {share}: the share of correct solutions is a number between 0 and 1")
        if share is not None and about.share is None:
            raise ConfigError(
                f"{Path(path) / adapter.ABOUT}: does not say how many of the rows it was trained on are correct; add "
                '"share" to it, 0.5 for a balanced dataset, so that scores can be moved from there'
            )
        if share is not None and about.share in (0, 1):
            raise ConfigError(f"{path}: was trained on one label only, so its scores cannot be moved to a share")
        found = load.pick_device(device)
        if precision == "auto":
            precision = about.precision if about.precision != "bf16" or load.multiplies_bf16(found) else "fp32"
        settings = config.build(
            config.Model, {"path": base or about.base, "base": precision, "device": device}, "verifier"
        )
        try:
            loaded = load.load_base(settings)
        except (MissingError, ModelError) as error:
            if base is not None:
                raise
            raise type(error)(
                f"{path}: its base cannot be loaded; if it has moved, say where it is with --model (in Python: "
                f"base). {error}"
            ) from None
        if about.weights and loaded.weights and about.weights != loaded.weights:
            warn(f"{path}: was trained on other weights than {settings.path} has now, so its scores may mean little")
        load.check_length(loaded, about.frame.max_length)
        check_answers(about.frame, loaded.tokenizer)
        self_check.check_paths(loaded, about.frame.max_length)
        if slower := self_check.slower(loaded, about.frame.max_length):
            warn(slower)
        # An adapter trained on FP8 weights has learnt to live with just their rounding.
        fits = precision == "bf16" or (precision == "fp8" and about.precision != "fp8")
        if merge is None and not (found.type == "cuda" and fits):
            merge = False
        model = adapter.load_adapter(loaded, path, merge=merge)
        model.eval()
        digest = hashlib.sha256((Path(path).expanduser() / adapter.WEIGHTS).read_bytes())
        merged = [] if isinstance(model, PeftModel) else ["merged"]
        base = loaded.weights or settings.path
        values = [about.frame.to_json(), base, precision, *merged, *([] if share is None else [share])]
        digest.update(json.dumps(values, sort_keys=True).encode())
        return Verifier(
            model=model,
            encoder=encoder(about.frame, loaded.tokenizer),
            device=loaded.device,
            identity=digest.hexdigest()[:16],
            way=loaded.ways[about.frame.max_length],
            budget=MICRO_BATCH_TOKENS[loaded.device.type],
            precision=precision,
            train_share=about.share,
            share=share,
            warn=warn,
        )

    def without_adapter(self) -> "Baseline":
        """The base model with the same prompt, to compare with. Raises ConfigError if the adapter was merged."""
        if not isinstance(self.model, PeftModel):
            raise ConfigError("the adapter is part of the weights: load the verifier with merge=False")
        return Baseline(self)

    def score(self, question: str, solutions: Sequence[str]) -> np.ndarray:
        """P(correct) of solutions of one question, float64 [solutions]. Raises as `score_rows`."""
        return self.score_rows([question] * len(solutions), solutions)

    def score_rows(
        self, questions: Sequence[str], solutions: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """P(correct) of each row, float64 [rows], in their order. `progress` is told of newly scored rows.

        A score does not depend on the rows beside it, but for rounding. On a GPU, who scores for a minute is taken to
        have more to score: layers are then compiled. If memory runs out, half as much is computed at once from then on.
        Raises DataError for what are not two lists of texts, of one length, and for an empty text, which `veritune
        score` leaves without a score; torch's OutOfMemoryError where one row alone is too much.
        """
        _check_texts(questions, solutions)
        if len(questions) and self.pace.seconds > COMPILE_AFTER:
            self.compile(questions, solutions)
        started = time.perf_counter()
        p = self._scores(questions, solutions, progress)
        self.pace.seconds += time.perf_counter() - started
        return p if self.share is None or self.train_share is None else at_share(p, self.train_share, self.share)

    def _scores(
        self, questions: Sequence[str], solutions: Sequence[str], progress: Callable[[int], None] | None
    ) -> np.ndarray:
        rows, _ = self.encoder.rows(questions, solutions)
        answers = self.encoder.frame.answer_ids

        def fewer(tokens: int) -> None:
            self.pace.halved += 1
            self.warn(f"memory ran out; from here on {tokens:,} tokens are scored at once")

        return score_ids(self.model, rows, answers, self.device, self._tokens, self.way, progress, fewer)

    @property
    def _tokens(self) -> int:
        return self.budget >> self.pace.halved

    def compile(self, questions: Sequence[str], solutions: Sequence[str]) -> None:
        """Compiles the layers on a GPU, once, if these rows' logits then stay what they are: tens of seconds, after
        which scoring is faster."""
        if self.pace.compiled or self.device.type != "cuda" or self.way != "paths":
            return
        self.pace.compiled = True
        # A batch as it is scored: kernels are chosen by what is fastest on the first one.
        rows, _ = self.encoder.rows(questions[:1024], solutions[:1024])
        trie = build([rows[i] for i in split(rows, self._tokens)[0]])

        def centred() -> Tensor:
            with torch.inference_mode():
                found = label_logits(self.model, trie, self.device)
                return found - found.mean(-1, keepdim=True)

        if problem := compile_layers(self.model, centred, "logits", precision=self.precision):
            self.warn(f"layers are not compiled, which is slower: {problem}")


@dataclass(frozen=True)
class Baseline:
    """A verifier's base model without its adapter; it was trained for no share, so its scores are moved to none."""

    verifier: Verifier

    @property
    def identity(self) -> str:
        return f"{self.verifier.identity} without adapter"

    def score_rows(
        self, questions: Sequence[str], solutions: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        _check_texts(questions, solutions)
        with self.verifier.model.disable_adapter(), uncompiled(self.verifier.model):
            return self.verifier._scores(questions, solutions, progress)


def _check_texts(questions: Sequence[str], solutions: Sequence[str]) -> None:
    for name, texts in (("questions", questions), ("solutions", solutions)):
        if isinstance(texts, str):
            raise DataError(f"{name} is one text, which would be taken letter by letter; give a list of texts")
        if isinstance(texts, Mapping | Set):
            why = "whose keys would be scored" if isinstance(texts, Mapping) else "which has no order"
            raise DataError(f"{name} is a {type(texts).__name__}, {why}; give a list of texts")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"{name}[{number}] is not text: {text!r:.80}")
            if not text.strip():
                raise DataError(f"{name}[{number}] is empty, so there is nothing to score; leave the row out")
    if len(questions) != len(solutions):
        raise DataError(f"there are {len(questions):,} questions and {len(solutions):,} solutions")


def score_ids(
    model: Any,
    rows: list[np.ndarray],
    answer_ids: tuple[int, int],
    device: torch.device,
    budget: int,
    way: Way = "paths",
    progress: Callable[[int], None] | None = None,
    fewer: Callable[[int], None] | None = None,
) -> np.ndarray:
    """P(correct) of encoded rows (int32 [length] each), float64 [rows], `budget` tokens at a time.

    If memory runs out, half as many for the rows that are left, which `fewer` is told. `progress` is told of newly
    scored rows. Raises torch's OutOfMemoryError where one row alone is too much.
    """
    out, scored = np.empty(len(rows)), np.zeros(len(rows), dtype=bool)
    while True:
        left = np.flatnonzero(~scored)
        try:
            with torch.inference_mode():
                for part, p in _parts(model, [rows[i] for i in left], answer_ids, device, budget, way):
                    out[left[part]], scored[left[part]] = p, True
                    if progress:
                        progress(len(part))
            return out
        except torch.OutOfMemoryError:
            if budget <= max(len(rows[i]) for i in left):
                raise
        # Outside the handler, which holds what had been computed.
        budget //= 2
        if fewer:
            fewer(budget)


def _parts(
    model: Any, rows: list[np.ndarray], answer_ids: tuple[int, int], device: torch.device, budget: int, way: Way
) -> Iterator[tuple[list[int], np.ndarray]]:
    """The numbers of some rows and their P(correct), part after part: a GPU is at the next one while a part's are read
    and the one after that is built."""
    asked: list[tuple[list[int], Tensor, torch.cuda.Event | None]] = []
    for part in split(rows, budget, sharing=way == "paths"):
        chosen = [rows[i] for i in part]
        if way == "paths":
            logits = label_logits(model, build(chosen), device)
        else:
            logits = rowwise_logits(model, chosen, device, way)
        asked.append((part, *_on_its_way(p_correct(logits, answer_ids))))
        if len(asked) > 1:
            yield _read(*asked.pop(0))
    yield from (_read(*last) for last in asked)


def _on_its_way(scores: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Scores on the CPU, there once the event has passed."""
    if not scores.is_cuda:
        return scores, None
    there = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True).copy_(scores, non_blocking=True)
    passed = torch.cuda.Event()
    passed.record(torch.cuda.current_stream(scores.device))
    return there, passed


def _read(part: list[int], scores: Tensor, passed: torch.cuda.Event | None) -> tuple[list[int], np.ndarray]:
    if passed is not None:
        passed.synchronize()
    return part, scores.numpy()
