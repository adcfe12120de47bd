"""Adapters in PEFT's format: fresh, saved, loaded whole or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_adapters import loaded, trained, values
from safetensors.torch import load_file, save_file
from tiny_models import tiny

from veritune import config
from veritune.errors import ConfigError, MissingError, ModelError
from veritune.model import adapter, load
from veritune.model.adapter import ABOUT
from veritune.tokens.prompt import Frame

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def test_files_are_the_same_bytes_each_time(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    again = trained(tiny_folder, tmp_path / "adapter")
    for name in (WEIGHTS, SETTINGS, ABOUT, "README.md"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    targets = json.loads((folder / SETTINGS).read_text())["target_modules"]
    assert targets == sorted(config.Lora().targets)


def test_files_hold_what_training_has(folder: Path, tiny_folder: Path) -> None:
    base = load.load_base(config.Model(path=str(tiny_folder), base="fp32", device="cpu"))
    model = adapter.load_adapter(base, folder, trainable=True)
    stored = load_file(folder / WEIGHTS)
    assert stored.keys() == adapter.weights(model).keys()
    assert len(stored) == 3 * 7 * 2
    assert all(torch.equal(stored[name], value) for name, value in adapter.weights(model).items())
    trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert trainable == sum(value.numel() for value in stored.values())
    adapter.set_weights(model, {name: value + 1 for name, value in stored.items()})
    assert all(torch.equal(stored[name] + 1, value) for name, value in adapter.weights(model).items())
    stored.pop(next(iter(stored)))
    with pytest.raises(ModelError, match="other tensors"):
        adapter.set_weights(model, stored)


def test_about_survives(folder: Path, tiny_folder: Path) -> None:
    about = adapter.read_about(folder)
    assert (about.base, about.precision, about.data) == (str(tiny_folder), "fp32", "the data's fingerprint")
    assert isinstance(about.frame, Frame)


# Fresh adapters, and going on from one.


def test_a_fresh_adapter_changes_nothing_and_is_drawn_from_the_seed(tiny_folder: Path) -> None:
    def fresh(seed: int) -> Any:
        base = load.load_base(config.Model(path=str(tiny_folder), base="fp32", device="cpu"))
        return adapter.add_adapter(base, config.Lora(rank=4), seed=seed)

    one, same, other = (adapter.weights(fresh(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert all(value.count_nonzero() == 0 for name, value in one.items() if "lora_B" in name)


def base_at(path: Path) -> load.Base:
    return load.load_base(config.Model(path=str(path), base="fp32", device="cpu"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "nothing"), "lora.targets: nothing names no layer of this model"),
        (("query", "value"), "lora.targets: query, value name no layer of this model"),
        (("proj",), "its linear layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        (("input_layernorm",), "lora.targets"),
    ],
)
def test_targets_that_match_nothing_are_refused(tiny_folder: Path, targets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter.add_adapter(base_at(tiny_folder), config.Lora(targets=targets), seed=1)


def test_a_family_with_other_names_is_not_trained_in_part() -> None:
    """Phi-3 has one projection for queries, keys and values; with the usual names only two of its four would learn."""
    base = load.Base(tiny("phi3"), None, torch.device("cpu"), "fp32", "phi3")
    with pytest.raises(ConfigError, match="its linear layers are down_proj, gate_up_proj, o_proj, qkv_proj"):
        adapter.add_adapter(base, config.Lora(), seed=1)


def test_start_from_an_adapter(tiny_folder: Path, folder: Path) -> None:
    model = adapter.add_adapter(base_at(tiny_folder), config.Lora(rank=8), seed=1, start_from=str(folder))
    stored = load_file(folder / WEIGHTS)
    assert all(torch.equal(stored[name], value) for name, value in adapter.weights(model).items())
    assert all(value.requires_grad == ("lora_" in name) for name, value in model.named_parameters())


def test_start_from_takes_the_dropout_of_the_settings(tiny_folder: Path, folder: Path) -> None:
    settings = config.Lora(rank=8, dropout=0.25)
    model = adapter.add_adapter(base_at(tiny_folder), settings, seed=1, start_from=str(folder))
    found = [module for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
    assert {module.p for module in found} == {0.25}
    assert model.peft_config["default"].lora_dropout == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4}, "rank 8 instead of 4"),
        ({"rank": 8, "alpha": 8}, "alpha 32 instead of 8"),
        ({"rank": 8, "targets": ("q_proj",)}, r"targets \['down_proj', .* instead of \['q_proj'\]"),
        ({"rank": 2, "alpha": 8}, "rank 8 instead of 2; alpha 32 instead of 8"),
    ],
)
def test_start_from_another_shape_is_refused(tiny_folder: Path, folder: Path, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter.add_adapter(base_at(tiny_folder), config.Lora(**settings), seed=1, start_from=str(folder))


def test_start_from_what_is_no_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, tiny_folder):
        with pytest.raises(MissingError, match="not an adapter folder"):
            adapter.add_adapter(base_at(tiny_folder), config.Lora(), seed=1, start_from=str(path))


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_no_model(tiny_folder: Path, folder: Path, tmp_path: Path, whole: bool) -> None:
    """With a tokenizer beside it, as other trainers leave it, transformers loads the base and the adapter on it."""
    copy = Path(shutil.copytree(folder, tmp_path / "adapter"))
    if whole:
        base_at(tiny_folder).tokenizer.save_pretrained(copy)
    with pytest.raises(ModelError, match=r"it is an adapter; name its base model here, and .* train\.start_from"):
        base_at(copy)


def test_tensors_that_a_model_has_no_place_for_are_told(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bias that the configuration does not know, say: the model computes something else than was trained."""
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    name = "model.layers.0.self_attn.q_proj.bias"
    held = load_file(copy / "model.safetensors") | {name: torch.ones(64)}
    save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    base_at(copy)
    told = f"{copy}: 1 tensors of its files have no place in the model and are left out, {name} for one\n"
    assert capsys.readouterr().err == told
    base_at(tiny_folder)
    assert capsys.readouterr().err == ""


# Nothing is loaded in part.


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], Any]:
    return lambda it: save_file(change(load_file(it / WEIGHTS)), it / WEIGHTS, metadata={"format": "pt"})


def frame(**new: Any) -> Callable[[Path], Any]:
    def apply(it: Path) -> None:
        about = json.loads((it / ABOUT).read_text())
        (it / ABOUT).write_text(json.dumps({**about, "frame": {**about["frame"], **new}}))

    return apply


def cut_in_half(it: Path) -> None:
    (it / WEIGHTS).write_bytes((it / WEIGHTS).read_bytes()[: (it / WEIGHTS).stat().st_size // 2])


ONE = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut in half": (cut_in_half, "incomplete metadata"),
    "garbage for weights": (lambda it: (it / WEIGHTS).write_bytes(b"garbage" * 99), "header too large"),
    "a tensor missing": (tensors(lambda t: {k: v for k, v in t.items() if k != ONE}), f"1 tensors .* {ONE}"),
    "every name another": (tensors(lambda t: {f"x.{k}": v for k, v in t.items()}), "84 tensors"),
    "a tensor too many": (tensors(lambda t: {**t, ONE.replace(".1.", ".7."): t[ONE].clone()}), "1 tensors"),
    "other tensors": (tensors(lambda t: {"a": torch.zeros(1)}), "42 tensors"),
    "another shape": (tensors(lambda t: {**t, ONE: t[ONE][:4].clone()}), "size mismatch"),
    "not finite": (tensors(lambda t: {**t, ONE: t[ONE] * float("nan")}), f"1 of .* not finite, {ONE}"),
    "settings not JSON": (lambda it: (it / SETTINGS).write_text("{"), "this adapter does not fit"),
    "settings a list": (lambda it: (it / SETTINGS).write_text("[]"), "this adapter does not fit"),
    "settings without kind": (values(SETTINGS, peft_type=None), "this adapter does not fit"),
    "another kind": (values(SETTINGS, peft_type="IA3"), "of the kind IA3, not LORA"),
    "an unknown kind": (values(SETTINGS, peft_type="NOPE"), "this adapter does not fit"),
    "other targets": (values(SETTINGS, target_modules=["nothing"]), "nothing.* not found"),
    "fewer targets": (values(SETTINGS, target_modules=["q_proj"]), "36 tensors"),
    "another rank": (values(SETTINGS, r=4), "size mismatch"),
    "about not JSON": (lambda it: (it / ABOUT).write_text("{"), "veritune.json: damaged"),
    "about a list": (lambda it: (it / ABOUT).write_text("[]"), "veritune.json: damaged"),
    "about empty": (lambda it: (it / ABOUT).write_text("{}"), r"veritune.json: damaged \('frame'\)"),
    "about not text": (lambda it: (it / ABOUT).write_bytes(b"\xff\xfe"), "veritune.json: damaged"),
    "frame of other types": (frame(max_length="long"), "damaged .*max_length: input should be a valid integer"),
    "one answer": (frame(answer_ids=[3]), "damaged .*answer_ids"),
    "no prefix": (values(ABOUT, frame={"middle": ""}), "damaged .*prefix: field required"),
    "tokens beyond the vocabulary": (frame(answer_ids=[99999, 5]), "another base model"),
    "tokens of another vocabulary": (frame(answer_ids=[40, 41]), "'True' with token 40.* another base model"),
}


@pytest.mark.parametrize("what", list(DAMAGED))
def test_a_damaged_adapter_is_refused(folder: Path, tmp_path: Path, what: str) -> None:
    damage, message = DAMAGED[what]
    copy = Path(shutil.copytree(folder, tmp_path / "adapter"))
    damage(copy)
    with pytest.raises(ModelError, match=message):
        loaded(copy)


def test_folders_that_are_no_adapter(folder: Path, tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(MissingError, match="no such adapter folder"):
        loaded(tmp_path / "nothing")
    with pytest.raises(MissingError, match=r"no veritune\.json in it, or it was not made by"):
        loaded(tiny_folder)
    shutil.copytree(folder, tmp_path / "run" / "adapter")
    with pytest.raises(MissingError, match=r"did you mean .*run/adapter\?"):
        loaded(tmp_path / "run")
    shutil.copytree(folder, tmp_path / "run" / "best")
    with pytest.raises(MissingError, match=r"did you mean .*run/best\?"):
        loaded(tmp_path / "run")
    for name in (WEIGHTS, SETTINGS):
        copy = Path(shutil.copytree(folder, tmp_path / name))
        (copy / name).unlink()
        with pytest.raises(MissingError, match="not an adapter folder"):
            loaded(copy)
