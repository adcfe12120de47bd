"""What a user copies works: recipes, the notebook, the README's and the docs' run files, links and tables."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from veritune import config

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CELLS: list[dict[str, Any]] = json.loads((ROOT / "recipes" / "colab.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def read(text: str, folder: Path) -> config.Run:
    file = folder / "run.toml"
    file.write_text(text, encoding="utf-8")
    return config.read_run(file)


def python(source: str) -> str:
    """A cell without its lines for the shell and the notebook."""
    return "\n".join(line for line in source.splitlines() if not line.startswith(("!", "%")))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_every_recipe_is_a_run(recipe: Path):
    assert config.read_run(recipe).out == f"runs/{recipe.stem}"


def test_recipes_are_there():
    assert {recipe.stem for recipe in RECIPES} >= {
        "smoke", "smollm2-gpu", "llama-8b-qlora", "seed-sequential", "seed-cumulative", "stream"
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_run_files_in_pages_are_runs(page: Path, tmp_path: Path):
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        read(block, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_in_pages_compiles(page: Path):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, name(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_local_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        target = (page.parent / file).resolve()
        assert target.exists(), f"{name(page)}: {link}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, link


def test_the_file_map_has_a_caption_for_each_file():
    source = ROOT / "src" / "veritune"
    files = {str(file.relative_to(source)) for file in source.rglob("*.py")}
    captions = dict(re.findall(r"^\| `([\w/]+\.py)` \| (.+) \|$", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE))
    assert set(captions) == {file for file in files if not file.endswith("__init__.py")}


def test_the_table_of_keys_is_the_settings():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| .+ \|$", page, re.MULTILINE))
    defaults = config.flat(config.as_dict(config.Run(out="x")))
    keys = config.keys(config.Run)
    assert [key for key in rows if key in keys] == keys
    for key in keys:
        if key == "out":
            assert rows[key] == "required"
        elif key == "prompt.instruction":
            assert defaults[key] in " ".join(page.split())
        else:
            shown = None if rows[key] == "none" else json.loads(rows[key].strip("`"))
            assert shown == defaults[key], key


def test_the_notebook_has_the_shape_of_one():
    book = json.loads((ROOT / "recipes" / "colab.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        assert cell["cell_type"] in ("markdown", "code")
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("source", CODE)
def test_the_notebooks_cells_compile(source: str):
    compile(python(source), "colab.ipynb", "exec")


def test_the_notebooks_run_file_is_a_run(tmp_path: Path):
    texts = [
        node.value
        for source in CODE
        for node in ast.walk(ast.parse(python(source)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "[train]" in node.value
    ]
    assert len(texts) == 1
    run = read(texts[0], tmp_path)
    drive = "/content/drive/"
    assert not run.out.startswith(drive)
    assert run.checkpoint.replica is not None
    assert run.checkpoint.replica.startswith(drive)
    assert run.session.hours is not None


def test_the_notebook_never_installs_torch():
    commands = [line for source in CODE for line in source.splitlines() if line.startswith("!pip install")]
    assert commands
    assert all("-c /content/keep.txt" in line or "--no-deps" in line for line in commands)
