"""The records that a page begins with: a verdict, findings, what to do, facts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from typing import Literal

__all__ = ["Advice", "Finding", "Level", "Summary"]

Level = Literal["failure", "warning", "information", "good"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a page has found, as a sentence or two.

    Attributes:
        level: ``"failure"`` and ``"warning"`` as for events; ``"information"``, which asks for nothing; ``"good"``.
        text: The sentences.
    """

    level: Level
    text: str


@dataclass(frozen=True, slots=True)
class Advice:
    """Something to do, and where to read more.

    Attributes:
        text: The sentence.
        place: Where the documentation says more, such as ``"docs/monitor.md#not_finite"``.
    """

    text: str
    place: str

    @property
    def address(self) -> str | None:
        """Address of the place on the web, ``None`` where the package does not name its documentation."""
        base = _documentation()
        return (
            None if base is None else f"{base.rstrip('/')}/{self.place.removeprefix('docs/').replace('.md', '.html')}"
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """The beginning of a page.

    Attributes:
        verdict: Whether the run is healthy, in one sentence.
        findings: The worst first.
        advice: What to do.
        facts: Names and values of what was measured, when, by what.
    """

    verdict: Finding
    findings: tuple[Finding, ...] = ()
    advice: tuple[Advice, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@cache
def _documentation() -> str | None:
    """Return the address of the documentation that the installed package names."""
    try:
        urls = metadata("lightning-spectral").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    named = dict(url.partition(", ")[::2] for url in urls)
    address = named.get("Documentation")
    return address if address is not None and address.startswith("https://") else None
