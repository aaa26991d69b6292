"""Walk a branch backwards from its output to the stream, along the steps on which it is linear in its matrices.

On these routes lie the matrices of the circuit linearization: output and value projection for attention (the attention
pattern is held fixed), down and up projection for an MLP (its activation and gate are left out).

A route is one way from an anchor to a value without another anchor in between. Anchors are products with weights,
attention products, norms and the stream itself. Everything else on the way is a multiplier or changes nothing::

    stream ── norm ── up ── gelu ── down ── × 0.5 ── output
      ▲        ▲      ▲              ▲
      anchors: each is where a route begins

    routes(output) = (down, multipliers 0.5)      routes(input of down) = (up, not linear: gelu)

Where routes meet in a sum, the value has several routes. One case is special: terms that all read the same value and
are products in a row, a weight beside its low-rank adapters. They form one matrix, so the sum is an anchor, too::

          ┌── W ──────────┐
    x ────┤               + ── value               routes(value) = (sum),  sums[value] = (W), (B, A)
          └── A ── B ─────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lightning_spectral.discovery.chains.steps import Step, Steps
from lightning_spectral.discovery.trace.operations import (
    Multiplier,
    added_operand,
    is_addition,
    matrix_operands,
    moved_values,
    term_factor,
    weight_operand,
)
from lightning_spectral.discovery.trace.tape import Operation

__all__ = ["Addend", "Route", "Router"]


@dataclass(frozen=True, slots=True)
class Route:
    """How a value is reached from the nearest anchor (a product, an attention product, a norm or the stream).

    Attributes:
        anchor: The value at which the route starts.
        kind: ``"product"``, ``"sum"`` (of products that read one value), ``"mixing"``, ``"norm"`` or ``"stream"``.
        multipliers: Constants and parameters that multiply the value on the route, nearest its end first.
        is_linear: Whether only multipliers lie on the route: no activation and no gate.
        selective: Whether the data chooses the tokens on this route, by a router's weight or by picking them.
    """

    anchor: int
    kind: str
    multipliers: tuple[Multiplier, ...] = ()
    is_linear: bool = True
    selective: bool = False

    def scaled(self, multiplier: Multiplier) -> Route:
        """Return the route with one more multiplier at its end, the same route for the number 1."""
        if isinstance(multiplier, float) and multiplier == 1.0:
            return self
        return replace(self, multipliers=(multiplier, *self.multipliers))

    def through(self, step: Step) -> Route:
        """Return the route after one more step.

        An activation multiplies by the slope that it has far from zero. A gate counts as 1, and is not linear.
        """
        route = self.scaled(step.multiplier) if step.kind in ("multiply", "activation") else self
        linear = self.is_linear and step.kind not in ("activation", "gate")
        selective = self.selective or step.selective
        if linear == route.is_linear and selective == route.selective:
            return route  # routes are compared and hashed by the thousand: no copy without a change
        return replace(route, is_linear=linear, selective=selective)


class Addend(NamedTuple):
    """One term of a sum of matrices: products in a row, such as B A of an adapter beside W.

    Attributes:
        links: The routes to the products, the last product first: B, then A.
        source: The value that the first product, A, reads, before data movement.
    """

    links: tuple[Route, ...]
    source: int


class Router:
    """Finds the routes of one branch, and remembers them by value.

    Attributes:
        sums: The terms of every sum of products that read one value: a matrix and the adapters beside it.
    """

    def __init__(self, steps: Steps) -> None:
        """Prepare for one branch."""
        self.tape, self.region, self.steps = steps.tape, steps.region, steps
        self.sums: dict[int, tuple[Addend, ...]] = {}
        self._known: dict[int, tuple[Route, ...]] = {}

    def routes(self, value: int) -> tuple[Route, ...]:
        """Return the different routes that end at ``value``; none if no way from the stream leads to it.

        Raises:
            UnmeasurableError: A way back to the stream leads through an operation that is no step of a linear map.
        """
        # Depth-first with an explicit stack: a value stays on the stack until the routes to its sources are known. A
        # mixture adds up hundreds of experts in a chain of sums, which is too deep for recursion.
        stack = [value]
        while stack:
            step = self.steps.step(stack[-1])
            # The walk stops at anchors: what a mixing or a norm reads belongs to other routes.
            waiting = (
                [] if step.kind in ("mixing", "norm") else [item for item in step.sources if self._is_open(step, item)]
            )
            if waiting:
                stack += waiting
                continue
            top = stack.pop()
            if top not in self._known:  # a value with two readers can be on the stack twice
                self._known[top] = tuple(dict.fromkeys(self._routes(top, step)))
        return self._known[value]

    def _is_open(self, step: Step, source: int) -> bool:
        """Whether the routes to a source are needed and unknown. The data of a product belongs to other routes."""
        return source not in self._known and (step.kind != "product" or source != step.sources[0])

    def _routes(self, value: int, step: Step) -> Iterable[Route]:
        """Return the routes to a value. The routes to the sources of its step are known."""
        if step.kind == "none":
            return []
        if step.kind in ("stream", "norm", "mixing"):
            return [Route(value, step.kind)]
        operation = self.tape.producer(value)
        assert operation is not None
        if step.kind == "product":
            return self._product(operation, value, step)
        if step.kind == "sum":
            return self._added(value, [(self._known[item], _factor(operation, item)) for item in step.sources])
        return [route.through(step) for item in step.sources for route in self._known[item]]

    def _product(self, operation: Operation, value: int, step: Step) -> Iterable[Route]:
        """Return the routes to a product, alpha · A X + beta · C in its fused form.

        A bias C is left out. Where C depends on the stream, the product and C are two terms of a sum.
        """
        # In addmm, alpha multiplies the product and beta the added value.
        product = Route(value, "product").scaled(float(operation.kwargs.get("alpha", 1)))
        if len(step.sources) == 1:
            return [product]
        added = added_operand(operation)
        assert added is not None
        return self._added(value, [(self._known[added], float(operation.kwargs.get("beta", 1))), ((product,), 1.0)])

    def _added(self, value: int, terms: Sequence[tuple[Sequence[Route], float]]) -> Iterable[Route]:
        """Return the routes to a sum, given the routes to each term and the number that multiplies it.

        That is one route if the terms form one matrix, else all routes to all terms.
        """
        parts = self._products(terms)
        if parts:
            self.sums[value] = parts
            return [Route(value, "sum")]
        return [route.scaled(factor) for routes, factor in terms for route in routes]

    def _products(self, terms: Sequence[tuple[Sequence[Route], float]]) -> tuple[Addend, ...]:
        """Return the terms as products in a row if together they are one matrix; else no term.

        They are one matrix if each term is a linear row of products, all rows read one value, and one row is a single
        product, which the others adapt.
        """
        # A row that begins further up reads another value. So each term offers all of its beginnings, the shortest
        # first: a term B A x offers "B reads A x" and "B A reads x". The sources of single products are tried in turn,
        # and a source that every term offers is the one.
        # An activation, a gate or a choice of tokens on the way makes a term a branch of its own, and no adapter.
        rows: list[list[Addend]] = []
        for routes, factor in terms:
            if len(routes) != 1 or not routes[0].is_linear or routes[0].kind not in ("product", "sum"):
                return ()
            if routes[0].selective:
                return ()
            route = routes[0].scaled(factor)
            if route.kind == "product":
                rows.append(list(self._rows(route)))
            else:  # a sum inside a sum: W + B₁A₁ was found, and B₂A₂ comes beside it
                inner = self.sums[route.anchor]
                rows += [[Addend((_behind(part.links[0], route), *part.links[1:]), part.source)] for part in inner]
        sources = [row[0].source for row in rows if len(row[0].links) == 1]
        for source in sources:
            found = [next((part for part in row if part.source == source), None) for row in rows]
            if None not in found:
                return tuple(part for part in found if part is not None)
        return ()

    def _rows(self, route: Route) -> Iterator[Addend]:
        """Yield the row of one product, then the row with the product before it, and so on up the branch."""
        links = [route]
        while True:
            source = self._read_by(links[-1])
            yield Addend(tuple(links), source)
            further = self.routes(source)
            if len(further) != 1 or further[0].kind != "product" or not further[0].is_linear or further[0].selective:
                return
            links.append(further[0])

    def _read_by(self, route: Route) -> int:
        """Return the value that the product at the start of a route reads, before data movement.

        Two products that read one value may each have moved it in their own way; before the moves it is the same
        number on the tape. The search does not go beyond the stream, which can itself be a moved value.
        """
        operation = self.tape.producer(route.anchor)
        assert operation is not None
        weight = weight_operand(self.tape, operation)
        data = next(item for item in matrix_operands(operation) if item != weight)
        for value in moved_values(self.tape, data):
            if value == self.region.stream:
                break
        return value


def _factor(operation: Operation, value: int) -> float:
    """Return the number by which a sum multiplies one of its terms."""
    return term_factor(operation, value) if is_addition(operation) else 1.0


def _behind(route: Route, outer: Route) -> Route:
    """Return a route followed by another one: the multipliers of both."""
    return replace(route, multipliers=(*outer.multipliers, *route.multipliers))
