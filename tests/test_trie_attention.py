"""The attention that is tried in benchmarks/trie_attention.py: right, and repeatable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("how", ["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def test_it_gives_the_outputs_and_gradients_of_plain_products(how: str) -> None:
    pytest.importorskip("triton", reason="torch comes without Triton here")
    file = Path(__file__).parents[1] / "benchmarks/trie_attention.py"
    env = {**os.environ, "TRITON_INTERPRET": "1"} if how == "interpreted" else dict(os.environ)
    done = subprocess.run([sys.executable, file, "--check"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 5
