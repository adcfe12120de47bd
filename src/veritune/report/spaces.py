"""Charts over the settings that a sweep searched: a map of two of them, and all of them side by side."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from ..quality.metrics import Floats
from .scale import Scale, label, ticks
from .svg import HEIGHT, LETTER, WIDE, WIDTH, colour, frame, shortened, text, trace
from .trials import Axis


def field(values: Floats, points: Sequence[tuple[float, float, int, str]], x: Axis, y: Axis) -> Markup:
    """A surface over two settings as cells, the stronger the colour the lower, and points on it.

    values: float64 [cells up, cells across], NaN for a cell left blank; points: places 0 to 1, colour, tip.
    """
    left = 14 + LETTER * max(len(name) for _, name in axis_labels(y))
    across, up = Scale(0, 1, left, WIDTH - 14), Scale(0, 1, HEIGHT - 26, 8)
    finite = [float(v) for line in values for v in line if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    rows, columns = len(values), len(values[0])
    parts = []
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if math.isfinite(value):
                strength = 0.04 + 0.58 * (high - value) / ((high - low) or 1)
                a, b = across(j / columns), up((i + 1) / rows)
                size = f'width="{across((j + 1) / columns) - a + 0.4:.1f}" height="{up(i / rows) - b + 0.4:.1f}"'
                parts.append(f'<rect class="cell" x="{a:.1f}" y="{b:.1f}" {size} fill-opacity="{strength:.2f}"/>')
    for at, name in axis_labels(x):
        parts.append(f'<text x="{across(at):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{text(name)}</text>')
    for at, name in axis_labels(y):
        parts.append(f'<text x="{left - 6:.1f}" y="{up(at) + 4:.1f}" text-anchor="end">{text(name)}</text>')
    for a, b, number, tip in points:
        place = f'cx="{across(a):.1f}" cy="{up(b):.1f}" r="4"'
        parts.append(f'<circle class="dot ring {colour(number)}" {place}><title>{text(tip)}</title></circle>')
    return frame(parts, WIDTH, HEIGHT)


def axis_labels(axis: Axis) -> list[tuple[float, str]]:
    """Places 0 to 1 along a setting's axis, and what stands there."""
    if axis.choices:
        return [(axis.place(i), shortened(name, 18)) for i, name in enumerate(axis.choices)]
    return [(axis.place(v), label(v)) for v in ticks(axis.low, axis.high, log=axis.log, most=5)]


def parallel(
    lines: Sequence[tuple[Sequence[float], int, bool, str]], axes: Sequence[Axis], last: tuple[str, str, str]
) -> Markup:
    """Upright axes side by side and a line through them for each (places, colour, strong, tip); last: the name of the
    last axis, which no setting has, and its lower and upper end."""
    width, height = WIDE
    count = len(axes) + 1
    across, up = Scale(0, max(count - 1, 1), 60, width - 90), Scale(0, 1, height - 16, 40)
    parts = []
    for places, number, strong, tip in lines:
        path = trace([(across(i), up(at)) for i, at in enumerate(places)])
        kind = "line" if strong else "line thin"
        parts.append(f'<path class="{kind} {colour(number)}" d="{path}"><title>{text(tip)}</title></path>')
    for i in range(count):
        a = across(i)
        name = axes[i].key.rpartition(".")[2] if i < len(axes) else last[0]
        found = axis_labels(axes[i]) if i < len(axes) else [(0.0, last[1]), (1.0, last[2])]
        parts.append(f'<path class="axis" d="M{a:.1f} {up.start:.1f}V{up.stop:.1f}"/>')
        low = 0 if i % 2 else 14  # long names of neighbours stand at two heights
        name = text(shortened(name, 22))
        parts.append(f'<text class="value" x="{a:.1f}" y="{12 + low}" text-anchor="middle">{name}</text>')
        for at, mark in found:
            parts.append(f'<text class="halo" x="{a + 5:.1f}" y="{up(at) + 4:.1f}">{text(mark)}</text>')
    return frame(parts, width, height)
