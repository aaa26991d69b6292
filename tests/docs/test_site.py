"""The documentation builds without a warning, has a place for every public name, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, ROOT
from sphinx.util.inventory import InventoryFile

import lightning_spectral
from lightning_spectral import tokens


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, as ``make docs`` builds them."""
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--keep-going",
        "--nitpicky",
        "-q",
        "docs",
        str(out),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_every_public_name_has_its_place(site: Path):
    """Exactly once, those of the public modules too; nothing that is gone."""
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    roles = ("function", "class", "exception")
    found = {name for role in roles for name in inventory.data.get(f"py:{role}", {})}
    public = {f"lightning_spectral.{name}" for name in lightning_spectral.__all__}
    shown = {name for name in found if name.count(".") == 1}
    assert shown == public
    rooms = (lightning_spectral.analysis, lightning_spectral.errors, lightning_spectral.metrics)
    assert {f"{room.__name__}.{name}" for room in rooms for name in room.__all__} - found <= {
        "lightning_spectral.errors.SpectralError"  # at the door
    }
    pure = {f"lightning_spectral.tokens.{name}" for name in tokens.__all__ if callable(getattr(tokens, name))}
    assert pure - found <= {"lightning_spectral.tokens.Power"}  # a type alias


def test_the_site_has_what_a_browser_of_the_repository_cannot_show(site: Path):
    """The pages of the index as a tree, the files beside the documentation, and every docstring."""
    page = {name: (site / f"{name}.html").read_text(encoding="utf-8") for name in ("index", "changelog", "reference")}
    assert {f'href="{name.stem}.html"' for name in (ROOT / "docs").glob("*.md") if name.stem != "index"} <= set(
        re.findall(r'href="\w+\.html"', page["index"])
    )
    assert "Unreleased" in page["changelog"]
    assert "Raises" in page["reference"]


def test_reading_takes_no_network(site: Path):
    """No page loads anything from elsewhere: no script, style, font or picture."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"((?:https?:)?//[^\"]+)\"", text)
        assert not loaded, (page.name, loaded)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path):
    """Also on pages that are not part of the site, and to files beside it."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target or path == "":
            continue
        linked = (page.parent / path).resolve()
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(title) for title in titles}, target


def slug(title: str) -> str:
    """The anchor of a heading, on the site as in a repository's browser."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
