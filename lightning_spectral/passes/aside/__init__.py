"""Passes aside: the user's code runs, and nothing of it is left."""

from lightning_spectral.passes.aside.restoring import kept, undisturbed

__all__ = ["kept", "undisturbed"]
