"""What helps to write a run file: one with every key, explained and commented out, and the keys as a JSON schema."""

import dataclasses
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from . import config
from .errors import ConfigError
from .sweepkeys import FIXED

OUT = "runs/first"
TITLE = "veritune run file"
HEAD = """\
# A run file of veritune. Every key stands here with its meaning and its default, commented out: take away the # in
# front of the keys you change. Then:
#
#     veritune prepare ROWS.csv --out prepared
#     veritune plan {name}
#     veritune train {name}
#
# An editor that knows TOML schemas completes and checks the keys after `veritune schema --out run.schema.json`, with
# this as the first line of this file:
#     #:schema run.schema.json
"""
SPACE = """
# What `veritune sweep` searches: settings under their names here, each with a range, a log range or a choice. Without
# this table: what docs/sweep.md lists.
# [sweep.space]
# train.lr = { log = [1e-5, 1e-2] }
# train.warmup_ratio = { range = [0.0, 0.2] }
# lora.rank = { choice = [8, 16, 32] }
"""


def schema() -> dict[str, Any]:
    """The keys of a run file as a JSON schema (draft 2020-12), each with its meaning, default and limits."""
    found = TypeAdapter(config.Run).json_schema()
    sweep = TypeAdapter(config.Sweep).json_schema()
    sweep["properties"]["space"] = _space(found["$defs"])
    found["properties"]["sweep"] = {"$ref": "#/$defs/Sweep"}
    found["$defs"]["Sweep"] = sweep
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": TITLE}


def _space(tables: dict[str, Any]) -> dict[str, Any]:
    """The schema of `[sweep.space]`, from those of the settings' tables: keys nested in their table, or quoted."""
    closed = {"type": "object", "additionalProperties": False}
    out: dict[str, Any] = {}
    for key in config.keys(config.Run):
        if key.startswith(FIXED):
            continue
        table, _, name = key.partition(".")
        about = tables[table.capitalize()]["properties"][name]
        value = {part: it for part, it in about.items() if part not in ("default", "description", "title")}
        kinds: dict[str, Any] = {"choice": {"type": "array", "items": value, "minItems": 1}}
        if {"integer", "number"} & {it.get("type") for it in about.get("anyOf", [about])}:
            ends = {"type": "array", "items": value, "minItems": 2, "maxItems": 2}
            kinds |= {"range": ends, "log": ends}
        spec = {**closed, "description": about["description"], "properties": kinds}
        nested = out.setdefault(table, {**closed, "properties": {}})["properties"]
        nested[name] = spec | {"minProperties": 1, "maxProperties": 1}
        out[key] = {"$ref": f"#/$defs/Sweep/properties/space/properties/{table}/properties/{name}"}
    text = "Settings under their dotted names, each { range = [a, b] }, { log = [a, b] } or { choice = [...] }."
    return {**closed, "description": text, "properties": out}


def write_schema(out: Path | None) -> None:
    """Writes the schema to a file, or prints it. Raises ConfigError if the file holds something else, such as a run."""
    text = json.dumps(schema(), indent=1, ensure_ascii=False)
    if out is None:
        print(text)
        return
    if out.is_file() and TITLE.encode() not in out.read_bytes():
        raise ConfigError(f"{out}: is there already, and no schema; name another file, such as run.schema.json")
    out.write_text(text + "\n", encoding="utf-8")


def write_run_file(path: Path) -> None:
    """Writes a run file to start from. Raises ConfigError if there is a file of this name."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(run_file(path.name))
    except FileExistsError:
        raise ConfigError(f"{path}: is there already; name another file") from None


def run_file(name: str) -> str:
    """The text of a run file in which only `out` is set; TOML."""
    blocks = [HEAD.format(name=name)]
    items = dataclasses.fields(config.Run)
    blocks += [_key(config.Run, it) for it in items if not dataclasses.is_dataclass(it.type)]
    blocks.append(f"\n{_comment(inspect.cleandoc(config.Phase.__doc__ or ''))}\n# [[phases]]\n")
    blocks += [_key(config.Phase, key) for key in dataclasses.fields(config.Phase)]
    tables: list[tuple[str, Any]] = [(it.name, it.type) for it in items if dataclasses.is_dataclass(it.type)]
    for name, kind in (*tables, ("sweep", config.Sweep)):
        blocks.append(f"\n{_comment(inspect.cleandoc(kind.__doc__ or ''))}\n[{name}]\n")
        blocks += [_key(kind, key) for key in dataclasses.fields(kind)]
    return "\n".join([*blocks, SPACE.lstrip("\n")])


def _key(cls: Any, item: Any) -> str:
    """A key with its meaning, commented out; the run's folder is set."""
    about = TypeAdapter(cls).json_schema()["properties"][item.name]
    text = _comment(about.get("description", ""))
    if cls is config.Run and item.name == "out":
        return f"{text}\n{item.name} = {toml(OUT)}\n"
    value, note = about.get("default"), ""
    if value is None:
        note = "  # not set by default" if "default" in about else ""
        # Of a phase: as in [train].
        value = getattr(config.Train(), item.name, None) if cls is config.Phase else None
        value = _example(about) if value is None else value
    return f"{text}\n# {item.name} = {toml(value)}{note}\n"


def _example(about: dict[str, Any]) -> Any:
    """A value that a key without a default could have."""
    kinds = [it for it in about.get("anyOf", [about]) if it.get("type") != "null"]
    kind = kinds[0] if kinds else {}
    if "enum" in kind:
        return kind["enum"][0]
    match kind.get("type"):
        case "integer":
            return 1000 if kind.get("minimum", 1) else 0
        case "number":
            return 12.0
        case "array":
            return [_example(it) for it in kind.get("prefixItems", [kind.get("items", {})])]
        case _:
            return "..."


def toml(value: Any) -> str:
    """A value as TOML writes it, which is JSON's form but for tables."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items() if item is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    joined = " ".join(text.split())
    return textwrap.fill(joined, 118, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
