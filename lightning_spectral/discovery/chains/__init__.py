"""From the residual add of a branch backwards to the stream: the chains of factors that it is linear in."""

__all__: list[str] = []
