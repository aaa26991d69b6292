"""Actions of a controller as text and as plain values: for a reader and for a journal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_spectral.control.law import Action
from lightning_spectral.records import Measurement
from lightning_spectral.records.text import numbered

__all__ = ["described_action", "news"]

TOLD_AT_ONCE = 4  # blocks named in one message


def described_action(action: Action, measurement: Measurement) -> dict[str, Any]:
    """Return an action as plain values, one line of a journal."""
    layer = measurement.layers[action.block]
    return {
        "step": measurement.step,
        "action": "rescale" if action.moves else "hold",
        "block": layer.index,
        "name": layer.name,
        "ratio": layer.ratio,
        "smoothed_ratio": layer.ratio if action.log_ratio is None else math.exp(action.log_ratio),
        "mlp_scale": layer.mlp_scale,
        "attention_scale": layer.attention_scale,
        "mlp_log_change": action.mlp,
        "attention_log_change": action.attention,
        "reason": action.reason,
    }


def news(actions: Sequence[Action], measurement: Measurement, *, dry_run: bool) -> str | None:
    """Return one line on the blocks whose steering begins, or meets a bound or the guard; ``None`` for no news."""
    told = [action for action in actions if action.begins or action.held or action.refused]
    if not told:
        return None
    listed = []
    for action in told[:TOLD_AT_ONCE]:
        layer = measurement.layers[action.block]
        seen = "" if action.log_ratio is None else f" (smoothed ratio {math.exp(action.log_ratio):.4g})"
        what = f"{action.reason}{seen}"
        listed.append(f"block {numbered(layer)}: {what}")
    more = f"; and {len(told) - TOLD_AT_ONCE} more" if len(told) > TOLD_AT_ONCE else ""
    verb = "would steer (dry run)" if dry_run else "steering"
    return f"residual scales, step {measurement.step}, {verb}: {'; '.join(listed)}{more}"
