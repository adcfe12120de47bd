"""A small table of numbers as an image, for trackers that show images beside curves."""

from collections.abc import Sequence
from typing import Any

CELL, LABEL, HEIGHT, SIZE = 110, 210, 44, 16
LIGHT, DARK = (247, 251, 255), (8, 69, 148)


def heat_map(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A PIL image of a table whose first column names the rows: the larger a number, the darker its cell, from the
    smallest to the largest of the table. None stays empty."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(SIZE)
    found = [value for _, *values in rows for value in values if value is not None]
    low, high = min(found, default=0.0), max(found, default=1.0)
    image = Image.new("RGB", (LABEL + CELL * (len(columns) - 1), HEIGHT * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(image)

    def write(text: str, left: float, top: float, width: float, ink: str) -> None:
        while len(text) > 1 and draw.textlength(text, font) > width - 10:
            text = text[:-2] + "…"
        draw.text((left + width / 2, top + HEIGHT / 2), text, ink, font, anchor="mm")

    for place, text in enumerate(columns):
        write(text, LABEL + CELL * (place - 1) if place else 0, 0, CELL if place else LABEL, "black")
    for line, (name, *values) in enumerate(rows, start=1):
        write(str(name), 0, HEIGHT * line, LABEL, "black")
        for place, value in enumerate(values):
            if value is None:
                continue
            part = (value - low) / (high - low) if high > low else 0.0
            shade = tuple(round(a + (b - a) * part) for a, b in zip(LIGHT, DARK, strict=True))
            left, top = LABEL + CELL * place, HEIGHT * line
            draw.rectangle((left, top, left + CELL - 2, top + HEIGHT - 2), fill=shade)
            shown = f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
            write(shown, left, top, CELL, "white" if part > 0.55 else "black")
    return image
