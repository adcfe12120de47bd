"""How the rate of a layer's products depends on the number of tokens computed at once.

    python benchmarks/products.py [--base bf16|fp8] [--tokens FIRST LAST STEP] [--more N ...]

The frozen products of one layer of the 8B shape, forward, and backward to their input, as `model.precision` computes
them; random numbers, a GPU. Prints ms of each and TFLOP/s of all: medians of rounds over all sizes, so that a card that
warms up slows no size more than another.
"""

import argparse
import json
import statistics
from functools import partial

import torch

from veritune.model.precision import product_fp8, quantise_rows

WIDTHS = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (14336, 4096),
          "up": (14336, 4096), "down": (4096, 14336)}  # fmt: skip
"""Out and in."""
AS = {"o": "q", "v": "k", "up": "gate"}
"""Products of the same size, which are timed once."""
Held = dict[tuple[str, str], tuple[torch.Tensor, ...]]
"""By name and way: a matrix [in, out]; in FP8 [out, in], and its scale."""


def weights(base: str) -> Held:
    held = {}
    for name in WIDTHS.keys() - AS.keys():
        w = torch.randn(*WIDTHS[name], device="cuda", dtype=torch.bfloat16) * 0.02
        for way, of in (("forward", w), ("backward", w.t())):
            if base == "fp8":
                values, scale = quantise_rows(of)
                held[name, way] = values.contiguous(), scale.t().contiguous()
            else:
                held[name, way] = (of.t(),)
    return held


def milliseconds(base: str, tokens: int, held: Held) -> dict[str, float]:
    """Of each product with `tokens` rows."""
    out = {}
    for (name, way), of in held.items():
        fp8 = base == "fp8"
        rows = torch.randn(tokens, of[0].shape[1 if fp8 else 0], device="cuda", dtype=torch.bfloat16)
        call = partial(torch.mm, rows, *of)
        if fp8:
            call = partial(product_fp8, *quantise_rows(rows), *of, None, rows.dtype)
        for _ in range(2):
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            call()
        end.record()
        end.synchronize()
        out[f"{name} {way}"] = start.elapsed_time(end) / 3
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--tokens", type=int, nargs=3, default=(4096, 24576, 1024))
    parser.add_argument("--more", type=int, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    held = weights(o.base)
    first, last, step = o.tokens
    sizes = sorted({*range(first, last + 1, step), *o.more})
    rounds = [{tokens: milliseconds(o.base, tokens, held) for tokens in sizes} for _ in range(o.rounds)]
    inside = sum(n * k for n, k in WIDTHS.values())
    for tokens in sizes:
        each = {key: statistics.median(found[tokens][key] for found in rounds) for key in rounds[0][tokens]}
        spent = {way: sum(each[f"{AS.get(name, name)} {way}"] for name in WIDTHS) for way in ("forward", "backward")}
        line = {
            "tokens": tokens,
            "TFLOP/s": round(4 * inside * tokens / sum(spent.values()) / 1e9, 1),
            **{f"{way} TFLOP/s": round(2 * inside * tokens / ms / 1e9, 1) for way, ms in spent.items()},
            **{f"{key} ms": round(ms, 3) for key, ms in each.items()},
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
