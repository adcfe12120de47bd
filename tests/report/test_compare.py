"""The report on several runs: every one in it, and differences that are the paired test's."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from runs import settings, trained
from test_page import Parsed, assert_self_contained

from veritune.quality.metrics import paired
from veritune.report import compare, folder, page, scored


@pytest.fixture(scope="module")
def second(data: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another real run on the same data, with another learning rate."""
    out = tmp_path_factory.mktemp("runs") / "second"
    trained(settings(out, data, tiny_folder, train={"lr": 0.02}, validation={"every": 3}))
    return out


def test_two_real_runs(finished: Path, second: Path, tmp_path: Path) -> None:
    page.report([finished, second], tmp_path / "r.html", price=1.0)
    text = (tmp_path / "r.html").read_text()
    assert_self_contained(text)
    found = Parsed(text)
    assert [attrs["id"] for tag, attrs in found.tags if tag == "section"] == [
        "summary", "what", "training", "validation", "differences", "scores", "cost", "again",
    ]  # fmt: skip
    assert "train.lr" in found.text
    assert "train.batch_size0" not in found.text
    assert "Training loss (nats)" in found.text
    a, b = (scored.load(folder.read(path)) for path in (finished, second))
    assert a
    assert b
    expected = paired(a.labels, a.p, b.p, a.groups, resamples=compare.RESAMPLES)
    assert compare.difference(a, b) == (32, expected)
    assert f"{expected['auroc'].value:+.3f}" in found.text


def test_rows_are_matched_by_their_id(finished: Path, second: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer"
    shutil.copytree(second, fewer)
    scores = pl.read_parquet(fewer / "scores-best.parquet")
    scores.reverse().head(20).write_parquet(fewer / "scores-best.parquet")
    a, b = (scored.load(folder.read(path)) for path in (finished, fewer))
    assert a
    assert b
    found = compare.difference(a, b)
    assert found
    assert found[0] == 20
    kept = [i for i, id_ in enumerate(a.frame["id"]) if id_ in set(b.frame["id"])]
    at = [b.frame["id"].to_list().index(a.frame["id"][i]) for i in kept]
    accuracy = ((b.p[at] >= 0.5) == b.labels[at]).mean() - ((a.p[kept] >= 0.5) == a.labels[kept]).mean()
    assert found[1]["accuracy"].value == pytest.approx(accuracy)


def test_rows_of_one_label_have_no_auroc_to_compare(finished: Path, second: Path, tmp_path: Path) -> None:
    one = tmp_path / "one", tmp_path / "other"
    for source, copy in zip((finished, second), one, strict=True):
        shutil.copytree(source, copy)
        scores = pl.read_parquet(copy / "scores-best.parquet")
        scores.filter(pl.col("is_correct")).write_parquet(copy / "scores-best.parquet")
    page.report([*one], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "nan" not in text.lower()
    assert "Accuracy: difference from one" in text
    assert "AUROC: difference from one" not in text


def test_runs_without_scores_and_on_other_data_are_shown_as_such(finished: Path, second: Path, tmp_path: Path) -> None:
    bare, other = tmp_path / "bare", tmp_path / "other"
    for path in (bare, other):
        shutil.copytree(second, path)
    (bare / "scores-best.parquet").unlink()
    (bare / "metrics.jsonl").unlink()
    about = json.loads((other / "run.json").read_text())
    about["resolved"]["fingerprint"] = "<other>"
    (other / "run.json").write_text(json.dumps(about))
    for paths in ([finished, bare, other], [bare, finished]):
        page.report(paths, tmp_path / "r.html")
        text = (tmp_path / "r.html").read_text()
        assert_self_contained(text)
        assert "trained on different data" in text or len(paths) == 2
    assert "bare has kept no scores" in text


def test_names_tell_runs_apart(finished: Path, tmp_path: Path) -> None:
    places = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "c"]
    for place in places:
        shutil.copytree(finished, place)
    assert compare.names([folder.read(place) for place in places]) == [
        "a/run", "b/run", f"{tmp_path.name}/c",
    ]  # fmt: skip
    assert len(set(compare.names([folder.read(places[0])] * 2))) == 2
