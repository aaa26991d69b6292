"""How the documentation is built; ``make docs`` runs it, with warnings as errors and without a network."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import lightning_spectral

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

import topics  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "lightning_spectral"
author = project_copyright = "The lightning_spectral authors"
version = release = lightning_spectral.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Names of other projects are not looked up, because that would take a network, and inner rooms have no page.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|torchmetrics|lightning|matplotlib|numpy|collections|typing|pathlib|os)\..*"),
    (
        r"py:.*",
        r"(Tensor|nn\.Module|Trainer|LightningModule|Figure|DataFrame|Event|OnAlarm|OutputKind|Solver|SolverChoice)",
    ),
    (r"py:.*", r"lightning_spectral\.(linalg|discovery|measuring|analysis\.covariance|scales\.fuse)(\..*)?"),
]

html_theme = "furo"
html_title = "lightning_spectral"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style = "friendly"
pygments_dark_style = "monokai"


def setup(app: Sphinx) -> None:
    """Give the site what a repository's browser cannot show."""
    app.connect("source-read", for_the_site)


def for_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Add the tree of pages to the index, docstrings to the reference; take in the files beside the documentation."""
    if page == "index":
        source[0] += "\n".join(trees(source[0]))
    elif page == "reference":
        source[0] = topics.between(source[0], "reference", "\n".join(topics.for_the_site()))
    elif page in ("changelog", "contributing"):
        source[0] = (ROOT / f"{page.upper()}.md").read_text(encoding="utf-8")


def trees(index: str) -> Iterator[str]:
    """One hidden tree for each heading of the index with a list of pages."""
    for section in index.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        if pages := re.findall(r"^\* \[[^\]]+\]\((\w+)\.md\)", body, re.MULTILINE):
            yield "\n".join(["", "```{toctree}", f":caption: {heading}", ":hidden:", "", *pages, "```", ""])
