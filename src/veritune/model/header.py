"""The header of a GGUF file: what it says of the model and the shapes of its tensors, without reading a weight.

The format's own reader builds an array for every word of the vocabulary, which takes seconds; here words are passed
over. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ModelError

# The format's value types by number: those of fixed size, as `struct` knows them.
FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


def read(file: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Single values by key (arrays are left out), and each tensor's sizes, the fastest moving first.

    Raises ModelError for a file that is no GGUF.
    """
    try:
        with open(file, "rb") as opened:
            if opened.read(4) != b"GGUF" or _number(opened, "I") not in (2, 3):
                raise ModelError(f"{file}: not a GGUF file of version 2 or 3")
            tensors, count = _number(opened, "Q"), _number(opened, "Q")
            values: dict[str, Any] = {}
            for _ in range(count):
                key, kind = _text(opened), _number(opened, "I")
                if kind == ARRAY:
                    _pass_array(opened)
                else:
                    values[key] = _text(opened) if kind == TEXT else _number(opened, FIXED[kind])
            shapes: dict[str, tuple[int, ...]] = {}
            for _ in range(tensors):
                name, sizes = _text(opened), _number(opened, "I")
                shapes[name] = tuple(_number(opened, "Q") for _ in range(sizes))
                struct.unpack("<IQ", opened.read(12))  # its type and place
    except (struct.error, KeyError, UnicodeDecodeError, MemoryError, OverflowError):
        raise ModelError(f"{file}: the GGUF header is damaged") from None
    return values, shapes


def _number(opened: BinaryIO, kind: str) -> Any:
    size = struct.calcsize("<" + kind)
    return struct.unpack("<" + kind, opened.read(size))[0]


def _text(opened: BinaryIO) -> str:
    return opened.read(_number(opened, "Q")).decode()


def _pass_array(opened: BinaryIO) -> None:
    kind, count = _number(opened, "I"), _number(opened, "Q")
    if kind in FIXED:
        opened.seek(count * struct.calcsize("<" + FIXED[kind]), 1)
        return
    if kind not in (TEXT, ARRAY):
        raise KeyError(kind)
    for _ in range(count):
        if kind == ARRAY:
            _pass_array(opened)
        else:
            opened.seek(_number(opened, "Q"), 1)
