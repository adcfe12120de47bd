"""What tests of training share: a small dataset and a loaded tiny model."""

from pathlib import Path

import pytest
from runs import prepared

from veritune import config
from veritune.data.generate import generate
from veritune.model import load


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows to train on and 8 to validate on."""
    return prepared(generate(12, solutions_per_question=4, seed=1), tmp_path_factory.mktemp("data") / "d", 8)


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> load.Base:
    return load.load_base(config.Model(path=str(tiny_folder), base="fp32", device="cpu"))
