"""The Triton kernel, run by Triton's interpreter where there is no GPU; `test_gpu.py` runs it compiled."""

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from veritune.model.attention import uses
from veritune.model.path_sum import sum_paths

torch.manual_seed(0)
for heads, width in ((1, 64), (3, 64), (8, 128)):
    path = torch.cat((torch.zeros(37, dtype=torch.int64), torch.randint(0, 18, (60,))))  # tokens 18 and 19: no entry
    # The interpreter cuts bf16 results instead of rounding them: float32.
    entries, like = torch.randn(97, heads, width).bfloat16(), torch.empty(20, heads, width)
    found = sum_paths(entries, *uses(path, 20), like)
    exact = torch.zeros(20, heads, width, dtype=torch.float64).index_add_(0, path, entries.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert found[18:].count_nonzero() == 0 and found[0].count_nonzero() > 0
"""


def test_each_token_gets_the_sum_of_its_entries() -> None:
    pytest.importorskip("triton", reason="torch comes without Triton here")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
