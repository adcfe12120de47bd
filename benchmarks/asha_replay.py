"""What ASHA would have cost and found, replayed over the recorded curves of trials that were all trained to their end.

    python benchmarks/asha_replay.py runs/NAME-sweep/trials.jsonl [--seeds 5] [--reduction 4]

The pool must come from a sweep without a pruner. For each seed its trials come in another random order, and one worker
takes them as the sweep's own rule (`veritune.search.asha`) says; each costs its seconds up to where it pauses for good.
Prints, against the whole pool: the share of the best validation AUROC that the trial chosen at the end reaches, and the
share of the time. A diverged trial costs nothing more from where it pauses. Loading, and taking a trial up again, cost
nothing here. Needs the extra `sweep`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from veritune.search import asha


def figure(point: dict[str, Any], by: str) -> float:
    """What complete trials are compared by at a validation, the less the better."""
    return -point["auroc"] if by == "auroc" else point["loss"]


def replay(
    pool: list[dict[str, Any]], order: list[int], reduction: int, validations: int, by: str
) -> tuple[float, float]:
    """AUROC of the trial that is chosen at the end, and the seconds that all take."""
    at, begun, seconds = asha.rungs(validations, reduction), {}, {}
    while True:
        more = len(begun) < len(pool)
        number = asha.choose(list(begun.values()), reduction, more=more)
        if number is None and not more:
            break
        number = order[len(begun)] if number is None else number
        begun[number], seconds[number] = go_on(pool[number], number, begun.get(number), at, validations)
    complete = [point for number, it in begun.items() if it.state == "complete" for point in pool[number]["curve"]]
    return min(complete, key=lambda point: figure(point, by))["auroc"], sum(seconds.values())


def go_on(
    recorded: dict[str, Any], number: int, before: asha.Standing | None, at: list[int], validations: int
) -> tuple[asha.Standing, float]:
    """A trial after its next rung, or at its end, and the seconds it has taken until there."""
    reached = list(before.reached) if before else []
    goal = len(reached) + 1
    for point in recorded["curve"]:
        behind = asha.validated(point["step"], recorded["steps"], validations)
        reached = asha.reach(reached, at, behind, point)
        if len(reached) >= goal and point["step"] < recorded["steps"]:
            return asha.Standing(number, "paused", reached), point["seconds"]
    state = "complete" if recorded["state"] == "complete" else "broken"
    return asha.Standing(number, state, reached), recorded["seconds"] or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--reduction", type=int, default=4)
    parser.add_argument("--rungs", type=int, default=9, help="the sweep's `validations`")
    by = "what the best of the complete trials is chosen by (the sweep: loss)"
    parser.add_argument("--by", choices=("loss", "auroc"), default="loss", help=by)
    options = parser.parse_args()
    pool = [json.loads(text) for text in options.trials.read_text().splitlines()]
    if not all(trial["state"] in ("complete", "diverged", "failed") for trial in pool):
        parser.error(f"{options.trials}: the pool must be complete (or diverged) trials of a sweep without pruner")
    points = [point for trial in pool for point in trial["curve"]]
    if options.by == "loss" and not all("loss" in point for point in points):
        parser.error(f"{options.trials}: its curves hold the plain log loss only, which ranks nothing; use --by auroc")
    for point in points:
        point.setdefault("loss", float("inf"))
    best = max(point["auroc"] for trial in pool if trial["state"] == "complete" for point in trial["curve"])
    total = sum(trial["seconds"] or 0.0 for trial in pool)
    print(f"{len(pool)} trials, best validation AUROC {best:.4f}, {total:.0f} s in all")
    shares = []
    for seed in range(options.seeds):
        order = np.random.default_rng(seed).permutation(len(pool)).tolist()
        auroc, spent = replay(pool, order, options.reduction, options.rungs, options.by)
        shares.append((auroc / best, spent / total))
        print(f"seed {seed}: AUROC {auroc:.4f}, {auroc / best:.1%} of the best, in {spent / total:.1%} of the time")
    quality, time = np.array(shares).T
    print(f"mean {quality.mean():.1%} (worst {quality.min():.1%}) in {time.mean():.1%} (worst {time.max():.1%})")


if __name__ == "__main__":
    main()
