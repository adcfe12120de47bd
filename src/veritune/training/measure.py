"""What is measured while a run trains: the validation rows, and after each phase the probes of every slice."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..model import load
from ..model.compiled import uncompiled
from ..model.verifier import score_ids
from ..quality import forgetting, metrics
from . import runfolder
from .feed import Rows
from .plan import Phase
from .session import Session, Stop

if TYPE_CHECKING:
    from .state import Training

FORGETTING = "forgetting.json"


def validate(state: "Training", stop: Session) -> tuple[dict[str, Any], np.ndarray]:
    """Figures on the run's validation rows, and P(correct) of each. `loss` is the log loss with both labels weighing as
    much as in train, so that it ranks adapters, where labels have another share, by what they have learnt and not by
    that share. It is over the two answer words, a step's over the whole vocabulary. Raises Stop."""
    held = state.validation
    p = _scores(state, held, stop)

    def figures() -> dict[str, Any]:
        loss = metrics.log_loss(held.labels, p, state.about.share)
        return {**metrics.measure(held.labels, p, held.groups), "loss": loss}

    return state.world.from_first(figures), p


def probe(state: "Training", phase: Phase, validation: dict[str, Any], stop: Session) -> dict[str, Any]:
    """Accuracy and AUROC on both probes of each slice after a phase. Raises Stop."""

    def figures(rows: Rows) -> tuple[float, float]:
        p = _scores(state, rows, stop)
        return metrics.accuracy(rows.labels, p), metrics.auroc(rows.labels, p)

    trained = [figures(state.train.take(it.trained)) for it in state.source.slices]
    held_out = []
    for it in state.source.slices:
        if it.held_out is None:
            held_out.append((validation["accuracy"], validation["auroc"]))
        else:
            source = state.train if it.held_out_from == "train" else state.source.held
            held_out.append(figures(source.take(it.held_out)))
    return {
        "phase": phase.name,
        "slice": phase.slice,
        "cooldown": phase.kind == "cooldown",
        "rows": {"trained": [len(it.trained) for it in state.source.slices], "held_out": held_out_rows(state)},
        **{
            name: {"accuracy": [accuracy for accuracy, _ in found], "auroc": [auroc for _, auroc in found]}
            for name, found in (("trained", trained), ("held_out", held_out))
        },
    }


def held_out_rows(state: "Training") -> list[int]:
    """Rows of each slice's held-out probe."""
    validation = len(state.validation.labels)
    return [validation if it.held_out is None else len(it.held_out) for it in state.source.slices]


def write_forgetting(state: "Training", folder: Path) -> dict[str, Any]:
    """Writes forgetting.json from what metrics.jsonl holds of the phases so far, and returns it."""
    slices = [
        {
            "name": it.name,
            "rows": len(it.rows),
            "trained_rows": len(it.trained),
            "held_out_rows": held_out,
            "held_out_from": it.held_out_from,
        }
        for it, held_out in zip(state.source.slices, held_out_rows(state), strict=True)
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = forgetting.report(slices, [line for line in lines if "probes" in line])
    runfolder.write_json(folder / FORGETTING, found)
    return found


def _scores(state: "Training", rows: Rows, stop: Session) -> np.ndarray:
    """P(correct) of rows, float64 [rows], of which each rank scores a share. Raises Stop, on all ranks, when one is to
    stop."""

    def progress(rows: int) -> None:
        stop.check()
        if stop.asked is not None:
            raise Stop(stop.asked)

    state.model.eval()
    ids, _ = state.encoder.rows(rows.questions, rows.solutions)
    share = state.world.share(ids)
    mine, answers, device = [ids[i] for i in share], state.encoder.frame.answer_ids, state.base.device
    try:
        with uncompiled(state.model):
            scores = score_ids(state.model, mine, answers, device, state.budget, state.way, progress)
    except Stop:
        scores = None
    load.set_training(state.model, recomputed=state.recomputed)
    p = np.empty(len(ids))
    for numbers, found in state.world.gather((share, scores)):
        if found is None:
            stop.agree(True)
            raise Stop(stop.reason)
        p[numbers] = found
    return p
