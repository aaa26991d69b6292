"""Steering: residual scales, the control laws, balanced initialization, the balance penalty."""

from lightning_spectral.control.balance import balance_init_
from lightning_spectral.control.band import ResidualRescaler
from lightning_spectral.control.ceiling import GainCeiling
from lightning_spectral.control.fuse import fuse_scales
from lightning_spectral.control.penalty import balance_penalty
from lightning_spectral.control.scales import ResidualScales, attach_scales

__all__ = [
    "GainCeiling",
    "ResidualRescaler",
    "ResidualScales",
    "attach_scales",
    "balance_init_",
    "balance_penalty",
    "fuse_scales",
]
