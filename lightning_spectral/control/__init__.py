"""Steering: residual scales, the control law, balanced initialization, the balance penalty."""

__all__: list[str] = []
