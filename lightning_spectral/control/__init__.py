"""Steering: the control laws, which are pure functions, and the code that applies them to a model in a run."""

from lightning_spectral.control.band import ResidualRescaler
from lightning_spectral.control.ceiling import GainCeiling

__all__ = ["GainCeiling", "ResidualRescaler"]
