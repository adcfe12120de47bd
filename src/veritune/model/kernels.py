"""What kernels of our own, in Triton, have in common: whether they work on this GPU, and the widths they take."""

from collections.abc import Callable

import torch
from torch.utils._triton import has_triton

from ..errors import first_line


def why_not(attempt: Callable[[], str | None]) -> str | None:
    """Why kernels do not work here: Triton is not there, or cannot compile one, for which it needs a C compiler and
    Python's headers, or the GPU has not the shared memory that one takes; or what `attempt`, which runs them, says of
    their numbers. None: they do. Raises OutOfMemoryError, which says nothing about them."""
    if not has_triton():
        return "torch comes without Triton here"
    try:
        return attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler that is not there can raise
        return first_line(error)


def padded(width: int) -> int:
    """A width as kernels count it: matrix units take powers of two, of 16 or more."""
    return max(16, 1 << (width - 1).bit_length())
