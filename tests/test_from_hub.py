"""The whole job with rows and a model from a hub: one on this machine, asked by the hub's own client in processes of
their own; then the same with nobody to ask."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import serving
from tiny_models import write_folder

from veritune.data.generate import write
from veritune.model import load

pytestmark = pytest.mark.alone


def test_rows_and_model_come_from_a_hub_and_later_from_its_cache(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    (hub / "datasets" / "me" / "rows").mkdir(parents=True)
    write(hub / "datasets" / "me" / "rows" / "train.jsonl", 24, seed=1)
    write_folder(hub / "models" / "me" / "tiny")
    run = tmp_path / "run.toml"
    run.write_text(
        '[data]\npath = "prepared"\n[model]\npath = "me/tiny"\nbase = "fp32"\ndevice = "cpu"\n'
        "[prompt]\nmax_length = 512\n[train]\nbatch_size = 8\n"
    )

    def veritune(*arguments: str) -> str:
        command = [sys.executable, "-m", "veritune", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    plain = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    env = plain | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with serving(hub) as (address, asked):
        env["HF_ENDPOINT"] = address
        veritune("prepare", "hf://datasets/me/rows/train.jsonl", "--out", "prepared", "--validation-rows", "16")
        veritune("train", "run.toml", "--out", "online")
        assert any(path.endswith("/train.jsonl") for path in asked)
        assert any(path.endswith("/model.safetensors") for path in asked)
    resolved = json.loads((tmp_path / "online" / "run.json").read_text())["resolved"]
    assert resolved["model.weights"] == load.fingerprint(hub / "models" / "me" / "tiny")
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    assert manifest["sources"][0]["name"] == "hf://datasets/me/rows/train.jsonl"

    veritune("prepare", "hf://datasets/me/rows/train.jsonl", "--out", "again", "--validation-rows", "16")
    for name in ("train.parquet", "validation.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "prepared" / name).read_bytes()
    veritune("train", "run.toml", "--out", "offline")
    lines = [(tmp_path / out / "metrics.jsonl").read_text().splitlines() for out in ("online", "offline")]
    losses = [[entry["loss"] for entry in map(json.loads, part) if "loss" in entry] for part in lines]
    assert losses[0] == losses[1] != []
    assert "AUROC" in veritune("evaluate", "online/best", "prepared")
