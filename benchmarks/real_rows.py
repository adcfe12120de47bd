"""The main job on real rows: prepare, train, evaluate on other questions and on unseen solvers; a table of figures.

    python benchmarks/real_rows.py --data ../shared/data --model WEIGHTS.gguf --out /tmp/real [--at-once 4]

Trains one adapter for each pair of answer words and each number of solutions of a question in a step. `--at-once`
runs share one GPU, so examples/s is then that of a run among others.
"""

import argparse
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WORDS = (("True", "False"), ("Yes", "No"))
TOGETHER = (8, 1)


def veritune(*arguments: str, log: Path) -> None:
    """Runs one command of the product."""
    with log.open("a") as out:
        subprocess.run([sys.executable, "-m", "veritune", *arguments], check=True, stdout=out, stderr=out)


def one(words: tuple[str, str], together: int, options: argparse.Namespace) -> dict:
    """Trains and measures one adapter."""
    name = f"{words[0].lower()}-{together}"
    run, log = options.out / name, options.out / f"{name}.log"
    recipe = options.out / f"{name}.toml"
    rows = f"rows = {options.rows}\n" if options.rows else ""
    recipe.write_text(
        f'out = "{run}"\n[data]\npath = "{options.out / "prepared"}"\n{rows}[model]\npath = "{options.model}"\n'
        f"[prompt]\nanswers = {json.dumps(words)}\nmax_length = 1024\n[train]\nlr = {options.lr}\nbatch_size = "
        f"{options.batch}\nper_question = {together}\n[validation]\nevery = {options.every}\nrows = 500\n"
        f"[checkpoint]\nevery = {options.every}\n"
    )
    veritune("train", str(recipe), log=log)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = [step for step in steps if "seconds" in step][20:]
    result = {
        "answers": "/".join(words),
        "per_question": together,
        "steps": len(timed) + 20,
        "examples/s": sum(s["rows"] for s in timed) / max(sum(s["seconds"] for s in timed), 1e-9),
    }
    for file in options.measure:
        figures = options.out / f"{name}-{file}.json"
        flags = ("--by", "solver") if file == "unseen_solvers" else ()
        flags += ("--baseline",) if together == TOGETHER[0] else ()
        veritune(
            "evaluate",
            str(run / "adapter"),
            str(options.data / f"{file}.jsonl.gz"),
            "--out",
            str(figures),
            *flags,
            log=log,
        )
        measured = json.loads(figures.read_text())
        result[file] = measured["adapter"]
        if measured.get("baseline"):
            base = measured["baseline"]
            print(f"{name} {file}: untrained accuracy {base['accuracy']:.4f}, AUROC {base['auroc']:.4f}", flush=True)
    print(name, "done", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--every", type=int, default=400)
    parser.add_argument("--only", help="one run by its name, such as true-8")
    parser.add_argument("--measure", nargs="*", default=["validation", "unseen_solvers"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    source, log = str(options.data / "train.jsonl.gz"), options.out / "prepare.log"
    veritune("prepare", source, "--out", str(options.out / "prepared"), "--validation-rows", "1000", log=log)
    grid = [
        pair for pair in itertools.product(WORDS, TOGETHER) if options.only in (None, f"{pair[0][0].lower()}-{pair[1]}")
    ]
    with ThreadPoolExecutor(options.at_once) as pool:
        results = list(pool.map(lambda pair: one(*pair, options), grid))
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    print(
        f"{'answers':12} {'together':8} {'ex/s':>7}"
        + "".join(f" {f + ' accuracy':>34} {'AUROC':>6}" for f in options.measure)
    )
    for r in results:
        line = f"{r['answers']:12} {r['per_question']:8} {r['examples/s']:7.0f}"
        for file in options.measure:
            f = r[file]
            low, high = f["accuracy_interval"]
            line += f" {f['accuracy']:18.4f} ({low:.3f} to {high:.3f}) {f['auroc']:6.4f}"
        print(line)


if __name__ == "__main__":
    main()
