"""The callback, the only room that knows Lightning."""

from lightning_spectral.monitor.callback import SpectralMonitor

__all__ = ["SpectralMonitor"]
