"""Tensors and plain values as the bytes of files, with nothing non-finite among them and nothing pickled."""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..durable import Parts
from ..errors import NonFiniteError

STATE = "state.json"
SUFFIX = ".safetensors"
Groups = Mapping[str, Mapping[str, torch.Tensor]]

# The format's name of each dtype, and for floats the bits that are all set exactly in NaN and infinity.
_DTYPES: dict[torch.dtype, tuple[str, int]] = {
    torch.float64: ("F64", 0x7FF0_0000_0000_0000),
    torch.float32: ("F32", 0x7F80_0000),
    torch.float16: ("F16", 0x7C00),
    torch.bfloat16: ("BF16", 0x7F80),
    torch.float8_e4m3fn: ("F8_E4M3", 0x7F),
    torch.float8_e5m2: ("F8_E5M2", 0x7C),
    torch.int64: ("I64", 0),
    torch.int32: ("I32", 0),
    torch.int16: ("I16", 0),
    torch.int8: ("I8", 0),
    torch.uint64: ("U64", 0),
    torch.uint32: ("U32", 0),
    torch.uint16: ("U16", 0),
    torch.uint8: ("U8", 0),
    torch.bool: ("BOOL", 0),
}


def pack(tensors: Groups, state: dict[str, Any], *, copy: bool = False) -> dict[str, Parts]:
    """The files of a checkpoint. With `copy` they stay as they are when the tensors change afterwards."""
    files = {f"{group}{SUFFIX}": safetensors_parts(them, group, copy=copy) for group, them in tensors.items()}
    return {**files, STATE: [as_json(state)]}


def as_json(value: Any) -> bytes:
    """Plain JSON. Raises NonFiniteError where a number is NaN or infinite, TypeError for what is not JSON."""
    _check_plain(value, STATE)
    return json.dumps(value, indent=1, allow_nan=False).encode()


def safetensors_parts(tensors: Mapping[str, torch.Tensor], where: str, *, copy: bool = False) -> Parts:
    """A safetensors file as pieces of memory, so that 0.5 GB is not gathered in one block before it is written.

    The format: 8 bytes with the length of a JSON header (little endian), the header, then each tensor's bytes; the
    larger element sizes come first so that each tensor is aligned. Every tensor is written out in full, whatever
    storage it shares. Raises NonFiniteError, naming `where` and the tensor, for one that holds NaN or infinity.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        there = tensor.detach().to("cpu").contiguous()
        # as_strided, since of one value or none any strides count as contiguous.
        flat = there.as_strided((there.numel(),), (1,)).view(torch.uint8).numpy()
        if copy and there.data_ptr() == tensor.data_ptr():
            flat = flat.copy()
        kind, bits = _DTYPES[tensor.dtype]
        if bits and (wrong := _non_finite(flat.view(f"u{tensor.element_size()}"), bits)):
            raise NonFiniteError(
                f"{where}/{name}: {wrong:,} of {tensor.numel():,} values are NaN or infinite; nothing was saved"
            )
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + flat.nbytes],
        }
        data.append(flat.data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)) + text, *data]


def _non_finite(values: np.ndarray, bits: int) -> int:
    """How many of `values` (the floats' bits as unsigned integers) are NaN or infinite.

    On one thread: torch's own threads, waiting for each other once a tensor, took seconds on a busy machine.
    """
    mask = values.dtype.type(bits)
    return int(np.count_nonzero((values & mask) == mask))


def _check_plain(value: Any, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise NonFiniteError(f"{name} is {value}; nothing was saved")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name}: the key {key!r} is not a string")
            _check_plain(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{name}[{index}]")
