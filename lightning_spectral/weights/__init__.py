"""Where a parameter comes from: its path, the residual scale on it, and its tensor, whole or in pieces."""

__all__: list[str] = []
