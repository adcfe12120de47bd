"""Settings as they are written: no slip in a key goes unnoticed, and what helps to write them is true to them."""

import json
import random
import string
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from veritune import cli, config, flags, starter
from veritune.data.generate import write
from veritune.errors import ConfigError
from veritune.search import space
from veritune.suggest import distance

KEYS = config.keys(config.Run)
LETTERS = string.ascii_lowercase + "_"


def slips(word: str) -> list[str]:
    """Every word that one drop or one swap of neighbours makes of a word; and at every place one insertion and one
    change, drawn."""
    draw = random.Random(word)
    out = [word[:i] + word[i + 1 :] for i in range(len(word))]
    out += [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)]
    out += [word[:i] + draw.choice(LETTERS) + word[i:] for i in range(len(word) + 1)]
    out += [word[:i] + draw.choice(LETTERS) + word[i + 1 :] for i in range(len(word))]
    return sorted({it for it in out if it and it != word})


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def siblings(key: str) -> set[str]:
    table = key.rpartition(".")[0]
    return {it.rpartition(".")[2] for it in KEYS if it.rpartition(".")[0] == table}


@pytest.mark.parametrize("key", KEYS)
def test_a_slip_in_a_key_of_a_run_file_is_told_the_key(key: str) -> None:
    table, dot, name = key.rpartition(".")
    for slip in slips(name):
        if slip in siblings(key):
            continue  # it is another key
        with pytest.raises(ConfigError) as caught:
            config.build(config.Run, {"out": "o", **nested(table + dot + slip, 1)}, "run.toml")
        told = str(caught.value)
        assert f"unknown key {table + dot + slip!r}" in told
        assert repr(key) in told.partition("did you mean")[2].partition(")")[0], told


@pytest.mark.parametrize("name", config.keys(config.Phase))
def test_a_slip_in_a_listed_phase_is_told_its_key(name: str) -> None:
    for slip in set(slips(name)) - set(config.keys(config.Phase)):
        with pytest.raises(ConfigError) as caught:
            config.build(config.Run, {"out": "o", "phases": [{"rows": [0, 8]}, {"rows": [8, 9], slip: 1}]}, "run.toml")
        assert f"unknown key 'phases.1.{slip}'" in str(caught.value)
        assert repr(f"phases.{name}") in str(caught.value).partition("did you mean")[2], caught.value


@pytest.mark.parametrize("table", sorted({key.partition(".")[0] for key in KEYS if "." in key}))
def test_a_slip_in_a_table_is_told_the_table(table: str) -> None:
    for slip in slips(table):
        with pytest.raises(ConfigError) as caught:
            config.build(config.Run, {"out": "o", slip: {}}, "run.toml")
        assert repr(table) in str(caught.value).partition("did you mean")[2], caught.value


SEARCHED = [key for key in KEYS if not key.startswith(space.FIXED)]


@pytest.mark.parametrize("key", SEARCHED)
def test_a_slip_in_a_searched_key_is_told_the_key(key: str) -> None:
    table, dot, name = key.rpartition(".")
    wrong = [table + dot + slip for slip in slips(name)] + [slip + dot + name for slip in slips(table)]
    for slip in [it for it in wrong if it not in KEYS]:
        with pytest.raises(ConfigError) as caught:
            space.read(nested(slip, {"choice": [1]}), config.Run(out="o"), "run.toml")
        assert repr(key) in str(caught.value).partition("did you mean")[2], caught.value
    for kind in space.KINDS:
        for slip in set(slips(kind)) - set(space.KINDS):
            with pytest.raises(ConfigError, match=rf"{key} must be {{ range = \[a, b\] }}, {{ log = "):
                space.read(nested(key, {slip: [1, 2]}), config.Run(out="o"), "run.toml")


@pytest.mark.parametrize("name", ["sweep", *(f"sweep.{name}" for name in ("space", *config.keys(config.Sweep)))])
def test_a_slip_in_the_sweeps_table_is_told_its_key(name: str, tmp_path: Path) -> None:
    table, dot, last = name.rpartition(".")
    for slip in slips(last):
        if slip in config.keys(config.Sweep):
            continue  # it is another key
        (tmp_path / "run.toml").write_text(f'out = "o"\n{table}{dot}{slip}.train.lr = {{ log = [1e-4, 1] }}\n')
        with pytest.raises(ConfigError) as caught:
            config.read_sweep(tmp_path / "run.toml")
        assert repr(last) in str(caught.value).partition("did you mean")[2], caught.value


@pytest.mark.parametrize("name", ["track", "hours", "gpus"])
def test_a_slip_in_a_short_flag_is_told_the_flag(name: str) -> None:
    known = flags.names(config.Run)
    for slip in set(slips(name)) - {*known, *flags.SHORT}:
        with pytest.raises(ConfigError) as caught:
            flags.check([f"--{slip.replace('_', '-')}=1"], known, "veritune train RUN.toml")
        assert repr(f"--{name}") in str(caught.value).partition("did you mean")[2], caught.value
    with pytest.raises(ConfigError, match="there is no flag --hours"):
        flags.check(["--hours", "1"], ["out"], "veritune score")


@pytest.mark.parametrize("key", KEYS)
def test_a_slip_in_a_flag_is_told_the_flag(key: str) -> None:
    flag = "--" + key.replace("_", "-")
    known = flags.names(config.Run)
    for slip in slips(flag[2:]):
        if slip.replace("-", "_") in [*known, *flags.SHORT]:
            continue
        with pytest.raises(ConfigError) as caught:
            flags.check([f"--{slip}=1"], known, "veritune train")
        assert repr(flag) in str(caught.value).partition("did you mean")[2], caught.value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[phases]\nrows = [0, 9]", r"phases must be a list, each item under \[\[phases\]\]"),
        ("lora.targets = 'q_proj'", r"lora\.targets must be a list, such as \['q_proj'\]"),
    ],
)
def test_a_single_value_in_place_of_a_list_is_told_the_list(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "run.toml").write_text(f'out = "o"\n{text}\n')
    with pytest.raises(ConfigError, match=told):
        config.read_run(tmp_path / "run.toml")


def test_slips_are_refused_by_the_command_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    for text, args in (
        ("[trian]\nlr = 1", []),
        ("[train]\nlrr = 1", []),
        ("", ["--train.l", "1"]),
        ("", ["--trainlr=1"]),
        ("", ["--data.ptah", "x"]),
    ):
        file.write_text(f'out = "{tmp_path / "out"}"\n{text}\n')
        assert cli.run(["train", str(file), *args]) == 2
        assert "did you mean" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb not in ("plan", "sweep", "train")])
def test_a_slip_in_a_flag_of_any_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = flags.names(cli.VERBS[verb])
    if cli.run([verb, "--help"]) == 0:
        shown = capsys.readouterr().out
        assert [name for name in known if "no_" not in name and f"--{name.replace('_', '-')}" not in shown] == []
    for name in known:
        for slip in slips(name):
            if slip in known:
                continue
            assert cli.run([verb, f"--{slip.replace('_', '-')}", "1"]) == 2
            said = capsys.readouterr().err
            assert f"'--{name.replace('_', '-')}'" in said.partition("did you mean")[2], said


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [("", "", 0), ("ab", "ba", 1), ("lr", "lrr", 1), ("rows", "ros", 1), ("abc", "xyz", 3), ("a", "", 1)],
)
def test_distance(a: str, b: str, steps: int) -> None:
    assert distance(a, b) == distance(b, a) == steps


NAME_ONE = "write one name at least, such as q_proj; without lora.targets its default stands"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--train.lr", "-1"], "flags: train.lr = -1.0: input should be greater than 0"),
        (["--train.batch-size=0"], "flags: train.batch_size = 0: input should be greater than or equal to 1"),
        (["--lora.dropout", "1"], "flags: lora.dropout = 1.0: input should be less than 1"),
        (["--train.epochs", "inf"], "flags: train.epochs = inf: input should be a finite number"),
        (["--train.epochs", "1e300"], "flags: train.epochs = 1e+300: input should be less than or equal to 1000000"),
        (["--train.max-grad-norm", "inf"], "flags: train.max_grad_norm = inf: input should be a finite number"),
        (["--strategy.replay-ratio", "inf"], "flags: strategy.replay_ratio = inf: input should be a finite number"),
        (["--hours", "nan"], "flags: session.hours = nan: input should be a finite number"),
        (["--lora.targets"], f"flags: lora.targets is empty: {NAME_ONE}"),
        (["--data.rows", f"{10**20}"], f"flags: data.rows = {10**20}: input should be less than or equal to {2**53}"),
    ],
)
def test_a_value_that_a_flag_cannot_have(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "--out", "o", *args]) == 2
    assert capsys.readouterr().err == f"veritune: {told}\n"


@pytest.mark.parametrize("name", ["validation_rows", "max_row_bytes", "limit"])
def test_a_number_that_preparing_cannot_have(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "rows.jsonl", 4, seed=1)
    args = [str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "p"), f"--{name.replace('_', '-')}", f"{10**20}"]
    assert cli.run(["prepare", *args]) == 2
    told = f"veritune: {name} = {10**20}: input should be less than or equal to {2**53}\n"
    assert capsys.readouterr().err == told


def test_what_is_written_of_a_run_is_the_run() -> None:
    """So a run can be gone on with, whatever its settings."""
    phase = {"rows": [0, 8], "replay_ratio": 0.5, "epochs": 1e6, "lr": 1e-300, "schedule": "wsd", "start_from": "best"}
    run = config.build(
        config.Run,
        {
            "out": "o",
            "phases": [phase, {"rows": [8, config.LARGEST], "optimizer_state": "keep"}],
            "data": {"path": "d \u00e9\n", "rows": config.LARGEST},
            "prompt": {"instruction": "{true} \u2028 {false}", "answers": ["Yes", "No"]},
            "lora": {"alpha": 1 / 3, "targets": ["q_proj"]},
            "train": {"lr": 5e-324, "max_grad_norm": 0, "memory_gib": 1.7e308, "seed": 2**32 - 1, "start_from": "a"},
            "strategy": {"ends": [1, 2], "cooldowns": [3], "replay_ratio": 0.1 + 0.2, "column": "solver"},
            "session": {"hours": 1e-9},
            "track": {"to": ["wandb", "trackio"], "name": "n"},
        },
        "test",
    )
    assert config.build(config.Run, json.loads(json.dumps(config.as_dict(run))), "test") == run


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    default = config.build(config.Run, {"out": "o", "train": {"lr": 3.0, "seed": 4}, "data": {"rows": 9}}, "test")
    args = ["--train.lr=5", "--prompt.answers", "Yes", "No", "--train.no-compile", "--track", "tensorboard", "wandb"]
    found = flags.parse(config.Run, args, default, prog="p", description="")
    changed = {
        "train": {"lr": 5.0, "seed": 4, "compile": False},
        "data": {"rows": 9},
        "prompt": {"answers": ["Yes", "No"]},
    }
    assert found == config.build(config.Run, {"out": "o", **changed, "track": {"to": ["tensorboard", "wandb"]}}, "test")


def test_the_home_folder_may_be_written_as_a_shell_would_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    file = tmp_path / "run.toml"
    file.write_text('out = "~/run"\n[data]\npath = "~/rows"\n[sweep]\nout = "~/sweep"\n')
    run, sweep, _ = config.read_sweep(file)
    assert (run.out, run.data.path, sweep.out) == tuple(f"/home/someone/{name}" for name in ("run", "rows", "sweep"))
    found = flags.parse(config.Run, ["--out=~/other"], run, prog="p", description="")
    assert found.out == "/home/someone/other"


# What helps to write them.


def test_a_run_file_to_start_from_is_taken_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    assert cli.run(["init", str(file)]) == 0
    assert config.read_run(file) == config.Run(out=starter.OUT)
    text = file.read_text()
    assert cli.run(["init", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.run(["schema", "--out", str(file)]) == 2
    assert f"{file}: is there already, and no schema" in capsys.readouterr().err
    assert file.read_text() == text
    for _ in range(2):  # a schema is written anew
        assert cli.run(["schema", "--out", str(tmp_path / "run.schema.json")]) == 0
    assert all(len(line) <= 120 for line in text.splitlines() if line.startswith("# ") and " = " not in line)


def commented(text: str) -> Iterator[tuple[str, str, bool]]:
    """The keys that are commented out in a run file: dotted key, line, and whether it shows a default."""
    table = ""
    for line in text.splitlines():
        if line.startswith("["):
            table = line.strip("[]") + "."
        name = line.removeprefix("# ").partition(" = ")[0]
        if line.startswith("# ") and " = " in line and table + name in KEYS:
            yield table + name, line[2:], "not set by default" not in line


def test_every_key_stands_there_with_its_default(tmp_path: Path) -> None:
    text = starter.run_file("run.toml")
    found = list(commented(text))
    assert ["out", *(key for key, _, _ in found)] == KEYS
    defaults = config.flat(config.as_dict(config.Run(out="x")))
    for key, line, is_default in found:
        values = nested(key.rpartition(".")[0], tomllib.loads(line)) if "." in key else tomllib.loads(line)
        run = config.build(config.Run, {"out": "x", **values}, "test")
        now = config.flat(config.as_dict(run))
        assert (now[key] == defaults[key]) == is_default, line
        assert is_default == (defaults[key] is not None)


def test_a_phase_stands_there_with_every_key() -> None:
    text = starter.run_file("run.toml").partition("# [[phases]]\n")[2].partition("\n[")[0]
    keys = [line.removeprefix("# ") for line in text.splitlines() if " = " in line]
    run = config.build(config.Run, {"out": "o", **tomllib.loads("\n".join(["[[phases]]", *keys]))}, "test")
    assert [key.partition(" = ")[0] for key in keys] == config.keys(config.Phase)
    usual = config.Train()
    expected = config.Phase(
        rows=(0, 1000), epochs=usual.epochs, lr=usual.lr, schedule=usual.schedule, warmup_ratio=usual.warmup_ratio
    )
    assert run.phases == (expected,)


def test_the_schema_knows_every_key_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["schema"]) == 0
    found = json.loads(capsys.readouterr().out)

    def walk(about: dict[str, Any], prefix: str = "") -> Iterator[str]:
        assert about["additionalProperties"] is False
        for name, item in about["properties"].items():
            if name == "space":
                assert item["type"] == "object"
            elif "$ref" in item:
                yield from walk(found["$defs"][item["$ref"].rpartition("/")[2]], f"{prefix}{name}.")
            else:
                assert item["description"], name
                yield prefix + name

    assert list(walk(found)) == KEYS + ["sweep." + key for key in config.keys(config.Sweep)]
    assert found["required"] == ["out"]
    searched = found["$defs"]["Sweep"]["properties"]["space"]["properties"]
    assert [key for key in searched if "." in key] == SEARCHED
    kinds = {key: set(searched["train"]["properties"][key]["properties"]) for key in ("lr", "optimizer")}
    assert kinds == {"lr": {"range", "log", "choice"}, "optimizer": {"choice"}}


def test_the_schema_agrees_with_the_check(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(starter.schema())
    for values in (
        {},
        {"out": 1},
        {"out": "o", "train": {"lr": 0}},
        {"out": "o", "x": 1},
        {"out": "o", "lora": {"rank": 1.5}},
    ):
        assert not checker.is_valid(values)
        with pytest.raises(ConfigError):
            config.build(config.Run, values, "test")
    checker.validate(tomllib.loads(starter.run_file("run.toml")))
    checker.validate({"out": "o", "sweep": {"trials": 3, "space": {"train": {"lr": {"log": [1e-5, 1e-2]}}}}})
    assert not checker.is_valid({"out": "o", "sweep": {"trails": 3}})


def test_the_schema_knows_what_can_be_searched() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(starter.schema())
    for key, spec, good in (
        ("train.lr", {"log": [1e-5, 1e-2]}, True),
        ("train.lr", {"rnage": [1e-5, 1e-2]}, False),
        ("train.lr", {"range": [1e-5]}, False),
        ("train.lr", {"range": [1e-5, 1e-2], "choice": [1e-3]}, False),
        ("train.optimizer", {"choice": ["adamw_torch", "lion_8bit"]}, True),
        ("train.optimizer", {"choice": ["adam"]}, False),
        ("train.optimizer", {"range": ["adamw_torch", "lion_8bit"]}, False),
        ("lora.targets", {"choice": [["q_proj"], ["q_proj", "v_proj"]]}, True),
        ("train.lrr", {"log": [1e-5, 1e-2]}, False),
        ("data.rows", {"range": [1, 2]}, False),
    ):
        for declared in (nested(key, spec), {key: spec}):
            values = {"out": "o", "sweep": {"space": declared}}
            assert checker.is_valid(values) == good, declared
            if good:
                space.read(declared, config.Run(out="o"), "test")
            else:
                with pytest.raises(ConfigError):
                    space.read(declared, config.Run(out="o"), "test")
    for key, spec in space.DEFAULT.items():
        checker.validate({"out": "o", "sweep": {"space": {key: spec}}})


# Secrets.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.path", "https://user:planted-password@huggingface.co/a/b"),
        ("model.path", "hf://hf_plantedplantedplanted@models/a/b"),
        ("data.path", "https://host/rows?token=planted-token"),
        ("train.start_from", "hf_plantedplantedplantedplanted"),
        ("prompt.instruction", "Use planted-in-the-environment. {true} {false}"),
        ("track.project", "https://plantedplantedplantedplanted@api.wandb.ai"),
    ],
)
def test_a_setting_that_holds_a_secret_is_refused(key: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "planted-in-the-environment")
    with pytest.raises(ConfigError) as caught:
        config.build(config.Run, {"out": "o", **nested(key, value)}, "run.toml")
    assert f"run.toml: {key} holds a key, token or password" in str(caught.value)
    assert "planted" not in str(caught.value)


def test_what_is_no_secret_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("SSH_KEY_FILE", "/home/me")
    monkeypatch.setenv("EMPTY_TOKEN", "")
    for value in (
        "/home/me/run",
        "true",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "hf://datasets/a/b@main/x.parquet",
        "a@b",
    ):
        assert config.build(config.Run, {"out": value}, "test").out == value
