"""Made-up content: noise for data, weights of the right size for parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_spectral.discovery.trace.hankel import hankel
from lightning_spectral.discovery.trace.tape import probe_device, probe_dtype

__all__ = ["is_mute", "made_up", "noise"]

# Entries from which on a made-up matrix is a Hankel matrix. Below, dense noise is as fast and takes no memory to speak
# of (2 MiB).
_DENSE = 2**18


def is_mute(weight: Tensor) -> bool:
    """Whether a weight hides the structure around it: a zero matrix, a gain with a zero, or one that is not finite."""
    if not bool(weight.isfinite().all()):
        return True
    return not bool(weight.any()) or (sum(size > 1 for size in weight.shape) < 2 and not bool(weight.all()))


def made_up(weight: Tensor, seed: int = 8) -> Tensor:
    """Return content in place of a weight: noise / √(larger of the last two sizes) for a matrix, a gain around 1.

    A line of integers counts up, as positions do; a table of integers is zero, which every table that it points into
    has. Booleans are a lower triangle, as causal masks are.

    Args:
        weight: The weight; its shape, strides and dtype count.
        seed: Seed of the noise.
    """
    if weight.dtype == torch.bool:
        content = torch.ones(weight.shape, dtype=torch.bool, device="cpu")
        return content.tril() if weight.dim() > 1 else content
    if not (weight.is_floating_point() or weight.is_complex()):
        line = sum(size > 1 for size in weight.shape) < 2
        numbers = torch.arange(weight.numel() if line else 1, device="cpu").to(weight.dtype)
        return numbers.view(weight.shape) if line else numbers.expand(weight.shape).clone()
    matrix = sum(size > 1 for size in weight.shape) > 1
    if not matrix:
        return 1 + 0.1 * noise(weight, seed)
    size = math.sqrt(max(weight.shape[-2:]))
    if weight.dim() in (2, 3) and weight.numel() >= _DENSE and not weight.is_complex():
        return hankel(weight.shape, 1 / size, seed)
    return noise(weight, seed) / size


def noise(like: Tensor, seed: int = 0) -> Tensor:
    """Return normal noise with the shape and the strides of a tensor, so that its recorded views stay possible."""
    # Drawn on the CPU: the same numbers on every device.
    content = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    device = probe_device(like.device)
    return torch.empty_like(like, dtype=probe_dtype(like), device=device, requires_grad=False).copy_(content)
