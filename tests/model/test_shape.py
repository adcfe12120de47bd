"""Shapes are read without weights, and are those of the models that transformers makes."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from huggingface_hub import constants
from local_hub import serving
from tiny_models import PHI3_TARGETS, tiny

from veritune import config
from veritune.errors import MissingError, ModelError
from veritune.model import adapter, header, load, shape
from veritune.model.shape import Shape


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_counts_are_those_of_the_model(family: str) -> None:
    import torch

    model = tiny(family)
    found = Shape.of(model.config.to_dict())
    inside = sum(m.weight.numel() for layer in load.layers(model) for m in layer.modules() if hasattr(m, "in_features"))
    assert found.inside == inside
    targets = PHI3_TARGETS if family == "phi3" else config.Lora().targets
    base = load.Base(model, None, torch.device("cpu"), "fp32", family)
    made: Any = adapter.add_adapter(base, config.Lora(rank=4, targets=targets), seed=0)
    assert found.trained(targets, 4) == sum(p.numel() for p in made.parameters() if p.requires_grad)


def test_a_folder_is_read_by_its_configuration_alone(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    found = shape.read(str(tmp_path))
    assert (found.layers, found.hidden, found.inner, found.keys) == (3, 64, 128, 32)


def test_a_gguf_is_read_by_its_header(smollm2: Path, tmp_path: Path) -> None:
    assert shape.read(str(smollm2)) == Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True, narrow=True)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2.read_bytes()[: 4 << 20])  # no weights
    assert shape.read(str(cut)) == shape.read(str(smollm2))


def test_a_header_says_what_the_formats_own_reader_says(tmp_path: Path) -> None:
    file = tmp_path / "made.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_bool("a.switch", True)
    writer.add_float64("a.number", 0.25)
    writer.add_string("a.text", "größer")
    writer.add_array("a.words", ["one", "two"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_int8("a.last", -3)
    writer.add_tensor("token_embd.weight", np.zeros((7, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values, tensors = header.read(file)
    assert values["llama.block_count"] == 2
    assert {key: value for key, value in values.items() if key.startswith("a.")} == {
        "a.switch": True, "a.number": 0.25, "a.text": "größer", "a.last": -3,
    }  # fmt: skip
    assert tensors == {"token_embd.weight": (4, 7)}
    for size in range(0, file.stat().st_size - 160, 7):
        part = tmp_path / "part.gguf"
        part.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ModelError, match=r"GGUF"):
            header.read(part)


def test_a_configuration_that_the_hub_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "me" / "tiny").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(tmp_path) as (address, _):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        url = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        with pytest.raises(ModelError, match=r"'me/tiny': its config.json cannot be downloaded"):
            shape.read("me/tiny")


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"num_experts": 8}, "experts"), ({"hidden_size": None}, "hidden_size")],
)
def test_models_that_are_built_otherwise_are_refused(
    change: dict[str, Any], reason: str, tiny_folder: Path, tmp_path: Path
) -> None:
    values = json.loads((tiny_folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in values.items() if value is not None})
    )
    with pytest.raises(ModelError, match=reason):
        shape.read(str(tmp_path))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"config\.json is not there"):
        shape.read(str(tmp_path))
