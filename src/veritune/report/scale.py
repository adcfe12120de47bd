"""From values to places on a chart: ranges, ticks, their labels, and series thinned to what a screen can show."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_POINTS = 500
"""Points of a series that are drawn."""


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis from `low` to `high`, drawn from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value, also outside the range; NaN if it has none."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return float("nan")
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.stop - self.start)


def span(values: Sequence[float], *, log: bool = False, pad: float = 0.05) -> tuple[float, float]:
    """The range that holds all finite values, with a margin; never empty."""
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not finite:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(finite), max(finite)
    if log:
        room = (high / low) ** pad if high > low else 2.0
        return low / room, high * room
    room = (high - low) * pad or abs(high) * 0.1 or 0.5
    return low - room, high + room


def ticks(low: float, high: float, *, log: bool = False, most: int = 6) -> list[float]:
    """Round values within a range: steps of 1, 2 or 5 times a power of ten; on a log axis powers of ten."""
    if high <= low:
        return [low]
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        if last - first >= 2:
            return [10.0**p for p in range(first, last + 1, max(1, math.ceil((last - first + 1) / most)))]
        return [m * 10.0**p for p in range(first - 1, last + 2) for m in (1, 2, 5) if low <= m * 10.0**p <= high][:most]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    places = 2 - math.floor(math.log10(step))
    return [round(i * step, places) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A tick's text: `0.25`, `1,500`, `20k`, `1.5e-4`; as many digits as it takes to tell it from its neighbours."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 0.001:
        digits, power = f"{value:.11e}".split("e")
        return f"{float(digits):.12g}e{int(power)}"
    if size >= 10_000:
        unit, letter = next((u, x) for u, x in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= u)
        return f"{value / unit:.12g}{letter}"
    return f"{value:,.12g}" if size >= 1000 else f"{value:.12g}"


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: those that fall together are averaged; a part with a value that is not finite keeps it."""
    count = len(x)
    if count <= most:
        return list(x), list(y)
    xs, ys = [], []
    for i in range(most):
        part = slice(i * count // most, (i + 1) * count // most)
        xs.append(sum(x[part]) / len(x[part]))
        ys.append(sum(y[part]) / len(y[part]))
    return xs, ys
