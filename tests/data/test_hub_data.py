"""Datasets of a hub on this machine, through the hub's own client."""

from collections.abc import Iterator
from pathlib import Path

import made_rows
import pytest
from huggingface_hub import constants
from local_hub import serving

from veritune.config import Columns
from veritune.data.sources import find_files, read_chunks
from veritune.errors import DataError

ROWS = made_rows.rows(6)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of a hub that has datasets `me/plain`, `me/converted`, `me/both` and `me/bare`."""
    sets = tmp_path / "hub" / "datasets" / "me"
    files = {
        "plain/train.jsonl": 4, "plain/more/test.csv": 2, "converted/x.csv": 1,
        "converted@refs-convert-parquet/main/train/0000.parquet": 3,
        "converted@refs-convert-parquet/main/train/0001.parquet": 2,
        "converted@refs-convert-parquet/main/test/0000.parquet": 1,
        "both/x.csv": 1, "both@refs-convert-parquet/main/train/0000.parquet": 3,
        "both@refs-convert-parquet/socratic/train/0000.parquet": 3,
    }  # fmt: skip
    for name, count in files.items():
        (sets / name).parent.mkdir(parents=True, exist_ok=True)
        made_rows.write(sets / name, ROWS[:count])
    (sets / "plain" / "README.md").write_text("about")
    (sets / "bare").mkdir()
    (sets / "bare" / "README.md").write_text("about")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(tmp_path / "hub") as (address, asked):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        url = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        yield asked


def read(name: str, note=lambda text: None) -> dict[str, int]:
    """Rows of each file that a name stands for."""
    out = {}
    for source in find_files([name], note):
        chunks = list(read_chunks(source, Columns(), 10**6, note, lambda n: None))
        assert not any(chunk.refused for chunk in chunks)
        out[source.name] = sum(len(chunk.frame) for chunk in chunks)
    return out


def test_a_bare_name_is_the_train_split_of_the_conversion(hub: list[str]) -> None:
    notes: list[str] = []
    found = read("hf://datasets/me/converted", notes.append)
    assert found == {
        "hf://datasets/me/converted@~parquet/main/train/0000.parquet": 3,
        "hf://datasets/me/converted@~parquet/main/train/0001.parquet": 2,
    }
    assert any("main/train/*.parquet" in note for note in notes)
    for name, count in found.items():  # as a report's "how to reproduce" gives it
        assert read(name) == {name: count}


def test_files_folders_patterns_and_revisions(hub: list[str]) -> None:
    assert read("hf://datasets/me/plain/train.jsonl") == {"hf://datasets/me/plain/train.jsonl": 4}
    assert read("hf://datasets/me/plain/more") == {"hf://datasets/me/plain/more/test.csv": 2}
    assert list(read("hf://datasets/me/plain/*.csv").values()) == [2]
    assert sorted(read("hf://datasets/me/plain@main").values()) == [2, 4]
    assert sum(read("hf://datasets/me/both@~parquet/socratic").values()) == 3
    assert sum(read("hf://datasets/me/both@refs%2Fconvert%2Fparquet").values()) == 6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf://datasets/me/nothing", "no such dataset, or it is private"),
        ("hf://datasets/me/plain", "no parquet conversion.*@main/train.jsonl"),
        ("hf://datasets/me/plain@v7", "no revision 'v7'"),
        ("hf://datasets/me/both", "main/train, socratic/train; name one, such as .*both@~parquet/main/train"),
        ("hf://datasets/me/bare@main", "no file there that veritune reads .*README.md"),
        ("hf://datasets/me/plain/none.csv", "no file there .*train.jsonl"),
        ("hf://models/me/plain", "named hf://datasets/USER/NAME"),
        ("hf://datasets/me", "named hf://datasets/USER/NAME"),
        ("hf://datasets/me/plain?token=x", "named hf://datasets/USER/NAME"),
    ],
)
def test_what_cannot_be_read_says_why(hub: list[str], name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        find_files([name], lambda text: None)


def test_what_was_read_once_is_read_again_without_a_network(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = read("hf://datasets/me/converted")
    count = len(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read("hf://datasets/me/converted") == before
    assert len(hub) == count, "nothing is asked offline"
    with pytest.raises(DataError, match=r"cache .* has nothing of this dataset"):
        find_files(["hf://datasets/me/plain@main"], print)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    notes: list[str] = []
    assert read("hf://datasets/me/converted", notes.append) == before
    assert any("cannot be asked" in note for note in notes)
