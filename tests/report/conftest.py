"""Runs to look at."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "training"))  # for `runs`

from runs import prepared, settings, trained

from veritune.data.generate import generate


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated problems: 48 rows to train on and 32 to validate on, of other questions."""
    return prepared(generate(20, solutions_per_question=4, seed=1), tmp_path_factory.mktemp("data") / "d", 32)


@pytest.fixture(scope="session")
def finished(data: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of six steps, validated three times."""
    out = tmp_path_factory.mktemp("runs") / "first"
    trained(settings(out, data, tiny_folder, validation={"every": 2}))
    return out
