"""What a report's page is made of; `page.html` says how each looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Chart:
    """A drawing with its title; legend: (colour's class, name)."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column holds names. details: what is clicked to see the table; "" shows it at once."""

    kind: ClassVar[str] = "table"
    rows: Sequence[Sequence[Any]]
    head: Sequence[str] = ()
    title: str = ""
    details: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning stands out."""

    kind: ClassVar[str] = "text"
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Code:
    """Commands or a file, to be copied."""

    kind: ClassVar[str] = "code"
    text: str
    title: str = ""
    details: str = ""


@dataclass(frozen=True)
class Tiles:
    """Figures that are seen first: (name, value, what stands under it)."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Row:
    """One solution that the verifier was wrong about."""

    kind: ClassVar[str] = "row"
    p: float
    label: bool
    id: str
    about: Sequence[tuple[str, str]]
    question: str
    solution: str


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    id: str
    title: str
    blocks: Sequence[Chart | Table | Text | Code | Tiles | Row]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    sections: Sequence[Section]
