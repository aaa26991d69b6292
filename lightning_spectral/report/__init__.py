"""Measurements in, figures out. Drawing needs the extra ``plot``; importing this package does not."""

from lightning_spectral.report.heatmap import heatmap

__all__ = ["heatmap"]
