"""Flags of the command line: a name that is none is told its right one, a value is checked as in a run file."""

import dataclasses
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import tyro

from . import config
from .errors import ConfigError
from .suggest import did_you_mean, nearest
from .sweepkeys import tables

T = TypeVar("T")
HELP = ("-h", "--help")
SHORT = {"track": "track.to", "hours": "session.hours"}  # `--track wandb`, `--hours 12`


def parse(cls: type[T], args: Sequence[str], default: T | None, *, prog: str, description: str) -> T:
    """Settings of a class from flags over a default.

    Raises ConfigError for a flag that is none and for a value that the class refuses; ends the process as tyro does
    after a help text, or where a flag lacks its value.
    """
    options: dict[str, Any] = {"prog": prog, "description": description}
    if any(arg in HELP for arg in args):
        paragraphs(cls)
        tyro.cli(cls, args=list(args), default=tyro.MISSING_NONPROP if default is None else default, **options)
    check(args, names(cls), prog)
    for listed in tables(cls):
        if any(arg.partition("=")[0] == f"--{listed}" for arg in args):
            raise ConfigError(f"--{listed} is no flag: [[{listed}]] tables stand in the run file")
    # Parsed into a class without checks: tyro would show pydantic's own words for what they refuse.
    bare = _bare(cls)
    given: Any = tyro.MISSING_NONPROP if default is None else _copy(bare, default)
    values = tyro.cli(bare, args=[_long(arg) for arg in args], default=given, **options)
    return config.build(cls, dataclasses.asdict(values), "flags")


def check(args: Sequence[str], known: Sequence[str], prog: str) -> None:
    """Raises ConfigError for the first flag that is none of `known` (as `names` gives them)."""
    short = [name for name, meant in SHORT.items() if meant in known]
    apart = ["gpus"] if prog.startswith("veritune train") else []  # read by `several`
    for arg in args:
        name = arg.partition("=")[0]
        if not name.startswith("--") or name in (*HELP, "--"):
            continue
        asked = name[2:].replace("-", "_")
        if asked not in known and asked not in short:
            near = ["--" + it.replace("_", "-") for it in nearest(asked, [*known, *short, *apart])]
            raise ConfigError(f"there is no flag {name}{did_you_mean(near)}; `{prog} --help` shows all")


def run_file(verb: str, args: Sequence[str]) -> tuple[config.Run | None, Sequence[str]]:
    """The run file that a command line begins with, read, and the flags after it. Raises the kinds in `errors`."""
    if args and not args[0].startswith("-"):
        return config.read_run(Path(args[0]), out_of(args)), args[1:]
    if not {arg.partition("=")[0] for arg in args} & {"--out", *HELP}:
        raise needs_run_file(verb, "; or --out and the other settings as flags")
    return None, args


def given(args: Sequence[str]) -> set[str]:
    """The settings that flags name."""
    return {_long(arg).partition("=")[0][2:].replace("-", "_") for arg in args if arg.startswith("--")}


def out_of(args: Sequence[str]) -> str | None:
    """The folder that `--out` names, if it does."""
    for at, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == "--out":
            return value if equals else next(iter(args[at + 1 :]), None)
    return None


def several(args: Sequence[str]) -> tuple[int, list[str]]:
    """How many processes `--gpus` asks to start, and the other arguments. Raises ConfigError."""
    left, count = list(args), 1
    for at in reversed(range(len(left))):
        name, _, value = left[at].partition("=")
        if name == "--gpus":
            value = value or "".join(left[at + 1 : at + 2])
            del left[at : at + (1 if "=" in left[at] else 2)]
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(f"--gpus {value}: how many GPUs to train on, 1 or more")
            count = int(value)
    if count > 1 and "WORLD_SIZE" in os.environ:
        raise ConfigError(f"--gpus {count}: torchrun has started processes already; leave one of the two out")
    return count, left


def needs_run_file(verb: str, otherwise: str = "") -> ConfigError:
    """What a verb says whose command line does not begin with a run file."""
    return ConfigError(
        f"{verb} needs a run file, named before all flags: veritune {verb} RUN.toml (`veritune init RUN.toml` writes "
        f"one to start from){otherwise}"
    )


def names(what: Any, prefix: str = "") -> list[str]:
    """The flags of a settings class or a function, with underscores and without dashes before them."""
    out: list[str] = []
    for name, plain, marks in _items(what):
        if dataclasses.is_dataclass(plain):
            out += names(
                plain, prefix if any(getattr(mark, "name", None) == "" for mark in marks) else f"{prefix}{name}."
            )
        elif not any(mark is _POSITIONAL for mark in marks):
            out.append(prefix + name)
            if plain is bool:
                out.append(f"{prefix}no_{name}")
    return out


def _items(what: Any) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """Name, type and tyro's marks of each setting of a class or parameter of a function."""
    if dataclasses.is_dataclass(what):
        found = [(item.name, item.type) for item in dataclasses.fields(what)]
    else:
        found = [(name, it.annotation) for name, it in inspect.signature(what).parameters.items()]
    split = ((name, get_args(kind) if get_origin(kind) is Annotated else (kind,)) for name, kind in found)
    return [(name, plain, tuple(marks)) for name, (plain, *marks) in split]


def paragraphs(what: Any) -> None:
    """Has the help text of a settings class or a function tell each setting's meaning in one paragraph: by itself tyro
    breaks it where the source does."""
    cls: Any = what
    for item in dataclasses.fields(cls) if dataclasses.is_dataclass(what) else ():
        found = (vars(base).get("__pydantic_fields__", {}).get(item.name) for base in cls.__mro__)
        text = next((about.description for about in found if about and about.description), "")
        item.metadata = MappingProxyType({"help": " ".join(text.split())} if text else {})
    for _, kind, _ in _items(what):
        if dataclasses.is_dataclass(kind):
            paragraphs(kind)


_POSITIONAL = get_args(tyro.conf.Positional[int])[1]


def _long(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return f"--{SHORT[name[2:]]}{equals}{value}" if name[:2] == "--" and name[2:] in SHORT else arg


def _bare(cls: Any) -> Any:
    """A dataclass with the same fields and defaults as a settings class, in which any value may stand."""
    fields: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(item.type):
            inner = _bare(item.type)
            fields.append((item.name, inner, dataclasses.field(default_factory=inner)))
        elif item.default is not dataclasses.MISSING:
            fields.append((item.name, item.type, dataclasses.field(default=item.default)))
        else:
            fields.append((item.name, item.type, dataclasses.field()))
    return dataclasses.make_dataclass(cls.__name__, fields, kw_only=True, frozen=True)


def _copy(bare: Any, settings: Any) -> Any:
    return bare(
        **{
            item.name: _copy(item.type, value) if dataclasses.is_dataclass(item.type) else value
            for item in dataclasses.fields(bare)
            for value in [getattr(settings, item.name)]
        }
    )
