"""A prepared folder appears whole or not at all, and never takes the place of something else."""

import json
import os
import subprocess
import sys

import pytest

from veritune.data import folder
from veritune.data.sources import Source
from veritune.errors import ConfigError, DataError, MissingError


def make(out, text="rows"):
    with folder.replacing(out) as temporary:
        for name in folder.FILES:
            (temporary / name).write_text(text)
        folder.write_manifest(temporary, {"fingerprint": text})


def half_make(out, error):
    with folder.replacing(out) as temporary:
        (temporary / folder.TRAIN).write_text("half")
        raise error


def test_it_is_read_back_as_written_and_replaced_whole(tmp_path):
    out = tmp_path / "deep/prepared"
    make(out, "first")
    assert folder.read_manifest(out)["fingerprint"] == "first"
    folder.check_place(out, [])
    make(out, "second")
    assert folder.read_manifest(out)["fingerprint"] == "second"
    assert [path.name for path in out.parent.iterdir()] == ["prepared"]


@pytest.mark.parametrize("error", [DataError("rows"), MissingError("file"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, error):
    out = tmp_path / "prepared"
    make(out, "first")
    with pytest.raises(type(error)):
        half_make(out, error)
    assert folder.read_manifest(out)["fingerprint"] == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "prepared").symlink_to(tmp_path / "drive")
    make(tmp_path / "prepared")
    assert (tmp_path / "prepared").is_symlink()
    assert folder.read_manifest(tmp_path / "drive")


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        make(tmp_path / "file/prepared")


def test_other_things_are_never_overwritten(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/manifest.json").write_text('{"kind": "an app"}')
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="file"):
        folder.check_place(tmp_path / "file", [])
    with pytest.raises(ConfigError, match=r"other things \(manifest\.json\)"):
        folder.check_place(tmp_path / "mine", [])
    make(tmp_path / "prepared")
    for name in ("run", ".notes", "a", "b"):
        (tmp_path / "prepared" / name).mkdir()
    with pytest.raises(ConfigError, match=r"other things \(\.notes, a, b, …\)"):
        folder.check_place(tmp_path / "prepared", [])
    folder.check_place(tmp_path / "empty", [])
    folder.check_place(tmp_path / "new", [])


def test_a_source_inside_the_place_is_never_lost(tmp_path):
    make(tmp_path / "prepared")
    inside = Source("mine", tmp_path / "prepared" / folder.TRAIN, 1)
    with pytest.raises(ConfigError, match="would be lost"):
        folder.check_place(tmp_path / "prepared", [inside])


def test_a_folder_that_is_not_whole_does_not_load(tmp_path):
    out = tmp_path / "prepared"
    with pytest.raises(MissingError, match=r"veritune prepare SOURCE --out .*prepared"):
        folder.read_manifest(out)
    out.mkdir()
    with pytest.raises(DataError, match="no manifest"):
        folder.read_manifest(out)
    out.rmdir()
    for name in folder.FILES:
        make(out)
        (out / name).write_text("r0ws")
        with pytest.raises(DataError, match=f"{name}: not the file that was prepared"):
            folder.read_manifest(out)
        (out / name).unlink()
        with pytest.raises(DataError, match=f"{name} is missing"):
            folder.read_manifest(out)


@pytest.mark.parametrize("change", [{"kind": "other"}, {"format": 99}, {"format": None}])
def test_another_kind_or_format_does_not_load(tmp_path, change):
    make(tmp_path / "prepared")
    path = tmp_path / "prepared/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"format|not a prepared dataset"):
        folder.read_manifest(tmp_path / "prepared")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_damaged_manifest_does_not_load(tmp_path, text):
    make(tmp_path / "prepared")
    (tmp_path / "prepared/manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        folder.read_manifest(tmp_path / "prepared")


def test_a_process_that_dies_while_writing_leaves_the_old_folder(tmp_path):
    out = tmp_path / "prepared"
    make(out, "first")
    program = (
        "import os, sys; from pathlib import Path; from veritune.data import folder\n"
        "with folder.replacing(Path(sys.argv[1])) as temporary:\n"
        "    (temporary / folder.TRAIN).write_text('half'); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(out)], check=False).returncode == 9
    assert folder.read_manifest(out)["fingerprint"] == "first"
    (left,) = [path for path in tmp_path.iterdir() if path != out]
    with pytest.raises(DataError, match="no manifest"):
        folder.read_manifest(left)
    make(out, "second")
    assert list(tmp_path.iterdir()) == [out], "the next one clears away what the dead one left"


def test_a_process_that_dies_in_the_swap_loses_nothing(tmp_path):
    out = tmp_path / "prepared"
    make(out, "first")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    out.rename(tmp_path / f".prepared.{dead.pid}.old")
    (tmp_path / ".prepared.more.old").mkdir()  # not ours
    with pytest.raises(DataError, match="cannot be written"):
        vanish(out)
    assert folder.read_manifest(out)["fingerprint"] == "first"
    assert (tmp_path / ".prepared.more.old").is_dir()


def test_what_is_left_of_a_dead_process_with_the_same_number_is_no_obstacle(tmp_path):
    out = tmp_path / "prepared"
    make(out, "first")
    for kind in ("partial", "old"):
        (tmp_path / f".prepared.{os.getpid()}.{kind}").mkdir()
        (tmp_path / f".prepared.{os.getpid()}.{kind}" / "left").touch()
    make(out, "second")
    assert folder.read_manifest(out)["fingerprint"] == "second"
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_swap_puts_the_old_folder_back(tmp_path):
    out = tmp_path / "prepared"
    make(out, "first")
    with pytest.raises(DataError, match="cannot be written"):
        vanish(out)
    assert folder.read_manifest(out)["fingerprint"] == "first"


def vanish(out):
    with folder.replacing(out) as temporary:
        (temporary / "link").symlink_to("nowhere")
