"""The file of a run: the journal writes it, :class:`History` reads it."""

from lightning_spectral.runs.history import History

__all__ = ["History"]
