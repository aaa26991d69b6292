"""Captions of the sections of a page. They also serve readers who cannot see the charts."""

from __future__ import annotations

__all__ = ["ACTIONS", "EVENTS", "LINES", "ZONE"]

ZONE = " The safe zone is ({:g}, {:g})."

_LOGGED = "From the loggers of the run, at the same steps as all other charts. Gaps: values that are not finite."
_HEATMAP = (
    "One row for each block, the first at the bottom; time runs to the right. Red: the MLP is larger. Blue: attention "
    "is larger. White: both are equal. Grey: no ratio. Colours are faint inside the safe zone and jump at its edges. "
    "They mean the same in every run, and end at 1/16 and 16."
)
_RATIO = (
    "The spectral norm of the MLP over the spectral norm of attention, one line per block; the colour changes with "
    "depth. The numbers of the blocks stand at the ends of their lines. Dashed: the edges of the safe zone. Leaving it "
    "is information, not a failure."
)
_NORMS = "The largest singular value of each branch as a linear operator: which of the two moves a ratio."
_SCALES = "The factor on each branch at the time of the measurement. 1: no change."
_TOKENS = (
    "Token residual: distance of the tokens from being one vector (0: they are one), without massive activations. "
    "Effective rank: number of directions that the tokens use. Both behind each block. Gaps: steps without a batch."
)

LINES = (
    ("Loss and learning rate", _LOGGED, ("loss", "rate")),
    ("Ratio over depth and time", _HEATMAP, ("heatmap",)),
    ("Ratio of every block", _RATIO, ("ratio",)),
    ("Spectral norms", _NORMS, ("mlp_norm", "attention_norm")),
    ("Residual scales", _SCALES, ("mlp_scale", "attention_scale")),
    ("Token geometry", _TOKENS, ("typical_token_residual", "effective_rank")),
)
"""Title, caption and charts of every section that shows series."""

EVENTS = (
    "Circles: notes, such as a block that crossed an edge of the safe zone, or a controller that stops. Triangles: "
    "warnings. Squares: failures; something is not finite, all tokens or all samples are one, or nothing moves. The "
    "list begins with the latest event."
)
ACTIONS = (
    "Number of blocks whose scales were moved after each measurement, and number of those that stay outside the safe "
    "zone because their law can do no more: ResidualRescaler stops at the bounds of the scales, GainCeiling at its "
    "floor. The table has totals by block."
)
