"""Walk a branch backwards from its output to the stream, along the route on which it is linear in its matrices.

On that route lie the matrices of the circuit linearization: output and value projection for attention (the attention
pattern is held fixed), down and up projection for an MLP (its activation and gate are left out).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lightning_spectral.discovery.operands import normalized_operand
from lightning_spectral.discovery.operations import (
    Multiplier,
    added_operand,
    addends,
    base_name,
    is_contraction,
    is_norm,
    is_product,
    matrix_operands,
    moved_input,
    moved_values,
    multiplied_input,
    refs,
    scattered_inputs,
    shifted_input,
    term_factor,
    weight_operand,
)
from lightning_spectral.discovery.paths import common_parts
from lightning_spectral.discovery.probe import Prober, Region
from lightning_spectral.discovery.tape import Operation, Tape

__all__ = ["Addend", "Route", "Router"]

# Operations that read the shape of their input and nothing else.
_ONLY_SHAPE = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}


@dataclass(frozen=True, slots=True)
class Route:
    """How a value is reached from the nearest anchor (a product, an attention product, a norm or the stream).

    Attributes:
        anchor: The value at which the route starts.
        kind: ``"product"``, ``"sum"`` (of products that read one value), ``"mixing"``, ``"norm"`` or ``"stream"``.
        nonlinear: Whether an activation lies on the route.
        multipliers: Constants and parameters that multiply the value on the route, nearest its end first.
        frozen: The other operands of gates on the route.
    """

    anchor: int
    kind: str
    nonlinear: bool = False
    multipliers: tuple[Multiplier, ...] = ()
    frozen: frozenset[int] = frozenset()

    def scaled(self, factor: float) -> Route:
        """Return the route with one more multiplier at its end."""
        return self if factor == 1.0 else replace(self, multipliers=(factor, *self.multipliers))

    @property
    def is_linear(self) -> bool:
        """Whether nothing but multipliers lies on the route."""
        return not self.nonlinear and not self.frozen


class Addend(NamedTuple):
    """One term of a sum of matrices: products in a row.

    Attributes:
        links: The routes to the products, the last product first.
        source: The value that the first product reads, up to data movement.
    """

    links: tuple[Route, ...]
    source: int


class Router:
    """Finds the routes of one branch.

    Attributes:
        sums: The terms of every sum of products that read one value: a matrix and the adapters beside it.
    """

    def __init__(self, tape: Tape, region: Region, prober: Prober) -> None:
        """Prepare for one branch."""
        self.tape, self.region, self.prober = tape, region, prober
        self.sums: dict[int, tuple[Addend, ...]] = {}
        self._known: dict[int, tuple[Route, ...]] = {}

    def routes(self, value: int) -> tuple[Route, ...]:
        """Return the routes that end at ``value``; none where it does not depend on the stream."""
        if value not in self._known:
            self._known[value] = tuple(self._routes(value))
        return self._known[value]

    def _routes(self, value: int) -> Iterable[Route]:
        tape, stream = self.tape, self.region.stream
        if value == stream:
            return [Route(value, "stream")]
        if not tape.depends(value, stream):
            return []
        operation = tape.producer(value)
        assert operation is not None
        if operation.name in _ONLY_SHAPE:
            return []
        if is_product(tape, operation):
            return self._product(operation, value)
        anchor = self._anchor(operation, value)
        if anchor is not None:
            return [anchor]
        moved = moved_input(operation)
        if moved is not None:
            # Entries of something else, picked by the stream (an expert's bias): no path for the stream itself.
            return self.routes(moved)
        multiplied = multiplied_input(tape, operation)
        if multiplied is not None:
            return [
                replace(route, multipliers=(multiplied[1], *route.multipliers)) for route in self.routes(multiplied[0])
            ]
        shifted = shifted_input(tape, operation, stream)
        if shifted is not None:
            return [route.scaled(abs(term_factor(operation, shifted))) for route in self.routes(shifted)]
        return self._joined(operation, value)

    def _anchor(self, operation: Operation, value: int) -> Route | None:
        if is_norm(operation):
            return Route(value, "norm")
        if is_contraction(operation):
            return Route(value, "mixing")
        normalized = normalized_operand(self.tape, operation)
        return None if normalized is None else Route(value, "norm")

    def _product(self, operation: Operation, value: int) -> Iterable[Route]:
        """A product is an anchor; fused with the addition of something that depends on the stream, it is a term."""
        product = Route(value, "product").scaled(float(operation.kwargs.get("alpha", 1)))
        added = added_operand(operation)
        if added is None or not self.tape.depends(added, self.region.stream):
            return [product]
        beta = float(operation.kwargs.get("beta", 1))
        return self._added(value, [(self.routes(added), beta), ((product,), 1.0)])

    def _added(self, value: int, terms: Sequence[tuple[Sequence[Route], float]]) -> Iterable[Route]:
        """Routes to a sum of terms, each with the number that multiplies it."""
        parts = self._products(terms)
        if parts:
            self.sums[value] = parts
            return [Route(value, "sum")]
        # Signs do not matter to norms.
        return _merged(route.scaled(abs(factor)) for routes, factor in terms for route in routes)

    def _products(self, terms: Sequence[tuple[Sequence[Route], float]]) -> tuple[Addend, ...]:
        """Return terms as products in a row, if all of them read one value and one is a single product; else none."""
        rows: list[list[Addend]] = []
        for routes, factor in terms:
            if len(routes) != 1 or not routes[0].is_linear or routes[0].kind not in ("product", "sum"):
                return ()
            route = routes[0].scaled(factor)
            if route.kind == "product":
                rows.append(list(self._rows(route)))
            else:
                inner = self.sums[route.anchor]
                rows += [[Addend((_behind(part.links[0], route), *part.links[1:]), part.source)] for part in inner]
        sources = [row[0].source for row in rows if len(row[0].links) == 1]
        for source in sources:
            found = [next((part for part in row if part.source == source), None) for row in rows]
            if None not in found:
                return tuple(part for part in found if part is not None)
        return ()

    def _rows(self, route: Route) -> Iterator[Addend]:
        """Yield the products that lie in a row behind one, each time with one more."""
        links = [route]
        while True:
            source = self._read_by(links[-1])
            yield Addend(tuple(links), source)
            further = self.routes(source)
            if len(further) != 1 or further[0].kind != "product" or not further[0].is_linear:
                return
            links.append(further[0])

    def _read_by(self, route: Route) -> int:
        """Return what the product at the start of a route multiplies, before data movement."""
        operation = self.tape.producer(route.anchor)
        assert operation is not None
        weight = weight_operand(self.tape, operation)
        data = next(item for item in matrix_operands(operation) if item != weight)
        for value in moved_values(self.tape, data):
            if value == self.region.stream:
                break
        return value

    def _joined(self, operation: Operation, value: int) -> Iterable[Route]:
        """Routes through an operation that joins several values, or through an activation."""
        tape, stream = self.tape, self.region.stream
        inputs = [value for value in operation.inputs if tape.depends(value, stream)]
        name = base_name(operation)
        scattered = scattered_inputs(operation)
        if name in ("add", "sub", "rsub"):
            return self._added(value, [(self.routes(item), term_factor(operation, item)) for item in inputs])
        if len(addends(tape, operation)) > 1 or name in ("cat", "stack", "refresh"):
            return self._union(inputs)
        if scattered:
            return self._union([value for value in scattered if value in inputs])
        if name in ("mul", "div") and len(inputs) == 2:
            return self._gated(operation, *inputs)
        if name in ("mul", "div") and len(inputs) == 1 and len(operation.inputs) == 2:
            # Gated by data of another origin (a conditioning vector): held fixed.
            other = next(item for item in operation.inputs if item != inputs[0])
            return [replace(route, frozen=route.frozen | {other}) for route in self.routes(inputs[0])]
        if name == "where":
            inputs = [value for position in (1, 2) for value in refs(operation, position) if value in inputs]
        return [replace(route, nonlinear=True, multipliers=()) for route in self._union(inputs)]

    def _union(self, values: Iterable[int]) -> list[Route]:
        return _merged(route for value in dict.fromkeys(values) for route in self.routes(value))

    def _gated(self, operation: Operation, first: int, second: int) -> Iterable[Route]:
        """Follow the linear operand of a gate; two operands with one origin make an activation."""
        narrow = [value for value in (first, second) if self._is_narrow(value, operation)]
        if len(narrow) == 1:
            first, second = (second, first) if narrow[0] == first else (first, second)
            return self._through(first, second)
        anchors = [{route.anchor for route in self.routes(value)} for value in (first, second)]
        if anchors[0] == anchors[1] and self._same_channels(first, second, anchors[0]):
            return [replace(route, nonlinear=True, multipliers=()) for route in self._union((first, second))]
        affine = [
            self.prober.is_affine(self.region, sources, value)
            for value, sources in zip((first, second), anchors, strict=True)
        ]
        if affine[1] and not affine[0]:
            first, second = second, first
        elif affine[0] == affine[1] and self._named_gate(first):
            # Both halves (or none) are linear: structure cannot tell, the name of the weight can.
            first, second = second, first
        return self._through(first, second)

    def _through(self, linear: int, gate: int) -> Iterable[Route]:
        return [replace(route, frozen=route.frozen | {gate}) for route in self.routes(linear)]

    def _is_narrow(self, value: int, operation: Operation) -> bool:
        """Whether the value has one entry per token: a router's weight, not a gate per channel."""
        value = self._unexpanded(value)
        shape = self.tape.shape(value)
        return not shape or (shape[-1] == 1 and self.tape.shape(operation.outputs[0])[-1] != 1)

    def _unexpanded(self, value: int) -> int:
        operation = self.tape.producer(value)
        while operation is not None and operation.name in ("expand", "unsqueeze", "_to_copy"):
            value = operation.inputs[0]
            operation = self.tape.producer(value)
        return value

    def _same_channels(self, first: int, second: int, anchors: set[int]) -> bool:
        if len(anchors) != 1:
            return False
        return self.prober.same_support(self.region, next(iter(anchors)), first, second)

    def _named_gate(self, value: int) -> bool:
        modules = []
        for route in self.routes(value):
            links = (
                [link for part in self.sums[route.anchor] for link in part.links] if route.kind == "sum" else [route]
            )
            if route.kind in ("product", "sum"):
                weights = [name for link in links for name in self._weights(link)]
                # The last word before the weight, or before what tells a weight from its adapters.
                modules += [(common_parts(name.rpartition(".")[0] for name in weights) or [""])[-1]]
        return any("gate" in module for module in modules[-1:])

    def _weights(self, product: Route) -> list[str]:
        operation = self.tape.producer(product.anchor)
        weight = None if operation is None else weight_operand(self.tape, operation)
        return [] if weight is None else [self.tape.names[known] for known in self.tape.parents_with_names(weight)]


def _merged(routes: Iterable[Route]) -> list[Route]:
    """Merge routes; two ways from one anchor make an activation of it, unless they are the same way."""
    found: dict[int, Route] = {}
    for route in routes:
        other = found.get(route.anchor)
        if other is None or other == route:
            found[route.anchor] = route
        else:
            frozen = other.frozen | route.frozen
            found[route.anchor] = replace(route, nonlinear=True, multipliers=(), frozen=frozen)
    return list(found.values())


def _behind(route: Route, outer: Route) -> Route:
    """Return a route with the multipliers of another one that goes on from its end."""
    return replace(route, multipliers=(*outer.multipliers, *route.multipliers))
