"""The steps that make a matrix, or a gain, of a stored parameter: one table for all who find, apply, cut or save them.

A layout is a tuple of steps, each a name and its arguments: ``(("transpose", -2, -1), ("narrow", 0, 64, 32))``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ARITHMETIC", "REDUCTIONS", "UNARY", "VIEWS", "arranged", "is_arithmetic"]

Step = tuple[Any, ...]

VIEWS: Mapping[str, Callable[..., Tensor]] = {
    "flatten": torch.flatten,
    "index_select": lambda tensor, dim, index: tensor.index_select(dim, torch.tensor(index, device=tensor.device)),
    "movedim": torch.movedim,
    "narrow": torch.narrow,
    "permute": lambda tensor, *dims: tensor.permute(*dims),
    "reshape": lambda tensor, *shape: tensor.reshape(*shape),
    "select": torch.select,
    "squeeze": torch.squeeze,
    "t": torch.t,
    "transpose": torch.transpose,
    "unsqueeze": torch.unsqueeze,
    "view": lambda tensor, *shape: tensor.view(*shape),
}
"""Steps that pick and rearrange entries, and make no more of them than there were."""

_UNARY_NAMES = (
    *("abs", "cos", "exp", "expm1", "log", "log1p", "neg", "reciprocal", "relu", "rsqrt", "sigmoid", "sin"),
    *("sqrt", "square", "tanh"),
)
UNARY: Mapping[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in _UNARY_NAMES},
    "softplus": F.softplus,
}
"""Steps that compute each entry from itself alone."""

ARITHMETIC: Mapping[str, Callable[..., Tensor]] = {
    **UNARY,
    **{name: getattr(torch, name) for name in ("add", "div", "mul", "pow", "sub")},
}
"""All steps that compute each entry from itself and numbers."""


REDUCTIONS: Mapping[str, Callable[..., Tensor]] = {"rms": lambda tensor: tensor.square().mean().sqrt()}
"""Steps that make one number of all entries: the root of their mean square, where a branch is written to streams."""


def is_arithmetic(step: Step) -> bool:
    """Whether a step computes entries, and does not only move them."""
    return step[0] in ARITHMETIC


def arranged(tensor: Tensor, layout: Iterable[Step]) -> Tensor:
    """Make the matrix or the gain of a stored parameter.

    Args:
        tensor: The parameter.
        layout: The steps.

    Raises:
        RuntimeError, IndexError: The parameter has another shape than the one that the layout was made for.
    """
    for name, *arguments in layout:
        if name not in VIEWS and tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()  # 1 + w in 16 bits would forget most of w
        tensor = (VIEWS.get(name) or ARITHMETIC.get(name) or REDUCTIONS[name])(tensor, *arguments)
    return tensor
