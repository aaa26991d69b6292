"""How the documentation is built; ``make docs`` runs it, with warnings as errors and without a network."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning_spectral

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "_ext"))
sys.path.append(str(ROOT / "tests" / "support"))  # the zoo, from which the page of architectures is made

project = "lightning_spectral"
author = project_copyright = "The lightning_spectral authors"
version = release = lightning_spectral.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
exclude_patterns = ["_build", "_ext", "_generated"]

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
