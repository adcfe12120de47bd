"""What ASHA would have cost and found, replayed over the recorded curves of trials that were all trained to their end.

    python benchmarks/asha_replay.py runs/NAME-sweep/trials.jsonl [--seeds 5] [--reduction 3]

The pool must come from a sweep without a pruner. For each seed its trials come in another random order; each is given
to Optuna's own ASHA pruner validation by validation, and costs its seconds up to where it was stopped. Prints, against
the whole pool: the share of the best validation AUROC that the trial chosen by ASHA (lowest loss) reaches, and the
share of the time. Diverged trials cost what they cost in the pool, in both. Needs the extra `sweep`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna


def figure(point: dict[str, Any], by: str) -> float:
    """What trials are compared by at a validation, the less the better."""
    return -point["auroc"] if by == "auroc" else point["loss"]


def replay(pool: list[dict[str, Any]], order: list[int], reduction: int, rungs: int, by: str) -> tuple[float, float]:
    """AUROC of the trial that ASHA chooses, and the seconds it spends."""
    study = optuna.create_study(
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=reduction)
    )
    spent, best = 0.0, (float("inf"), float("nan"))
    for number in order:
        trial, recorded = study.ask(), pool[number]
        stopped = False
        for point in recorded["curve"]:
            rung = int(rungs * point["step"] / recorded["steps"] + 1e-9)
            trial.report(figure(point, by), rung)
            if rung < rungs and trial.should_prune():
                spent, stopped = spent + point["seconds"], True
                break
        if not stopped:
            spent += recorded["seconds"] or 0.0
            if recorded["state"] == "complete":
                best = min([best, *((figure(point, by), point["auroc"]) for point in recorded["curve"])])
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return best[1], spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--reduction", type=int, default=3)
    parser.add_argument("--rungs", type=int, default=9, help="the sweep's `validations`")
    parser.add_argument("--by", choices=("loss", "auroc"), default="loss", help="what trials are compared by")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pool = [json.loads(text) for text in options.trials.read_text().splitlines()]
    if not all(trial["state"] in ("complete", "diverged", "failed") for trial in pool):
        parser.error(f"{options.trials}: the pool must be complete (or diverged) trials of a sweep without pruner")
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
