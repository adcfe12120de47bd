"""Curves in the terminal: a Braille letter holds 2 x 4 points."""

import math
from collections.abc import Sequence

BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column] of U+2800's dots


def curve(values: Sequence[float], width: int, height: int) -> list[str]:
    """`values` as a curve of `height` lines with its highest and lowest value at the left, `width` letters in all.

    Several values that fall on one column are averaged; a value that is not finite leaves a gap.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return [" " * width] * height
    low, high = min(finite), max(finite)
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"][:height]
    margin = max(map(len, labels)) + 1
    columns, rows = max(width - margin, 1) * 2, height * 4
    cells = [[0] * ((columns + 1) // 2) for _ in range(height)]
    before: int | None = None
    for x, value in enumerate(columned(values, columns)):
        if value is None:
            before = None
            continue
        y = round((high - value) / (high - low) * (rows - 1)) if high > low else rows // 2
        start = y if before is None else before + (y > before) - (y < before)  # joins this point to the one before
        for at in range(min(start, y), max(start, y) + 1):
            cells[at // 4][x // 2] |= BITS[at % 4][x % 2]
        before = y
    return [
        label.rjust(margin - 1) + " " + "".join(chr(0x2800 + cell) for cell in line)
        for label, line in zip(labels, cells, strict=True)
    ]


def columned(values: Sequence[float], columns: int) -> list[float | None]:
    """A value for each column: the mean of those that fall on it, or between two of them; None for a gap."""
    count = len(values)
    if count < columns:
        return [_between(values, column * (count - 1) / max(columns - 1, 1)) for column in range(columns)]
    out: list[float | None] = []
    for column in range(columns):
        part = [v for v in values[column * count // columns : (column + 1) * count // columns] if math.isfinite(v)]
        out.append(sum(part) / len(part) if part else None)
    return out


def _between(values: Sequence[float], at: float) -> float | None:
    left = int(at)
    right = min(left + 1, len(values) - 1)
    value = values[left] + (at - left) * (values[right] - values[left])
    return value if math.isfinite(value) else None
