"""The results of a solver, and the memory that it carries from one measurement to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.operators import LinearOperator

__all__ = ["Memory", "Solver", "SolverState", "SpectralNorm", "random_rows"]

OUT_OF_RANGE = "the spectral norm is outside the range of a float"


@dataclass(frozen=True, slots=True)
class SpectralNorm:
    """The spectral norm of one operator.

    Attributes:
        value: An estimate from below of the largest singular value; ``None`` where it cannot be computed.
        error_bound: A posteriori bound β ≥ 0 with σ₁ ≤ (1 + β) · value; ``None`` where there is no value. The solver
            documents whether the bound is proven or holds with high probability.
        reason: Why there is no value, ``None`` where there is one.
        iterations: Multiplications by AᵀA, each of which reads every weight twice.
    """

    value: float | None
    error_bound: float | None
    reason: str | None = None
    iterations: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """The memory of one operator A = 2^exponent · Ã.

    Attributes:
        subspace: ``(n, p)``, orthonormal columns: approximate right singular vectors, the dominant one first.
        images: ``(s, m)``, the images Ãx of the random probes x as rows, at the time of the last certificate.
        upper: The upper bound of ‖Ã‖₂ in that certificate.
        exponent: The exponent of the power of two that was taken out.
        latest: ``(k, m)``, the images Ãx of k Gaussian probes at the time of this measurement. The probes are the same
            in all measurements. ``None`` unless they were asked for (:attr:`SolverState.keeps_images`).
    """

    subspace: Tensor
    images: Tensor
    upper: float
    exponent: int = 0
    latest: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SolverState:
    """What a solver carries from one measurement to the next: plain numbers and tensors.

    Attributes:
        seed: Seed of the random probes. All randomness of a solver comes from it, so a resumed run is exact.
        memories: One entry per operator; ``None`` for an operator that has not been solved.
        keeps_images: Whether the next call of :meth:`Solver.compute` shall keep the images of its probes. A solver that
            has none may ignore it. Not part of :meth:`state_dict`.
    """

    seed: int
    memories: tuple[Memory | None, ...]
    keeps_images: bool = False

    @property
    def subspaces(self) -> tuple[Tensor | None, ...]:
        """The right singular subspaces ``(n, p)``; column 0 approximates the dominant right singular vector."""
        return tuple(None if memory is None else memory.subspace for memory in self.memories)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors, fit for ``torch.load(weights_only=True)``."""
        memories = [
            None
            if memory is None
            else {item.name: value for item in fields(Memory) if (value := getattr(memory, item.name)) is not None}
            for memory in self.memories
        ]
        return {"seed": self.seed, "memories": memories}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> SolverState:
        """Rebuild a state.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ConfigurationError: If the mapping does not have the expected keys.
        """
        try:
            memories = tuple(None if memory is None else Memory(**memory) for memory in state["memories"])
            return cls(int(state["seed"]), memories)
        except (KeyError, TypeError) as error:
            raise ConfigurationError(
                f"Not the state of a solver: expected the keys 'seed' and 'memories', got {sorted(state)}."
            ) from error


def random_rows(seed: int, count: int, n: int) -> Tensor:
    """Return ``(count, n)`` standard normal numbers, the same ones for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, generator=generator, device=generator.device)


class Solver(Protocol):
    """A solver: frozen hyper-parameters, and a pure function from operators and state to norms and state."""

    def init(self, operators: Sequence[LinearOperator]) -> SolverState:
        """Return the state before the first measurement."""

    def compute(
        self, operators: Sequence[LinearOperator], state: SolverState
    ) -> tuple[tuple[SpectralNorm, ...], SolverState]:
        """Return the spectral norm of every operator, and the state for the next measurement."""
