"""Operators whose weights are spread over processes, and stacks of operators of one shape."""

__all__: list[str] = []
