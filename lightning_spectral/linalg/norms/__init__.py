"""Solvers: the spectral norms of a batch of operators, randomized or exact; the Frobenius norm of one."""

__all__: list[str] = []
