"""Blocks, weights and a solver in, numbers out: weight linearizations, Jacobians, updates, token geometry."""

from lightning_spectral.measuring.meter import Meter, measure

__all__ = ["Meter", "measure"]
