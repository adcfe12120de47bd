"""The flags of `veritune sweep`, read before Optuna is asked for."""

from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path

from pydantic.dataclasses import dataclass
from rich.console import Console

from .. import config
from ..errors import ConfigError, PeerError, first_line
from ..flags import given, needs_run_file, out_of, parse
from ..redact import redact
from .space import read


@dataclass(frozen=True, kw_only=True, config=config.STRICT)
class Search(config.Run):
    """A run and how to search around it."""

    sweep: config.Sweep = field(default_factory=config.Sweep)
    worker: bool = False
    """Join a sweep that was started elsewhere, with its sweep.storage and the same name of sweep.out, as one more
    worker."""


def sweep(args: Sequence[str], console: Console) -> None:
    """Searches settings around a run file; flags override the file's keys. Raises the kinds in `errors`."""
    file, flags = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    if file is None and not {"-h", "--help"} & set(flags):
        raise needs_run_file("sweep")
    run, searched, space = config.read_sweep(Path(file), out_of(flags)) if file else (None, None, {})
    chosen = parse(
        Search,
        flags,
        Search(**vars(run), sweep=searched) if run and searched else None,
        prog="veritune sweep RUN.toml",
        description="Trains many short runs with settings drawn from the run file's [sweep.space] and writes the best "
        "as a run file. The same command again goes on with it.",
    )
    run = config.Run(**{item.name: getattr(chosen, item.name) for item in fields(config.Run)})
    axes = read(space, run, str(file))
    for axis in axes:
        if axis.key in given(flags):
            raise ConfigError(
                f"--{axis.key.replace('_', '-')}: {axis.key} is searched, so the flag would change nothing; take the "
                f"flag away, or declare a [sweep.space] without {axis.key}"
            )
    try:
        from .search import sweep as search
    except ImportError as error:
        if error.name not in ("optuna", "sqlalchemy"):
            raise
        raise ConfigError("sweep needs optuna and sqlalchemy: pip install 'veritune[sweep]'") from None
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        search(run, chosen.sweep, axes, console, worker=chosen.worker)
    except (OptunaError, SQLAlchemyError) as error:
        reason = redact(first_line(error))
        raise PeerError(f"the sweep's storage failed: {reason}. No trial is lost; the same command goes on") from error
