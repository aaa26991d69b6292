"""Tables of the numbers behind the charts, for readers who cannot see charts or prefer numbers."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_spectral.pages.stays import Stay, branch_that_moved
from lightning_spectral.pages.words import clear, clear_name, zone_of
from lightning_spectral.records import Event, LayerMeasurement, Measurement
from lightning_spectral.runs.entries import FORMAT
from lightning_spectral.runs.history import History

__all__ = [
    "MISSING",
    "Table",
    "action_table",
    "block_table",
    "comparison_table",
    "event_table",
    "norms_table",
    "number",
    "series_table",
    "settings",
]

MISSING = "–"
ROWS = 2000  # rows of a list of events; nobody reads more


@dataclass(frozen=True, slots=True)
class Table:
    """Text in rows.

    Attributes:
        title: Title of the table.
        head: Title of every column.
        rows: One text per column.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns have only numbers and dashes for missing ones, and so are aligned right."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.head)
        return tuple(all(map(_is_numeric, column)) and set(column) != {MISSING} for column in columns)


def series_table(history: History, quantities: Mapping[str, str]) -> Table:
    """Return the first, smallest, largest and last value of some quantities, for every block."""
    names = _names(history)
    head = [f"{label}, {which}" for label in quantities.values() for which in ("first", "smallest", "largest", "last")]
    columns = [history.values(quantity) for quantity in quantities]
    rows = [
        (str(block), names[block], *(text for values in columns for text in _extremes(values[block])))
        for block in sorted(names)
    ]
    return Table(f"Values of every block: {', '.join(quantities.values())}", ("block", "name", *head), tuple(rows))


def _names(history: History) -> dict[int, str]:
    return {layer.index: clear_name(layer.name) for measurement in history.measurements for layer in measurement}


def _extremes(series: Any) -> Iterator[str]:
    seen = series[np.isfinite(series)]
    values = (seen[0], seen.min(), seen.max(), seen[-1]) if seen.size else (None,) * 4
    return map(number, values)


def norms_table(measurement: Measurement, outside: Sequence[Stay] = ()) -> Table:
    """Return one measurement, one row per block.

    Args:
        measurement: The measurement.
        outside: The blocks that are outside the safe zone; adds since when and by which branch.
    """
    zone = zone_of(measurement)
    stay_of = {stay.index: stay for stay in outside}
    more = ("outside", "moved by") if outside else ()
    rows = []
    for layer in measurement:
        norms = [number(value) for value in (layer.mlp_norm, layer.attention_norm, layer.ratio)]
        stay = stay_of.get(layer.index)
        told = ("", "") if stay is None else (f"{stay.when}, {stay.course}", branch_that_moved(stay))
        row = (str(layer.index), clear_name(layer.name), *norms, *(told if outside else ()), _note(layer, zone))
        rows.append(row)
    return Table("Every block", ("block", "name", "‖MLP‖₂", "‖attention‖₂", "ρ", *more, "note"), tuple(rows))


def comparison_table(before: Measurement, after: Measurement) -> Table:
    """Return two measurements of the same blocks, one row per block."""
    names = {"mlp_norm": "‖MLP‖₂", "attention_norm": "‖attention‖₂", "ratio": "ρ"}
    head = [f"{label}, {which}" for label in names.values() for which in ("before", "after")]
    rows = []
    for one, two in zip(before, after, strict=True):
        change = None if one.log_ratio is None or two.log_ratio is None else two.log_ratio - one.log_ratio
        values = [number(getattr(layer, name)) for name in names for layer in (one, two)]
        rows.append((str(two.index), clear_name(two.name), *values, number(change)))
    return Table("Every block", ("block", "name", *head, "change of ln ρ"), tuple(rows))


def _note(layer: LayerMeasurement, zone: tuple[float, float] | None) -> str:
    if layer.reason is not None:
        return clear(" ".join(layer.reason.split()), 300)
    if zone is None or layer.ratio is None or zone[0] < layer.ratio < zone[1]:
        return ""
    return "above the safe zone" if layer.ratio >= zone[1] else "below the safe zone"


def event_table(events: Sequence[Event]) -> Table:
    """Return events, the latest first.

    Args:
        events: In the order of their steps, with messages for a table (see :mod:`~lightning_spectral.pages.timeline`).
    """
    rows = [(f"{event.step:,}", event.level, event.message) for event in reversed(events)]
    title = "Events" if len(rows) <= ROWS else f"Events, the last {ROWS:,} of {len(rows):,}"
    return Table(title, ("step", "level", "what happened"), tuple(rows[:ROWS]))


def action_table(history: History) -> Table:
    """Return the total of the controller's actions on each block, over the whole run."""
    acted: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for action in history.actions:
        acted[action["block"]].append(action)
    names = _names(history)
    rows = [
        (
            str(block),
            names.get(block, ""),
            str(sum(action["action"] == "rescale" for action in actions)),
            str(sum(action["action"] == "hold" for action in actions)),
            number(math.exp(sum(action["mlp_log_change"] for action in actions))),
            number(math.exp(sum(action["attention_log_change"] for action in actions))),
            clear(actions[-1]["reason"], 200),
        )
        for block, actions in sorted(acted.items())
    ]
    head = ("block", "name", "moved", "held", "MLP scale times", "attention scale times", "last reason")
    return Table("Actions of the controller, by block", head, tuple(rows))


def block_table(header: Mapping[str, Any]) -> tuple[Table, ...]:
    """Return the blocks that the run found; no table if the header does not list them."""
    blocks = header.get("blocks")
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        return ()
    keys = ("index", "name", "attention", "mlp", "verified")
    rows = tuple(tuple(_plain(block.get(key)) for key in keys) for block in blocks)
    return (Table("Blocks and their branches", ("block", "name", "attention", "MLP", "verified"), rows),)


def settings(header: Mapping[str, Any]) -> Table:
    """Return the settings of a run and of its controller."""
    told_elsewhere = ("blocks", "file", "model", "versions")
    kept = {name: value for name, value in header.items() if name not in told_elsewhere}
    rows = tuple((clear(name), _plain(value)) for name, value in _flat(kept))
    return Table("Settings", ("setting", "value"), rows)


def _flat(header: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in header.items():
        if name == FORMAT:
            yield "format of the file", value
        elif isinstance(value, dict):
            yield from ((f"{name}.{inner}", what) for inner, what in value.items())
        else:
            yield name, value


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: MISSING, True: "yes", False: "no"}[value]
    if isinstance(value, list):
        return clear(", ".join(map(_plain, value[:20])), 300)
    return clear(str(value), 300)


def _is_numeric(text: str) -> bool:
    return text == MISSING or re.fullmatch(r"[×−+-]?[\d,.]+(e[−+-]?\d+)?", text) is not None


def number(value: float | None) -> str:
    """Return a number with four digits, or a dash for a missing one."""
    return MISSING if value is None or not math.isfinite(value) else format(value, ".4g").replace("-", "−")
