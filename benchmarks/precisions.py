"""Does a base held in NF4 or FP8 make a worse verifier? One pass over the same real rows in each precision and seed.

    python benchmarks/precisions.py --data ../shared/data --model WEIGHTS.gguf --out /tmp/precisions [--rows 30000]

The precisions share the device, a process each; what is done already is not done again. Each adapter scores
`validation.jsonl.gz` and `unseen_solvers.jsonl.gz` with the base it was trained on. Prints means over seeds, and the
paired difference to bf16 on the same rows, questions and seeds (bootstrap over questions).
"""

import argparse
import subprocess
import sys
from pathlib import Path

import forgetting
import numpy as np


def command(o: argparse.Namespace, base: str) -> list[str]:
    """The runs of one precision, as a command of forgetting.py: a stream is one pass in one schedule."""
    return [
        sys.executable, str(Path(__file__).parent / "forgetting.py"), "--data", str(o.data), "--model", str(o.model),
        "--prepared", str(o.out / "prepared"), "--out", str(o.out / base), "--base", base, "--device", o.device,
        "--strategies", "stream", "--slices", "2", "--slice-rows", str(o.rows // 2), "--probe-rows", str(o.probe_rows),
        "--seeds", *map(str, o.seeds), "--lr", str(o.lr), "--batch", str(o.batch), "--validation-rows", "200",
        "--evaluate-per-question", str(o.evaluate_per_question), *(["--no-compile"] if o.no_compile else []),
    ]  # fmt: skip


def of(o: argparse.Namespace, base: str) -> argparse.Namespace:
    """The options under which forgetting.py finds the results of one precision."""
    return argparse.Namespace(out=o.out / base, data=o.data, evaluate_per_question=o.evaluate_per_question)


def report(o: argparse.Namespace) -> None:
    from veritune.quality.metrics import paired

    found = {base: {line["seed"]: line for line in forgetting.results_of(of(o, base))} for base in o.bases}
    print("| base | seeds | " + " | ".join(f"{file}: accuracy | AUROC" for file in forgetting.FILES) + " |")
    print("|" + "---|" * (2 + 2 * len(forgetting.FILES)))
    for base, lines in found.items():
        cells = [base, str(len(lines))]
        for file in forgetting.FILES:
            for figure in ("accuracy", "auroc"):
                each = [line[file][figure] for line in lines.values()]
                cells.append(f"{np.mean(each):.4f} ({', '.join(f'{x:.3f}' for x in each)})" if each else "")
        print("| " + " | ".join(cells) + " |")
    for base in o.bases:
        seeds = sorted(set(found[base]) & set(found[o.bases[0]]))
        if base == o.bases[0] or not seeds:
            continue
        for file in forgetting.FILES:
            of_first, of_base = (
                forgetting.pooled(of(o, each), [found[each][seed] for seed in seeds], file)
                for each in (o.bases[0], base)
            )
            labels, _, ranks, groups = of_first
            it = paired(labels, ranks, of_base[2], groups, resamples=1000)["auroc"]
            low, high = it.interval or (float("nan"),) * 2
            print(f"{base} - {o.bases[0]}, {file}, seeds {seeds}: AUROC {it.value:+.4f} ({low:+.4f} to {high:+.4f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bases", nargs="+", default=["bf16", "nf4", "fp8"], help="others stand beside the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--probe-rows", type=int, default=200)
    parser.add_argument("--evaluate-per-question", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    if not o.report:
        if o.model is None:
            parser.error("--model is needed")
        if not (o.out / "prepared" / "manifest.json").exists():
            prepare = ["prepare", str(o.data / "train.jsonl.gz"), "--out", str(o.out / "prepared"), "--validation-rows"]
            subprocess.run([sys.executable, "-m", "veritune", *prepare, "1000"], check=True)
        running = [subprocess.Popen(command(o, base)) for base in o.bases]
        for process in running:
            process.wait()
    report(o)


if __name__ == "__main__":
    main()
