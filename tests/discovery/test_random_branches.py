"""Random residual programs: the norm is that of the matrix that is left without activations, or there is a reason."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_branches import WIDTH, Body, bodies

from lightning_spectral import ExactSVD, find_blocks, measure

EXAMPLES = 100


def test_a_random_program_has_its_exact_norm_or_a_reason() -> None:
    """Norms, gates, gains, views, lists and sums in any order: never another number, never another error."""
    seen: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(bodies())
    def check(body: Body) -> None:
        x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
        blocks = find_blocks(body, batch=x)
        (layer,) = measure(body, blocks, solver=ExactSVD())
        assert blocks[0].verified, blocks[0].evidence
        for name, wanted in body.norms().items():
            norm, reason = getattr(layer, name), getattr(layer, name.replace("norm", "reason"))
            assert (norm is None) != (reason is None)
            assert norm is None or norm == pytest.approx(wanted, rel=1e-4)
            seen["measured" if reason is None else reason] += 1

    check()
    assert seen["measured"] > 0.9 * seen.total(), seen
