"""How the rate of a layer's products depends on the number of tokens computed at once.

    python benchmarks/products.py [--base bf16|fp8] [--tokens FIRST LAST STEP] [--more N ...]

The frozen products of one layer of the 8B shape, forward, and backward to their input, as `model.precision` computes
them; random numbers, a GPU. Prints ms of each and TFLOP/s of all: medians of rounds over all sizes, so that a card that
warms up slows no size more than another.
"""

import argparse
import json
import statistics

import torch

from veritune.model.precision import FP8, quantise_rows

WIDTHS = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (14336, 4096),
          "up": (14336, 4096), "down": (4096, 14336)}  # fmt: skip
"""Out and in."""
AS = {"o": "q", "v": "k", "up": "gate"}
"""Products of the same size, which are timed once."""


def milliseconds(base: str, tokens: int, held: dict[tuple[str, str], tuple[torch.Tensor, ...]]) -> dict[str, float]:
    """Of each product with `tokens` rows."""
    out = {}
    for (name, way), (w, *scale) in held.items():
        rows = torch.randn(tokens, w.shape[1] if way == "forward" or base == "fp8" else w.shape[0], device="cuda",
                           dtype=torch.bfloat16)  # fmt: skip
        if base == "fp8":
            given, by = quantise_rows(rows)
            of = (given, w.t(), by, scale[0], None, None, torch.bfloat16, True)
            call = torch.ops.aten._scaled_mm
        else:
            of, call = (rows, w.t() if way == "forward" else w), torch.mm
        for _ in range(2):
            call(*of)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            call(*of)
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
    held: dict[tuple[str, str], tuple[torch.Tensor, ...]] = {}
    for name, (n, k) in WIDTHS.items():
        if name not in AS:
            w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
            for way, of in (("forward", w), ("backward", w.t() if o.base == "fp8" else w)):
                values, scale = quantise_rows(of) if o.base == "fp8" else (of, w)
                held[name, way] = (values.contiguous(), scale.t().contiguous()) if o.base == "fp8" else (of,)
                assert o.base != "fp8" or held[name, way][0].dtype == FP8
    first, last, step = o.tokens
    sizes = sorted({*range(first, last + 1, step), *o.more})
    rounds = [{tokens: milliseconds(o.base, tokens, held) for tokens in sizes} for _ in range(o.rounds)]
    inside = sum(n * k for n, k in WIDTHS.values())
    for tokens in sizes:
        each = {key: statistics.median(found[tokens][key] for found in rounds) for key in rounds[0][tokens]}
        whole = sum(each[f"{AS.get(name, name)} {way}"] for name in WIDTHS for way in ("forward", "backward"))
        rates = {way: 2 * inside * tokens / sum(each[f"{AS.get(n, n)} {way}"] for n in WIDTHS) / 1e9
                 for way in ("forward", "backward")}  # fmt: skip
        line = {"tokens": tokens, "TFLOP/s": round(4 * inside * tokens / whole / 1e9, 1), "us a token":
                round(1e3 * whole / tokens, 4), **{way: round(rate, 1) for way, rate in rates.items()},
                **{key: round(value, 3) for key, value in each.items()}}  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
