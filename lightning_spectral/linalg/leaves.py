"""One walk over the tree of a composed operator, for callers that multiply the leaves in a way of their own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.linalg.operators import Adjoint, LinearOperator, Product, Scaled
from lightning_spectral.linalg.sums import Sum

__all__ = ["Leaf", "Walk", "flat", "multiplied", "walk"]

Factors = tuple[tuple[LinearOperator, bool], ...]
"""Operators that multiply one after the other, each with whether its transpose does."""


class Leaf(NamedTuple):
    """One multiplication that a walk asks for.

    Attributes:
        operator: An operator that is not composed of others.
        X: ``(n, k)``, or ``(m, k)`` where the transpose multiplies.
        transposed: Whether the transpose multiplies.
        then: The factors that multiply the product next, the nearest first; they may be composed. Empty where something
            else happens to the product, such as an addition.
    """

    operator: LinearOperator
    X: Tensor
    transposed: bool
    then: Factors = ()

    def multiplied(self) -> Tensor:
        """Return the product as the operator computes it."""
        return self.operator.adjoint(self.X) if self.transposed else self.operator.matmat(self.X)


Walk = Generator[Leaf, Tensor, Tensor]
"""Yields the leaves in the order of multiplication, is sent each product, and returns the product of the whole."""


def walk(operator: LinearOperator, X: Tensor, *, transposed: bool = False, then: Factors = ()) -> Walk:
    """Multiply a block of vectors by an operator, leaf by leaf.

    The walk itself only adds and scales, with a graph where ``X`` or the number of a ``Scaled`` has one. Its caller
    sends the product of every leaf, and may take its time::

        Product(A, Sum(B, C)), X      yields (B, X), (C, X), (A, BX + CX); returns A(BX + CX)

    Args:
        operator: The operator, ``(m, n)``.
        X: ``(n, k)``, or ``(m, k)`` where the transpose multiplies.
        transposed: Whether the transpose multiplies.
        then: What multiplies the product of the whole next; see :class:`Leaf`.
    """
    match operator:
        case Product():
            factors = operator.operators if transposed else operator.operators[::-1]
            for i, factor in enumerate(factors, 1):
                rest = tuple((other, transposed) for other in factors[i:])
                X = yield from walk(factor, X, transposed=transposed, then=rest + then)
            return X
        case Sum():
            terms = []
            for term in operator.operators:
                terms.append((yield from walk(term, X, transposed=transposed)))
            return torch.stack(terms).sum(0)
        case Adjoint():
            return (yield from walk(operator.operator, X, transposed=not transposed, then=then))
        case Scaled():
            return (yield from walk(operator.operator, X * operator.c, transposed=transposed, then=then))
        case _:
            return (yield Leaf(operator, X, transposed, then))


def flat(factors: Factors) -> Iterator[tuple[LinearOperator, bool]]:
    """Yield the leaves of factors in the order of multiplication, a sum as one of them; numbers are left out."""
    for operator, transposed in factors:
        match operator:
            case Product():
                parts = operator.operators if transposed else operator.operators[::-1]
                yield from flat(tuple((part, transposed) for part in parts))
            case Adjoint():
                yield from flat(((operator.operator, not transposed),))
            case Scaled():
                yield from flat(((operator.operator, transposed),))
            case _:
                yield operator, transposed


def multiplied(operator: LinearOperator, X: Tensor, answer: Callable[[Leaf], Tensor]) -> Tensor:
    """Multiply a block of vectors by an operator, ``(n, k) -> (m, k)``, with a caller's own products of the leaves.

    Args:
        operator: The operator, ``(m, n)``.
        X: ``(n, k)``.
        answer: Returns the product of one leaf.
    """
    steps = walk(operator, X)
    try:
        leaf = next(steps)
        while True:
            leaf = steps.send(answer(leaf))
    except StopIteration as stop:
        product: Tensor = stop.value
        return product
