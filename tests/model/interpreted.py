"""Code that runs Triton kernels, in a process of its own: on a GPU, or by Triton's interpreter where there is none."""

import os
import subprocess
import sys

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def printed(code: str, device: str) -> list[str]:
    """The lines that code prints, which gets the device as its argument and asserts what it has to."""
    pytest.importorskip("triton", reason="torch comes without Triton here")
    env = {**os.environ, "TRITON_INTERPRET": "1"} if device == "cpu" else dict(os.environ)
    done = subprocess.run([sys.executable, "-c", code, device], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\n")[:-1]
