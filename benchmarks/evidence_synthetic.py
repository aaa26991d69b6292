"""The synthetic experiment of 'The 1:1 Rule' (Gamaleldin; unreviewed) and its control, for `evidence.py`.

The same layer A = I + W_mlp + W_attn again and again; both matrices have one large singular value, the spike, over a
flat bulk. The effective rank is that of the covariance of the product, exp H(λ/Σλ) with λ = σ². Published is the
smallest over the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lightning_spectral.tokens import effective_rank

DEPTH, SPIKE, BULK = 24, 5.0, 0.5
RATIOS = (0.1, 0.29, 0.51, 0.78, 0.97, 1.2, 2.06, 2.86, 4.9, 10.5, 20.0)
CONTROL_RATIOS = (0.1, 0.29, 0.97, 2.86, 20.0)
SEEDS = range(5)
# How bases are shared, whether they are Haar, and the bulk; see Case.
KINDS = (
    ("shared", False, 0.0),
    ("shared", True, 0.0),
    ("own", False, 0.0),
    ("own", False, 0.28),
    ("own", True, 0.28),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One curve's point.

    Attributes:
        bases: ``"shared"`` by both matrices, the sign of attention's spike flipped, or ``"own"``.
        haar: Whether bases are uniform, or come from a QR factorization as it is, as the paper's do.
        bulk: The bulk as a fraction of each spike; 0 for the stated constant.
        ratio: Spike of the MLP over that of attention.
        seed: Decides the bases.
    """

    bases: str
    haar: bool
    bulk: float
    ratio: float
    seed: int

    @property
    def key(self) -> str:
        """Name of the case in the file of results."""
        basis = "haar" if self.haar else "qr"
        return f"{self.bases} {basis} bulk={self.bulk:g} ratio={self.ratio:g} seed={self.seed}"


def cases(*, quick: bool) -> list[Case]:
    """Return all cases."""
    if quick:
        return [Case(*kind, ratio, 0) for kind in KINDS for ratio in (0.1, 0.97, 20.0)]
    return [
        Case(*kind, ratio, seed)
        for kind in KINDS
        for seed, ratio in product(SEEDS, RATIOS if kind[0] == "shared" else CONTROL_RATIOS)
    ]


def basis(width: int, generator: torch.Generator, *, haar: bool) -> Tensor:
    """Return an orthogonal matrix from the QR factorization of a Gaussian, ``(width, width)``, float64."""
    Q, R = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    Q = Q * R.diagonal().sign() if haar else Q
    assert isinstance(Q, Tensor)
    return Q


def layer(case: Case, width: int) -> Tensor:
    """Return A, ``(width, width)``, float64."""
    generator = torch.Generator().manual_seed(case.seed)
    A = torch.eye(width, dtype=torch.float64)
    U = V = A
    for number, spike in enumerate((case.ratio * SPIKE, SPIKE)):
        if number == 0 or case.bases == "own":
            U, V = (basis(width, generator, haar=case.haar) for _ in range(2))
        sigma = torch.full((width,), case.bulk * spike or BULK, dtype=torch.float64)
        sigma[0] = -spike if number == 1 and case.bases == "shared" else spike
        A = A + (U * sigma) @ V.mT
    return A


def least_rank(case: Case, width: int) -> float:
    """Return the smallest effective rank of the powers of A up to the depth."""
    A, ranks = layer(case, width), []
    P = torch.eye(width, dtype=A.dtype)
    for _ in range(DEPTH):
        P = A @ P
        P = P / P.norm()
        ranks.append(effective_rank(P, power=2).item())
    return min(ranks)


def grouped(entries: Mapping[str, float]) -> dict[str, dict[str, list[float]]]:
    """Sort the synthetic results by kind and ratio, from keys as ``shared qr bulk=0 ratio=0.1 seed=0``."""
    found: dict[str, dict[str, list[float]]] = {}
    for key, value in entries.items():
        kind, _, rest = key.partition(" ratio=")
        found.setdefault(kind, {}).setdefault(rest.partition(" ")[0], []).append(value)
    return found
