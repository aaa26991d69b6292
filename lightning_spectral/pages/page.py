"""A page that needs nothing but itself: charts, their library and style in one file, and no way out to a network."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_spectral.pages.tables import Table
from lightning_spectral.runs.durable import replace

if TYPE_CHECKING:
    from bokeh.plotting import figure
    from jinja2 import Environment

__all__ = ["Section", "check_installed", "write_page"]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page.

    Attributes:
        title: Its heading.
        caption: What its charts show, in words.
        charts: Names of its charts.
        tables: Its numbers.
        unfolded: Whether they are shown at once.
    """

    title: str
    caption: str = ""
    charts: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    unfolded: bool = False


def check_installed() -> None:
    """Find out before the work whether a page can be made.

    Raises:
        ModuleNotFoundError: The extra ``report`` is not installed.
    """
    try:
        import bokeh  # noqa: F401
        import jinja2  # noqa: F401
    except ModuleNotFoundError as error:
        message = f"a report needs {error.name}; type: pip install 'lightning-spectral[report]'"
        raise ModuleNotFoundError(message, name=error.name) from error


def write_page(
    path: Path,
    title: str,
    subtitle: str,
    story: Sequence[str],
    sections: Sequence[Section],
    charts: Mapping[str, figure],
) -> None:
    """Write a page; a crash leaves either the old or the new one.

    Args:
        path: The file.
        title: Of the page.
        subtitle: What the page is about.
        story: The summary, in sentences.
        sections: In order.
        charts: By the name under which a section asks for them.
    """
    script, places = _bundle(charts)
    loader = _template().from_string("{% include 'loader.js' %}").render().strip()
    html = (
        _template()
        .get_template("page.html")
        .render(
            title=title,
            subtitle=subtitle,
            story=story,
            sections=sections,
            places=places,
            loader=loader,
            packed=base64.b64encode(gzip.compress(script.encode(), 6, mtime=0)).decode(),
            allowed=f"{_hash(loader)} {_hash(script)}",
        )
    )
    replace(path, html.encode("utf-8", "replace"))


def _template() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("lightning_spectral.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _bundle(charts: Mapping[str, figure]) -> tuple[str, Mapping[str, str]]:
    """Return the chart library with the charts' data behind it, as one script, and the places of the charts."""
    from bokeh.embed import components
    from bokeh.resources import Resources

    if not charts:
        return "", {}
    script, places = components(dict(charts), wrap_script=False)
    library = Resources(mode="inline", components=["bokeh"]).js_raw
    return "\n".join([*library, script]), places


def _hash(script: str) -> str:
    """Return what a content security policy calls a script: no other runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
