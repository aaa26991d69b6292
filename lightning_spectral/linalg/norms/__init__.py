"""Solvers: spectral norms of a batch of operators, randomized or exact, and the Frobenius norm of one operator."""

__all__: list[str] = []
