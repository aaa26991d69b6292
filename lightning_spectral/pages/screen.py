"""One screen of text about one measurement."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_spectral.pages.words import clear, clear_name
from lightning_spectral.records import LayerMeasurement, Measurement

__all__ = ["one_screen", "summary_line"]

LONGEST = 200  # characters of a name or a reason


def one_screen(measurement: Measurement, rows: int = 24) -> str:
    """Return the table of a measurement. Of many blocks, it shows the ones farthest from balance.

    Args:
        measurement: The measurement.
        rows: Largest number of blocks to show.

    Returns:
        Lines of text: a title, one line per block, and the summary.
    """
    layers = measurement.layers
    distance = [_distance(layer, measurement.safe_zone) for layer in layers]
    farthest = sorted(range(len(layers)), key=distance.__getitem__, reverse=True)[:rows]
    shown = [str(replace(measurement, layers=tuple(_on_one_line(layers[place]) for place in sorted(farthest))))]
    if len(layers) > rows:
        shown.append(f"      … and {len(layers) - rows} blocks nearer to balance")
    return "\n".join([*shown, summary_line(measurement)])


def _on_one_line(layer: LayerMeasurement) -> LayerMeasurement:
    """Return a layer with short texts on one line: a reason may be an error of torch with its call stack."""
    mlp, attention = (None if why is None else _flat(why) for why in (layer.mlp_reason, layer.attention_reason))
    return replace(
        layer, name=clear_name(" ".join(layer.name.split()), LONGEST), mlp_reason=mlp, attention_reason=attention
    )


def _flat(text: str) -> str:
    return clear(" ".join(text.split()), LONGEST)


def _distance(layer: LayerMeasurement, zone: tuple[float, float]) -> float:
    if layer.log_ratio is None:
        return -math.inf
    return abs(layer.log_ratio - sum(map(math.log, zone)) / 2)


def summary_line(measurement: Measurement) -> str:
    """Return one line on all blocks: ratios, how many are inside the safe zone, and how long it took to measure."""
    values = measurement.summary()
    low, high = measurement.safe_zone
    ratios = [layer.ratio for layer in measurement if layer.ratio is not None]
    if not ratios:
        return "no block has a ratio"
    measured, inside = len(ratios), sum(low < ratio < high for ratio in ratios)
    return (
        f"min {values['ratio_min']:.3g}, median {values['ratio_median']:.3g}, max {values['ratio_max']:.3g}; "
        f"{inside} of {measured} blocks inside the safe zone; measured in {values['seconds'] * 1e3:.0f} ms"
    )
