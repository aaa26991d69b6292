"""Residual scales in a model: attach, save, load, and fold into the weights. No run is needed."""

from lightning_spectral.scales.attach import ResidualScale, ResidualScales, attach_scales
from lightning_spectral.scales.fuse import fuse_scales

__all__ = ["ResidualScale", "ResidualScales", "attach_scales", "fuse_scales"]
