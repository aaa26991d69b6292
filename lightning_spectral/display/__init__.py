"""Figures of plain numbers. Drawing needs the extra ``plot``; importing this package does not."""

from lightning_spectral.display.heatmap import heatmap_figure
from lightning_spectral.display.profile import profile_figure

__all__ = ["heatmap_figure", "profile_figure"]
