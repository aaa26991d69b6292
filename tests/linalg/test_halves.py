"""Three parts of 16 bits are the float32 block, and their products the product."""

from __future__ import annotations

import pytest
import torch

from lightning_spectral.linalg import Matrix, RandomizedSVD
from lightning_spectral.linalg.halves import multiplied_in_parts, parts, reads_halves

gpu = pytest.mark.gpu
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e6, 1e30])
def test_the_parts_sum_to_24_bits(dtype, size, generator):
    rows = torch.randn(6, 500, generator=generator) * size
    rows[1] *= torch.logspace(0, -20, 500)
    rows[2] = 0.0
    split, factors = parts(rows, dtype)
    assert split.dtype == dtype
    assert split.shape == (3, 6, 500)
    error = (split.double().sum(0) * factors.double() - rows.double()).abs()
    assert bool((error <= 2.0**-24 * rows.double().abs().amax(1, keepdim=True)).all())
    assert torch.equal(torch.frexp(factors).mantissa, torch.full_like(factors, 0.5))  # powers of two


@pytest.mark.parametrize("dtype", HALVES)
def test_products_of_the_parts_are_those_of_the_block(dtype, generator):
    rows, weight = torch.randn(14, 300, generator=generator), torch.randn(300, 200, generator=generator).to(dtype)
    split, factors = parts(rows, dtype)
    exact = rows.double() @ weight.double()
    # Products of 16-bit numbers are exact in float32, so this is what a device with 32-bit sums computes.
    product = (split.float() @ weight.float()).sum(0) * factors
    plain = rows @ weight.float()
    assert float((product - exact).abs().max()) <= 4 * float((plain - exact).abs().max())
    assert not reads_halves(weight, torch.float32)  # on the CPU


@gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_of_16_bits_are_multiplied_as_they_lie(dtype, generator):
    weight = torch.randn(3, 256, 512, generator=generator).to(dtype)
    X, Y = torch.randn(512, 14, generator=generator), torch.randn(768, 14, generator=generator)
    here, there = Matrix(weight), Matrix(weight.cuda())
    torch.testing.assert_close(there.matmat(X.cuda()).cpu(), here.matmat(X), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(there.adjoint(Y.cuda()).cpu(), here.adjoint(Y), rtol=1e-5, atol=1e-4)
    if reads_halves(weight.cuda(), torch.float32):
        rows = torch.randn(14, 256, generator=generator)
        product = multiplied_in_parts(rows.cuda(), weight[0].cuda())
        torch.testing.assert_close(product.cpu(), rows @ weight[0].float(), rtol=1e-5, atol=1e-4)


@gpu
def test_the_solver_on_cuda_waits_once_and_agrees_with_the_cpu(generator):
    weights = [torch.randn(300, 400, generator=generator) for _ in range(10)]
    solver = RandomizedSVD()
    here, there = [Matrix(weight) for weight in weights], [Matrix(weight.cuda()) for weight in weights]
    expected, _ = solver.compute(here, solver.init(here))
    norms, state = solver.compute(there, solver.init(there))
    for norm, other in zip(norms, expected, strict=True):
        assert norm.value == pytest.approx(other.value, rel=1e-5)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as caught:
            solver.compute(there, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) <= 3  # one for each look at the error, of which weights without a gap need three
