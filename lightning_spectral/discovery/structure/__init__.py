"""Residual adds, sites, branches and blocks of a recorded pass, and the numerical check of each block."""

__all__: list[str] = []
