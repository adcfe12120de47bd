"""Rules of the house: imports run one way, files stay small."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "veritune"
# Each may import those before it, and itself. `__init__` (the version) is free to all.
ORDER = (
    "errors", "redact", "suggest", "durable", "sweepkeys", "config", "starter", "flags", "data", "tokens", "model",
    "quality", "track", "trackers", "training", "search", "report", "demo", "cli", "__main__",
)  # fmt: skip
MOST_LINES = 400
FILES = sorted(SOURCE.rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The parts of veritune that a file imports, anywhere in it."""
    package = ("veritune", *file.relative_to(SOURCE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [module] if len(module) > 1 else [[*module, alias.name] for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "veritune" and len(name) > 1}
    return found - {"__version__"}


def test_the_order_names_every_part():
    assert {part_of(file) for file in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_run_one_way(file: Path):
    if part_of(file) == "__init__":
        assert not imported(file)
        return
    allowed = set(ORDER[: ORDER.index(part_of(file)) + 1])
    assert imported(file) <= allowed, f"{file} may import {sorted(allowed)} only"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_files_stay_small(file: Path):
    assert len(file.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("file", [f for f in FILES if part_of(f) == "data"], ids=lambda f: f.name)
def test_data_needs_no_torch(file: Path):
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name or "").split(".")[0]
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
    }
    assert not roots & {"torch", "transformers", "peft", "bitsandbytes"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_no_family_of_transformers_is_imported(file: Path):
    """What a family's own file holds changes from one version to the next; its modules are used as they are found."""
    modules = {node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in modules if name.startswith("transformers.models")]
