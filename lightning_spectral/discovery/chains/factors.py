"""Turn the linear routes of a branch into chains of factors, read off a recorded forward pass.

The walk goes from the end of the branch to the stream, from anchor to anchor. A chain lists its factors in the order of
the matrix product, so in the order of the walk: [output, value, pre_norm] is output · value · diag(pre_norm).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lightning_spectral.discovery.chains.adapters import summed_matrix
from lightning_spectral.discovery.chains.linear import LinearPart
from lightning_spectral.discovery.chains.multipliers import multiplier_factors
from lightning_spectral.discovery.chains.patterns import check_pattern
from lightning_spectral.discovery.chains.products import (
    Columns,
    Reader,
    WeightProduct,
    as_ranges,
    columns_read,
    matrix_factor,
    rows_read,
    weight_product,
)
from lightning_spectral.discovery.chains.routes import Route, Router
from lightning_spectral.discovery.trace.operands import UnmeasurableError, norm_channel
from lightning_spectral.discovery.trace.operations import Divisor, is_norm, norm_gain, norm_groups
from lightning_spectral.discovery.trace.probe import Prober, Region
from lightning_spectral.discovery.trace.tape import Operation, Tape
from lightning_spectral.records import BranchKind, Factor, FactorRole

__all__ = ["Chain", "FoundChain", "chains", "chains_of", "kind_of", "merged"]

Chain = tuple[Factor, ...]
_MAX_CHAINS = 4096


class FoundChain(NamedTuple):
    """One chain of factors, the factor nearest the site first.

    Attributes:
        factors: The chain.
        selective: Whether the data chooses the tokens of this chain: an expert.
        mixes: Whether the chain leads through an attention pattern.
        bends: Whether an activation or a gate stands between two matrices of the chain.
    """

    factors: Chain
    selective: bool
    mixes: bool = False
    bends: bool = False


def chains(linear: LinearPart, prober: Prober, kind: BranchKind) -> tuple[FoundChain, ...]:
    """Return the chains of factors of one branch. Chains are added up; chains that the data chooses are alternatives.

    Args:
        linear: The linear part of the branch.
        prober: Answers numerical questions.
        kind: The kind of the branch, which names the roles.

    Returns:
        One chain per way from the branch output to the stream: usually 1 for a dense branch, 1 per expert that ran.

    Raises:
        UnmeasurableError: Where the branch is not a sum of products of its parameters; the message says why.
    """
    walker = _Walker(linear.tape, linear.region, prober, linear, Router(linear.steps))
    found: dict[FoundChain, None] = {}
    end = Reader(linear.region.leaf, linear.end_channel(prober.channel_dim(linear.region)))
    for inner in walker.chains_to(linear.region.leaf, end):
        if any(factor.role == "latent" for factor in inner.factors):
            chain = merged(_with_roles(inner.factors, kind_of(inner, kind)))
            found[FoundChain(chain, inner.selective, inner.mixes, inner.bends)] = None
        if len(found) > _MAX_CHAINS:
            raise UnmeasurableError(f"more than {_MAX_CHAINS} ways lead through the branch")
    if not found:
        raise UnmeasurableError("no weight matrix lies on a linear path through the branch")
    return tuple(found)


def chains_of(linear: LinearPart, prober: Prober, value: int, channel: int) -> Iterator[Chain]:
    """Yield the chains of factors from the stream to a value inside a branch, with roles that are still open.

    Args:
        linear: The linear part of the branch.
        prober: Answers numerical questions.
        value: The value.
        channel: The dimension of its channels.

    Raises:
        UnmeasurableError: As :func:`chains` raises it.
    """
    walker = _Walker(linear.tape, linear.region, prober, linear, Router(linear.steps))
    yield from (inner.factors for inner in walker.chains_to(value, Reader(value, channel)))


def kind_of(chain: FoundChain | _Inner, kind: BranchKind) -> BranchKind:
    """Return the kind of one chain. A parallel block can have one output matrix for attention and an MLP together."""
    return "mlp" if kind == "attention" and chain.bends and not chain.mixes else kind


def merged(chain: Chain) -> Chain:
    """Write a chain with as few factors as possible: one number between two norms, gains with their norms."""
    return _merged_norms(_merged_constants(chain))


class _Inner(NamedTuple):
    """A chain from the stream to a value, while the walk is on its way.

    Attributes:
        factors: The factors so far, the last one first.
        selective: Whether the data chooses the tokens of this chain.
        columns: The channels of the reader that the chain feeds, ``None`` for all.
        mixes: Whether the chain leads through an attention pattern.
        bends: Whether an activation or a gate stands between two matrices of the chain.
        bent: Whether one stands behind the last matrix so far. The next matrix turns it into ``bends``.
    """

    factors: Chain
    selective: bool = False
    columns: Columns | None = None
    mixes: bool = False
    bends: bool = False
    bent: bool = False


@dataclass(frozen=True, slots=True)
class _Walker:
    """Walks one branch backwards, from anchor to anchor."""

    tape: Tape
    region: Region
    prober: Prober
    linear: LinearPart
    router: Router

    def chains_to(self, value: int, reader: Reader) -> Iterator[_Inner]:
        """Yield the chains of factors from the stream to a value, as the reader of the value sees them.

        Args:
            value: The value.
            reader: The product that reads the value next, or the end of the branch.
        """
        routes = self.router.routes(value)
        # Attention and an MLP that enter one matrix: while one of them is read, the other one is held at zero.
        apart = len({route.kind == "mixing" for route in routes}) > 1 and self.linear.mixes_tokens
        for route in routes:
            own = replace(reader, held=(*reader.held, *self._beside(route, routes, value))) if apart else reader
            yield from self._along(route, own)

    def _beside(self, route: Route, routes: Sequence[Route], value: int) -> Iterator[int]:
        """Yield values to hold at zero so that only the given route feeds a value.

        For an MLP these are the attention products. For attention they are all values of the MLP that the attention
        product neither feeds nor reads; both can begin with one fused matrix.
        """
        if route.kind != "mixing":
            yield from (other.anchor for other in routes if other.kind == "mixing")
            return
        for item in self.region.values[1:]:
            related = self.tape.depends(item, route.anchor) or self.tape.depends(route.anchor, item)
            if not related and self.tape.depends(value, item):
                yield item

    def _along(self, route: Route, reader: Reader) -> Iterator[_Inner]:
        """Yield the chains that end with one route."""
        if route.kind == "stream":
            # The chain is complete. The caller keeps chains with at least one matrix.
            yield _Inner(self._multipliers(route, reader, None), route.selective, bent=not route.is_linear)
            return
        operation = self.tape.producer(route.anchor)
        assert operation is not None
        for inner in self._through(route, operation, reader):
            before = self._multipliers(route, reader, inner.columns)
            bent = inner.bent or (not route.is_linear and route.kind in ("product", "sum"))
            selective = inner.selective or route.selective
            yield inner._replace(factors=(*before, *inner.factors), selective=selective, bent=bent)

    def _multipliers(self, route: Route, reader: Reader, columns: Columns | None) -> Chain:
        """Return the multipliers of a route as factors, the entries of gains in the order of the reader's channels."""
        found = []
        for multiplier in route.multipliers:
            for factor in multiplier_factors(self.tape, (multiplier,), by_head=True):
                if factor.size is not None:
                    value = multiplier.value if isinstance(multiplier, Divisor) else multiplier
                    order = self.linear.gain_channels(route.anchor, int(value), reader.target)
                    factor = _ordered(factor, order, columns)
                found.append(factor)
        return tuple(found)

    def _through(self, route: Route, operation: Operation, reader: Reader) -> Iterator[_Inner]:
        """Yield the chains that end with the anchor of a route."""
        if route.kind == "mixing":
            carrier = self.router.steps.carrier(route.anchor)
            if self.linear.mixes_tokens:
                check_pattern(self.tape, operation, carrier)
            for inner in self.chains_to(carrier, reader):
                yield inner._replace(mixes=True) if self.linear.mixes_tokens else inner._replace(selective=True)
        elif route.kind == "norm":
            yield from self._through_norm(route, operation, reader)
        elif route.kind == "sum":
            yield from self._through_sum(route, reader)
        else:
            product = weight_product(self.tape, operation)
            yield from self._through_matrix(route, product, matrix_factor(self.tape, product), reader)

    def _through_sum(self, route: Route, reader: Reader) -> Iterator[_Inner]:
        """Yield the chains through a sum of products: one chain for a matrix with adapters, else one per term."""
        addends = self.router.sums[route.anchor]
        try:
            product, matrix = summed_matrix(self.region, self.prober, self.linear, route.anchor, addends)
        except UnmeasurableError:  # not one matrix with adapters
            for addend in addends:
                yield from self._along(addend.links[0], reader)
            return
        yield from self._through_matrix(route, product, matrix, reader)

    def _through_matrix(self, route: Route, product: WeightProduct, matrix: Factor, reader: Reader) -> Iterator[_Inner]:
        """Yield the chains through a matrix, of which the reader sees some rows and each inner chain feeds columns."""
        # `columns` are the columns of the reader that these rows feed; the reader's matrix is cut to them further out.
        # `inner.columns` are the columns of this matrix that an inner chain feeds; this matrix is cut to them here.
        rows, columns = rows_read(self.linear, product, route.anchor, reader)
        matrix = replace(matrix, rows=rows)
        for inner in self.chains_to(product.data, Reader.of(product)):
            whole = matrix if inner.columns is None else columns_read(matrix, inner.columns)
            bends = inner.bends or inner.bent
            factors = (whole, *inner.factors)
            yield inner._replace(factors=factors, columns=columns, bends=bends, bent=False)

    def _through_norm(self, route: Route, operation: Operation, reader: Reader) -> Iterator[_Inner]:
        """Yield the chains through a norm: its gain, and what stands before it unless that is the stream."""
        step = self.router.steps.step(route.anchor)
        (source,) = step.sources
        norm = self._norm(route, operation, reader)
        if step.multiplier != 1.0:
            norm = (*multiplier_factors(self.tape, (step.multiplier,)), *norm)
        if self._is_of_stream(source):
            # The norm removes every number that multiplies the stream before it, so the chain ends here.
            yield _Inner(norm)
            return
        for inner in self.chains_to(source, reader):
            if inner.columns is not None:
                raise UnmeasurableError("a norm acts on several matrices side by side")
            yield inner._replace(factors=(*norm, *inner.factors))

    def _norm(self, route: Route, operation: Operation, reader: Reader) -> Chain:
        """Return a norm as a factor, its gain in the order of the reader's channels."""
        gain = norm_gain(operation) if is_norm(operation) else None
        channel = norm_channel(self.tape, operation)
        size = self.tape.shape(route.anchor)[channel]
        found = tuple(multiplier_factors(self.tape, () if gain is None else (gain,)))
        factor = replace(found[0], size=size) if found else Factor("scale", None, size=size)
        # A norm divides by a size that all channels share. So it must be read as a whole, each channel equally often;
        # repeated channels are heads that several query heads read.
        order = self.linear.channels((route.anchor, channel), reader.target)
        whole = tuple(range(size))
        times = None if order in (None, whole) else Counter(order)
        if order is None or (times is not None and any(times[place] != times[0] for place in whole)):
            raise UnmeasurableError("a norm is read in part, or its channels are mixed afterwards")
        groups = norm_groups(operation) if is_norm(operation) else 1
        if order != whole * (len(order) // size):
            if groups > 1 or len(order) > size:
                raise UnmeasurableError("channels are rearranged behind a norm of single heads or groups")
            factor = replace(factor, size=len(order))
            factor = factor if factor.parameter is None else replace(factor, rows=as_ranges(order))
        elif groups > 1:
            factor = replace(factor, size=size // groups)
        return (replace(factor, role="inner_norm"),)

    def _is_of_stream(self, value: int) -> bool:
        """Whether a value is the stream times a number, up to norms: no matrix and no gain stands before it."""
        for route in self.router.routes(value):
            if route.kind in ("product", "sum", "mixing"):
                return False
            if any(factor.size is not None for factor in multiplier_factors(self.tape, route.multipliers)):
                return False
            if route.kind == "norm" and not self._is_of_stream(self.router.steps.step(route.anchor).sources[0]):
                return False
        return True


def _ordered(gain: Factor, order: tuple[int, ...] | None, columns: Columns | None) -> Factor:
    """Return a gain with its entries in the order of the reader's channels.

    Args:
        gain: The gain.
        order: The number of the gain's entry for each channel of the reader, −1 for no entry; ``None`` where several
            entries multiply one channel.
        columns: The channels of the reader that are fed, ``None`` for all.

    Raises:
        UnmeasurableError: Some channel has no entry, or several.
    """
    if order is not None and columns is not None:
        order = tuple(order[place] for place in columns)
    if order is None or min(order) < 0:
        raise UnmeasurableError("a gain acts on a part of the channels, or in another order at every token")
    if order == tuple(range(gain.size or 0)):
        return gain
    return replace(gain, rows=as_ranges(order), size=len(order))


def _merged_constants(chain: Chain) -> Chain:
    """Multiply the numbers between two norms into one number: numbers commute with matrices, but not with norms."""
    result: list[Factor] = []
    segment: list[Factor] = []
    number = 1.0

    def close() -> None:
        nonlocal number
        if abs(number - 1) > 1e-6:
            result.append(Factor("scale", None, constant=number))
        result.extend(segment)
        segment.clear()
        number = 1.0

    # [0.5, W, 2, V, norm, 3] becomes [W, V, norm, 3]: 0.5 · 2 commutes with W and V, and 3 stands behind the norm.
    for factor in chain:
        if factor.role == "scale" and factor.parameter is None:
            number *= factor.constant
        else:
            segment.append(factor)
            if factor.role in ("inner_norm", "post_norm"):
                close()
    close()
    return tuple(result)


def _with_roles(chain: Chain, kind: BranchKind) -> Chain:
    """Name the matrices by their place: output and value for attention, down and up for an MLP.

    A chain of more than two matrices has ``latent`` matrices behind these two (MLA). A norm left of the first matrix is
    ``post_norm``, a norm right of the last one ``pre_norm``, and a norm in between stays ``inner_norm``.
    """
    matrices = [position for position, factor in enumerate(chain) if factor.role == "latent"]
    names: tuple[FactorRole, FactorRole] = ("output", "value") if kind == "attention" else ("down", "up")
    roles = dict(zip(matrices, names, strict=False))
    result = []
    for position, factor in enumerate(chain):
        role = roles.get(position, factor.role)
        if role == "inner_norm" and matrices:
            role = "post_norm" if position < matrices[0] else _norm_in_front(chain, position, matrices[-1])
        elif role == "scale" and factor.size is not None and matrices and position > matrices[-1]:
            role = "pre_norm"
        adapters = tuple(tuple(_named(item, role) for item in adapter) for adapter in factor.adapters)
        result.append(replace(factor, role=role, adapters=adapters))
    return tuple(result)


def _norm_in_front(chain: Chain, position: int, last: int) -> FactorRole:
    """Return the role of a norm right of the first matrix: ``pre_norm`` in front of the branch, else ``inner_norm``.

    A norm with a gain further right normalizes what the gain makes, so it is not in front of the branch.
    """
    gains = any(factor.role == "scale" and factor.size is not None for factor in chain[position:])
    return "pre_norm" if position > last and not gains else "inner_norm"


def _named(factor: Factor, role: FactorRole) -> Factor:
    return replace(factor, role=role) if factor.role == "latent" else factor


def _merged_norms(chain: Chain) -> Chain:
    """Write a gain and the norm without weights behind it as one norm with this gain."""
    result: list[Factor] = []
    for factor in chain:
        previous = result[-1] if result else None
        if (
            factor.role.endswith("_norm")
            and factor.parameter is None
            and previous is not None
            and previous.parameter is not None
            and previous.size == factor.size
            and previous.role in ("scale", factor.role)
        ):
            result[-1] = replace(previous, role=factor.role)
            continue
        result.append(factor)
    return tuple(result)
