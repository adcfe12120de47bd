"""`veritune report`: one HTML file that holds all it shows, from the run folders' files alone."""

import math
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from .. import __version__
from ..durable import replace_file
from ..errors import ConfigError
from . import compare, folder, quality, run, scored, sweep, trials
from .blocks import Page
from .words import visible

HERE = Path(__file__).parent


def report(paths: Sequence[Path], out: Path, *, data: Path | None = None, price: float | None = None) -> None:
    """Writes the report on a run, on several compared, or on a sweep, whole or not at all.

    data: the prepared folder, if it is no longer where the run says; price: of an hour, in any currency. Raises what
    `folder.read` and `trials.read` raise, and ConfigError for a place that is a folder, a price below 0, or a
    sweep among runs.
    """
    if out.is_dir():
        raise ConfigError(f"--out {out}: this is a folder; name a file, such as {out / 'report.html'}")
    if price is not None and not (price >= 0 and math.isfinite(price)):
        raise ConfigError(f"--price {price:g}: must be a number of at least 0")
    if not paths:
        raise ConfigError("report needs a run folder: veritune report RUN --out FILE.html; `veritune runs` lists them")
    text = render(page(paths, data, price))
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, text.encode())


def page(paths: Sequence[Path], data: Path | None, price: float | None) -> Page:
    """The page on what the paths are: a sweep, a run, or several runs."""
    if any(trials.is_sweep(path) for path in paths):
        if len(paths) > 1:
            raise ConfigError("a report is on one sweep, or on runs: name the sweep's folder alone")
        return swept(paths[0], price)
    return one(paths[0], data, price) if len(paths) == 1 else several(paths, data, price)


def swept(path: Path, price: float | None) -> Page:
    """The report on a sweep."""
    of = trials.read(path)
    sections = sweep.sections(of, price)
    return Page(path.resolve().name, f"{path} · a sweep · {run.now()}", [part for part in sections if part])


def one(path: Path, data: Path | None, price: float | None) -> Page:
    """The report on one run."""
    of = folder.read(path)
    sections = [
        run.head(of),
        run.what(of, data),
        run.training(of),
        run.validation(of),
        run.forgetting(of),
        *quality.sections(scored.load(of, data)),
        run.cost(of, price),
        run.reproduce(of, data),
    ]
    title = path.resolve().name
    return Page(title, f"{path} · {of.state()[0]} · {run.now()}", [part for part in sections if part])


def several(paths: Sequence[Path], data: Path | None, price: float | None) -> Page:
    """The report that compares runs with the first of them."""
    runs = [folder.read(path) for path in paths]
    sections = compare.sections(runs, data, price)
    return Page(f"{len(runs)} runs", f"compared with {paths[0]} · {run.now()}", [part for part in sections if part])


def render(page: Page) -> str:
    """A page as HTML. Every text on it is escaped, and its control characters made visible."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html").render(page=page, style=style, version=__version__)
