"""Measurements in; figures, pages and text out.

Figures need the extra ``plot`` and pages the extra ``report``. Importing this package needs neither.
"""

from lightning_spectral.pages.checkpoint import write_checkpoint_page
from lightning_spectral.pages.loggers import send_alert, send_event, send_figure
from lightning_spectral.pages.page import check_installed
from lightning_spectral.pages.reports import report, watch_report
from lightning_spectral.pages.screen import one_screen, summary_line

__all__ = [
    "check_installed",
    "one_screen",
    "report",
    "send_alert",
    "send_event",
    "send_figure",
    "summary_line",
    "watch_report",
    "write_checkpoint_page",
]
