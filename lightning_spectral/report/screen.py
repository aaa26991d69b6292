"""One screen of text about one measurement."""

from __future__ import annotations

import math

from lightning_spectral.records import LayerMeasurement, Measurement

__all__ = ["one_screen"]


def one_screen(measurement: Measurement, rows: int = 24) -> str:
    """Return the table of a measurement, shortened to the blocks farthest from balance where there are many.

    Args:
        measurement: What to show.
        rows: Number of blocks that are shown at most.

    Returns:
        Lines of text: a title, one line per block, and the summary.
    """
    title, head, *lines = str(measurement).splitlines()
    distance = [_distance(layer, measurement.safe_zone) for layer in measurement]
    farthest = sorted(range(len(lines)), key=distance.__getitem__, reverse=True)[:rows]
    shown = [lines[position] for position in sorted(farthest)]
    if len(lines) > rows:
        shown.append(f"      … and {len(lines) - rows} blocks nearer to balance")
    return "\n".join([title, head, *shown, _summary(measurement)])


def _distance(layer: LayerMeasurement, zone: tuple[float, float]) -> float:
    if layer.log_ratio is None:
        return -math.inf
    return abs(layer.log_ratio - sum(map(math.log, zone)) / 2)


def _summary(measurement: Measurement) -> str:
    values = measurement.summary()
    if "ratio_median" not in values:
        return "no block has a ratio"
    measured = sum(layer.ratio is not None for layer in measurement)
    return (
        f"min {values['ratio_min']:.3g}, median {values['ratio_median']:.3g}, max {values['ratio_max']:.3g}; "
        f"{round(values['in_zone'] * measured)} of {measured} blocks inside the zone; {values['seconds'] * 1e3:.0f} ms"
    )
