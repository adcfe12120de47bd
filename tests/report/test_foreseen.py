"""`veritune plan` foretells memory on a named card, from a configuration without weights."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from veritune import config
from veritune.data import dataset
from veritune.data.generate import generate
from veritune.errors import ConfigError
from veritune.report import foreseen, planned
from veritune.report.foreseen import Foreseen
from veritune.training import feed
from veritune.training.memory import GIB

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def source_and_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[feed.Source, config.Run]:
    folder = tmp_path_factory.mktemp("plan")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in generate(60, solutions_per_question=4, seed=1)))
    dataset.prepare([str(rows)], folder / "prepared", config.Prepare(validation_rows=16))
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    values = {
        "out": str(folder / "run"), "data": {"path": str(folder / "prepared")},
        "model": {"path": str(folder), "base": "nf4"}, "train": {"batch_size": 64},
    }  # fmt: skip
    run = config.build(config.Run, values, "test")
    return feed.read(run), run


def test_memory_and_speed_on_a_card(source_and_run: tuple[feed.Source, config.Run]) -> None:
    source, run = source_and_run
    found = foreseen.look(run, source, "h200", None)
    assert isinstance(found, Foreseen)
    assert found.fit.fits
    assert found.precision == "nf4, held as bf16"
    small = foreseen.look(run, source, "h200", 10)
    assert isinstance(small, Foreseen)
    assert small.fit.peak.total < 10 * GIB
    assert small.fit.budget < found.fit.budget or small.fit.recomputed > found.fit.recomputed
    assert small.rows_per_second < found.rows_per_second
    printed = io.StringIO()
    foreseen.show(small, Console(file=printed, width=200))
    assert "memory on 10 GiB of an h200 (nf4)" in printed.getvalue()
    assert f"{small.fit.budget:,} tokens at once" in printed.getvalue()


def test_a_named_card_gives_the_speed_unless_one_is_told(source_and_run: tuple[feed.Source, config.Run]) -> None:
    _, run = source_and_run
    told = planned.Planned(**vars(run), gpu="h100")
    assert planned.speed(told, 50.0) == 50.0
    assert planned.speed(replace(told, rows_per_second=7), 50.0) == 7


def test_what_cannot_be_foreseen_is_said(
    source_and_run: tuple[feed.Source, config.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run = source_and_run
    with pytest.raises(ConfigError, match="known cards are h200"):
        foreseen.look(run, source, "voodoo", None)
    eight = config.build(config.Run, config.as_dict(run) | {"model": {"path": run.model.path, "base": "fp8"}}, "test")
    with pytest.raises(ConfigError, match="a100 has no FP8 products"):
        foreseen.look(eight, source, "a100", None)
    assert isinstance(foreseen.look(eight, source, "l4", None), Foreseen)
    monkeypatch.setattr(foreseen, "DRIVERS", ())
    assert "there is none here" in str(foreseen.look(run, source, None, None))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"num_local_experts": 8}))
    settings = config.as_dict(run) | {"model": {"path": str(tmp_path)}}
    assert "has experts" in str(foreseen.look(config.build(config.Run, settings, "test"), source, "h100", None))


def test_reckoned_rows_share_their_beginning_and_are_not_too_long(
    source_and_run: tuple[feed.Source, config.Run],
) -> None:
    source, run = source_and_run
    of_one = [i for i in range(len(source.train.ids)) if source.train.groups[i] == source.train.groups[0]][:2]
    rows = foreseen.reckoned(run, source, of_one)  # pyright: ignore[reportArgumentType]
    shared = next(i for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b)
    assert shared >= len(source.train.questions[0]) / foreseen.CHARACTERS + foreseen.TEMPLATE
    short = config.build(config.Run, config.as_dict(run) | {"prompt": {"max_length": 64}}, "test")
    assert max(map(len, foreseen.reckoned(short, source, of_one))) == 64  # pyright: ignore[reportArgumentType]
