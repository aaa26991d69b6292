"""From a checkpoint file to a measurement: no model is loaded, and nothing in the file is executed."""

from lightning_spectral.checkpoints.blockwise import audit
from lightning_spectral.checkpoints.untrusted import printable

__all__ = ["audit", "printable"]
