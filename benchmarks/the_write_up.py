"""The competition entry's way from end to end: docs/the-write-up.md as one resumable command.

    python benchmarks/the_write_up.py --data ../shared/data --model SMOLLM2.gguf --out /tmp/write-up --at-once 6
    python benchmarks/the_write_up.py --tiny --model SMOLLM2.gguf --out /tmp/dry     # generated rows, a CPU, no claims

Prepare, a sweep of 31 random configurations on 10,000 rows, its best run file trained on cumulative slices, evaluation
on other questions, a submission. What is done already is not done again. Prints a small table, writes results.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

# Batches of the entry's search, larger: a GPU shared by several small trials waits for Python between small steps.
SPACE = """[sweep.space]
train.lr = { log = [1e-6, 5e-1] }
train.optimizer = { choice = ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "lion_8bit"] }
train.schedule = { choice = ["linear", "cosine", "cosine_with_restarts"] }
train.max_grad_norm = { range = [0.3, 2.0] }
train.warmup_ratio = { range = [0.0, 0.2] }
train.weight_decay = { range = [0.0, 0.1] }
train.batch_size = { choice = [16, 32, 64] }
train.gradient_accumulation = { choice = [1, 2] }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="train.jsonl.gz and validation.jsonl.gz are in it")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--trials", type=int, default=31)
    parser.add_argument("--rows", type=int, default=10_000, help="rows of a trial")
    parser.add_argument("--ends", default="[20000, 40000]", help="where the cumulative slices end")
    parser.add_argument("--validation-rows", type=int, default=500)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--tiny", action="store_true", help="generated rows and small sizes")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    times: dict[str, float] = json.loads((o.out / "times.json").read_text()) if (o.out / "times.json").exists() else {}

    def veritune(stage: str, *arguments: str, again: bool = False) -> None:
        """Runs one command of the product, unless it was through before."""
        if stage in times and not again:
            return
        print("veritune", *arguments, flush=True)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "veritune", *arguments], check=True)
        times[stage] = times.get(stage, 0.0) + time.perf_counter() - started
        (o.out / "times.json").write_text(json.dumps(times))

    if o.tiny:
        from veritune.data import generate

        o.trials, o.rows, o.ends, o.validation_rows, o.max_length, o.data = 3, 16, "[16, 32]", 8, 512, o.out
        if not (o.out / "train.jsonl").exists():
            generate.write(o.out / "train.jsonl", 20, seed=1)
            generate.write(o.out / "validation.jsonl", 4, seed=2)
    end = ".jsonl" if o.tiny else ".jsonl.gz"
    source, held = (str(o.data / f"{name}{end}") for name in ("train", "validation"))
    run = o.out / "run.toml"
    run.write_text(
        f'out = "{o.out / "run"}"\n[data]\npath = "{o.out / "prepared"}"\n[model]\npath = "{o.model}"\n'
        f"[prompt]\nmax_length = {o.max_length}\n[validation]\nrows = {o.validation_rows}\n"
        f"[sweep]\ntrials = {o.trials}\nrows = {o.rows}\nat_once = {o.at_once}\n{SPACE}"
    )
    rows = "16" if o.tiny else "1000"
    veritune("prepare", "prepare", source, "--out", str(o.out / "prepared"), "--validation-rows", rows)
    veritune("sweep", "sweep", str(run))
    best = o.out / "run-sweep" / "best.toml"
    final = o.out / "cumulative.toml"
    final.write_text(best.read_text() + f'\n[strategy]\nkind = "cumulative"\nends = {o.ends}\n')
    veritune("train", "train", str(final))
    figures = o.out / "evaluation.json"
    veritune("evaluate", "evaluate", str(o.out / "run" / "best"), held, "--out", str(figures))
    veritune("submit", "submit", str(o.out / "run" / "best"), held, "--out", str(o.out / "submission.csv"))
    sweep = json.loads((o.out / "run-sweep" / "results.json").read_text())
    measured = json.loads(figures.read_text())["adapter"]
    result = {"times": times, "states": sweep["states"], "best": sweep["best"], "evaluation": measured}
    (o.out / "results.json").write_text(json.dumps(result, indent=1))
    low, high = measured["accuracy_interval"] or (float("nan"),) * 2
    print(f"sweep: {sweep['states']}, best {sweep['best']['params']}: validation AUROC {sweep['best']['auroc']}")
    print(f"{measured['rows']} rows: accuracy {measured['accuracy']:.4f} ({low:.3f} to {high:.3f}), "
          f"AUROC {measured['auroc']:.4f}")  # fmt: skip
    print("seconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in times.items()))


if __name__ == "__main__":
    main()
