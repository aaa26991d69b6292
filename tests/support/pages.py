"""The pages of the documentation and the README, and their fenced blocks.

A reader sees which blocks the tests run: all of them, but those whose first line is a comment that begins with
``# Not run by the tests:`` and gives the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "# Not run by the tests: "


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: The file.
        line: Number of its first line of content, from 1.
        language: The first word behind the fence.
        text: What it holds.
        output: The ``text`` block that follows it directly, without a word between them: what it prints.
    """

    page: Path
    line: int
    language: str
    text: str
    output: str | None = None

    @property
    def is_run(self) -> bool:
        """Whether the tests run it."""
        return not self.text.startswith(NOT_RUN)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return list(_with_outputs(page))


def _with_outputs(page: Path) -> Iterator[Block]:
    fences = [token for token in MarkdownIt().parse(page.read_text(encoding="utf-8")) if token.level == 0]
    fences = [token for token in fences if not token.type.endswith("_close")]
    taken = False
    for token, following in zip(fences, [*fences[1:], None], strict=True):
        if taken or token.type != "fence" or token.map is None:
            taken = False
            continue
        language = token.info.split()[0] if token.info else ""
        taken = (
            language in ("python", "bash")
            and following is not None
            and following.type == "fence"
            and following.info == "text"
        )
        output = following.content if taken and following is not None else None
        yield Block(page, token.map[0] + 2, language, token.content, output)
