"""GGUF files: kept weights are the unkept ones bit for bit, whoever else converts, whatever the disk does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import byte_level, tiny, worked_text, write_gguf
from torch import Tensor

from veritune import config, durable
from veritune.errors import ModelError
from veritune.model import gguf, load


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def base_of(file: Path, precision: Any = "fp32") -> load.Base:
    return load.load_base(config.Model(path=str(file), base=precision, device="cpu"))


def assert_same(a: load.Base, b: load.Base) -> None:
    """All weights and buffers bit for bit, the configuration, and what the tokenizer makes of text."""

    def held(base: load.Base) -> dict[str, Tensor]:
        return dict([*base.model.named_parameters(), *base.model.named_buffers()])

    left, right = held(a), held(b)
    assert left.keys() == right.keys()
    bits = [name for name in left if left[name].dtype != right[name].dtype or not torch.equal(left[name], right[name])]
    assert bits == []
    known = [{**base.model.config.to_dict(), "_name_or_path": "", "architectures": ""} for base in (a, b)]
    assert known[0] == known[1]
    assert a.model.generation_config.to_dict() == b.model.generation_config.to_dict()
    assert a.tokenizer.backend_tokenizer.to_str() == b.tokenizer.backend_tokenizer.to_str()
    assert a.tokenizer.chat_template == b.tokenizer.chat_template
    assert a.tokenizer.special_tokens_map == b.tokenizer.special_tokens_map
    texts = worked_text(5)
    assert a.tokenizer(texts)["input_ids"] == b.tokenizer(texts)["input_ids"]


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_kept_weights_are_the_same(
    tiny_gguf: Path, cache: Path, precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = base_of(tiny_gguf, precision)
    said = capsys.readouterr().err
    assert f"{tiny_gguf}: its weights are kept in {cache}" in said
    assert f"({sum(f.stat().st_size for f in next(cache.glob('tiny-*')).iterdir()) / 1e6:,.0f} MB)" in said
    monkeypatch.setattr(gguf, "read", None)  # from here on the GGUF is not read again
    again = base_of(tiny_gguf, precision)
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    monkeypatch.setenv(gguf.VARIABLE, "off")
    unkept = base_of(tiny_gguf, precision)
    assert_same(first, unkept)
    assert_same(again, unkept)
    assert len(folders(cache)) == 1


def test_off_keeps_nothing(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(gguf.VARIABLE, "off")
    base_of(tiny_gguf)
    assert not (tmp_path / "home").exists()
    monkeypatch.delenv(gguf.VARIABLE)
    base_of(tiny_gguf)
    assert len(folders(tmp_path / "home" / "veritune" / "gguf")) == 1


def test_another_content_in_the_same_place_is_another_model(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", seed=1)
    before, stamp = base_of(file), file.stat()
    write_gguf(file, seed=2)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_size == stamp.st_size
    after = base_of(file)
    assert not torch.equal(before.model.lm_head.weight, after.model.lm_head.weight)
    assert len(folders(cache)) == 2
    file.rename(tmp_path / "b.gguf")
    (tmp_path / "b.gguf").rename(file)
    assert_same(after, base_of(file))
    assert len(folders(cache)) == 2
    assert before.weights != after.weights == base_of(file.rename(tmp_path / "b.gguf")).weights is not None


@pytest.mark.parametrize("damage", ["cut", "missing", "manifest", "half"])
def test_a_damaged_folder_is_made_anew(tiny_gguf: Path, cache: Path, damage: str) -> None:
    whole = base_of(tiny_gguf)
    (place,) = (cache / name for name in folders(cache))
    weights = place / "model.safetensors"
    if damage == "cut":
        cut = weights.read_bytes()[:-8]
        weights.unlink()  # `whole` maps it
        weights.write_bytes(cut)
    elif damage == "missing":
        (place / "tokenizer.json").unlink()
    elif damage == "manifest":
        (place / durable.MANIFEST).unlink()
    else:  # a process was killed while it wrote
        durable.beside(place, "new").mkdir()
        (durable.beside(place, "new") / "model.safetensors").write_bytes(weights.read_bytes()[:99])
        durable.discard(place)
    assert_same(whole, base_of(tiny_gguf))
    assert durable.looks_whole(place)
    assert not durable.beside(place, "new").exists()


def test_a_cache_that_cannot_be_written_costs_only_time(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unkept = base_of(tiny_gguf)
    capsys.readouterr()
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path / "file"))
    assert_same(unkept, base_of(tiny_gguf))
    assert "cannot be kept" in capsys.readouterr().err
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda path: _Disk)
    assert_same(unkept, base_of(tiny_gguf))
    assert "0.5 GB are free" in capsys.readouterr().err
    assert folders(tmp_path / "cache" / "gguf") == []


class _Disk:
    free = 500_000_000


def test_what_is_no_gguf_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.gguf").write_bytes(b"hello\n" * 100)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(write_gguf(tmp_path / "whole.gguf").read_bytes()[:-5000])
    for file in (tmp_path / "text.gguf", cut):
        with pytest.raises(ModelError, match="cannot be loaded"):
            base_of(file)
    assert folders(cache) == []


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_a_gguf_computes_what_its_model_does(tmp_path: Path, cache: Path, factor: float | None) -> None:
    """Llama 3 scales positions, of which a GGUF tells by what each frequency is divided by."""
    turns: dict[str, Any] = {"rope_type": "default", "rope_theta": 500_000.0}
    tokenizer = byte_level(worked_text())
    like = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
    plain = model = tiny("llama", rope_parameters=turns, **like)
    if factor is not None:
        model = tiny("llama", rope_parameters={**turns, **gguf.LLAMA3, "factor": factor}, **like)
    factors = None if factor is None else plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    file = write_gguf(tmp_path / "a.gguf", model=model, factors=factors)
    ids = torch.tensor(tokenizer(worked_text(9))["input_ids"][0] * 3)[None]
    expected = model(input_ids=ids).logits
    for _ in range(2):  # converted, then kept
        assert torch.allclose(base_of(file).model(input_ids=ids).logits, expected, atol=1e-5)
    assert (expected - plain(input_ids=ids).logits).abs().max() > 1e-2 or factor is None


@pytest.mark.parametrize("told", [{"scaling": "yarn"}, {"factors": [2.0] * 8}])
def test_a_scaling_that_is_not_read_is_refused(tmp_path: Path, cache: Path, told: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"its positions are scaled \((yarn|rope_freqs.weight)\).*hub id or folder"):
        base_of(write_gguf(tmp_path / "a.gguf", **told))
    assert folders(cache) == []


def test_biases_that_the_model_has_no_place_for_are_refused(tmp_path: Path, cache: Path) -> None:
    """transformers leaves them out of a Llama without a word: its configuration does not learn of them from a GGUF."""
    with pytest.raises(ModelError, match=r"1 biases have no place .*, blk\.1\.attn_q\.bias for one.*hub id or folder"):
        base_of(write_gguf(tmp_path / "a.gguf", bias="blk.1.attn_q.bias"))
    assert folders(cache) == []


def test_processes_at_once_make_one(tiny_gguf: Path, cache: Path) -> None:
    code = """
import os, sys
from veritune import config
from veritune.model import load
for _ in range(3):
    if os.fork() == 0:
        base = load.load_base(config.Model(path=sys.argv[1], base="fp32", device="cpu"))
        total = float(sum(p.double().sum() for p in base.model.parameters()))
        os.write(1, f"{total}\\n".encode())  # in one piece: print's two can come between another process's
        os._exit(0)
assert [os.wait()[1] for _ in range(3)] == [0, 0, 0]
"""
    args = [sys.executable, "-c", code, str(tiny_gguf)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3
    assert len(set(done.stdout.split())) == 1
    assert done.stderr.count("its weights are kept") == 1
    assert len(folders(cache)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_smollm2_is_the_same(smollm2: Path, cache: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = base_of(smollm2, precision)
    monkeypatch.setenv(gguf.VARIABLE, "off")
    assert_same(kept, base_of(smollm2, precision))
