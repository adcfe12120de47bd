"""Charts as SVG, to stand inside an HTML page: colours are classes (s1 to s8), so that the page's style decides them.

Charts are Markup; texts given to them are escaped here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .scale import Scale, label, span, thin, ticks
from .words import visible

WIDTH, HEIGHT = 460, 270
WIDE = (960, 320)
LETTER = 7.0
"""Width of a letter of the charts' font, about."""
COLOURS = 8
MOST_DOTS = 60
"""Points of a line that are marked; more would hide it."""


@dataclass(frozen=True)
class Series:
    """A line, or points, over x; `low` and `high` are the band around it."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 1
    name: str = ""
    kind: str = "line"
    """line, faint or thin (lines too), points, or both (a line with points)."""
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    tips: Sequence[str] | None = None
    """What each point says when it is pointed at."""


def colour(number: int) -> str:
    """The class of the number-th colour, counted from 1, again from the start after the last."""
    return f"s{(number - 1) % COLOURS + 1}"


def plot(
    series: Sequence[Series],
    *,
    x_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    shades: Sequence[tuple[float, float, str]] = (),
    marks: Sequence[tuple[float, str]] = (),
    diagonal: bool = False,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Markup:
    """Series over one pair of axes. shades: stretches of x with a name, every second one shaded; marks: upright lines
    with a name; diagonal: the line y = x; size: width and height, WIDE for a chart as wide as the page."""
    all_y = [v for s in series for part in (s.y, s.low or (), s.high or ()) for v in part]
    x_low, x_high = x_range or span([v for s in series for v in s.x], log=log_x, pad=0.02)
    y_low, y_high = y_range or span(all_y, log=log_y)
    y_ticks = ticks(y_low, y_high, log=log_y, most=5)
    left = 12 + LETTER * max((len(label(v)) for v in y_ticks), default=1)
    x = Scale(x_low, x_high, left, size[0] - 14, log_x)
    y = Scale(y_low, y_high, size[1] - 38, 20 if shades or marks else 10, log_y)
    parts = [shade(x, y, start, stop, name, i) for i, (start, stop, name) in enumerate(shades)]
    parts += axes(x, y, ticks(x_low, x_high, log=log_x), y_ticks, x_label)
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        parts.append(f'<path class="rule" d="M{x(low):.1f} {y(low):.1f}L{x(high):.1f} {y(high):.1f}"/>')
    for at, name in marks:
        parts.append(f'<path class="rule" d="M{x(at):.1f} {y.start:.1f}V{y.stop:.1f}"/>')
        anchor = "end" if x(at) > size[0] * 0.6 else "start"
        shift = -4 if anchor == "end" else 4
        parts.append(f'<text x="{x(at) + shift:.1f}" y="{y.stop - 4:.1f}" text-anchor="{anchor}">{text(name)}</text>')
    for one in series:
        parts += drawn(one, x, y)
    return frame(parts, *size)


def drawn(one: Series, x: Scale, y: Scale) -> list[str]:
    """A series as SVG elements; what lies outside the axes is drawn at their edge."""

    def place(value: float) -> float:
        at = y(value)
        return min(max(at, y.stop), y.start) if at == at else at

    out = []
    if one.low is not None and one.high is not None:
        xs, lows = thin(one.x, one.low)
        _, highs = thin(one.x, one.high)
        edge = [(x(a), place(b)) for a, b in zip(xs, lows, strict=True)]
        edge += [(x(a), place(b)) for a, b in reversed(list(zip(xs, highs, strict=True)))]
        out.append(f'<path class="band {colour(one.colour)}" d="{trace(edge)}Z"/>')
    if one.kind != "points":
        xs, ys = thin(one.x, one.y)
        line = trace([(x(a), place(b)) for a, b in zip(xs, ys, strict=True)])
        kind = "line" if one.kind in ("line", "both") else f"line {one.kind}"
        out.append(f'<path class="{kind} {colour(one.colour)}" d="{line}"/>')
    if one.kind == "points" or len(one.x) == 1 or (one.kind == "both" and len(one.x) <= MOST_DOTS):
        for i, (a, b) in enumerate(zip(one.x, one.y, strict=True)):
            if x(a) == x(a) and y(b) == y(b):
                tip = f"<title>{text(one.tips[i])}</title>" if one.tips else ""
                at = f'cx="{x(a):.1f}" cy="{place(b):.1f}" r="3.5"'
                out.append(f'<circle class="dot {colour(one.colour)}" {at}>{tip}</circle>')
    return out


def trace(points: Sequence[tuple[float, float]]) -> str:
    """A path through points, broken where one has no place."""
    out, pen = [], "M"
    for a, b in points:
        if a == a and b == b:
            out.append(f"{pen}{a:.1f} {b:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(out) or "M0 0"


def axes(x: Scale, y: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> list[str]:
    """Grid lines, ticks and the name of the x axis."""
    out = []
    for value in y_ticks:
        at = y(value)
        out.append(f'<path class="grid" d="M{x.start:.1f} {at:.1f}H{x.stop:.1f}"/>')
        out.append(f'<text x="{x.start - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{label(value)}</text>')
    for value in x_ticks:
        at = x(value)
        out.append(f'<path class="tick" d="M{at:.1f} {y.start:.1f}v4"/>')
        out.append(f'<text x="{at:.1f}" y="{y.start + 17:.1f}" text-anchor="middle">{label(value)}</text>')
    out.append(f'<path class="axis" d="M{x.start:.1f} {y.start:.1f}H{x.stop:.1f}"/>')
    out.append(f'<text class="name" x="{x.stop:.1f}" y="{y.start + 33:.1f}" text-anchor="end">{text(x_label)}</text>')
    return out


def shade(x: Scale, y: Scale, start: float, stop: float, name: str, number: int) -> str:
    """A stretch of x, shaded if its number is odd, with its name where that has room."""
    a, b = (min(max(x(v), x.start), x.stop) for v in (start, stop))
    out = ""
    if number % 2:
        out = f'<rect class="shade" x="{a:.1f}" y="{y.stop:.1f}" width="{b - a:.1f}" height="{y.start - y.stop:.1f}"/>'
    if len(name) * LETTER < b - a:
        out += f'<text x="{(a + b) / 2:.1f}" y="{y.stop - 5:.1f}" text-anchor="middle">{text(name)}</text>'
    return out


def bars(edges: Sequence[float], groups: Sequence[tuple[int, Sequence[float]]], *, x_label: str) -> Markup:
    """Histograms over one set of bins (edges: [bins + 1]), each group (its colour, a height for each bin) see-through,
    one before the other."""
    top = max((v for _, heights in groups for v in heights), default=0.0) or 1.0
    y_ticks = ticks(0, top, most=5)
    left = 12 + LETTER * max(len(label(v)) for v in y_ticks)
    x = Scale(edges[0], edges[-1], left, WIDTH - 14)
    y = Scale(0, top * 1.04, HEIGHT - 38, 10)
    parts = axes(x, y, ticks(edges[0], edges[-1]), y_ticks, x_label)
    for number, heights in groups:
        for start, stop, value in zip(edges[:-1], edges[1:], heights, strict=True):
            if value > 0:
                place = f'x="{x(start) + 0.5:.1f}" width="{x(stop) - x(start) - 1:.1f}"'
                size = f'y="{y(value):.1f}" height="{y.start - y(value):.1f}"'
                tip = f"<title>{label(round(start, 4))} to {label(round(stop, 4))}: {value:,.4g}</title>"
                parts.append(f'<rect class="bar {colour(number)}" {place} {size}>{tip}</rect>')
    return frame(parts, WIDTH, HEIGHT)


def intervals(
    rows: Sequence[tuple[str, float, tuple[float, float] | None]],
    *,
    x_label: str,
    rule: float | None = None,
) -> Markup:
    """A line for each (name, value, interval): the value as a point on its interval. rule: an upright line."""
    names = [shortened(name, 24) for name, *_ in rows]
    left = 14 + LETTER * max((len(name) for name in names), default=1)
    height = 44 + 24 * len(rows)
    ends = [v for _, value, low_high in rows for v in (value, *(low_high or ()))]
    low_end, high_end = span([*ends, *([rule] if rule is not None else [])])
    x = Scale(low_end, high_end, left, WIDTH - 14)
    y = Scale(0, 1, height - 38, 4)
    parts = axes(x, y, ticks(low_end, high_end, most=5), (), x_label)
    if rule is not None:
        parts.append(f'<path class="rule" d="M{x(rule):.1f} {y.start:.1f}V{y.stop:.1f}"/>')
    for i, ((name, value, low_high), short) in enumerate(zip(rows, names, strict=True)):
        at = 18 + 24 * i
        tip = f"<title>{text(name)}: {value:.3f}</title>"
        parts.append(f'<text x="{left - 8:.1f}" y="{at + 4}" text-anchor="end">{text(short)}{tip}</text>')
        if low_high:
            line = f"M{x(low_high[0]):.1f} {at}H{x(low_high[1]):.1f}"
            parts.append(f'<path class="whisker {colour(1)}" d="{line}"/>')
        if math.isfinite(value):
            parts.append(f'<circle class="dot {colour(1)}" cx="{x(value):.1f}" cy="{at}" r="4.5">{tip}</circle>')
    return frame(parts, WIDTH, height)


def heat(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], *, low: float, high: float
) -> Markup:
    """A table of values in [low, high] as cells, the stronger the colour the higher, with rows and columns named."""
    short = [[shortened(name, most) for name in part] for part, most in ((rows, 24), (columns, 16))]
    left = 14 + LETTER * max((len(name) for name in short[0]), default=1)
    wide = max(44.0, (WIDTH - left - 6) / max(len(columns), 1))
    turned = wide < LETTER * max((len(name) for name in short[1]), default=1) + 6
    top = 18 + (LETTER * 0.75 * max(len(name) for name in short[1]) if turned else 8)
    width, height = left + wide * len(columns) + 6, top + 34 * len(rows) + 6
    parts = []
    for j, name in enumerate(short[1]):
        at = left + wide * (j + 0.5)
        place = (
            f'transform="translate({at:.1f} {top - 6:.1f}) rotate(-40)"'
            if turned
            else f'x="{at:.1f}" y="{top - 8:.1f}"'
        )
        parts.append(f'<text {place} text-anchor="{"start" if turned else "middle"}">{text(name)}</text>')
    for i, line in enumerate(values):
        y = top + 34 * i
        parts.append(f'<text x="{left - 8:.1f}" y="{y + 21:.1f}" text-anchor="end">{text(short[0][i])}</text>')
        for j, value in enumerate(line):
            x = left + wide * j
            known = math.isfinite(value)
            strength = 0.06 + 0.56 * min(max((value - low) / ((high - low) or 1), 0), 1) if known else 0
            parts.append(
                f'<rect class="cell" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="32" rx="3" '
                f'fill-opacity="{strength:.2f}"/>'
            )
            shown = f"{value:.3f}" if known else "-"
            parts.append(
                f'<text class="value" x="{x + wide / 2:.1f}" y="{y + 21:.1f}" text-anchor="middle">{shown}</text>'
            )
    return frame(parts, width, height)


def shortened(name: str, most: int) -> str:
    """A name of at most so many letters: of a longer one the middle is left out, since ends tell names apart."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


def text(value: str) -> Markup:
    """A text as it may stand in SVG."""
    return escape(visible(value))


def frame(parts: Sequence[str], width: float, height: float) -> Markup:
    """The `svg` element around its parts."""
    return Markup(f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img">{"".join(parts)}</svg>')
