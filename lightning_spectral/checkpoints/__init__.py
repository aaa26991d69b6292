"""From a checkpoint file to a measurement, without loading a model and without executing anything in the file."""

from lightning_spectral.checkpoints.blockwise import audit
from lightning_spectral.checkpoints.untrusted import printable

__all__ = ["audit", "printable"]
