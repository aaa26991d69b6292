"""Weights that are spread over processes, as operators; and stacks of operators of one shape."""

__all__: list[str] = []
