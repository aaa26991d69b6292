"""Measurements in, figures and text out. Drawing needs the extra ``plot``; importing this package does not."""

from lightning_spectral.history import heatmap
from lightning_spectral.report.loggers import send_figure
from lightning_spectral.report.table import one_screen

__all__ = ["heatmap", "one_screen", "send_figure"]
