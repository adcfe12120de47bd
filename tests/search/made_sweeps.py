"""Small sweeps: rows whose label one word tells, a tiny model, and boards that need no training."""

import json
import random
from pathlib import Path
from typing import Any

from veritune import config
from veritune.data import dataset
from veritune.search import space
from veritune.search.board import Board, open_board

AXES = {"train.lr": {"log": [1e-4, 1e-1]}, "train.batch_size": {"choice": [8, 16]}, "lora.rank": {"range": [1, 8]}}


def prepared(folder: Path, questions: int = 60) -> Path:
    rng = random.Random(0)
    rows = [
        {"question": f"{i}?", "solution": f"{rng.randrange(1000)} {word * 3}", "is_correct": word == "pen "}
        for i in range(questions)
        for word in ("pen ", "cup ")
    ]
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset.prepare([str(folder / "rows.jsonl")], folder / "prepared", config.Prepare(validation_rows=16))
    return folder / "prepared"


def run_values(out: Path, data: Path, model: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "data": {"path": str(data)},
        "model": {"path": str(model), "base": "fp32", "device": "cpu"},
        "prompt": {"max_length": 160},
        "train": {"batch_size": 8},
    }


def board(folder: Path, *, join: bool = False, **settings: Any) -> Board:
    """A board whose trials are numbers only."""
    chosen = config.build(config.Sweep, {"trials": 6, "validations": 4, **settings}, "test")
    axes = space.read(AXES, config.Run(out="x"), "test")
    return open_board(chosen, axes, folder, {"seed": chosen.seed}, join=join)


def point(step: int, loss: float = 0.5, auroc: float = 0.7) -> dict[str, Any]:
    return {"step": step, "rows": step * 8, "seconds": float(step), "loss": loss, "auroc": auroc, "accuracy": 0.6}
