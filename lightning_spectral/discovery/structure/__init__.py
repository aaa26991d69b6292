"""Residual adds, sites, branches and blocks of a recorded pass, and the check that they are what they seem."""

__all__: list[str] = []
