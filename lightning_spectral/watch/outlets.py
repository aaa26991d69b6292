"""Where a measurement goes: whatever the loop has, the journal, the picture, the console.

Each of them fails alone: it is told once, and the others get what is theirs. Nothing here is raised, whatever
``on_error`` says, because most of it happens in one process of several, and the others would wait for it.
"""

from __future__ import annotations

import io
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lightning_spectral.alarms import Event
from lightning_spectral.alarms.messages import ON_RATIOS
from lightning_spectral.control.actions import described_action
from lightning_spectral.control.law import Action
from lightning_spectral.pages import one_screen
from lightning_spectral.records import Measurement
from lightning_spectral.runs.durable import replace
from lightning_spectral.runs.history import history_of
from lightning_spectral.runs.journal import Journal
from lightning_spectral.runs.series import Series
from lightning_spectral.watch.telling import inform, is_first_process, warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Folder", "Outlet", "Outlets"]

PAUSE = 300.0  # seconds between two pictures of a run that is going, at least
SHARE = 0.01  # of the time of the run that drawing them may take

P = ParamSpec("P")
R = TypeVar("R")


class Outlet:
    """A place where values go. Every method may fail, which is told once and does no harm to other places."""

    @property
    def name(self) -> str:
        """What the place is called in a message."""
        return type(self).__name__

    def folder(self) -> Path | None:
        """Return the folder of the run on this machine, ``None`` where the place has none."""
        return None

    def publish(self, values: Mapping[str, float]) -> None:
        """Take what is true of the weights now, for those who decide by it. Called in all processes."""

    def log(self, values: dict[str, float], index: int) -> None:
        """Take a measurement, once, behind those before it. The values are the place's own."""

    def show(self, values: Mapping[str, float]) -> None:
        """Take what is new at the end of a batch."""

    def announce(self, event: Event, key: str, index: int) -> None:
        """Take a warning or a failure."""

    def picture(self, figure: Figure, key: str, index: int) -> None:
        """Take the picture of the run."""


class Folder(Outlet):
    """A folder, which gets the journal and the picture.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def folder(self) -> Path:
        """Return the folder."""
        return self._path


class Outlets:
    """The outlets of one run.

    Args:
        speaker: Who speaks to the user.
        prefix: First part of every key and file name.
        places: Returns the places, which may change in a run.
        verbose: Whether the console hears of every crossing and drift of a ratio.
    """

    def __init__(
        self, speaker: str, prefix: str, places: Callable[[], Sequence[Outlet]], *, verbose: bool = False
    ) -> None:
        self.speaker, self.prefix, self._find, self._verbose = speaker, prefix, places, verbose
        self._journal: Journal | None = None
        self._is_old = False  # what is shown is of an older measurement
        self._failed: set[str] = set()
        self._untold: list[tuple[str, bool]] = []  # texts, and whether they are grave
        self._grave: list[str] = []  # the failures and warnings of this run, in a few words each
        self._next_picture = time.monotonic() + PAUSE

    def open(self, header: Mapping[str, Any], resume_step: int | None) -> None:
        """Begin the journal, or go on with it, where this process writes one (see :class:`Journal`)."""
        places = self._places() if is_first_process() else ()
        if places:
            folders = (self._try(f"asking {place.name} for its folder", place.folder) for place in places)
            folder = next((folder for folder in folders if folder is not None), None)
            path = None if folder is None else folder / f"{self.prefix}.jsonl"
            self._journal = self._try("beginning the journal", Journal, path, header, resume_step=resume_step)
        self._tell()

    @property
    def has_folder(self) -> bool:
        """Whether this process writes files."""
        return self._journal is not None and self._journal.path is not None

    def write(
        self, series: Series, measurement: Measurement, events: Sequence[Event], actions: Sequence[Action]
    ) -> None:
        """Write a measurement, its logged values, what is new in it and the actions after it everywhere."""
        self._is_old = True
        if self._journal is not None:
            self._try("writing the journal", _append, self._journal, measurement, events, actions)
        for place in self._places():
            self._try(f"publishing to {place.name}", place.publish, series.values)
            # A copy: a logger may change it.
            self._try(f"logging to {place.name}", place.log, dict(series.values), series.batches)
            for event in events:
                if event.level != "note" and is_first_process():
                    what = f"sending events to {place.name}"
                    self._try(what, place.announce, event, f"{self.prefix}/events", series.batches)
        said = [event for event in events if self._verbose or event.name not in ON_RATIOS]
        self._untold += [(f"{self.speaker}, {event.message}", event.level != "note") for event in said]
        self._grave += [f"{event.level} {event.name} at step {event.step}" for event in events if event.level != "note"]
        self._draw_now_and_then(series.batches)
        self._tell()

    def publish(self, values: Mapping[str, float]) -> None:
        """Put values where others look for them. On all ranks: reading them may be a collective."""
        for place in self._places():
            self._try(f"publishing to {place.name}", place.publish, values)
        self._tell()

    def rescue(self, failure: Event, index: int) -> Path | None:
        """Make a folder for what is kept of a run that fails, with its journal so far; ``None`` where there is none.

        Args:
            failure: What has failed; ``failure.json`` gets it.
            index: How many batches the run has had.
        """
        if self._journal is None or self._journal.path is None:
            return None
        folder = self._journal.path.parent / f"{self.prefix}-failure-{failure.step}"
        self._try("keeping what has failed", _keep, folder, self._journal, failure, index)
        self._tell()
        return folder

    def show(self, values: Mapping[str, float]) -> None:
        """Show new values between batches."""
        if not self._is_old:
            return
        self._is_old = False
        for place in self._places():
            self._try(f"showing in {place.name}", place.show, values)
        self._tell()

    def finish(self, measurement: Measurement | None, index: int) -> None:
        """Write what the journal could not write, print the last measurement and what was told, draw the run.

        Args:
            measurement: The last measurement, ``None`` where there was none.
            index: Where loggers put the picture.
        """
        if self._journal is not None:
            self._try("writing the journal", self._journal.close)
        text = None if measurement is None else self._try("printing", one_screen, measurement)
        self._untold += [] if text is None else [(text, False)]
        if self._grave:  # they were told hours ago, between lines of others
            self._untold.append((f"{self.speaker}: told in this run: {', '.join(self._grave)}", False))
            self._grave = []
        if self._journal is not None and self._journal.path is not None and measurement is not None:
            self._untold.append((f"{self.speaker}: {_whereabouts(self._journal.path)}", False))
        self._draw(index)
        self._tell()

    def _draw_now_and_then(self, index: int) -> None:
        """Draw the run so far, if the last picture is some minutes old: it takes as long as the run is long."""
        if (began := time.monotonic()) < self._next_picture:
            return
        self._draw(index)
        now = time.monotonic()
        self._next_picture = now + max(PAUSE, (now - began) / SHARE)

    def _draw(self, index: int) -> None:
        figure = None if self._journal is None else self._try("drawing", self._figure, self._journal)
        if figure is None or self._journal is None:
            return
        if self._journal.path is not None:
            self._try("drawing", _save, figure, self._journal.path.with_suffix(".png"))
        for place in self._places():
            what = f"sending the picture to {place.name}"
            self._try(what, place.picture, figure, f"{self.prefix}/heatmap", index)

    def _places(self) -> Sequence[Outlet]:
        return self._try("finding the loggers", self._find) or ()

    def _figure(self, journal: Journal) -> Figure | None:
        history = history_of(journal.lines())
        if not history.measurements:  # all of them have failed
            return None
        try:
            return history.plot_heatmap()
        except ModuleNotFoundError as error:
            if "no heatmap" not in self._failed:
                self._failed.add("no heatmap")
                self._untold.append((f"{self.speaker}: no heatmap; {error}", False))
            return None

    def _try(self, what: str, action: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Do one thing that may fail, and is told then, the first time."""
        try:
            return action(*args, **kwargs)
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                why = f"{type(error).__name__}: {error}"
                self._untold.append((f"{self.speaker} failed in {what} ({why}); training goes on", True))
            return None

    def _tell(self) -> None:
        """Say what is to be said, behind all else: where warnings are errors, the first one raises."""
        news = () if self._journal is None else self._journal.take_news()
        told = [(f"{self.speaker}: {item.text}", item.grave) for item in news] + self._untold
        self._untold = []
        for text, grave in told:
            (warn if grave else inform)(text)


def _append(journal: Journal, measurement: Measurement, events: Sequence[Event], actions: Sequence[Action]) -> None:
    told = [asdict(event) for event in events]
    journal.append(measurement, told + [described_action(action, measurement) for action in actions])


def _keep(folder: Path, journal: Journal, failure: Event, index: int) -> None:
    assert journal.path is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / journal.path.name).write_bytes(b"".join(line.raw for line in journal.lines()))
    (folder / "failure.json").write_text(json.dumps({**asdict(failure), "batch": index}, indent=2), encoding="utf-8")


def _whereabouts(journal: Path) -> str:
    """Say where the files of a run are, and what to type to see a page of them."""
    named = journal.parent if journal.name == "spectral.jsonl" else journal
    command = f"lightning-spectral report {shlex.quote(str(named))}"
    return f"files are in {journal.parent}, and this makes a page of them:\n{command}"


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace(path, picture.getvalue())
