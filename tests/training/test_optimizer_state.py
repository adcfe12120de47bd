"""Training goes on bit for bit from a saved optimiser, for all four kinds, with state that is really quantised."""

import warnings
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from made_tensors import save

from veritune.errors import CheckpointError
from veritune.training import checkpoint
from veritune.training import optimizer as ours
from veritune.training.optimizer_state import optimizer_tensors, restore_optimizer

KINDS = {
    "adamw_torch": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.01),
    "adamw_8bit": lambda groups: ours.AdamW8bit(groups, lr=1e-2, weight_decay=0.01),
    "paged_adamw_32bit": lambda groups: ours.PagedAdamW32bit(groups, lr=1e-2, weight_decay=0.01),
    "lion_8bit": lambda groups: ours.Lion8bit(groups, lr=1e-3, weight_decay=0.01),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def start(kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    make = torch.Generator().manual_seed(0)
    shapes = [(96, 64), (700, 200), (7,), (64, 65)]  # 7 values stay in 32 bits, 140,000 are paged on a GPU
    params = [torch.nn.Parameter(torch.randn(shape, generator=make).to(device, dtype)) for shape in shapes]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    return params, KINDS[kind](groups)


def train(params, optimizer, steps: range) -> None:
    for step in steps:
        make = torch.Generator().manual_seed(1000 + step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=make).to(param)
        optimizer.step()


def frozen(params, optimizer) -> list[bytes]:
    tensors = [*params, *(it for _, it in sorted(optimizer_tensors(optimizer)[0].items()))]
    return [bytes(it.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()) for it in tensors]


def through_disk(folder: Path, params, optimizer) -> checkpoint.Saved:
    tensors, state = optimizer_tensors(optimizer)
    weights = {str(index): param.detach() for index, param in enumerate(params)}
    save(folder, 5, {"adapter": weights, "optimizer": tensors}, {"optimizer": state})
    saved = checkpoint.load_latest(folder)
    assert saved is not None
    return saved


def resumed(kind: str, saved: checkpoint.Saved, device: str = "cpu", restore: bool = True):
    params, optimizer = start(kind, saved.tensors["adapter"]["0"].dtype, device)
    with torch.no_grad():
        for index, param in enumerate(params):
            param.copy_(saved.tensors["adapter"][str(index)])
    if restore:
        restore_optimizer(optimizer, saved.tensors["optimizer"], saved.state["optimizer"])
    return params, optimizer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_bit_for_bit(tmp_path, kind, dtype, device):
    params, optimizer = start(kind, dtype, device)
    train(params, optimizer, range(5))
    saved = through_disk(tmp_path, params, optimizer)
    at_save = frozen(params, optimizer)
    train(params, optimizer, range(5, 10))
    want = frozen(params, optimizer)

    params, optimizer = resumed(kind, saved, device)
    assert frozen(params, optimizer) == at_save
    train(params, optimizer, range(5, 10))
    assert frozen(params, optimizer) == want
    again = resumed(kind, saved, device)
    assert frozen(*again) == at_save, "training on must not change what was loaded"

    forgotten = resumed(kind, saved, device, restore=False)
    train(*forgotten, range(5, 10))
    assert frozen(*forgotten) != want, "without its state the optimiser would have gone elsewhere"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW32bit", "Lion8bit"])
def test_one_wait_a_step_changes_no_bit_of_what_bitsandbytes_computes(name, device):
    both = []
    for kind in (getattr(ours, name), getattr(bnb.optim, name)):
        params, _ = start("adamw_torch", device=device)
        optimizer = kind([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}], lr=1e-2)
        train(params, optimizer, range(4))
        both.append(frozen(params, optimizer))
    assert both[0] == both[1]


@pytest.mark.parametrize("kind", ["adamw_8bit", "lion_8bit"])
def test_eight_bit_state_is_quantised_and_its_map_written_once(tmp_path, kind):
    params, optimizer = start(kind)
    train(params, optimizer, range(2))
    tensors, state = optimizer_tensors(optimizer)
    assert tensors["0.state1"].dtype == torch.uint8
    assert tensors["2.state1"].dtype == torch.float32
    assert [name for name in tensors if "qmap1" in name] == ["0.qmap1"]
    assert state["shared"]["1.qmap1"] == "0.qmap1"
    saved = through_disk(tmp_path, params, optimizer)
    params, optimizer = resumed(kind, saved)
    assert optimizer.state[params[0]]["qmap1"] is optimizer.state[params[1]]["qmap1"]


@pytest.mark.gpu
def test_paged_state_is_paged_again(tmp_path):
    params, optimizer = start("paged_adamw_32bit", device="cuda")
    train(params, optimizer, range(2))
    params, optimizer = resumed("paged_adamw_32bit", through_disk(tmp_path, params, optimizer), "cuda")
    assert optimizer.state[params[1]]["state1"].is_paged


def test_a_parameter_without_state_stays_without(tmp_path):
    params, optimizer = start("adamw_8bit")
    train(params[:2], optimizer, range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, optimizer = resumed("adamw_8bit", through_disk(tmp_path, params, optimizer))
    assert set(optimizer.state) == set(params[:2])


def test_state_of_another_optimiser_or_another_adapter_is_refused(tmp_path):
    params, optimizer = start("adamw_8bit")
    train(params, optimizer, range(1))
    tensors, state = optimizer_tensors(optimizer)
    with pytest.raises(CheckpointError, match=r"AdamW8bit over 4 parameters.*Lion8bit over 4"):
        restore_optimizer(start("lion_8bit")[1], tensors, state)
    other = ours.AdamW8bit([torch.nn.Parameter(torch.zeros(5000)) for _ in range(4)])
    with pytest.raises(CheckpointError, match="over 4 parameters"):
        restore_optimizer(other, tensors, {**state, "sizes": [2, 2]})
    other = ours.AdamW8bit(
        [{"params": [torch.nn.Parameter(torch.zeros(5000)) for _ in range(2)]} for _ in range(2)]
    )
    with pytest.raises(CheckpointError, match=r"0\.state1 has shape \[96, 64\], its parameter \[5000\]"):
        restore_optimizer(other, tensors, state)
    assert not other.state, "a refused state leaves the optimiser as it was"
    with pytest.raises(CheckpointError, match=r"lacks the tensor 0\.qmap1"):
        restore_optimizer(start("adamw_8bit")[1], {k: v for k, v in tensors.items() if k != "0.qmap1"}, state)


def test_hyper_parameters_come_back_and_the_way_of_computing_stays():
    params, optimizer = start("adamw_torch")
    train(params, optimizer, range(3))
    tensors, state = optimizer_tensors(optimizer)
    fresh_params, _ = start("adamw_torch")
    fresh = torch.optim.AdamW([{"params": fresh_params[:2]}, {"params": fresh_params[2:]}], lr=9.0, foreach=False)
    restore_optimizer(fresh, tensors, state)
    assert [group["lr"] for group in fresh.param_groups] == [1e-2 / 3] * 2
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.01, 0.0]
    assert fresh.param_groups[0]["foreach"] is False
    assert fresh.param_groups[0]["betas"] == (0.9, 0.999)
