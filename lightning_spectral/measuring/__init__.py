"""Blocks, weights and a solver in, numbers out: weight linearizations, Jacobians, updates, tokens of real passes."""

from lightning_spectral.measuring.meter import Meter, measure

__all__ = ["Meter", "measure"]
