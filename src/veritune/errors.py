"""What a user can do wrong. Each kind is also a standard exception, so callers need not import it to catch it.

The command line prints `str(error)` and exits with 2: a message says what was wrong, where, and what to do.
"""

from collections.abc import Mapping
from typing import Any


class VerituneError(Exception):
    """Base of every expected failure."""

    def __str__(self) -> str:  # an OSError's would show more than the message
        return str(self.args[0]) if self.args else ""


def first_line(error: Exception) -> str:
    """What another library's error says, in a line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refused(item: Mapping[str, Any]) -> str:
    """What pydantic says of a value, in a line; item: one of a ValidationError's `errors()`."""
    key, value = ".".join(map(str, item["loc"])), item["input"]
    if item["type"] == "tuple_type":
        as_list = f"each item under [[{key}]]" if isinstance(value, dict) else f"such as {[value]}"
        return f"{key} must be a list, {as_list}"
    return f"{key} = {value!r}: {item['msg'].lower()}"


class ConfigError(VerituneError, ValueError):
    """A setting, a run file or a flag cannot be used."""


class OtherWayError(ConfigError):
    """A run's checkpoint was computed in another way (precision; with dropout, micro-batches or device too)."""


class DataError(VerituneError, ValueError):
    """Rows, a data file or a prepared dataset cannot be used."""


class MissingError(VerituneError, FileNotFoundError):
    """A file or folder the user named is not there."""


class ModelError(VerituneError, RuntimeError):
    """Weights, a tokenizer or an adapter cannot be used."""


class NonFiniteError(VerituneError, FloatingPointError):
    """A loss, a gradient or a weight is NaN or infinite."""


class RoomError(VerituneError, MemoryError):
    """Memory does not suffice."""


class CheckpointError(VerituneError, OSError):
    """No whole checkpoint could be written or read."""


class NoneWholeError(CheckpointError):
    """There are checkpoints, and none is whole."""


class BusyError(VerituneError, BlockingIOError):
    """Another process works at this moment on what only one may."""


class PeerError(VerituneError, ConnectionError):
    """Another process of a run on several GPUs, or the storage of a sweep, is gone."""
