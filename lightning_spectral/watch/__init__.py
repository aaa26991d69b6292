"""The core of a watched run, which needs no Trainer."""

__all__: list[str] = []
