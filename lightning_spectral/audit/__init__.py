"""From a checkpoint file to a measurement: no model is loaded, and nothing in the file is executed."""

from lightning_spectral.audit.blockwise import audit
from lightning_spectral.audit.compare import Comparison, compare
from lightning_spectral.audit.untrusted import printable

__all__ = ["Comparison", "audit", "compare", "printable"]
