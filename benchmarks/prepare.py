"""How long `veritune prepare` takes, and how much memory: rows of about 1 kB, as jsonl (or --format csv, parquet).

    python benchmarks/prepare.py --rows 1000000

Prints seconds, rows a second and the peak resident memory. The target is 1,000,000 rows in under 60 s and 4 GiB on two
cores. The rows look like the competition's: 20 solutions a question, 40 % True, five columns, a few that cannot be
used. They are made before the clock starts.
"""

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from veritune.config import Prepare
from veritune.data import dataset

WORDS = "the number of apples is then twice what we had before so that each child gets as many as there are left"


def rows(count: int, seed: int = 0) -> Iterator[dict]:
    """Rows of about 1 kB: numbers and words at random, every 5,000th without a label."""
    draw = random.Random(seed)
    words = WORDS.split() + [str(n) for n in range(400)] + ["\n", "\\frac{1}{2}", "√π", "=", "+"]
    question = ""
    for number in range(count):
        if number % 20 == 0:
            question = " ".join(draw.choices(words, k=45))
        yield {
            "question": question,
            "solution": " ".join(draw.choices(words, k=170)),
            "is_correct": draw.random() < 0.4 if number % 5000 else None,
            "answer": str(draw.randrange(1000)),
            "solver": f"solver-{draw.randrange(8)}",
        }


def write(path: Path, count: int) -> None:
    """Writes the rows in the format that the path's suffix names."""
    if path.suffix == ".parquet":
        pl.DataFrame(list(rows(count))).write_parquet(path)
    elif path.suffix == ".csv":
        pl.DataFrame(list(rows(count))).write_csv(path)
    else:
        with open(path, "w", encoding="utf-8") as file:
            for row in rows(count):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    """Makes the rows, prepares them once, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=("jsonl", "csv", "parquet"), default="jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"rows.{options.format}"
        # In a process of its own, so that its memory does not count either.
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(source, options.rows))
        writer.start()
        writer.join()
        start, cpu = time.perf_counter(), time.process_time()
        manifest = dataset.prepare([str(source)], Path(folder) / "prepared", Prepare())
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        size = source.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{options.format}, {options.rows:,} rows, {size / options.rows:,.0f} bytes a row, {size / 1e6:,.0f} MB")
    print(f"{seconds:.1f} s ({cpu:.1f} s of processor time), {options.rows / seconds:,.0f} rows a second")
    print(f"peak memory {peak / 2**30:.2f} GiB")
    print(f"train {manifest['train']['rows']:,}, validation {manifest['validation']['rows']:,}")


if __name__ == "__main__":
    main()
