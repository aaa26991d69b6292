"""Find the residual blocks of a model: the only rooms that walk a user's model."""

from lightning_spectral.discovery.find import find_blocks

__all__ = ["find_blocks"]
