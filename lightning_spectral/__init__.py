"""Watch the spectral balance of MLP and attention in any Transformer."""

__version__ = "0.1.0.dev0"
