"""What `veritune plan` tells of a GPU: peak memory, tokens at once, layers computed again, rows a second."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from .. import config
from ..errors import ConfigError, MissingError, ModelError
from ..model import shape
from ..training import fit
from ..training.feed import Source
from ..training.memory import CONTEXT, GIB, Job
from ..training.speed import CARDS, Card, card_of

CHARACTERS = 3.5
"""Of a token: 4.1 in questions and 3.5 in solutions were measured on real rows with Llama 3's tokenizer."""
TEMPLATE = 30
"""Tokens of a chat template beside the instruction."""
DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
"""Where there is none of these, there is no GPU, and torch need not be loaded to know it."""


@dataclass(frozen=True)
class Foreseen:
    """What a run would take and reach on a card."""

    fit: fit.Fit
    precision: str
    layers: int
    card: str
    rows_per_second: float


def foresee(run: config.Run, source: Source, gpu: str | None, gib: float | None) -> Foreseen | None:
    """On the named card, or the one in this machine; None if there is neither.

    gib: memory to plan for, GiB, instead of the card's. Raises ConfigError for a card that is not known or without FP8
    products that the run is to use, ModelError for a model whose memory is not foreseen, MissingError.
    """
    name, card, room = _card(run, gpu, gib)
    if card is None or room is None:
        return None
    precision = run.model.base
    if precision == "auto":
        precision = "fp32" if card is CARDS["t4"] else "bf16"
    if precision == "fp8" and not card.fp8:
        raise ConfigError(f"model.base = 'fp8': {name} has no FP8 products; use 'bf16', or 'nf4' to save memory")
    of = shape.read(run.model.path)
    job = Job(precision, run.lora, run.train.optimizer, run.train.compile)
    steps = [reckoned(run, source, source.plan.rows(step)) for step in fit.looked_at(len(source.plan))]
    mix = fit.mix(steps)
    found = fit.choose(of, job, run.train, mix, room, card)
    if better := fit.unpacked(found, of, job, run.train, mix):
        found, precision = better, "nf4, held as bf16"
    return Foreseen(found, precision, of.layers, name, max(map(len, steps)) / found.seconds)


def _card(run: config.Run, gpu: str | None, gib: float | None) -> tuple[str, Card | None, float | None]:
    """A card, its name, and the bytes on it for tensors."""
    if gpu is None and gib is None:
        if run.model.device == "cpu" or not any(Path(driver).exists() for driver in DRIVERS):
            return "", None, None
        import torch

        if not torch.cuda.is_available():
            return "", None, None
        name = torch.cuda.get_device_name()
        free = torch.cuda.mem_get_info()[0]
        return name, card_of(name) or CARDS["h100"], fit.room_of(free, run.train.memory_gib)
    name = (gpu or "h100").lower()
    if name not in CARDS:
        raise ConfigError(f"--gpu {gpu}: known cards are {', '.join(CARDS)}; for another, give --gpu-memory GIB")
    card = CARDS[name]
    total = (gib or card.gib) * GIB
    shown = name if gib is None else f"{gib:g} GiB" + (f" of an {name}" if gpu else ", at an h100's speed")
    return shown, card, fit.room_of(total - CONTEXT, run.train.memory_gib)


def reckoned(run: config.Run, source: Source, numbers: np.ndarray) -> list[np.ndarray]:
    """Rows as ids without a tokenizer: so many characters make a token, and equal beginnings equal ones."""
    head = np.zeros(int(len(run.prompt.instruction) / CHARACTERS) + TEMPLATE, dtype=np.int32)
    rows = []
    for i in numbers:
        parts = [head, _ids(source.train.questions[i]), _ids(source.train.solutions[i])]
        rows.append(np.concatenate(parts)[: run.prompt.max_length])
    return rows


def _ids(text: str) -> np.ndarray:
    places = (np.arange(int(len(text) / CHARACTERS) + 1) * CHARACTERS).astype(int).tolist()
    pieces = (text[a:b].encode() for a, b in zip(places, [*places[1:], len(text)], strict=True))
    return np.array([zlib.crc32(piece) & 0x7FFFFFFF for piece in pieces], dtype=np.int32)


def look(run: config.Run, source: Source, gpu: str | None, gib: float | None) -> Foreseen | str:
    """`foresee`, or why nothing can be foreseen. Raises ConfigError for a card that is not known."""
    try:
        found = foresee(run, source, gpu, gib)
    except (MissingError, ModelError) as error:
        return f"not foreseen: {error}"
    return found or "planned for GPUs, and there is none here; tell --gpu NAME or --gpu-memory GIB"


def show(found: Foreseen | str, console: Console) -> None:
    """Prints what was foreseen, or why nothing was."""
    if isinstance(found, str):
        console.out(f"memory: {found}", highlight=False)
        return
    chosen, parts = found.fit, found.fit.peak
    names = ("weights", "adapter", "kept", "working", "libraries")
    split = ", ".join(f"{name} {getattr(parts, name) / GIB:.1f}" for name in names)
    verdict = "" if chosen.fits else "; that does not fit: model.base = 'nf4', a lower prompt.max_length or a smaller "
    verdict += "" if chosen.fits else "model takes less"
    for line in (
        f"memory on {found.card} ({found.precision}): {parts.total / GIB:.1f} of {chosen.room / GIB:.1f} GiB "
        f"({split}){verdict}",
        f"  {chosen.budget:,} tokens at once, {chosen.recomputed} of {found.layers} layers computed again; about "
        f"{found.rows_per_second:,.0f} rows/s (tokens reckoned at {CHARACTERS:g} characters)",
    ):
        console.out(line, highlight=False)
