"""What the sections of a page show, in words: for whoever reads a chart, and for whoever cannot see it."""

from __future__ import annotations

__all__ = ["ACTIONS", "EVENTS", "LINES", "ZONE"]

ZONE = " The safe zone is ({:g}, {:g})."

_HEATMAP = (
    "One row for each block, the first at the bottom; time runs to the right. Red: the MLP is larger. Blue: attention "
    "is larger. No colour: both are alike. Grey: no ratio. Colours are faint inside the zone and jump at its edges."
)
_RATIO = (
    "The spectral norm of the MLP over that of attention, one line for each block; the scale beside it tells which. "
    "Dashed: the edges of the safe zone. To leave it is information, not an alarm. The numbers are in the table above."
)
_NORMS = "The largest singular value of each branch as a linear operator: which of the two moves a ratio."
_SCALES = "The factors on each branch, as they were when the ratio was measured with them. 1: no change."
_TOKENS = (
    "Token residual: how far the tokens are from being one vector, 0 where they are, massive activations left out. "
    "Effective rank: how many directions they use. Both behind each block. Gaps: steps without a batch to look at."
)

LINES = (
    ("Ratio over depth and time", _HEATMAP, ("heatmap",)),
    ("Ratio of every block", _RATIO, ("ratio",)),
    ("Spectral norms", _NORMS, ("mlp_norm", "attention_norm")),
    ("Residual scales", _SCALES, ("mlp_scale", "attention_scale")),
    ("Token geometry", _TOKENS, ("typical_token_residual", "effective_rank")),
)
"""Title, caption and charts of every section that shows series."""

EVENTS = (
    "Circles: a block crossed an edge of the zone, or an alarm is over. Triangles: a warning. Squares: an alarm, which "
    "has two witnesses, a ratio that stays outside and tokens that become one vector. The list has the last first."
)
ACTIONS = "How many blocks had a scale moved, or held, after each measurement. The table adds up each block."
