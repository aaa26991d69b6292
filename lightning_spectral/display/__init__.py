"""Figures of plain numbers. Only drawing needs the extra ``plot``, not the import of this package."""

from lightning_spectral.display.heatmap import heatmap_figure
from lightning_spectral.display.profile import profile_figure

__all__ = ["heatmap_figure", "profile_figure"]
