"""An optimiser's state as named tensors and JSON, and back, bit for bit.

For torch's AdamW and bitsandbytes' AdamW8bit, PagedAdamW32bit and Lion8bit. Their own `load_state_dict` casts state to
the parameter's dtype, and the 8-bit ones share one quantisation map among all parameters, which safetensors refuses;
here each tensor keeps its dtype, and one that is shared is written once and shared again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

from ..errors import CheckpointError

# How a step is computed, not what: these stay as the new optimiser has them.
_OWN = ("params", "foreach", "fused", "capturable", "differentiable")
# State with one value for each of the parameter's.
_SHAPED = ("exp_avg", "max_exp_avg", "state")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of an optimiser's state, named `INDEX.KEY` by the parameter's place, and the rest as plain JSON.

    The tensors are the optimiser's own, not copies. Raises TypeError for a state that is neither tensor nor number.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for index, at in enumerate(_params(optimizer)):
        for key, value in sorted(optimizer.state.get(at.param, {}).items()):
            name = f"{index}.{key}"
            if not isinstance(value, torch.Tensor):
                if not isinstance(value, int | float):
                    raise TypeError(f"optimiser state {name} is a {type(value).__name__}")
                numbers[name] = value
            elif id(value) in first:
                shared[name] = first[id(value)]
            else:
                tensors[name] = value
                first[id(value)] = name
    return tensors, {
        "kind": type(optimizer).__name__,
        "sizes": [len(group["params"]) for group in optimizer.param_groups],
        "groups": [{key: it for key, it in group.items() if key not in _OWN} for group in optimizer.param_groups],
        "numbers": numbers,
        "shared": shared,
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """Puts back what `optimizer_tensors` gave into a fresh optimiser over the same parameters, on any device.

    Copies the tensors. Raises CheckpointError if the state is another kind's or does not fit the parameters.
    """
    params = _params(optimizer)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if (state["kind"], state["sizes"]) != (type(optimizer).__name__, sizes):
        raise CheckpointError(
            f"the checkpoint's optimiser state is that of {state['kind']} over {sum(state['sizes'])} parameters, "
            f"the run's optimiser is {type(optimizer).__name__} over {sum(sizes)}: resume with the settings it was "
            "saved with, or reset the optimiser"
        )
    sources = {name: name for name in tensors} | state["shared"]
    for name, source in sources.items():
        index, _, key = name.partition(".")
        if source not in tensors:
            raise CheckpointError(f"the checkpoint's optimiser state lacks the tensor {source}")
        have, want = tensors[source].shape, params[int(index)].param.shape
        if key.startswith(_SHAPED) and have != want:
            raise CheckpointError(f"optimiser state {name} has shape {list(have)}, its parameter {list(want)}")

    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        group |= {key: tuple(it) if isinstance(group.get(key), tuple) else it for key, it in saved.items()}
    optimizer.state.clear()
    moved: dict[str, torch.Tensor] = {}
    for name in (*sources, *state["numbers"]):
        at = params[int(name.partition(".")[0])]
        key = name.partition(".")[2]
        held = optimizer.state[at.param]
        if not held and isinstance(optimizer, Optimizer8bit):
            optimizer.init_state(at.group, at.param, at.group_index, at.place)  # only this allocates paged memory
        if name in state["numbers"]:
            held[key] = state["numbers"][name]
        elif getattr(held.get(key), "is_paged", False):
            held[key].copy_(tensors[name])
        else:
            source = sources[name]
            if source not in moved:
                on_host = key == "step" and not (at.group.get("capturable") or at.group.get("fused"))
                moved[source] = tensors[source].to("cpu" if on_host else at.param.device, copy=True)
            held[key] = moved[source]


class _Param(NamedTuple):
    group_index: int
    place: int
    group: dict[str, Any]
    param: torch.nn.Parameter


def _params(optimizer: torch.optim.Optimizer) -> list[_Param]:
    return [
        _Param(group_index, place, group, param)
        for group_index, group in enumerate(optimizer.param_groups)
        for place, param in enumerate(group["params"])
    ]
