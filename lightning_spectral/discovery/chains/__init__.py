"""From the residual add of a branch backwards to the stream: the chains of factors in which the branch is linear."""

__all__: list[str] = []
