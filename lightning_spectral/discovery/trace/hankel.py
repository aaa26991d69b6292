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

__all__ = ["entrywise", "hankel", "is_hankel", "multiplied", "product"]

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
    if _fits(right):
        return _correlated(left, right)
    if _fits(left):
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
        return multiplied(*args[:2])
    if name in ("addmm", "baddbmm"):
        return kwargs.get("beta", 1) * args[0] + kwargs.get("alpha", 1) * multiplied(*args[1:3])
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


def _correlated(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x @ matrix`` for a Hankel matrix or a stack of them."""
    *count, rows, columns = matrix.shape
    length = rows + columns - 1
    strides = (*matrix.stride()[:-2], 1)
    numbers = matrix.as_strided((*count, length), strides)
    # A correlation along a circle: nothing wraps around, because the circle is as long as the numbers.
    size = 1 << (length - 1).bit_length()
    spectrum = torch.fft.rfft(numbers, size).unsqueeze(-2)
    return torch.fft.irfft(torch.fft.rfft(x.double(), size).conj() * spectrum, size)[..., :columns].contiguous()
