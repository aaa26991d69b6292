"""Passes aside: the user's code runs, and everything it changed is put back."""

from lightning_spectral.passes.aside.restoring import evaluated, kept, undisturbed

__all__ = ["evaluated", "kept", "undisturbed"]
