"""One forward pass as a graph of values: recorded, replayed and asked."""

__all__: list[str] = []
