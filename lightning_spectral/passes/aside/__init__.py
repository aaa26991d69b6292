"""Passes aside: the user's code runs, and everything it changed is put back."""

from lightning_spectral.passes.aside.restoring import kept, undisturbed

__all__ = ["kept", "undisturbed"]
