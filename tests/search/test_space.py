"""What is searched is declared in the settings' names, and a mistake in it is found before anything starts."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veritune import config
from veritune.errors import ConfigError
from veritune.search import space

RUN = config.Run(out="runs/x")


def axes(text: str, run: config.Run = RUN) -> dict[str, space.Axis]:
    declared = tomllib.loads(text)
    return {axis.key: axis for axis in space.read(declared, run, "run.toml")}


def test_names_are_the_settings_quoted_or_not() -> None:
    targets = '{ choice = [["q_proj"], ["q_proj", "v_proj"]] }'
    plain = axes(f"train.lr = {{ log = [1e-5, 1e-2] }}\nlora.targets = {targets}")
    quoted = axes(f'"train.lr" = {{ log = [1e-5, 1e-2] }}\n[lora]\ntargets = {targets}')
    assert plain == quoted
    assert plain["train.lr"] == space.Axis("train.lr", "log", (1e-5, 1e-2))


def test_whole_numbers_where_the_setting_takes_nothing_else() -> None:
    found = axes("lora.rank = { log = [4, 64] }\ntrain.lr = { range = [1, 2] }\nlora.dropout = { range = [0, 0.5] }")
    assert [found[key].whole for key in ("lora.rank", "train.lr", "lora.dropout")] == [True, False, False]
    assert found["lora.rank"].values == (4, 64)


def test_the_default_is_the_search_of_the_entry() -> None:
    found = {axis.key: axis for axis in space.read({}, RUN, "run.toml")}
    assert found["train.lr"] == space.Axis("train.lr", "log", (1e-6, 0.5))
    assert set(found) == set(space.DEFAULT)
    assert config.Sweep().trials == 31
    assert config.Sweep().rows == 10_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train.learning_rate = { log = [1e-5, 1] }", "unknown setting 'train.learning_rate'"),
        ("train.lrr = { log = [1e-5, 1] }", "did you mean 'train.lr'"),
        ("lr = { log = [1e-5, 1] }", "did you mean 'train.lr'"),
        ("lora.lr = { log = [1e-5, 1] }", "did you mean 'train.lr'"),
        ('out = { choice = ["a", "b"] }', "out cannot be searched"),
        ('model.path = { choice = ["a", "b"] }', "model.path cannot be searched"),
        ("data.rows = { range = [1, 2] }", "data.rows cannot be searched"),
        ('strategy.kind = { choice = ["plain", "stream"] }', "strategy.kind cannot be searched"),
        ("session.hours = { range = [1, 2] }", "session.hours cannot be searched"),
        ("train.lr = [1e-5, 1]", "must be { range = [a, b] }"),
        ("train.lr = { uniform = [1e-5, 1] }", "must be { range = [a, b] }"),
        ("train.lr = { log = [1e-5, 1], range = [0, 1] }", "must be { range = [a, b] }"),
        ("train.lr = { log = 3 }", "must be a list"),
        ("train.lr = { log = [] }", "must be a list"),
        ("train.lr = { log = [1e-5] }", "must be two numbers"),
        ("train.lr = { log = [1e-5, true] }", "must be two numbers"),
        ("train.lr = { log = [1, 1e-5] }", "from a lower to a higher"),
        ("train.lr = { range = [1e-5, inf] }", "from a lower to a higher"),
        ("train.weight_decay = { log = [0, 1] }", "cannot start at 0"),
        ("train.lr = { range = [-1.0, 1.0] }", "train.lr = -1.0"),
        ("train.warmup_ratio = { range = [0, 1] }", "train.warmup_ratio = 1"),
        ("lora.rank = { range = [1, 2.5] }", "lora.rank = 2.5"),
        ("lora.rank = { range = [0, 4] }", "lora.rank = 0"),
        ('train.optimizer = { choice = ["adamw_torch", "adam"] }', "train.optimizer = 'adam'"),
        ('train.schedule = { choice = ["cosine", "cosine"] }', "a choice twice"),
        ('train.schedule = { range = ["cosine", "linear"] }', "must be two numbers"),
    ],
)
def test_a_mistake_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        axes(text)
    assert said in str(caught.value)
    assert str(caught.value).startswith("run.toml: [sweep.space]: ")


def test_what_a_phase_sets_itself_is_not_searched() -> None:
    phases = (config.Phase(rows=(0, 8)), config.Phase(rows=(8, 16), lr=1e-4, schedule="linear"))
    run = config.Run(out="runs/x", phases=phases)
    with pytest.raises(ConfigError, match=r"train\.lr: phase 2 of the run sets its own lr.*take lr out of the phase"):
        axes("train.lr = { log = [1e-5, 1e-2] }", run)
    with pytest.raises(ConfigError, match=r"train\.lr: phase 2 .*train\.schedule: phase 2 "):
        space.read({}, run, "run.toml")
    assert axes("train.epochs = { range = [1, 2] }\nlora.rank = { choice = [8] }", run)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"lora.rank = 0.*unknown setting 'train.lrr'"):
        axes("train.lrr = { log = [1e-5, 1] }\nlora.rank = { range = [0, 4] }")


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_every_value_between_the_ends_is_taken(data: Any) -> None:
    """The ends are what was checked; whatever is drawn between them builds."""
    for axis in space.read({}, RUN, "x"):
        among = st.sampled_from(axis.values) if axis.kind == "choice" else st.floats(*axis.values)
        value = data.draw(among)
        changed = space.apply(RUN, {axis.key: value})
        got = config.flat(config.as_dict(changed))
        assert got[axis.key] == value or math.isclose(got[axis.key], value)
        assert {key for key in got if got[key] != config.flat(config.as_dict(RUN))[key]} <= {axis.key}


def test_train_takes_the_file_and_checks_the_sweep(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('out = "r"\n[sweep]\ntrials = 3\n[sweep.space]\ntrain.lr = { log = [1e-5, 1] }\n')
    assert config.read_run(file) == config.Run(out="r")
    assert config.read_sweep(file)[1:] == (config.Sweep(trials=3), {"train": {"lr": {"log": [1e-5, 1]}}})
    file.write_text('out = "r"\n[sweep]\ntrails = 3\n')
    with pytest.raises(ConfigError, match=r"\[sweep\]: unknown key 'trails' \(did you mean 'trials'\?\)"):
        config.read_run(file)
    file.write_text('out = "r"\nsweep = 3\n')
    with pytest.raises(ConfigError, match="must be tables"):
        config.read_run(file)
