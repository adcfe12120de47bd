"""Does training on slices one after another forget, and which strategy should be the default?

    python benchmarks/forgetting.py --data ../shared/data --model WEIGHTS.gguf --out /tmp/forgetting --at-once 4
    python benchmarks/forgetting.py --out /tmp/forgetting --report

Trains each strategy with each seed on the same slices, evaluates each adapter on `validation.jsonl.gz` and
`unseen_solvers.jsonl.gz`, and writes one line a run to OUT/results.jsonl; what is there is not run again, and a run
that was stopped goes on. The deciding comparisons come first. `--at-once` processes share the device, or the `--gpus`
devices, each loads the base and compiles its layers once. `=cumulative` strategies get as many row presentations as
cumulative. Tables at the end: means over seeds, and paired tests against sequential and cumulative (bootstrap over
questions, all seeds of a question together). A run's seconds are those of its steps while it shares the device.
"""

import argparse
import gc
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

FILES = ("validation", "unseen_solvers")
# In the order of what decides most. The first group runs with every seed before the second begins.
DECIDING = ("sequential", "cumulative", "stream", "sequential=cumulative", "stream=cumulative", "replay-10")
FURTHER = ("sequential-kept", "replay-25", "replay-5")


def strategy_of(name: str, sizes: list[int]) -> dict[str, Any]:
    """The [strategy] settings of a name, besides the slices."""
    kind, _, like = name.partition("=")
    kind, _, option = kind.partition("-")
    found: dict[str, Any] = {"kind": kind}
    if kind == "replay":
        found["replay_ratio"] = int(option) / 100
    elif option == "kept":
        found["optimizer_state"] = "keep"
    if like == "cumulative":
        found["presentations"] = int(np.cumsum(sizes).sum())
    return found


def jobs_of(o: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(run's name, strategy, seed), what decides first."""
    out = []
    for group in (DECIDING, FURTHER, [name for name in o.strategies if name not in DECIDING + FURTHER]):
        out += [(f"{name}-{seed}", name, seed) for seed in o.seeds for name in group if name in o.strategies]
    return out


def run_of(o: argparse.Namespace, name: str, strategy: str, seed: int, sizes: list[int] | None = None) -> Any:
    """The settings of one run."""
    from veritune import config

    slices = {"slices": o.slices, "column": o.column, "slice_rows": o.slice_rows, "probe_rows": o.probe_rows}
    if sizes is not None:
        slices |= strategy_of(strategy, sizes)
    values = {
        "out": str(o.out / name),
        "data": {"path": str(o.prepared)},
        "model": {"path": str(o.model), "base": o.base, "device": o.device},
        "prompt": {"max_length": o.max_length},
        "lora": {"rank": o.rank, "alpha": 2 * o.rank},
        "train": {
            "lr": o.lr,
            "batch_size": o.batch,
            "per_question": o.per_question,
            "seed": seed,
            "compile": not o.no_compile,
            # Three processes keep a GPU busy without recorded passes, which cost seconds and padding.
            "cuda_graphs": o.at_once < 3 * o.gpus,
        },
        "strategy": slices,
        "validation": {"every": 10**9, "rows": o.validation_rows},
        "checkpoint": {"every": 10**9, "keep": 1},
    }
    return config.build(config.Run, values, name)


def slice_sizes(o: argparse.Namespace) -> list[int]:
    """Rows of each slice, which are the same for every strategy and seed but for probes held out of them."""
    import dataclasses

    from veritune.training import feed

    run = run_of(o, "sizes", "sequential", 0)
    kind = dataclasses.replace(run.strategy, kind="sequential")
    return [len(part.rows) for part in feed.read(dataclasses.replace(run, strategy=kind)).slices]


def held_out(o: argparse.Namespace, file: str) -> tuple[Any, np.ndarray]:
    """The rows of a file, at most `--evaluate-per-question` of each question, and their questions' numbers."""
    import polars as pl

    from veritune.quality.metrics import group_ids

    table = pl.read_ndjson(o.data / f"{file}.jsonl.gz").select("qid", "question", "solution", "is_correct")
    table = table.sample(fraction=1, shuffle=True, seed=0).filter(
        pl.int_range(pl.len()).over("qid") < o.evaluate_per_question
    )
    table = table.sort("qid", maintain_order=True)
    return table, group_ids(table["qid"].to_list())


def work(o: argparse.Namespace, sizes: list[int], jobs: Any, results: Any, number: int) -> None:
    """One process: loads the base once and trains one job after another."""
    if o.gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % o.gpus)
    from rich.console import Console

    from veritune import config
    from veritune.model import load
    from veritune.model.verifier import score_ids
    from veritune.training.trainer import Training, train

    base = load.load_base(config.Model(path=str(o.model), base=o.base, device=o.device))
    tables = {file: held_out(o, file)[0] for file in FILES}
    encoded: dict[str, list[np.ndarray]] = {}
    with (o.out / f"worker-{number}.log").open("a") as log:
        console = Console(file=log, width=160)
        while True:
            try:
                name, strategy, seed = jobs.get_nowait()
            except queue.Empty:
                return
            if o.seconds and time.time() > o.started + o.seconds:
                return

            def evaluate(state: Training, folder: Path = o.out / name) -> None:
                state.model.eval()
                scores = {}
                for file, table in tables.items():
                    if file not in encoded:
                        encoded[file], _ = state.encoder.rows(table["question"].to_list(), table["solution"].to_list())
                    scores[file] = score_ids(
                        state.model,
                        encoded[file],
                        state.encoder.frame.answer_ids,
                        base.device,
                        state.budget,
                        state.way,
                    )
                np.savez(folder / "scores.npz", **scores)  # pyright: ignore[reportArgumentType]

            started = time.perf_counter()
            try:
                train(run_of(o, name, strategy, seed, sizes), console, base, evaluate)
                results.put((name, strategy, seed, time.perf_counter() - started, None))
            except Exception:  # the other jobs go on
                results.put((name, strategy, seed, time.perf_counter() - started, traceback.format_exc()))
            gc.collect()  # recorded passes hold memory of the GPU


def figures(o: argparse.Namespace, name: str, strategy: str, seed: int, wall: float) -> dict[str, Any]:
    """What one run has to say: a line of results.jsonl."""
    from veritune.quality.metrics import measure, plain

    folder = o.out / name
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "loss" in line]
    forgetting = json.loads((folder / "forgetting.json").read_text())
    scores = np.load(folder / "scores.npz")
    out = {
        "name": name,
        "strategy": strategy,
        "seed": seed,
        "presentations": sum(line["rows"] for line in steps),
        "step_seconds": sum(line["seconds"] for line in steps),
        "wall_seconds": wall,
        "at_once": o.at_once,
        **{key: forgetting[key] for key in ("accuracy", "average_forgetting", "backward_transfer")},
    }
    for file in FILES:
        table, groups = held_out(o, file)
        out[file] = measure(table["is_correct"].to_numpy().astype(bool), scores[file], groups, resamples=500)
    return plain(out)


def results_of(o: argparse.Namespace) -> list[dict[str, Any]]:
    file = o.out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run_all(o: argparse.Namespace) -> None:
    """Runs what is not in results.jsonl yet."""
    done = {line["name"] for line in results_of(o)}
    todo = [job for job in jobs_of(o) if job[0] not in done]
    sizes = slice_sizes(o)
    print(f"{len(todo)} runs to do, {len(done)} done; slices of {sizes} rows", flush=True)
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    for job in todo:
        jobs.put(job)
    time.sleep(0.2)  # until the queue's thread has written them
    workers = [
        context.Process(target=work, args=(o, sizes, jobs, results, number))
        for number in range(min(o.at_once, len(todo)))
    ]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers) or not results.empty():
            try:
                name, strategy, seed, wall, problem = results.get(timeout=0.5)
            except queue.Empty:
                continue
            if problem:
                print(f"{name} failed:\n{problem}", flush=True)
                continue
            line = figures(o, name, strategy, seed, wall)
            with (o.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            held = line["validation"]
            print(
                f"{name}: {line['presentations']:,} rows, {line['step_seconds']:.0f} s of steps, {wall:.0f} s in all; "
                f"validation accuracy {held['accuracy']:.3f}, AUROC {held['auroc']:.3f}; forgotten "
                f"{line['average_forgetting']['trained']:+.3f}",
                flush=True,
            )
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def pooled(o: argparse.Namespace, lines: list[dict[str, Any]], file: str) -> tuple[np.ndarray, ...]:
    """Labels, P(correct), its rank within the run, and questions of all runs' rows, one run after another."""
    table, groups = held_out(o, file)
    p = [np.load(o.out / line["name"] / "scores.npz")[file] for line in lines]
    ranks = [(np.searchsorted(np.sort(it), it, "left") + np.searchsorted(np.sort(it), it, "right")) / 2 for it in p]
    labels = np.tile(table["is_correct"].to_numpy().astype(bool), len(lines))
    return labels, np.concatenate(p), np.concatenate(ranks), np.tile(groups, len(lines))


def report(o: argparse.Namespace) -> None:
    """Prints the tables."""
    from veritune.quality.metrics import intervals, paired

    lines = results_of(o)
    names = [
        name for name in dict.fromkeys(job[1] for job in jobs_of(o)) if any(it["strategy"] == name for it in lines)
    ]
    by = {name: sorted((it for it in lines if it["strategy"] == name), key=lambda it: it["seed"]) for name in names}
    mean = lambda it, *keys: float(np.mean([_at(line, keys) for line in it]))  # noqa: E731
    print(
        "\n| strategy | seeds | rows shown | step seconds | "
        + " | ".join(f"{file}: accuracy (95 %) | AUROC" for file in FILES)
        + " | forgotten: trained, held out | backward transfer |"
    )
    print("|" + "---|" * (6 + 2 * len(FILES)))
    for name, it in by.items():
        cells = [name, str(len(it)), f"{mean(it, 'presentations'):,.0f}", f"{mean(it, 'step_seconds'):.1f}"]
        for file in FILES:
            labels, p, _, groups = pooled(o, it, file)
            low, high = intervals(labels, p, groups, resamples=1000)["accuracy"] or (float("nan"),) * 2
            cells += [f"{mean(it, file, 'accuracy'):.4f} ({low:.3f} to {high:.3f})", f"{mean(it, file, 'auroc'):.4f}"]
        cells.append(", ".join(f"{mean(it, 'average_forgetting', probe):+.4f}" for probe in ("trained", "held_out")))
        cells.append(", ".join(f"{mean(it, 'backward_transfer', probe):+.4f}" for probe in ("trained", "held_out")))
        print("| " + " | ".join(cells) + " |")
    print("\nPaired, on the same rows, questions and seeds: the first minus the second (95 %), p.")
    for other in ("sequential", "cumulative"):
        for name in names:
            common = {line["seed"] for line in by[name]} & {line["seed"] for line in by.get(other, [])}
            if name == other or not common or (other == "cumulative" and name == "sequential"):
                continue
            for file in FILES:
                a, b = (pooled(o, [it for it in by[key] if it["seed"] in common], file) for key in (other, name))
                found = {
                    "accuracy": paired(a[0], a[1], b[1], a[3], resamples=1000)["accuracy"],
                    "AUROC": paired(a[0], a[2], b[2], a[3], resamples=1000)["auroc"],
                }
                told = []
                for figure, it in found.items():
                    low, high = it.interval or (float("nan"),) * 2
                    told.append(
                        f"{figure} {it.value:+.4f} ({low:+.4f} to {high:+.4f}), p {it.p_value or float('nan'):.3f}"
                    )
                print(f"- {name} - {other}, {file}, seeds {sorted(common)}: {'; '.join(told)}")
    print("\nForgetting matrices: accuracy after each phase (a line) on each slice, mean over seeds.")
    for name, it in by.items():
        for probe in ("trained", "held_out"):
            matrix = np.mean([line["accuracy"][probe] for line in it], axis=0)
            print(f"{name}, {probe}:\n" + "\n".join("   " + " ".join(f"{x:.3f}" for x in row) for row in matrix))


def _at(line: dict[str, Any], keys: tuple[str, ...]) -> float:
    found: Any = line
    for key in keys:
        found = found[key]
    return float("nan") if found is None else found


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options, for a benchmark of such runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--prepared", type=Path, help="a prepared folder; default: OUT/prepared, made from --data")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--base", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--slice-rows", type=int, default=12_000)
    parser.add_argument("--column", help="slices by a column, such as dataset or solver, instead of at random")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", default=[*DECIDING, *FURTHER])
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="start no run after so many seconds")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--per-question", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--probe-rows", type=int, default=200)
    parser.add_argument("--validation-rows", type=int, default=400)
    parser.add_argument("--evaluate-per-question", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options as given, with a folder to write to and the rows prepared if something is to run."""
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    o.prepared = o.prepared or o.out / "prepared"
    o.started = time.time()
    if not o.report and o.model is None:
        parser.error("--model is needed")
    if not o.report and not (o.prepared / "manifest.json").exists():
        command = ["prepare", str(o.data / "train.jsonl.gz"), "--out", str(o.prepared), "--validation-rows", "1000"]
        subprocess.run([sys.executable, "-m", "veritune", *command], check=True)
    return o


def main() -> None:
    o = parsed(parser_of(__doc__))
    if not o.report:
        run_all(o)
    report(o)


if __name__ == "__main__":
    main()
