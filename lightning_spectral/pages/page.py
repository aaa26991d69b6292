"""Pages of one self-contained file: charts, chart library and style inside, no access to a network."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_spectral.pages.summary import Summary
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
        title: Heading of the section.
        caption: Text that explains the charts.
        charts: Names of the charts.
        tables: Tables of numbers.
        unfolded: Whether the tables are open when the page is loaded.
    """

    title: str
    caption: str = ""
    charts: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    unfolded: bool = False


def check_installed() -> None:
    """Check that the packages for a page are installed.

    Raises:
        ModuleNotFoundError: The extra ``report`` is not installed.
    """
    try:
        import bokeh  # noqa: F401
        import jinja2  # noqa: F401
    except ModuleNotFoundError as error:
        message = f"a report needs {error.name}; type: pip install bokeh jinja2"
        raise ModuleNotFoundError(message, name=error.name) from error


def write_page(
    path: Path,
    title: str,
    subtitle: str,
    summary: Summary,
    sections: Sequence[Section],
    charts: Mapping[str, figure],
    *,
    reload: float | None = None,
) -> None:
    """Write a page. A crash leaves the old page or the complete new one.

    Args:
        path: The file.
        title: Title of the page.
        subtitle: The run or checkpoint that the page is about.
        summary: The beginning of the page.
        sections: The sections in order.
        charts: The charts by the names that the sections use.
        reload: Seconds after which the page loads itself again, ``None`` for never.
    """
    script, places = _bundle(charts)
    loader = _template().from_string("{% include 'loader.js' %}").render().strip()
    html = (
        _template()
        .get_template("page.html")
        .render(
            title=title,
            subtitle=subtitle,
            summary=summary,
            sections=sections,
            places=places,
            loader=loader,
            reload=reload,
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
    """Return one script with the chart library and the data of the charts, and the HTML place of each chart."""
    from bokeh.embed import components
    from bokeh.resources import Resources

    if not charts:
        return "", {}
    script, places = components(dict(charts), wrap_script=False)
    library = Resources(mode="inline", components=["bokeh"]).js_raw
    return "\n".join([*library, script]), places


def _hash(script: str) -> str:
    """Return the hash of a script for the content security policy, which lets no other script run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
