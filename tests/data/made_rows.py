"""Rows and files for the tests of data/: small, plain, and the same each time."""

import csv
import gzip
import json
import random
from pathlib import Path

import polars as pl


def rows(count: int = 400, per_question: int = 10, true_share: float = 0.6, seed: int = 0) -> list[dict]:
    """Different rows, `per_question` to a question, with a given share of True (by draw)."""
    draw = random.Random(seed)
    return [
        {
            "question": f"Tom has {number // per_question} bags of 3 apples. How many is that?",
            "solution": f"Attempt {number}: there are {draw.randrange(99)} apples,\nso the answer is {number}.",
            "is_correct": draw.random() < true_share,
            "solver": f"solver-{number % 3}",
        }
        for number in range(count)
    ]


def write(path: Path, these: list[dict]) -> Path:
    """Writes rows in the format that the name's end says."""
    if path.name.endswith(".parquet"):
        pl.DataFrame(these).write_parquet(path)
    elif ".csv" in path.name:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, these[0])
            writer.writeheader()
            writer.writerows(these)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in these).encode()
        path.write_bytes(gzip.compress(text) if path.name.endswith(".gz") else text)
    return path


def rejected(folder: Path) -> list[dict]:
    """The refused rows that a prepared folder lists."""
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
