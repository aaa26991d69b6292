"""Steering: residual scales, the control law, balanced initialization, the balance penalty."""

from lightning_spectral.control.fuse import fuse_scales
from lightning_spectral.control.law import ResidualRescaler
from lightning_spectral.control.scales import ResidualScales, attach_scales

__all__ = ["ResidualRescaler", "ResidualScales", "attach_scales", "fuse_scales"]
