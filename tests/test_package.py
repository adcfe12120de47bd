"""What importing the package sets."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, "expandable_segments:True None"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64 None"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "None max_split_size_mb:64"),
    ],
    ids=["none", "the old name", "the new name"],
)
def test_gpu_memory_grows_in_place_unless_the_user_has_set_how(own: dict[str, str], found: str) -> None:
    names = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    code = f"import os, veritune; print(*(os.environ.get(name) for name in {names}))"
    env = {name: value for name, value in os.environ.items() if name not in names} | own
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found
