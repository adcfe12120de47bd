"""Nothing that is written holds a secret: secrets are planted wherever one may be, a whole job is run with a tracker,
stopped and failed on the way, and every byte that it left or said is searched."""

import importlib.util
import json
import socket
from pathlib import Path

import pytest

from veritune.cli import run
from veritune.data import generate
from veritune.redact import HIDDEN, redact
from veritune.trackers import follow

PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlantedPlant",
    "HUGGING_FACE_HUB_TOKEN": "hf_SecondSecondSecondSecondSecondSe",
    "PGPASSWORD": "planted-database-password",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access/key0123456789",
    "OPTUNA_DB_PASSWORD": "another planted password",
    "AZURE_ACCESS_KEY": "/planted+in/base64/0123456789abcdefghij==",
}
IN_URLS = ("url-planted-password", "hf_UrlUrlUrlUrlUrlUrlUrlUrlUrl", "query-planted-token")
SECRETS = [*PLANTED.values(), *IN_URLS]


def forms(secret: str) -> list[bytes]:
    """A secret as it may stand in a file: plain, in JSON, in UTF-16."""
    return [secret.encode(), json.dumps(secret)[1:-1].encode(), secret.encode("utf-16-le")]


def searched(folder: Path, said: list[bytes]) -> int:
    """Searches every file of a folder and what was said; gives the number of files."""
    count = 0
    for file in folder.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert not [secret for secret in SECRETS for form in forms(secret) if form in data], file
            count += 1
    for text in said:
        assert not [secret for secret in SECRETS for form in forms(secret) if form in text], text
    return count


def test_no_byte_of_a_job_holds_a_secret(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trackers = [name for name in ("wandb", "trackio", "tensorboard") if _installed(name)]
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    for name in ("HOME", "XDG_CACHE_HOME", "WANDB_DATA_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name))
    monkeypatch.setattr(follow, "DEADLINE", 20.0)
    monkeypatch.chdir(tmp_path)
    generate.write(tmp_path / "rows.jsonl", 12, seed=1)
    (tmp_path / "run.toml").write_text(
        f"""out = "run"
[model]
path = "{tiny_folder}"
base = "fp32"
device = "cpu"
[prompt]
max_length = 512
[train]
batch_size = 8
[checkpoint]
every = 1
[track]
to = {json.dumps(trackers)}
""",
        encoding="utf-8",
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(["prepare", "rows.jsonl", "--out", "prepared", "--validation-rows", "12"]) == 0
    assert run(["train", "run.toml"]) == 0
    assert run(["score", "run/best", "rows.jsonl", "--out", "scored.jsonl"]) == 0
    for name in trackers:
        assert (tmp_path / "run" / "trackers" / name / "sent.json").is_file()
    # Online, with the key, where nobody answers.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(follow, "DEADLINE", 2.0)
    assert run(["train", "run.toml", "--out", "other", "--data.rows", "8", "--track", *trackers[:1]]) == 0
    for args in (
        ["train", "run.toml", "--model.path", f"https://me:{IN_URLS[0]}@huggingface.co/a/b"],
        ["train", "run.toml", "--model.path", f"hf://{IN_URLS[1]}@a/b"],
        ["train", "run.toml", "--data.path", f"https://host/rows?token={IN_URLS[2]}"],
        ["train", "run.toml", "--out", PLANTED["HF_TOKEN"]],
        ["train", f"https://me:{IN_URLS[0]}@host/run.toml"],
        ["prepare", f"hf://datasets/a/b?token={IN_URLS[2]}", "--out", "hub"],
        ["prepare", f"https://me:{IN_URLS[0]}@host/rows.csv", "--out", "hub"],
        ["score", "run/best", "rows.jsonl", "--out", "a.jsonl", "--model", f"https://{IN_URLS[1]}@host/a"],
    ):
        assert run(args) == 2
    assert searched(tmp_path, [text.encode() for text in capfd.readouterr()]) > 30


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("postgresql://me:pass@db/x", f"postgresql://me:{HIDDEN}@db/x"),
        (
            "failed: postgresql+psycopg://me:p%40ss@db:5432/x and more",
            f"failed: postgresql+psycopg://me:{HIDDEN}@db:5432/x and more",
        ),
        ("https://0123456789abcdef0123@host", f"https://{HIDDEN}@host"),
        ("https://host/?a=1&api_key=abc&b=2", f"https://host/?a=1&api_key={HIDDEN}&b=2"),
        ("token hf_abcdefghijklmnopqrst.", f"token {HIDDEN}."),
        ("planted-in-the-environment", HIDDEN),
        ("key /planted/in+base64==", f"key {HIDDEN}"),
        ("key in /proc/self/environ", "key in /proc/self/environ"),
        ("models/hf_llama_3_8b_instruct", "models/hf_llama_3_8b_instruct"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("hf://datasets/a/b@main and you@host.org", "hf://datasets/a/b@main and you@host.org"),
        ("postgresql://me@db/x", "postgresql://me@db/x"),
    ],
)
def test_redacted(text: str, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "planted-in-the-environment")
    monkeypatch.setenv("SHORT_KEY", "abc")
    monkeypatch.setenv("MY_ACCESS_KEY", "/planted/in+base64==")
    monkeypatch.setenv("MY_CREDENTIALS", "/proc/self/environ")
    monkeypatch.setenv("TOKENIZER_PATH", "HuggingFaceTB/SmolLM2-135M")
    assert redact(text) == left
