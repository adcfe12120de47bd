"""An adapter on the tiny model, and the verifier that it makes."""

from pathlib import Path

import pytest
from made_adapters import loaded, trained

from veritune.model.verifier import Verifier


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_folder, tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture(scope="module")
def verifier(folder: Path) -> Verifier:
    return loaded(folder)
