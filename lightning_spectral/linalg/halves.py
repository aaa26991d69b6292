"""Products of float32 blocks by weights of 16 bits, which are read as they lie.

Converting a weight to float32 writes it and reads it again: five times the bytes. Instead the block, which is thin, is
split into three 16-bit parts whose sum it is to 24 bits::

    x = 2**e · (x₁ + x₂ + x₃)      x₁ = x rounded to 16 bits, x₂ = the rest rounded, x₃ = the rest of the rest
    x W = 2**e · (x₁W + x₂W + x₃W)

A product of two 16-bit numbers is exact in float32, and sums are taken in float32. So the result is as exact as that of
float32 weights, and one product of three times the columns reads each weight once.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["multiplied_in_parts", "parts", "reads_halves"]

# The largest entry of a row before it is split: below the 2**16 of float16, and far above its smallest number, 2**-24.
_LARGEST = 13


def reads_halves(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight can be multiplied by blocks of a dtype as it lies: products of mixed dtypes need CUDA."""
    if weight.dtype not in (torch.float16, torch.bfloat16) or dtype != torch.float32 or weight.device.type != "cuda":
        return False
    return torch.version.cuda is not None and torch.cuda.get_device_capability(weight.device) >= (8, 0)


def parts(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split rows into three 16-bit parts.

    Args:
        rows: ``(k, n)`` in float32.
        dtype: ``torch.float16`` or ``torch.bfloat16``.

    Returns:
        The parts ``(3, k, n)`` and the factors ``(k, 1)``, powers of two in float32: the factors times the sum of the
        parts are the rows, up to 2**-24 of the largest entry of each row.
    """
    exponent = torch.frexp(rows.abs().amax(1, keepdim=True)).exponent
    exponent = (exponent - _LARGEST).clamp(-126, 126).to(rows.dtype)
    rest = rows * torch.exp2(-exponent)
    found = []
    for _ in range(3):
        found.append(rest.to(dtype))
        rest = rest - found[-1].to(rows.dtype)  # without error: both numbers are of one size
    return torch.stack(found), torch.exp2(exponent)


def multiplied_in_parts(rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``rows @ weight`` in float32 for float32 rows ``(k, n)`` and a 16-bit weight ``(n, m)`` on CUDA."""
    split, factors = parts(rows, weight.dtype)
    products = torch.mm(split.flatten(0, 1), weight, out_dtype=torch.float32)
    return products.view(3, len(rows), -1).sum(0) * factors
