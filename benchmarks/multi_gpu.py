"""Speed of `veritune train --gpus N` for several N, side by side on the same rows: examples/s, and the losses beside
those of one GPU.

    python benchmarks/multi_gpu.py --model WEIGHTS --out /tmp/multi [--data ROWS] [--gpus 1 2 4] [--examples 512]
    python benchmarks/multi_gpu.py --shape 8b --tokenizer LLAMA3_FOLDER --out /tmp/multi ...

The step has the same `--examples` rows for every N, as in the product. Weights of a shape are random and written to
OUT/model once (8b: 16 GB); ROWS is what `veritune prepare` takes, generated problems by default. Without a GPU, N
processes on the CPU. A table, and OUT/results.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

SKIPPED = 6
"""Steps before the clock counts: kernels are compiled for the first sizes, caches are cold."""


def veritune(*arguments: str, log: Path) -> None:
    """Runs one command of the product."""
    with log.open("a") as out:
        done = subprocess.run([sys.executable, "-m", "veritune", *arguments], stdout=out, stderr=out)
    if done.returncode:
        sys.exit(f"veritune {' '.join(arguments)} failed ({done.returncode}):\n{log.read_text()[-3000:]}")


def random_model(shape: str, tokenizer: Path, folder: Path) -> Path:
    """A model folder with random weights of a shape and Llama 3's tokenizer."""
    import torch
    import workload
    from train_speed import random_base
    from transformers import PreTrainedTokenizerFast

    if not (folder / "config.json").is_file():
        words = PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer / "tokenizer.json"), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
        )
        words.chat_template = workload.LLAMA3
        words.save_pretrained(folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        random_base(shape, device, "bf16").model.save_pretrained(folder)
    return folder


def one(gpus: int, model: str, options: argparse.Namespace) -> dict:
    """Trains on N GPUs and reads what the run wrote."""
    run, recipe = options.out / f"gpus-{gpus}", options.out / f"gpus-{gpus}.toml"
    recipe.write_text(
        f'out = "{run}"\n[data]\npath = "{options.out / "prepared"}"\nrows = {options.examples * options.steps}\n'
        f'[model]\npath = "{model}"\nbase = "{options.base}"\n[prompt]\nmax_length = 1024\n[train]\n'
        f"batch_size = {options.examples}\nper_question = {options.together}\n[validation]\nevery = 100000\nrows = 64\n"
        "[checkpoint]\nevery = 100000\n"
    )
    veritune("train", str(recipe), "--gpus", str(gpus), log=options.out / f"gpus-{gpus}.log")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    timed = steps[SKIPPED:]
    machine = json.loads((run / "status.json").read_text())["sessions"][-1]["machine"]
    return {
        "gpus": gpus,
        "device": machine["device"],
        "examples/s": statistics.median(step["rows"] / step["seconds"] for step in timed),
        "slowest and fastest step": [f(step["rows"] / step["seconds"] for step in timed) for f in (min, max)],
        "seconds a step": statistics.median(step["seconds"] for step in timed),
        "losses": [step["loss"] for step in steps],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, hub id or .gguf")
    parser.add_argument("--shape", default="8b", help="random weights of this shape, where there is no --model")
    parser.add_argument("--tokenizer", type=Path, help="with --shape: a folder with Llama 3's tokenizer.json")
    parser.add_argument("--data", help="labelled rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--examples", type=int, default=512, help="in a step, whatever N is")
    parser.add_argument("--together", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--base", default="auto")
    options = parser.parse_args()
    if options.steps <= SKIPPED:
        parser.error(f"--steps must be more than {SKIPPED}")
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "prepare.log"
    if not (options.out / "prepared").is_dir():
        from veritune.data import generate

        if not options.data:
            options.data = str(options.out / "rows.jsonl")
            questions = options.examples * options.steps // options.together * 5 // 4 + 20
            generate.write(Path(options.data), questions, solutions_per_question=options.together, seed=0)
        veritune("prepare", options.data, "--out", str(options.out / "prepared"), "--validation-rows", "64", log=log)
    model = options.model or str(random_model(options.shape, options.tokenizer, options.out / "model"))
    results = []
    print(f"{'GPUs':>4} {'examples/s':>10} {'speed-up':>8} {'of ideal':>8} {'s/step':>7} {'loss off by':>11}")
    for gpus in options.gpus:
        results.append(found := one(gpus, model, options))
        first = results[0]
        gain = found["examples/s"] / first["examples/s"]
        found["speed-up"], found["of ideal"] = gain, gain * first["gpus"] / gpus
        found["loss off by"] = max(abs(a - b) for a, b in zip(found["losses"], first["losses"], strict=True))
        print(
            f"{gpus:4} {found['examples/s']:10.1f} {gain:8.2f} {found['of ideal']:8.0%} {found['seconds a step']:7.3f} "
            f"{found['loss off by']:11.1e}",
            flush=True,
        )
        (options.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"on {results[0]['device']}, {options.examples} examples a step, {model}")


if __name__ == "__main__":
    main()
