"""What is saved comes back bit for bit; what is not whole is found out, named, and passed over."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import made_tensors
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tensors import latest, tensors
from safetensors.torch import load_file

from veritune.errors import CheckpointError, NonFiniteError
from veritune.training import checkpoint
from veritune.training.pack import as_json

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist())


def save(folder: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        made_tensors.save(folder, step, tensors(step), {"step": step}, keep=keep)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([*FLOATS, *WHOLE, torch.bool]),
    shape=st.lists(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(["plain", "transposed", "strided"]),
)
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path_factory, dtype, shape, seed, form):
    folder = tmp_path_factory.mktemp("bits")
    count = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    tensor = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
    tensor = tensor.reshape(shape)
    if dtype in FLOATS:
        tensor = torch.where(tensor.double().isfinite(), tensor.double(), 1.0).to(dtype)
    if form == "transposed":
        tensor = tensor.t() if tensor.dim() == 2 else tensor
    elif form == "strided" and tensor.dim():
        tensor = torch.stack([tensor, tensor], dim=tensor.dim())[..., 1]
    made_tensors.save(folder, 1, {"group": {"x": tensor, "scalar": torch.tensor(3, dtype=torch.int32)}}, {})
    saved = checkpoint.load_latest(folder)
    assert saved is not None
    back = saved.tensors["group"]["x"]
    assert (back.dtype, back.shape, bits(back)) == (tensor.dtype, tensor.shape, bits(tensor))
    assert saved.tensors["group"]["scalar"].shape == ()


def test_the_files_are_safetensors_that_others_read(tmp_path):
    path = made_tensors.save(tmp_path, 7, {"adapter": tensors()["adapter"], "empty": {}}, {"n": 1})
    assert path == tmp_path / "step-00000007"
    assert sorted(p.name for p in path.iterdir()) == [
        "adapter.safetensors",
        "empty.safetensors",
        "manifest.json",
        "state.json",
    ]
    other = load_file(path / "adapter.safetensors")
    assert all(torch.equal(it, other[name]) for name, it in tensors()["adapter"].items())


def test_tensors_that_share_storage_are_each_written_out(tmp_path):
    base = torch.arange(10.0)
    made_tensors.save(
        tmp_path, 1, {"x": {"qmap1": base, "qmap2": base, "part": base[2:5], "flipped": base.view(2, 5).t()}}, {}
    )
    saved = checkpoint.load_latest(tmp_path)
    assert saved is not None
    back = saved.tensors["x"]
    assert torch.equal(back["qmap1"], base)
    assert torch.equal(back["qmap2"], base)
    assert torch.equal(back["part"], base[2:5])
    assert torch.equal(back["flipped"], base.view(2, 5).t())


def test_state_comes_back_exactly(tmp_path):
    state = {
        "lr": 0.1 + 0.2,
        "tiny": 5e-324,
        "rng": [2**63, -1],
        "none": None,
        "text": "é\n\ud800",
        "d": {"b": 1, "a": []},
    }
    made_tensors.save(tmp_path, 1, tensors(), state)
    saved = checkpoint.load_latest(tmp_path)
    assert saved is not None
    assert saved.state == state
    assert list(saved.state["d"]) == ["b", "a"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nothing_non_finite_is_written(tmp_path, dtype, value):
    if (dtype == torch.float8_e4m3fn and value != value) or dtype != torch.float8_e4m3fn:
        bad = torch.ones(2, 300, dtype=dtype)
        bad.view(-1)[417] = value
        save(tmp_path, 1)
        with pytest.raises(NonFiniteError, match=r"optimizer/3\.exp_avg: 1 of 600 values"):
            made_tensors.save(tmp_path, 2, {**tensors(), "optimizer": {"3.exp_avg": bad}}, {})
        assert os.listdir(tmp_path) == ["step-00000001"]


def test_large_but_finite_values_and_integers_pass(tmp_path):
    huge = {str(dtype): torch.full((50,), torch.finfo(dtype).max, dtype=dtype) for dtype in FLOATS}
    made_tensors.save(tmp_path, 1, {"x": {**huge, "u8": torch.full((9,), 255, dtype=torch.uint8)}}, {})


def test_a_non_finite_number_in_the_state_is_refused_by_name(tmp_path):
    with pytest.raises(NonFiniteError, match=r"state\.json\.best\[1\] is inf"):
        made_tensors.save(tmp_path, 1, tensors(), {"best": [0.5, float("inf")]})
    with pytest.raises(TypeError, match="key 3 is not a string"):
        made_tensors.save(tmp_path, 1, tensors(), {"rows": {3: 1}})
    assert os.listdir(tmp_path) == []


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert checkpoint.load_latest(tmp_path / "nowhere") is None
    assert checkpoint.load_latest(tmp_path) is None
    assert made_tensors.steps(tmp_path / "nowhere") == []


def test_order_is_by_step_never_by_file_time(tmp_path):
    save(tmp_path, 5, 90, 1_000_000, 123_456_789)
    for age, step in enumerate([123_456_789, 1_000_000, 90, 5]):
        os.utime(checkpoint.place(tmp_path, step), (age, age))
    assert made_tensors.steps(tmp_path) == [5, 90, 1_000_000, 123_456_789]
    assert latest(tmp_path).step == 123_456_789


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    save(tmp_path, *range(1, 6), keep=keep)
    assert made_tensors.steps(tmp_path) == list(range(6 - keep, 6))
    assert len(os.listdir(tmp_path)) == keep


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "adapter.safetensors").write_bytes(b"")
    save(tmp_path, 3, keep=2)
    assert made_tensors.steps(tmp_path) == [1, 3]
    assert not (tmp_path / "step-00000002").exists()


def test_a_later_checkpoint_is_left_alone_by_an_earlier_save(tmp_path):
    save(tmp_path, 5, 9)
    save(tmp_path, 6, keep=1)
    assert made_tensors.steps(tmp_path) == [6, 9]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 3)
    made_tensors.save(tmp_path, 3, tensors(44), {"again": True}, keep=1)
    saved = checkpoint.load_latest(tmp_path)
    assert saved is not None
    assert saved.state == {"again": True}
    assert torch.equal(saved.tensors["adapter"]["a"], tensors(44)["adapter"]["a"])
    assert os.listdir(tmp_path) == ["step-00000003"]


def test_what_a_killed_process_left_is_never_a_checkpoint(tmp_path):
    save(tmp_path, 1)
    for kind in ("new", "trash"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / f".step-00000002.{kind}")
    assert made_tensors.steps(tmp_path) == [1]
    assert latest(tmp_path).step == 1
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_checkpoint_being_replaced_when_the_process_was_killed_is_put_back(tmp_path):
    save(tmp_path, 1)
    os.rename(tmp_path / "step-00000001", tmp_path / ".step-00000001.old")
    assert latest(tmp_path).step == 1
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000001.old")
    (tmp_path / "step-00000001" / "state.json").write_text("{")
    assert latest(tmp_path).step == 1
    assert os.listdir(tmp_path) == ["step-00000001"]


DAMAGES = ["flip", "flip", "flip", "cut", "delete", "grow", "empty"]


def damage(path: Path, rng: random.Random) -> str:
    kind, data = rng.choice(DAMAGES), bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
        return kind
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "grow":
        data += rng.randbytes(rng.randint(1, 9))
    else:
        data.clear()
    path.write_bytes(data)
    return kind


def check_damages(folder: Path, count: int) -> None:
    rng = random.Random(count)
    save(folder, 1)
    for _ in range(count):
        save(folder, 2)
        name = rng.choice(["adapter.safetensors", "state.json", "manifest.json"])
        kind, warned = damage(folder / "step-00000002" / name, rng), []
        assert latest(folder, warned).step == 1, f"{kind} in {name} was not noticed"
        assert len(warned) == 1
        assert f"step-00000002: {name}" in warned[0]


def test_damage_is_found_named_and_passed_over(tmp_path):
    check_damages(tmp_path, 120)


@pytest.mark.slow
def test_damage_is_found_named_and_passed_over_1000_times(tmp_path):
    check_damages(tmp_path, 1000)


def test_where_none_is_whole_it_stops_and_says_so(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000001" / "state.json").unlink()
    (tmp_path / "step-00000002" / "manifest.json").write_text("[]")
    warned = []
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-00000002.*step-00000001.*state\.json"):
        checkpoint.load_latest(tmp_path, warn=warned.append)
    assert len(warned) == 2


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    save(tmp_path, 1, 2)
    os.rename(tmp_path / "step-00000002", tmp_path / "step-00000700")
    warned = []
    assert latest(tmp_path, warned).step == 1
    assert "manifest is that of step 2" in warned[0]


def test_loaded_tensors_do_not_depend_on_the_files(tmp_path):
    save(tmp_path, 1)
    saved = latest(tmp_path)
    for path in (tmp_path / "step-00000001").iterdir():
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(saved.tensors["adapter"]["a"], tensors(1)["adapter"]["a"])
    saved.tensors["adapter"]["a"].zero_()
    assert torch.equal(saved.tensors["adapter"]["b"], tensors(1)["adapter"]["b"])


def test_publish_replaces_a_folder_as_a_whole(tmp_path):
    best = tmp_path / "best"
    checkpoint.publish(best, {"w.safetensors": tensors(1)["adapter"], "card.md": b"one", "extra": b""})
    checkpoint.publish(best, {"w.safetensors": tensors(2)["adapter"], "card.md": as_json({"two": 2})})
    assert sorted(os.listdir(best)) == ["card.md", "w.safetensors"]
    assert torch.equal(load_file(best / "w.safetensors")["a"], tensors(2)["adapter"]["a"])
    assert json.loads((best / "card.md").read_bytes()) == {"two": 2}
    with pytest.raises(NonFiniteError, match=r"w\.safetensors/a"):
        checkpoint.publish(best, {"w.safetensors": {"a": torch.tensor(float("nan"))}})
    assert torch.equal(load_file(best / "w.safetensors")["a"], tensors(2)["adapter"]["a"])
    assert os.listdir(tmp_path) == ["best"]


def test_saver_saves_what_was_there_when_it_was_asked(tmp_path):
    weights = torch.zeros(200_000)
    saver = checkpoint.Saver(tmp_path, keep=2)
    for step in range(1, 5):
        weights.fill_(step)
        saver.save(step, {"adapter": {"w": weights}}, {"step": step})
        weights.fill_(-1)
    saver.close()
    saved = checkpoint.load_latest(tmp_path)
    assert saved is not None
    assert (saved.step, made_tensors.steps(tmp_path)) == (4, [3, 4])
    assert torch.equal(saved.tensors["adapter"]["w"], torch.full((200_000,), 4.0))


def test_saver_raises_at_once_for_a_weight_and_at_the_next_call_for_the_disk(tmp_path):
    saver = checkpoint.Saver(tmp_path / "file" / "run")
    with pytest.raises(NonFiniteError, match="adapter/w"):
        saver.save(1, {"adapter": {"w": torch.tensor([float("nan")])}}, {})
    (tmp_path / "file").write_text("in the way")
    saver.save(1, tensors(), {})
    with pytest.raises(CheckpointError, match="could not be written"):
        saver.wait()
    saver.save(2, tensors(), {})
    with pytest.raises(CheckpointError, match="could not be written"):
        saver.save(3, tensors(), {})
    saver.close()


NO_PICKLE = """
import pickle, sys, torch
from pathlib import Path
from veritune.training import checkpoint
from veritune.training.pack import as_json

found = []
sys.addaudithook(lambda event, args: found.append(args) if event.startswith("pickle.") else None)
class Class: pass
pickle.loads(pickle.dumps(Class()))
assert found, "the hook sees unpickling"
found.clear()

def refuse(*args, **kwargs):
    raise AssertionError("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = torch.serialization.load = refuse
pickle._Unpickler.load = refuse

folder = Path(sys.argv[1])
saved = checkpoint.load_latest(folder, warn=lambda text: print(text))
assert saved.step == 1 and saved.tensors["adapter"]["a"].shape == (8, 4)
assert not found, found
print("clean")
"""


def test_loading_unpickles_nothing(tmp_path):
    save(tmp_path, 1, 2)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save({"a": Bomb()}, tmp_path / "step-00000002" / "adapter.safetensors")
    done = subprocess.run([sys.executable, "-c", NO_PICKLE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "clean"
    assert "step-00000002: adapter.safetensors has" in done.stdout
    assert not (tmp_path / "exploded").exists()


def test_the_place_is_found_quickly_at_step_a_million(tmp_path):
    save(tmp_path, 999_999, 1_000_000)
    begin = time.perf_counter()
    assert latest(tmp_path).step == 1_000_000
    assert time.perf_counter() - begin < 5


@pytest.mark.alone
@pytest.mark.slow
def test_a_save_of_half_a_gigabyte_holds_the_loop_for_less_than_a_second(tmp_path):
    group = {f"{i}": torch.randn(16, 4096 * 10) for i in range(64)}  # 42M values: rank 16 on an 8B model
    moments = {f"{i}.{key}": it.clone() for key in ("exp_avg", "exp_avg_sq") for i, it in group.items()}
    saver, held = checkpoint.Saver(tmp_path), []
    for step in range(3):
        begin = time.perf_counter()
        saver.save(step, {"adapter": group, "optimizer": moments}, {})
        held.append(time.perf_counter() - begin)
        saver.wait()
    saver.close()
    assert min(held) < 1, held


def test_messages_read_well(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "adapter.safetensors").write_bytes(b"abc")
    warned = []
    latest(tmp_path, warned)
    size = (tmp_path / "step-00000001" / "adapter.safetensors").stat().st_size
    what = f"adapter.safetensors has 3 bytes, not {size}"
    assert warned == [f"checkpoint {tmp_path}/step-00000002: {what}. Trying the one before it."]
