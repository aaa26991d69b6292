"""Large random matrices that take no memory: Hankel matrices, multiplied by Fourier transforms.

A Hankel matrix has the same number along each of its antidiagonals, Hᵢⱼ = r₍ᵢ₊ⱼ₎. So an m × n matrix is a view with the
strides (1, 1) of a vector r of m + n − 1 numbers, and its transposes, slices and parts by heads are such views again.
A product is a correlation with r, which costs O((m + n) log(m + n)) and not O(m n)::

    (x H)ⱼ = Σᵢ xᵢ r₍ᵢ₊ⱼ₎

With random r it has full rank, and no two rows or columns are equal: to a probe it is as good as a dense random matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["entrywise", "grouped", "hankel", "is_hankel", "multiplied", "product"]

_APART = 7  # the offset between the vectors of two matrices in a stack
_ENTRYWISE = {"_to_copy", "clone", "contiguous", "neg", "detach", "alias", "mul", "div"}


def hankel(shape: Sequence[int], size: float, seed: int) -> Tensor:
    """Return a random Hankel matrix, or a stack of them, in float64.

    Args:
        shape: Shape, ``(m, n)`` or ``(count, m, n)``.
        size: Standard deviation of an entry.
        seed: Seed of the random numbers.
    """
    *count, rows, columns = shape
    strides = (*[_APART] * len(count), 1, 1)
    length = rows + columns - 1 + sum((number - 1) * _APART for number in count)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(length, generator=generator, dtype=torch.float64, device="cpu") * size
    return numbers.as_strided(tuple(shape), strides)


def is_hankel(item: Any) -> bool:
    """Whether an argument of an operation is a Hankel matrix, a stack of them, or a view of them."""
    if not isinstance(item, Tensor) or item.dim() < 2 or item.layout != torch.strided:
        return False
    if item.dtype != torch.float64 or item.stride().count(1) < 2 or 0 in item.shape:
        return False
    return item.numel() > _extent(item)


def entrywise(function: Callable[[Tensor], Tensor], content: Tensor) -> Tensor:
    """Apply a function of single entries. A Hankel matrix stays one."""
    if not is_hankel(content):
        return function(content)
    numbers = content.as_strided((_extent(content),), (1,))
    return function(numbers).as_strided(content.shape, content.stride(), 0)


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` for matrices and stacks of them, or for a matrix and a vector."""
    if right.dim() == 1:
        return multiplied(left, right.unsqueeze(1)).squeeze(1)
    if _fits(right) and not left.is_complex():
        return _correlated(left, right)
    if _fits(left) and not right.is_complex():
        return _correlated(right.mT, left.mT).mT
    return left @ right


def product(name: str, args: Sequence[Any], kwargs: Any) -> Tensor | None:
    """Run an operation on Hankel matrices without writing them out, ``None`` where that is not possible.

    Args:
        name: Name of the operation, such as ``"addmm"``.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    if not any(map(is_hankel, args)):
        return None
    if name in _ENTRYWISE and is_hankel(args[0]) and not any(isinstance(item, Tensor) for item in args[1:]):
        number = args[1] if name in ("mul", "div") else 1
        factor = -1 if name == "neg" else 1 / number if name == "div" else number
        wanted = kwargs.get("dtype")
        return entrywise(lambda content: factor * content, args[0]) if wanted in (None, torch.float64) else None
    if name in ("mm", "bmm", "matmul", "mv"):
        return multiplied(args[0], args[1])
    if name in ("addmm", "baddbmm"):
        result = multiplied(args[1], args[2]).mul_(kwargs.get("alpha", 1))
        return result.add_(args[0], alpha=kwargs.get("beta", 1))
    if name == "linear":
        result = multiplied(args[0], args[1].mT)
        return result if len(args) < 3 or args[2] is None else result + args[2]
    return None


def _fits(content: Tensor) -> bool:
    return is_hankel(content) and content.stride()[-2:] == (1, 1)


def _extent(content: Tensor) -> int:
    """Return how many places of memory a view reaches over."""
    steps = zip(content.shape, content.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def grouped(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each group by its own matrix of a stack.

    Args:
        rows: ``(rows, m)``.
        stack: ``(groups, m, n)``.
        ends: ``(groups,)``, the end of the rows of each group. Rows behind the last end become zero.

    Returns:
        ``(rows, n)``.
    """
    bounds = [0, *ends.tolist()]
    if not _fits(stack):
        parts = [rows[start:end] @ matrix for start, end, matrix in zip(bounds, bounds[1:], stack, strict=False)]
    else:  # one transform for all matrices: they are windows of one vector
        groups = torch.bucketize(torch.arange(bounds[-1], device=rows.device), ends.to(torch.int64), right=True)
        parts = [_windows(rows[: bounds[-1]], stack, groups * stack.stride(0))]
    return torch.cat([*parts, rows.new_zeros(rows.shape[0] - bounds[-1], stack.shape[-1])])


def _correlated(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x @ matrix`` for a Hankel matrix or a stack of them."""
    if matrix.dim() == 2:
        return _windows(x, matrix, torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device))
    x = x.expand(*matrix.shape[:-2], *x.shape[-2:])
    starts = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    for place, stride in enumerate(matrix.stride()[:-2]):
        numbers = torch.arange(matrix.shape[place], device=x.device) * stride
        starts += numbers.view(-1, *[1] * (starts.dim() - place - 1))
    return _windows(x, matrix, starts)


def _windows(x: Tensor, matrix: Tensor, starts: Tensor) -> Tensor:
    """Return yⱼ = Σᵢ xᵢ r₍ₛ₊ᵢ₊ⱼ₎ for each row x, whose matrix begins at its own place s of the numbers r."""
    columns, length = matrix.shape[-1], _extent(matrix)
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], columns)  # the Fourier transform of no rows is an error
    # A correlation along a circle: nothing wraps around, because the circle is as long as the numbers.
    size = _quick_length(length)
    spectrum = torch.fft.rfft(matrix.as_strided((length,), (1,)), size)
    whole: Tensor = torch.fft.irfft(torch.fft.rfft(x.double(), size).conj_physical_().mul_(spectrum), size)
    if not bool(starts.any()):
        return whole[..., :columns].contiguous()
    return whole.gather(-1, starts.unsqueeze(-1) + torch.arange(columns, device=x.device))


def _quick_length(least: int) -> int:
    """Return a length that a fast Fourier transform likes: a power of 2, or 3, 5, 9 or 15 times one."""
    lengths = (odd << max((least - 1) // odd, 0).bit_length() for odd in (1, 3, 5, 9, 15))
    return min(lengths)
