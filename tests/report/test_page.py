"""The report on a run: everything in it, nothing from outside, nothing that rows say ever taken for markup."""

import json
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from runs import prepared, settings, trained

from veritune import cli, config
from veritune.errors import ConfigError, MissingError
from veritune.report import folder, page, run, scored
from veritune.report.words import SHOWN_LETTERS, plain

VOID = {"meta", "br", "img", "link", "input", "hr"}
SECTIONS = ["summary", "what", "training", "validation", "scores", "parts", "worst", "cost", "again"]
HOSTILE = [
    "<script>alert(1)</script>",
    "</style><b>out</b><!--",
    "</pre></details><img src=x onerror=alert(1)>",
    r"$\frac{1}{2}$ and \[x^2\] &amp; &lt; {{ 7*7 }} {% raw %}",
    "\u202ertl override\u202c \u05d0\u05d1 \u200b",
    "x" * 10_000,
    "\"quoted\" 'single' `back` \x07 bell \x7f",
    "line\n" * 50,
]


class Parsed(HTMLParser):
    """Tags in order, checked to close, with the text of every <pre>."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pre: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self.pre.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if "pre" in self.open:
            self.pre[-1] += data


def written(path: Path, out: Path, **how) -> str:
    page.report([path], out, **how)
    return out.read_text(encoding="utf-8")


def assert_self_contained(text: str) -> None:
    found = Parsed(text)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    ids = {attrs["id"] for _, attrs in found.tags if "id" in attrs}
    for _, attrs in found.tags:
        assert not {name for name in attrs if name.startswith("on") or name in ("src", "srcset", "style", "xlink:href")}
        if "href" in attrs:
            assert str(attrs["href"]).removeprefix("#") in ids
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert len(text) < 2_000_000


def test_every_section_of_a_real_run_is_there(finished: Path, tmp_path: Path) -> None:
    text = written(finished, tmp_path / "deep" / "report.html", price=3.0)
    assert_self_contained(text)
    found = Parsed(text)
    assert [attrs["id"] for tag, attrs in found.tags if tag == "section"] == SECTIONS
    figures = [tag for tag, _ in found.tags].count("figure")
    assert figures == [tag for tag, _ in found.tags].count("svg") >= 4 + 2 + 4 + 3
    assert "nan" not in text.lower().replace("dominant", "")
    about = folder.read(finished)
    best = about.metrics.best
    assert best
    for said in (
        f"{best['accuracy']:.3f}", f"{best['auroc']:.3f}", about.about["resolved"]["fingerprint"], "6 of 6",
        "veritune train run.toml", "at 3 an hour", "by solver", "length of the solution",
        "training, over the whole vocabulary", "validation, over the two answer words", "log loss over the two answer",
        "as it should be on rows of train's share of correct solutions. Of these 50% are.",
    ):  # fmt: skip
        assert said in found.text, said


@pytest.fixture(scope="module")
def hostile(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on rows that try to leave their place, in questions, solutions and another column."""
    rows = [
        {"question": f"{i} {text}", "solution": f"{j} {text}", "is_correct": j % 2 == 0, "<i>kind": text[:60]}
        for i, text in enumerate(HOSTILE * 2)
        for j in range(4)
    ]
    place = tmp_path_factory.mktemp("hostile")
    out = place / "<b>run"
    trained(settings(out, prepared(rows, place / "d", 32), tiny_folder))
    return out


def test_how_many_rows_were_chosen_is_said(finished: Path, tmp_path: Path) -> None:
    assert "its first" not in written(finished, tmp_path / "r.html")
    shutil.copytree(finished, tmp_path / "some")
    about = json.loads((finished / "run.json").read_text())
    about["settings"]["data"]["rows"] = 1234
    (tmp_path / "some" / "run.json").write_text(json.dumps(about))
    found = Parsed(written(tmp_path / "some", tmp_path / "r.html"))
    assert f"{about['settings']['data']['path']}, its first 1,234 rows" in found.text


def test_rows_are_text_whatever_they_say(hostile: Path, tmp_path: Path) -> None:
    text = written(hostile, tmp_path / "r.html")
    assert_self_contained(text)
    shown = Parsed(text).pre
    rows = scored.load(folder.read(hostile))
    assert rows
    wrong = [i for i in range(len(rows.p)) if (rows.p[i] >= 0.5) != rows.labels[i]]
    texts = {plain(rows.frame["solution"][i]) for i in wrong}
    seen = [part for part in shown if part in texts]
    assert len(seen) >= min(len(wrong), 10)
    assert "\u202e" not in text
    assert "\x07" not in text


def test_long_and_invisible_text_is_shown_as_such() -> None:
    assert plain("x" * 100_000).startswith("x" * 100)
    assert "[… 96,000 letters left out …]" in plain("x" * 100_000)
    assert len(plain("x" * 100_000)) < SHOWN_LETTERS + 100
    assert plain("a\x00\x1b\x7f\u202e\n\tb") == "a\u2400\u241b\u2421[U+202E]\n\tb"


def test_a_run_that_has_hardly_begun_has_a_page(finished: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(finished / "run.json", bare)
    text = written(bare, tmp_path / "r.html", data=tmp_path / "gone")
    assert_self_contained(text)
    assert "No step is finished yet" in text
    assert "name it with --data" in text
    assert "has kept no scores" in text


def test_a_failed_run_says_why(finished: Path, tmp_path: Path) -> None:
    failed = tmp_path / "failed"
    shutil.copytree(finished, failed)
    about = json.loads((failed / "status.json").read_text())
    about["sessions"][-1] |= {"state": "failed", "reason": "NonFiniteError: step 7: <loss>"}
    (failed / "status.json").write_text(json.dumps(about))
    assert "NonFiniteError: step 7: &lt;loss&gt;" in written(failed, tmp_path / "r.html")


def test_scores_are_shown_without_rows_and_with_other_data(finished: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(data, other)
    manifest = json.loads((other / "manifest.json").read_text()) | {"fingerprint": "other"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    for place in (tmp_path / "gone", other):
        text = written(finished, tmp_path / "r.html", data=place)
        assert "is not there, or is not the dataset that the run was trained on" in text
        assert 'id="scores"' in text
        assert 'id="worst"' not in text


def test_data_prepared_otherwise_since_is_not_told_as_the_runs(finished: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(data, other)
    manifest = json.loads((other / "manifest.json").read_text())
    for mark, about in ((": name it with --data", manifest | {"fingerprint": "other"}), ("rows read", manifest)):
        (other / "manifest.json").write_text(json.dumps(about))
        found = Parsed(written(finished, tmp_path / "r.html", data=other)).text
        assert mark in found
        assert ("rows read" in found) == ("veritune prepare" in found) == (about is manifest)
        compared = tmp_path / "compared.html"
        page.report([finished, finished], compared, data=other)
        assert ("rows read" in Parsed(compared.read_text(encoding="utf-8")).text) == (about is manifest)


def test_paths_are_no_patterns(finished: Path, data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run [2]")
    text = written(run, tmp_path / "report.html", data=shutil.copytree(data, tmp_path / "rows [2]"))
    assert 'id="worst"' in text


def test_forgetting_is_a_heat_map(finished: Path, tmp_path: Path) -> None:
    with_phases = tmp_path / "phases"
    shutil.copytree(finished, with_phases)
    matrix = {"trained": [[0.9, None], [0.7, 0.8]], "held_out": [[0.8, 0.5], [0.6, 0.7]]}
    summary = {
        "average_forgetting": {"trained": 0.2, "held_out": 0.2},
        "backward_transfer": {"trained": None, "held_out": -0.2},
    }
    names = {"slices": [{"name": "one"}, {"name": "<two>"}], "phases": [{"name": "first"}, {"name": "second"}]}
    (with_phases / "forgetting.json").write_text(json.dumps({**names, "accuracy": matrix, **summary}))
    text = written(with_phases, tmp_path / "r.html")
    assert_self_contained(text)
    assert text.count('class="cell"') == 8
    assert "&lt;two&gt;" in text
    (with_phases / "forgetting.json").write_text('{"slices": []}')
    assert "forgetting.json cannot be read" in written(with_phases, tmp_path / "r.html")


def test_the_run_file_on_the_page_is_the_run(finished: Path, tmp_path: Path) -> None:
    about = folder.read(finished)
    again = config.build(config.Run, tomllib.loads(run.run_file(about.settings)), "page")
    assert config.as_dict(again) == about.settings


def test_the_flags_of_prepare_are_those_that_differ() -> None:
    usual = config.as_dict(config.Prepare())
    assert run.prepare_flags(usual) == []
    changed = usual | {"validation_rows": 32, "near_duplicates": True, "columns": usual["columns"] | {"label": "ok"}}
    assert run.prepare_flags(changed) == ["--columns.label", "ok", "--validation-rows", "32", "--near-duplicates"]


def test_the_verb(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", str(finished), "--out", str(tmp_path / "r.html")]) == 0
    assert "written to" in capsys.readouterr().out
    assert cli.run(["report", str(finished), "--out", str(tmp_path)]) == 2
    assert "this is a folder" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        page.report([finished], tmp_path)
    with pytest.raises(MissingError):
        page.report([tmp_path / "none"], tmp_path / "x.html")
