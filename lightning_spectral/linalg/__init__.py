"""Matrix-free linear operators, and the solvers that measure their spectral norms. Knows no Transformer."""

from lightning_spectral.linalg.jacobian import Jacobian
from lightning_spectral.linalg.matrix import Matrix
from lightning_spectral.linalg.norms.exact import ExactSVD
from lightning_spectral.linalg.norms.frobenius import frobenius_norm, frobenius_norm_is_cheap, frobenius_norms_of_groups
from lightning_spectral.linalg.norms.randomized import RandomizedSVD
from lightning_spectral.linalg.norms.solution import Memory, Solver, SolverState, SpectralNorm
from lightning_spectral.linalg.operators import Adjoint, Diagonal, Gather, LinearOperator, Product, Scaled
from lightning_spectral.linalg.sharding.sharded import Sharded
from lightning_spectral.linalg.sharding.stacked import Stacked
from lightning_spectral.linalg.sums import Sum

__all__ = [
    "Adjoint",
    "Diagonal",
    "ExactSVD",
    "Gather",
    "Jacobian",
    "LinearOperator",
    "Matrix",
    "Memory",
    "Product",
    "RandomizedSVD",
    "Scaled",
    "Sharded",
    "Solver",
    "SolverState",
    "SpectralNorm",
    "Stacked",
    "Sum",
    "frobenius_norm",
    "frobenius_norm_is_cheap",
    "frobenius_norms_of_groups",
]
