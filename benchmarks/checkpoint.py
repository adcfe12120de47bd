"""What saving costs a run, and what finding its place again costs, on this machine's disk.

    python benchmarks/checkpoint.py [--folder DIR] [--values 42000000] [--steps 1000000]

Saves an adapter of rank 16 on an 8B model (42 M values and two moments of AdamW, 0.5 GB) as the loop does, and times
how long the loop is held, how long the writing beside it takes, and, with `--replica DIR`, the copy. Then goes to step
1,000,000 of a run over 800,000 rows: loads the checkpoint, cuts a metrics.jsonl of that many lines, makes the plan, and
takes the rows that are due. Prints one JSON line.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from veritune import config
from veritune.track import Tracker
from veritune.training import plan
from veritune.training.checkpoint import Saver, load_latest

TEN_MINUTES = 600


def timed(work, *args):
    began = time.perf_counter()
    result = work(*args)
    return result, round(time.perf_counter() - began, 3)


def saving(folder: Path, values: int, replica: Path | None, saves: int = 4) -> dict:
    """Seconds that each save holds the loop, and until it is whole on the disk; the first warms up."""
    width = values // 64
    group = {f"{i}": torch.randn(width) for i in range(64)}
    moments = {f"{i}.{key}": it.clone() for key in ("exp_avg", "exp_avg_sq") for i, it in group.items()}
    saver, held, written, busy = Saver(folder, keep=2, replica=replica), [], [], []
    for step in range(1_000_000 - saves + 1, 1_000_001):
        cpu = time.process_time()
        began = time.perf_counter()
        saver.save(step, {"adapter": group, "optimizer": moments}, {"at": {"done": step}})
        held.append(round(time.perf_counter() - began, 3))
        saver.wait()
        written.append(round(time.perf_counter() - began, 3))
        busy.append(round(time.process_time() - cpu, 3))
    saver.close()
    worst = max(held)
    return {
        "megabytes": round(3 * 4 * 64 * width / 1e6),
        "held_s": held,
        "written_s": written,
        "cpu_s": busy,
        "held_share_of_10_minutes": round(worst / TEN_MINUTES, 5),
        "cpu_share_of_10_minutes": round(max(busy) / TEN_MINUTES, 5),
        **({"longest_with_replica_s": round(saver.seconds, 3)} if replica else {}),
    }


def finding(folder: Path, steps: int, rows: int = 800_000) -> dict:
    """Seconds of each part of finding the place again, all but loading model and data."""
    log = folder / "metrics.jsonl"
    line = '"loss": 0.69314718055994, "lr": 0.0001999999, "grad_norm": 1.2345678, "rows": 16, "seconds": 0.123456789}\n'
    with log.open("w") as file:
        file.writelines(f'{{"step": {step}, {line}' for step in range(1, steps + 151))
    saved, load = timed(load_latest, folder)
    assert saved is not None
    assert saved.step == 1_000_000
    tracker, cut = timed(lambda: Tracker(log, from_step=steps))
    tracker.close()
    rng = np.random.default_rng(0)
    questions, labels = np.arange(rows) // 20, rng.random(rows) < 0.5
    settings = config.Train(epochs=(steps + 1000) * 16 / rows)
    made, planned = timed(plan.make, settings, questions, labels)
    assert len(made) > steps
    due, drawn = timed(made.rows, steps)
    assert len(due) == 16
    return {
        "load_s": load,
        "metrics_s": cut,
        "plan_s": planned,
        "rows_s": drawn,
        "all_s": round(load + cut + planned + drawn, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; by default a new folder under the system's own")
    parser.add_argument("--replica", type=Path, help="a folder on a drive to copy to")
    parser.add_argument("--values", type=int, default=42_000_000)
    parser.add_argument("--steps", type=int, default=1_000_000)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        result = {"saving": saving(folder, args.values, args.replica), "finding": finding(folder, args.steps)}
        print(json.dumps(result))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
