"""A run, read from its file ``spectral.jsonl`` into one frozen record.

The run may still be going or may have been killed, and the file may come from somebody else. So every line is checked.
A line that this package would not write is left out and listed in ``damaged``. An entry of an unknown kind is skipped:
a later release may have written it.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.display import heatmap_figure
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import (
    Event,
    Forecast,
    FunctionalMeasurement,
    LayerMeasurement,
    Measurement,
    OutputMeasurement,
    WeightSignals,
)
from lightning_spectral.records.events import Level
from lightning_spectral.records.frames import dataframe
from lightning_spectral.records.measurements import OutputKind
from lightning_spectral.records.values import listed, number, one_of, text, whole
from lightning_spectral.runs.entries import Line, entries

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["History", "history_of", "in_order"]

MOST = 2**53  # a float, and so a chart, counts exactly only up to here
LAST_DATE = 253_370_764_800  # 9999-01-01, in seconds since 1970
MOST_BLOCKS = 2**12  # a picture has one row per block


@dataclass(frozen=True, slots=True, repr=False)
class History:
    """A run: its description, its measurements, its events and the actions of its controller.

    Attributes:
        header: Settings of the run: linearization, zone, interval, settings of the controller, blocks. Empty if the
            first line is damaged.
        measurements: The measurements in the order of their steps. Of two at one step, the later line counts.
        events: The events in the order of the file.
        actions: The actions of the controller in the order of the file, as plain values.
        torn: Whether the last line is incomplete, as it may be while the run writes it.
        damaged: For every other unreadable line, by its number, the reason.
        times: When each measurement was written, by its step, in seconds since 1970 (UTC). Runs of early releases have
            none.

    Example:
        >>> run = History.read("runs/gpt/version_0/spectral.jsonl")
        >>> run
        History(5 measurements of 3 blocks, steps 0 to 20)
        >>> run.values("ratio").shape
        (3, 5)
    """

    header: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    events: tuple[Event, ...] = ()
    actions: tuple[Mapping[str, Any], ...] = ()
    torn: bool = False
    damaged: Mapping[int, str] = field(default_factory=dict)
    times: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> History:
        """Read the file of a run.

        Args:
            path: A ``spectral.jsonl``, or the folder that it is in.

        Raises:
            ConfigurationError: The file is no journal of this package, or has measurements of several linearizations.
            OSError: The file cannot be read.
        """
        place = Path(path)
        return history_of(entries(place / "spectral.jsonl" if place.is_dir() else place))

    @property
    def steps(self) -> tuple[int, ...]:
        """Optimizer step of every measurement."""
        return tuple(measurement.step for measurement in self.measurements)

    def values(self, quantity: str) -> NDArray[np.float64]:
        """Return one quantity of every block in every measurement.

        Args:
            quantity: Name of an attribute of :class:`~lightning_spectral.records.LayerMeasurement`.

        Returns:
            Shape ``(blocks, measurements)``, with one row per index up to the largest; NaN for a missing value.
        """
        blocks = 1 + max((layer.index for measurement in self.measurements for layer in measurement), default=-1)
        values = np.full((blocks, len(self.measurements)), np.nan)
        for column, measurement in enumerate(self.measurements):
            for layer in measurement:
                if (value := getattr(layer, quantity)) is not None:
                    values[layer.index, column] = value
        return values

    def to_dataframe(self) -> DataFrame:
        """Return a ``pandas.DataFrame`` with a row for every block of every measurement.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return dataframe([{"step": item.step, **layer.row()} for item in self.measurements for layer in item])

    def __repr__(self) -> str:
        """Return the number of measurements and blocks, and the range of steps."""
        if not self.measurements:
            return "History(no measurements)"
        count, blocks, steps = len(self.measurements), len(self.measurements[-1].layers), self.steps
        return f"History({count} measurements of {blocks} blocks, steps {steps[0]} to {steps[-1]})"

    def _repr_html_(self) -> str:
        """Return the same and the last measurement as HTML, for a notebook."""
        last = self.measurements[-1]._repr_html_() if self.measurements else ""
        return f"<p>{html.escape(repr(self))}</p>{last}"

    def plot_heatmap(self) -> Figure:
        """Draw ln ρ of every block (upwards) at every measured step (to the right).

        A block is blue if attention dominates, red if the MLP dominates, white if both are equal, and hatched if it has
        no ratio. Lines enclose ratios outside the safe zone, if the linearization has one.

        Returns:
            A figure outside of pyplot's global state. Save it with ``figure.savefig(path)``.

        Raises:
            ConfigurationError: There is no measurement.
            ModuleNotFoundError: matplotlib is not installed.
        """
        if not self.measurements:
            raise ConfigurationError("a heatmap needs at least one measurement; found none")
        last = self.measurements[-1]
        zone = last.safe_zone if last.has_zone else None
        return heatmap_figure(self.values("log_ratio"), self.steps, last.linearization, zone)


def history_of(lines: Iterable[Line]) -> History:
    """Make the record of a run from the lines of its file.

    Args:
        lines: The lines, the header first.

    Raises:
        ConfigurationError: The measurements are of several linearizations.
    """
    header: Mapping[str, Any] = {}
    measurements: list[Measurement] = []
    events: list[Event] = []
    actions: list[Mapping[str, Any]] = []
    damaged: dict[int, str] = {}
    times: dict[int, float] = {}
    torn = False
    for line in lines:
        header = header or line.header
        entry, torn = line.entry or {}, line.torn
        if line.entry is None and not torn:
            damaged[line.number] = "it is not a JSON object"
        try:
            if "layers" in entry:
                measurements.append(_measurement(entry))
                if (moment := _date(entry.get("time"))) is not None:
                    times[measurements[-1].step] = moment
            elif "level" in entry:
                events.append(_event(entry))
            elif "action" in entry:
                actions.append(_action(entry))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            damaged[line.number] = _shortened(error)
    return History(header, in_order(measurements), tuple(events), tuple(actions), torn, damaged, times)


def in_order(measurements: Sequence[Measurement]) -> tuple[Measurement, ...]:
    """Sort measurements by step. Of two at one step, the later one counts.

    Raises:
        ConfigurationError: The measurements are of different linearizations.
    """
    linearizations = sorted({measurement.linearization for measurement in measurements})
    if len(linearizations) > 1:
        raise ConfigurationError(f"a history has one linearization; found {', '.join(linearizations)}")
    by_step = {measurement.step: measurement for measurement in measurements}
    return tuple(by_step[step] for step in sorted(by_step))


_EARLIER_LEVELS = {"info": "note", "alarm": "failure"}  # as they were called at first


def _measurement(entry: Mapping[str, Any]) -> Measurement:
    """Rebuild a measurement from the values of :meth:`Measurement.to_dict`."""
    low, high = map(_size, listed(entry["safe_zone"]))
    if not 0 < low < high:
        raise ValueError(f"the safe zone is ({low}, {high})")
    layers = tuple(map(_layer, listed(entry["layers"])))
    step, seconds = _count(entry["step"]), _optional(_size)(entry["seconds"]) or 0.0
    linearization: Any = text(entry["linearization"])
    adapters: Any = text(entry.get("adapters", "sum"))
    output = None if entry.get("output") is None else _output(entry["output"])
    return Measurement(step, linearization, layers, (low, high), seconds, adapters, output=output)


def _output(entry: Mapping[str, Any]) -> OutputMeasurement:
    names = ("sample_residual", "batch_residual", "pooled_residual")
    few, batch, pooled = (_optional(number)(entry.get(name)) for name in names)
    kind: OutputKind = one_of(entry["kind"], get_args(OutputKind))
    return OutputMeasurement(few, batch, kind, _count(entry["width"]), bool(entry["finite"]), pooled)


def _layer(entry: Mapping[str, Any]) -> LayerMeasurement:
    values = {name: read(entry[name]) for name, read in _LAYER.items() if name in entry}
    if values["index"] >= MOST_BLOCKS:
        raise ValueError(f"block {values['index']}")
    return LayerMeasurement(**values)


def _functional(entry: Mapping[str, Any]) -> FunctionalMeasurement:
    values = {item.name: entry[item.name] for item in fields(FunctionalMeasurement) if item.name in entry}
    finite_differences = bool(values.pop("finite_differences", False))
    numbers = {name: _optional(number)(value) for name, value in values.items()}
    return FunctionalMeasurement(**numbers, finite_differences=finite_differences)


def _weights(entry: Mapping[str, Any]) -> WeightSignals:
    values = {item.name: entry[item.name] for item in fields(WeightSignals) if entry.get(item.name) is not None}
    read = {name: bool(value) if name.endswith("_moved") else _optional(_size)(value) for name, value in values.items()}
    return WeightSignals(**read)


def _event(entry: Mapping[str, Any]) -> Event:
    named = _EARLIER_LEVELS.get(entry["level"], entry["level"])
    level = one_of(named, get_args(Level))
    blocks, coming = tuple(map(_count, listed(entry["blocks"]))), entry.get("forecast")
    forecast = None if coming is None else Forecast(**{name: _moment(value) for name, value in coming.items()})
    since, message = _count(entry["since"]), text(entry["message"])
    branch, advice = entry.get("branch"), tuple(map(text, listed(entry.get("advice", ()))))
    values = {text(name): number(value) for name, value in dict(entry.get("values") or {}).items() if value is not None}
    return Event(
        level,
        _count(entry["step"]),
        since,
        blocks,
        message,
        forecast,
        name=text(entry.get("name", "")),
        branch=None if branch is None else text(branch),
        values=values,
        advice=advice,
    )


def _action(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, read in _ACTION.items():
        read(entry[name])
    return entry


def _moment(value: Any) -> float:
    """Read a step in the future. JSON has no infinity: ``null`` stands for never."""
    return math.inf if value is None else number(value)


def _date(value: Any) -> float | None:
    """Read seconds since 1970. A wrong date is no reason to leave out a measurement."""
    return float(value) if isinstance(value, int | float) and 0 <= value <= LAST_DATE else None


def _size(value: Any) -> float:
    return number(value, least=0.0)


def _count(value: Any) -> int:
    return whole(value, 0, MOST - 1)


def _expert(value: Any) -> int | str:
    return value if isinstance(value, str) else _count(value)


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make a reader that returns ``None`` for a missing value, and for the NaN or infinity of a run that diverged."""
    return lambda value: None if value is None or _is_not_finite(value) else read(value)


def _scale(value: Any) -> float:
    return math.nan if value is None or _is_not_finite(value) else _size(value)


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


_LAYER: Mapping[str, Callable[[Any], Any]] = {
    "index": _count,
    "name": text,
    "mlp_norm": _optional(_size),
    "attention_norm": _optional(_size),
    "mlp_scale": _scale,
    "attention_scale": _scale,
    "mlp_expert": _optional(_expert),
    "mlp_reason": _optional(text),
    "attention_reason": _optional(text),
    "error_bound": _optional(_size),
    "doubt": _optional(text),
    "functional": _optional(_functional),
    "token_residual": _optional(_size),
    "typical_token_residual": _optional(_size),
    "effective_rank": _optional(_size),
    "sample_residual": _optional(_size),
    "stream_rms": _optional(_size),
    "stream_finite": bool,
    "weights": _optional(_weights),
}
_ACTION: Mapping[str, Callable[[Any], Any]] = {
    "step": _count,
    "action": text,
    "block": _count,
    "ratio": _optional(_size),
    "mlp_log_change": number,
    "attention_log_change": number,
    "reason": text,
}


def _shortened(error: Exception) -> str:
    """Return an error as one short line of printable ASCII: its text may quote the file."""
    text = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 120 else f"{text[:60]}...{text[-60:]}"
