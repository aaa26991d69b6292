"""Measurements in; figures, pages and text out.

Figures need the extra ``plot``, pages the extra ``report``; importing this package needs neither.
"""

from lightning_spectral.history import heatmap
from lightning_spectral.report.checkpoint import write_checkpoint_page
from lightning_spectral.report.loggers import send_figure
from lightning_spectral.report.page import check_installed
from lightning_spectral.report.run import report
from lightning_spectral.report.screen import one_screen

__all__ = ["check_installed", "heatmap", "one_screen", "report", "send_figure", "write_checkpoint_page"]
