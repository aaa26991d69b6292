"""The core of a watched run, which needs no Trainer, and :class:`Watch`, its shell for loops of one's own."""

from lightning_spectral.watch.loop import Watch

__all__ = ["Watch"]
