"""The whole of `prepare`: the same rows give the same files, no row is lost without a count, and a mistake of the
user's is a message."""

import gzip
import json
import random
from pathlib import Path

import made_rows
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veritune.config import Columns, Prepare
from veritune.data import clean, dataset, lines
from veritune.errors import ConfigError, DataError, MissingError

SHARED = Path(__file__).parents[2] / "../shared/data"


def files(out: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def rows_of(out: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    prepared = dataset.load(out)
    return prepared.train, prepared.validation


@pytest.fixture
def source(tmp_path):
    return made_rows.write(tmp_path / "rows.jsonl", made_rows.rows(400))


def test_the_tables_have_their_columns_and_every_row_is_accounted_for(tmp_path, source):
    manifest = dataset.prepare([str(source)], tmp_path / "out", Prepare())
    train, validation = rows_of(tmp_path / "out")
    for table in (train, validation):
        assert table.columns == ["id", "qid", "question", "solution", "is_correct", "solver"]
        assert table.schema["is_correct"] == pl.Boolean
        assert table["id"].str.contains("^[0-9a-f]{16}$").all()
        assert table["qid"].str.contains("^[0-9a-f]{16}$").all()
    assert not set(train["qid"]) & set(validation["qid"])
    given_rows = {(row["question"], row["solution"]): row for row in made_rows.rows(400)}
    for row in pl.concat([train, validation]).to_dicts():
        assert row["is_correct"] == given_rows[row["question"], row["solution"]]["is_correct"]
        assert row["solver"] == given_rows[row["question"], row["solution"]]["solver"]
    out = sum(count for name, count in manifest["train"].items() if name.startswith("left_out"))
    assert manifest["rows"]["usable"] == 400 == len(train) + len(validation) + out
    assert len(validation) == 20
    assert validation.equals(validation.sort("qid", "id"))
    assert train["is_correct"].mean() == 0.5
    assert manifest["leaks"] == {"shared_questions": 0, "near_duplicate_questions": None}


def test_two_runs_give_the_same_files(tmp_path, source):
    for name in ("one", "two"):
        dataset.prepare([str(source)], tmp_path / name, Prepare(allow_refused=1))
    assert files(tmp_path / "one") == files(tmp_path / "two")


@given(
    st.lists(st.sampled_from([".jsonl", ".jsonl.gz", ".csv", ".parquet"]), min_size=1, max_size=3),
    st.integers(0, 2**32),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_order_names_and_formats_of_the_sources_do_not_matter(tmp_path_factory, source, suffixes, seed):
    folder = tmp_path_factory.mktemp("given")
    draw = random.Random(seed)
    rows = made_rows.rows(400)
    draw.shuffle(rows)
    named = []
    for number, suffix in enumerate(suffixes):
        part = [row for at, row in enumerate(rows) if at % len(suffixes) == number]
        named.append(str(made_rows.write(folder / f"{draw.randrange(999)}-{number}{suffix}", part)))
    draw.shuffle(named)
    first = dataset.prepare([str(source)], folder / "first", Prepare())
    second = dataset.prepare(named, folder / "second", Prepare())
    assert first["fingerprint"] == second["fingerprint"]
    for name in ("train.parquet", "validation.parquet"):
        assert (folder / "first" / name).read_bytes() == (folder / "second" / name).read_bytes()


def test_the_fingerprint_changes_with_any_byte_and_with_any_setting_that_matters(tmp_path):
    rows = made_rows.rows(200)
    changes = [rows, rows[:-1], [*rows, rows[0]]]
    for key, value in (("question", " "), ("solution", "."), ("is_correct", None), ("solver", "x")):
        for at in (0, 70, 199):
            other = [dict(row) for row in rows]
            other[at][key] = (not other[at][key]) if value is None else other[at][key] + value
            changes.append(other)
    changes.append([row | {"more": "x"} if at == 3 else row for at, row in enumerate(rows)])
    seen = set()
    for these in changes:
        path = made_rows.write(tmp_path / "rows.jsonl", these)
        seen.add(dataset.prepare([str(path)], tmp_path / "out", Prepare())["fingerprint"])
    assert len(seen) == len(changes)
    path = made_rows.write(tmp_path / "rows.jsonl", rows)
    same = [Prepare(), Prepare(allow_refused=0.3), Prepare(columns=Columns(label="is_correct"))]
    assert len({dataset.prepare([str(path)], tmp_path / "out", with_)["fingerprint"] for with_ in same}) == 1
    differing = [
        Prepare(seed=1),
        Prepare(limit=20),
        Prepare(balance="none"),
        Prepare(balance="0.4"),
        Prepare(validation_rows=7),
        Prepare(validation_per_question=2),
        Prepare(balance_validation=True),
        Prepare(max_row_bytes=500),
    ]
    others = {dataset.prepare([str(path)], tmp_path / "out", with_)["fingerprint"] for with_ in differing}
    assert len(others - seen) == len(differing)


def test_refused_rows_are_kept_with_file_line_and_reason(tmp_path, source):
    text = source.read_bytes().splitlines(keepends=True)
    text[3] = b'{"question": "q", "solution": "s", "is_correct": "perhaps"}\n'
    text[10] = b"\xff\xfe broken\n"
    text[20] = b'{"question": ["q"], "solution": "s", "is_correct": true}\n'
    source.write_bytes(b"".join(text))
    other = made_rows.write(tmp_path / "a.csv", [{"question": "", "solution": "s", "is_correct": "no"}])
    manifest = dataset.prepare([str(source), str(other)], tmp_path / "out", Prepare())
    listed = made_rows.rejected(tmp_path / "out")
    assert [(row["file"], row["line"]) for row in listed] == [
        (str(other), 2),
        (str(source), 4),
        (str(source), 11),
        (str(source), 21),
    ]
    assert [row["reason"] for row in listed] == [
        clean.NO_QUESTION,
        clean.BAD_LABEL,
        lines.NOT_UTF8,
        listed[3]["reason"],
    ]
    assert "\ufffd\ufffd broken" in listed[2]["raw"]
    assert manifest["rows"]["refused"] == 4 == sum(manifest["refused"].values())
    assert manifest["rows"]["read"] == 401


def test_duplicates_and_contradictions_are_counted_and_only_these_go(tmp_path):
    rows = made_rows.rows(100)
    again = [row | {"solution": row["solution"].replace(" ", "\n"), "solver": "other"} for row in rows[:9]]
    against = [row | {"is_correct": not row["is_correct"]} for row in rows[20:23]]
    path = made_rows.write(tmp_path / "rows.jsonl", rows + again + against)
    manifest = dataset.prepare([str(path)], tmp_path / "out", Prepare(balance="none", validation_rows=0))
    assert manifest["rows"] == {"read": 112, "refused": 0, "contradictory": 6, "duplicates": 9, "usable": 97}
    listed = made_rows.rejected(tmp_path / "out")
    assert [row["line"] for row in listed] == [21, 22, 23, 110, 111, 112]
    assert {row["reason"] for row in listed} == {clean.CONTRADICTORY}
    train = rows_of(tmp_path / "out")[0]
    assert len(train) == 97
    assert not {row["solution"] for row in against} & set(train["solution"])


def test_rows_that_all_contradict_each_other_leave_nothing(tmp_path):
    rows = made_rows.rows(10)
    rows += [row | {"is_correct": not row["is_correct"]} for row in rows]
    path = made_rows.write(tmp_path / "rows.csv", rows)
    with pytest.raises(DataError, match="a copy with the other label"):
        dataset.prepare([str(path)], tmp_path / "out", Prepare())


def test_too_many_refused_stop_with_the_counts_unless_allowed(tmp_path, source):
    text = source.read_text().splitlines(keepends=True)
    source.write_text("".join(["broken\n"] * 30 + text))
    with pytest.raises(DataError, match=r"30 of 430 .*7\.0%.*30 not valid JSON .*rows\.jsonl:1.*--allow-refused 0\.07"):
        dataset.prepare([str(source)], tmp_path / "out", Prepare())
    assert not (tmp_path / "out").exists()
    assert dataset.prepare([str(source)], tmp_path / "out", Prepare(allow_refused=0.07))["rows"]["refused"] == 30
    source.write_text("broken\n" * 5)
    with pytest.raises(DataError, match="no row can be used; all 5 were refused"):
        dataset.prepare([str(source)], tmp_path / "out", Prepare(allow_refused=1))
    signed = [row | {"is_correct": 1 if row["is_correct"] else -1} for row in made_rows.rows(60)]
    path = made_rows.write(tmp_path / "signed.csv", signed)
    with pytest.raises(DataError, match=r"label is neither true nor false \(first: .*signed\.csv:\d+, label '-1'\)"):
        dataset.prepare([str(path)], tmp_path / "out", Prepare())


def test_columns_of_ours_in_a_source_are_kept_under_another_name(tmp_path):
    rows = [
        row | {"qid": "theirs", "id": 7, "source_id": "x", "problem": row["question"]} for row in made_rows.rows(60)
    ]
    path = made_rows.write(tmp_path / "rows.jsonl", rows)
    dataset.prepare([str(path)], tmp_path / "out", Prepare(columns=Columns(question="problem")))
    train = rows_of(tmp_path / "out")[0]
    named = {"source_qid": "theirs", "source_source_id": "7", "source_id": "x"}
    for name, value in named.items():
        assert set(train[name]) == {value}
    assert set(train["source_question"]) == set(train["question"])
    assert "problem" not in train.columns


def test_sources_with_different_columns_give_their_union(tmp_path):
    rows = made_rows.rows(60)
    one = made_rows.write(tmp_path / "a.csv", [{k: v for k, v in row.items() if k != "solver"} for row in rows[:30]])
    two = made_rows.write(tmp_path / "b.jsonl", [row | {"gold": 3} for row in rows[30:]])
    dataset.prepare([str(one), str(two)], tmp_path / "out", Prepare(balance="none", validation_rows=0))
    train = rows_of(tmp_path / "out")[0]
    assert train.columns[5:] == ["gold", "solver"]
    assert train["gold"].null_count() == 30 == train["solver"].null_count()


def test_an_out_folder_is_replaced_only_by_a_whole_one(tmp_path, source):
    out = tmp_path / "out"
    dataset.prepare([str(source)], out, Prepare())
    before = files(out)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(source.read_bytes())[:900])
    with pytest.raises(DataError, match="cut off"):
        dataset.prepare([str(cut)], out, Prepare())
    with pytest.raises(MissingError):
        dataset.prepare([str(tmp_path / "none")], out, Prepare())
    with pytest.raises(ConfigError, match="balance"):
        dataset.prepare([str(source)], out, Prepare(balance="even"))
    with pytest.raises(ConfigError, match="would be lost"):
        dataset.prepare([str(out / "train.parquet")], out, Prepare())
    assert files(out) == before
    assert dataset.prepare([str(source)], out, Prepare(seed=1))["settings"]["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.jsonl.gz", "out", "rows.jsonl"]


def test_a_prepared_folder_is_no_source_but_its_train_table_is(tmp_path, source):
    dataset.prepare([str(source)], tmp_path / "out", Prepare())
    with pytest.raises(DataError, match=r"prepared dataset already.*train\.parquet"):
        dataset.prepare([str(tmp_path / "out")], tmp_path / "again", Prepare())
    dataset.prepare([str(tmp_path / "out/train.parquet")], tmp_path / "again", Prepare())
    train = rows_of(tmp_path / "again")[0]
    assert (train["source_id"] == train["id"]).all()


def test_a_prepared_folder_within_a_source_folder_is_left_alone(tmp_path, source):
    made_rows.write(source, [*made_rows.rows(400), {"question": "", "solution": "s", "is_correct": True}])
    first = dataset.prepare([str(tmp_path)], tmp_path / "deep/out", Prepare())
    again = dataset.prepare([str(tmp_path)], tmp_path / "deep/out", Prepare())
    assert again["fingerprint"] == first["fingerprint"]
    assert [it["name"] for it in again["sources"]] == [str(source)]
    assert again["notes"] == [f"{tmp_path / 'deep/out'}: left alone, a prepared dataset"]
    with pytest.raises(DataError, match="no data file"):
        dataset.prepare([str(tmp_path / "deep")], tmp_path / "other", Prepare())


def test_a_path_is_no_pattern(tmp_path, source):
    for name in ("rows [v2]", "rows v", "rows *"):
        dataset.prepare([str(source)], tmp_path / name, Prepare())
    counts = {sum(map(len, rows_of(tmp_path / name))) for name in ("rows [v2]", "rows v", "rows *")}
    assert len(counts) == 1


def test_an_altered_folder_does_not_load(tmp_path, source):
    out = tmp_path / "out"
    dataset.prepare([str(source)], out, Prepare())
    data = bytearray((out / "train.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "train.parquet").write_bytes(bytes(data))
    with pytest.raises(DataError, match="altered or damaged"):
        dataset.load(out)


def test_near_duplicates_are_counted_across_the_splits(tmp_path):
    pytest.importorskip("rensa")
    text = "On the first day of a long week in {} a shop sold {} bags of rice and {} bags of flour to its {} customers"
    rows = []
    for number in range(80):
        for twin in ("Rome", "Oslo"):
            question = text.format(twin, number, number * 7, number + 11)
            rows += [{"question": question, "solution": f"{twin} {n}", "is_correct": n % 2 == 0} for n in range(4)]
    path = made_rows.write(tmp_path / "rows.jsonl", rows)
    manifest = dataset.prepare([str(path)], tmp_path / "out", Prepare(near_duplicates=True, validation_rows=40))
    leaks = manifest["leaks"]
    assert leaks["shared_questions"] == 0
    train, validation = rows_of(tmp_path / "out")
    trained = {question.replace("Rome", "Oslo") for question in train["question"]}
    twins = {question for question in validation["question"] if question.replace("Rome", "Oslo") in trained}
    assert leaks["near_duplicate_questions"] == len(twins) > 0
    assert leaks["examples"][0]["similarity"] >= leaks["near_duplicate_similarity"]


def test_the_real_set_becomes_what_its_readme_says(tmp_path):
    path = SHARED / "train.jsonl.gz"
    if not path.exists():
        pytest.skip("the shared data are not on this machine")
    manifest = dataset.prepare([str(path)], tmp_path / "out", Prepare(validation_rows=0))
    assert manifest["rows"]["read"] == 106_039
    assert manifest["questions"] == 4062
    assert manifest["train"]["rows"] == pytest.approx(54_750, abs=50)
    assert manifest["train"]["true_share"] == 0.5


def test_the_manifest_is_json_that_lists_sources_with_their_hashes(tmp_path, source):
    dataset.prepare([str(source)], tmp_path / "out", Prepare())
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    (entry,) = manifest["sources"]
    assert entry["rows"] == 400
    assert entry["bytes"] == source.stat().st_size
    assert len(entry["sha256"]) == 64
