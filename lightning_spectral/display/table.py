"""A measurement as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_spectral.records import Measurement

__all__ = ["measurement_table"]


def measurement_table(measurement: Measurement) -> str:
    """Return a readable table, one line per block."""
    return "\n".join(_lines(measurement))


def _lines(measurement: Measurement) -> Iterator[str]:
    low, high = measurement.safe_zone
    name_width = max([len(layer.name) for layer in measurement.layers] + [len("block")])
    # Scales are shown where there are any: most models have none.
    scaled = any(layer.mlp_scale != 1.0 or layer.attention_scale != 1.0 for layer in measurement.layers)
    zone = f"safe zone ({low:g}, {high:g})" if measurement.has_zone else "no zone is known"
    part = "" if measurement.adapters == "sum" else f"adapters={measurement.adapters!r}, "
    yield (
        f"spectral ratio ‖mlp‖₂/‖attention‖₂, linearization={measurement.linearization!r}, {part}"
        f"step {measurement.step}, {zone}"
    )
    scales = f"  {'scales':>13}" if scaled else ""
    yield f"{'':>4}  {'block':<{name_width}}  {'mlp':>10}  {'attention':>10}  {'ratio':>8}{scales}"
    for layer in measurement.layers:
        note = layer.reason or ""
        if measurement.has_zone and layer.ratio is not None and not low < layer.ratio < high:
            note = "above the zone" if layer.ratio >= high else "below the zone"
        note = "; ".join(filter(None, [note, layer.doubt and f"not verified: {layer.doubt}"]))
        scales = f"  {layer.mlp_scale:>5.3g} : {layer.attention_scale:<5.3g}" if scaled else ""
        line = (
            f"{layer.index:>4}  {layer.name:<{name_width}}  {_number(layer.mlp_norm, 10)}  "
            f"{_number(layer.attention_norm, 10)}  {_number(layer.ratio, 8)}{scales}  {note}"
        )
        yield line.rstrip()
    yield from (f"note: {note}" for note in measurement.notes)


def _number(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(value, '.4g'):>{width}}"
