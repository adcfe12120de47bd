"""Figures, times and rows' texts as they are shown."""

import unicodedata
from collections.abc import Sequence
from typing import Any

SHOWN_LETTERS = 4000
"""Of a longer text the middle is left out, and that is said."""


def plain(text: str) -> str:
    """A row's text as it can be shown: control characters made visible, the middle of a long one left out."""
    if len(text) > SHOWN_LETTERS:
        head, tail = text[: SHOWN_LETTERS * 2 // 3], text[-SHOWN_LETTERS // 3 :]
        text = f"{head}\n[… {len(text) - len(head) - len(tail):,} letters left out …]\n{tail}"
    return visible(text)


def visible(text: str) -> str:
    """The same text with its control and format characters (bells, changes of direction) as letters that are seen."""
    return "".join(_visible(letter) for letter in text)


def _visible(letter: str) -> str:
    if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs"):
        return letter
    code = ord(letter)
    return chr(0x2400 + code) if code < 32 else "\u2421" if code == 127 else f"[U+{code:04X}]"


def number(value: Any, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) and value == value else "-"


def between(interval: Sequence[float] | None) -> str:
    """`0.701 to 0.745`, or nothing."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`, `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
