"""What a tracker costs a step: a tiny model trained with and without trackers, one run after another in turns.

usage: python benchmarks/tracking.py [ROUNDS]

Prints, for no tracker and for each: the median time of a step over all rounds, the time that the training process's
main thread computed in a step (which other work on the machine does not change), and what the run took to close.
"""

import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from veritune import config
from veritune.data import dataset, generate
from veritune.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_models import write_folder

KINDS = ([], ["tensorboard"], ["trackio"], ["wandb"])


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        generate.write(folder / "rows.jsonl", 150, seed=1)
        quiet = Console(file=io.StringIO())
        dataset.prepare([str(folder / "rows.jsonl")], folder / "prepared", config.Prepare(validation_rows=40), quiet)
        model = write_folder(folder / "model")
        wall: dict[str, list[float]] = {}
        computed: dict[str, list[float]] = {}
        for at in range(rounds):
            for to in KINDS:
                name = "+".join(to) or "none"
                values = {
                    "out": str(folder / f"run-{at}-{name}"),
                    "data": {"path": str(folder / "prepared")},
                    "model": {"path": str(model), "base": "fp32", "device": "cpu"},
                    "prompt": {"max_length": 512},
                    "train": {"batch_size": 8, "epochs": 3.0},
                    "validation": {"every": 10_000},
                    "checkpoint": {"every": 10_000},
                    "track": {"to": to},
                }
                run = config.build(config.Run, values, "benchmark")
                before = time.thread_time()
                train(run, quiet)
                used = time.thread_time() - before
                lines = [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]
                seconds = [line["seconds"] for line in lines if "seconds" in line]
                wall.setdefault(name, []).extend(seconds[10:])
                computed.setdefault(name, []).append(used / len(seconds))
    for name, seconds in wall.items():
        print(
            f"{name:12} step {statistics.median(seconds) * 1e3:7.2f} ms over {len(seconds):,}; computed by the main "
            f"thread {statistics.median(computed[name]) * 1e3:7.2f} ms"
        )


main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
