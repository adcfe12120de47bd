"""Does a base held in NF4 or FP8 make a worse verifier? One pass over the same real rows in each precision and seed.

    python benchmarks/precisions.py --data ../shared/data --model WEIGHTS.gguf --out /tmp/precisions

Options are those of forgetting.py, with two slices of 15,000 rows. The precisions share the device, a process each;
what is done already is not done again. Each adapter scores `validation.jsonl.gz` and `unseen_solvers.jsonl.gz` with the
base it was trained on. Prints means over seeds, and the paired difference to bf16 on the same rows, questions and seeds
(bootstrap over questions).
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import forgetting
import numpy as np


def of(o: argparse.Namespace, base: str) -> argparse.Namespace:
    """The options of one precision's runs. A stream is one pass in one schedule."""
    return argparse.Namespace(**vars(o) | {"base": base, "out": o.out / base})


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
    parser = forgetting.parser_of(__doc__)
    parser.add_argument("--bases", nargs="+", default=["bf16", "nf4", "fp8"], help="others stand beside the first")
    parser.set_defaults(strategies=["stream"], slices=2, slice_rows=15_000, lr=4e-4, validation_rows=200)
    o = forgetting.parsed(parser)
    if not o.report:
        each = [of(o, base) for base in o.bases]
        for its in each:
            its.out.mkdir(exist_ok=True)
        with ThreadPoolExecutor(len(each)) as pool:  # each starts and waits for processes of its own
            list(pool.map(forgetting.run_all, each))
    report(o)


if __name__ == "__main__":
    main()
