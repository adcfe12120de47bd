import io

import pytest
from fake_scorer import Recorder
from rich.console import Console


@pytest.fixture
def scorer():
    return Recorder()


@pytest.fixture
def console():
    """A console whose text is `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)
