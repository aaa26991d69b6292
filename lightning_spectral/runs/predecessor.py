"""A file that exists where a run wants to write: the run continues it, or it is renamed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, get_args

from lightning_spectral.records import Linearization
from lightning_spectral.runs.durable import replace, set_aside
from lightning_spectral.runs.entries import FORMAT, VERSION, Line, entries, first_entry

__all__ = ["News", "Predecessor", "Superseded", "aside_names", "is_set_aside", "take_over"]

SAME = 1e-2  # two measurements of the same weights differ by at most this, relatively


@dataclass(frozen=True, slots=True)
class News:
    """A message about a file.

    Attributes:
        text: The message, without a full stop.
        grave: Whether something is wrong.
    """

    text: str
    grave: bool = False


class Superseded:
    """A second file with the lines of steps after the step that a run resumed at.

    Args:
        path: The second file.
        lines: The lines of the file, without the header.
    """

    def __init__(self, path: Path, lines: Iterable[Line]) -> None:
        self.path, self._size = path, path.stat().st_size
        found = (line.entry for line in lines if line.entry is not None)
        self._waiting = {entry["step"]: _norms(entry) for entry in found if "layers" in entry}
        self._stays = not self._waiting  # events alone are never measured again

    def see(self, measurement: Mapping[str, Any]) -> None:
        """Compare a new measurement with the old one of the same step. If they differ, the file stays for good."""
        before = self._waiting.pop(measurement["step"], None)
        if before is not None and not _close(before, _norms(measurement)):
            self._stays = True

    def tidy(self) -> None:
        """Remove the file if every step in it was measured again with the same result, and the file has not grown."""
        if self._stays or self._waiting:
            return
        self._stays = True
        with suppress(OSError):
            if self.path.stat().st_size == self._size:
                self.path.unlink()


@dataclass(frozen=True, slots=True)
class Predecessor:
    """The file that a run continues, if any.

    Attributes:
        source: The file that is continued, ``None`` for none.
        kept: The lines of that file up to the resumed step, without the header.
        superseded: The lines of later steps, which are in a second file now.
        news: Messages about the files.
    """

    source: Path | None = None
    kept: bytes = b""
    superseded: Superseded | None = None
    news: tuple[News, ...] = ()


def take_over(path: Path, header: Mapping[str, Any], resume_step: int | None) -> Predecessor:
    """Find the file that a run continues, and rename any other file in its place. Nothing is overwritten.

    Args:
        path: The file that the run wants to write.
        header: The description of the run: the linearization, and perhaps the name of the run.
        resume_step: Optimizer step at which the run resumes; ``None`` for a new run.

    Raises:
        OSError: A file cannot be read or renamed.
    """
    news = [told for told in (_clear(path, header, resume_step),) if told is not None]
    # The name that a file got when a run of another linearization took its place.
    before = path.with_stem(f"{path.stem}-{header['linearization']}")
    for source in (path, before):
        if resume_step is not None and source.is_file() and _goes_on(source, header):
            return _split(source, resume_step, news)
    return Predecessor(news=tuple(news))


def aside_names(path: Path, word: str) -> Iterator[str]:
    """Yield new names for a file that is renamed: ``spectral.damaged-1.jsonl`` and so on."""
    return (f"{path.stem}.{word}-{number}{path.suffix}" for number in count(1))


def is_set_aside(path: Path) -> bool:
    """Whether a file has a name of :func:`aside_names`."""
    return re.search(r"\.(damaged|earlier|from-\d+|newer|other)-\d+$", path.stem) is not None


def _clear(path: Path, header: Mapping[str, Any], resume_step: int | None) -> News | None:
    """Rename a file that is not continued, so that its name is free."""
    if not os.path.lexists(path):
        return None
    if (why := _unusable(path)) is not None:
        word, what = why
        aside = set_aside(path, aside_names(path, word))
        return News(f"{path} {what}. It is kept as {aside}, and a new file begins", grave=True)
    if resume_step is not None and _goes_on(path, header):
        return None
    linearization = (first_entry(path) or {})["linearization"]
    if linearization != header["linearization"]:
        other = path.with_stem(f"{path.stem}-{linearization}")
        aside = set_aside(path, chain([other.name], aside_names(other, "earlier")))
        return News(f"{path} is of linearization {linearization!r}. It is kept as {aside}, and a new file begins")
    aside = set_aside(path, aside_names(path, "earlier"))
    return News(f"{path} is of another run. It is kept as {aside}, and a new file begins")


def _unusable(path: Path) -> tuple[str, str] | None:
    """Return a word for the new name of a file that cannot belong to a run, and the reason; ``None`` if it can."""
    if not path.is_file():
        return "damaged", "is not a file"
    if path.stat().st_size == 0:
        return "damaged", "is empty"
    header = first_entry(path)
    if header is None or FORMAT not in header:
        return "damaged", "does not begin with the header of a spectral journal"
    if header[FORMAT] != VERSION:
        return "newer", f"is of format {str(header[FORMAT])[:20]!r}, this release writes format {VERSION}"
    if header.get("linearization") not in get_args(Linearization):
        return "damaged", "does not say its linearization"
    return None


def _goes_on(path: Path, header: Mapping[str, Any]) -> bool:
    """Whether a file has the same linearization and, if both headers name a run, the same run."""
    if _unusable(path) is not None:
        return False
    found = first_entry(path) or {}
    runs = {run for run in (found.get("run"), header.get("run")) if run}
    return found["linearization"] == header["linearization"] and len(runs) < 2


def _split(source: Path, resume_step: int, news: list[News]) -> Predecessor:
    """Divide a file at a step. Lines without a step stay, damaged lines too: a person may repair them by hand."""
    first, *lines = entries(source)
    torn = bool(lines) and lines[-1].torn
    lines = lines[:-1] if torn else lines
    later = [line for line in lines if _is_later(line, resume_step)]
    kept = [line for line in lines if not _is_later(line, resume_step)]
    if torn:
        news.append(News(f"the last line of {source} was torn by a crash and is left out"))
    news += [News(f"line {line.number} of {source} is damaged", grave=True) for line in kept if line.entry is None]
    superseded = _apart(source, first, later) if later else None
    if superseded is not None:
        news.append(News(f"lines of {source} after step {resume_step} are kept in {superseded.path}"))
    return Predecessor(source, _joined(kept), superseded, tuple(news))


def _is_later(line: Line, resume_step: int) -> bool:
    step = None if line.entry is None else line.entry.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and step > resume_step


def _apart(source: Path, header: Line, later: Sequence[Line]) -> Superseded:
    first = min(line.entry["step"] for line in later if line.entry is not None)
    for name in aside_names(source, f"from-{first}"):
        path = source.with_name(name)
        try:
            replace(path, _joined([header, *later]), new=True)
        except FileExistsError:
            continue
        return Superseded(path, later)
    raise AssertionError("names never end")


def _joined(lines: Iterable[Line]) -> bytes:
    return b"".join(line.raw if line.raw.endswith(b"\n") else line.raw + b"\n" for line in lines)


def _norms(measurement: Mapping[str, Any]) -> list[Any]:
    """Return the norms of every block. The file may hold any JSON."""
    layers = measurement["layers"]
    layers = [layer if isinstance(layer, dict) else {} for layer in layers] if isinstance(layers, list) else []
    return [layer.get(name) for layer in layers for name in ("mlp_norm", "attention_norm")]


def _close(before: Sequence[Any], now: Sequence[Any]) -> bool:
    return len(before) == len(now) and all(map(_same, before, now))


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, int | float) and isinstance(two, int | float):
        return math.isclose(one, two, rel_tol=SAME)
    return one is two is None
