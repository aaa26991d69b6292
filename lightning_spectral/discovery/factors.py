"""Turn the linear routes of a branch into chains of factors, read off a recorded forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_spectral.discovery.multipliers import multiplier_factors
from lightning_spectral.discovery.operands import UnmeasurableError, normalized_operand, value_operand
from lightning_spectral.discovery.operations import Multiplier, is_norm, refs
from lightning_spectral.discovery.probe import Prober, Region
from lightning_spectral.discovery.products import MATRICES, Reader, matrix_factor, rows_read, weight_product
from lightning_spectral.discovery.routes import Route, Router
from lightning_spectral.discovery.sums import summed_matrix
from lightning_spectral.discovery.tape import Operation, Tape
from lightning_spectral.records import BranchKind, Factor, FactorRole

__all__ = ["Chain", "chains", "check_sum"]

Chain = tuple[Factor, ...]
_MAX_CHAINS = 4096


def chains(
    tape: Tape,
    region: Region,
    prober: Prober,
    kind: BranchKind,
    multipliers: Sequence[tuple[int, Multiplier]] = (),
) -> tuple[Chain, ...]:
    """Return the chains of factors of one branch, the factor nearest the site first.

    Args:
        tape: The recorded forward pass.
        region: The branch: from the stream to the value that is added to it.
        prober: Answers numerical questions.
        kind: The kind of the branch, which names the roles.
        multipliers: The constants that multiply the branch before it is added, outermost first.

    Returns:
        One chain per way from the branch output to the stream: one for a dense branch, one per expert that ran.

    Raises:
        UnmeasurableError: Where the branch is not a chain of matrices of its parameters; the message says why.
    """
    walker = _Walker(tape, region, prober, Router(tape, region, prober), single=kind == "attention")
    outer = tuple(multiplier_factors(tape, tuple(multiplier for _, multiplier in multipliers)))
    found: dict[Chain, None] = {}
    for inner in walker.chains_to(region.leaf, None):
        found[*outer, *inner] = None
        if len(found) > _MAX_CHAINS:
            raise UnmeasurableError(f"more than {_MAX_CHAINS} ways lead through the branch")
    weighted = [_with_roles(chain, kind) for chain in found if any(factor.role == "latent" for factor in chain)]
    if not weighted:
        raise UnmeasurableError("no weight matrix lies on a linear path through the branch")
    check_sum(weighted, kind)
    return tuple(weighted)


def check_sum(found: Sequence[Chain], kind: BranchKind) -> None:
    """Check that chains which are added up are alternatives: the experts of a mixture.

    Raises:
        UnmeasurableError: The norm of the sum is not the largest norm of a chain.
    """
    if kind == "attention" and len(found) > 1:
        raise UnmeasurableError(f"its output is a sum over {len(found)} paths, not a product of matrices")
    if len({sum(factor.role in MATRICES for factor in chain) for chain in found}) > 1:
        raise UnmeasurableError(
            "its output is a sum over paths of different length (a low-rank update beside a weight): merge the update "
            "into the weight to measure it"
        )


@dataclass(frozen=True, slots=True)
class _Walker:
    """Walks one branch backwards, from anchor to anchor. ``single``: a second way from a value is an error."""

    tape: Tape
    region: Region
    prober: Prober
    router: Router
    single: bool

    def chains_to(self, value: int, reader: Reader | None) -> Iterator[Chain]:
        """Yield the chains of factors that end at a value, the last factor first."""
        routes = self.router.routes(value)
        if self.single and len(routes) > 1:
            raise UnmeasurableError(f"its output is a sum over {len(routes)} paths, not a product of matrices")
        for route in routes:
            scales = () if route.nonlinear else tuple(multiplier_factors(self.tape, route.multipliers))
            if route.kind == "stream":
                yield scales
                continue
            operation = self.tape.producer(route.anchor)
            assert operation is not None
            for chain in self._through(route, operation, _holding(reader, route.frozen)):
                yield scales + chain

    def _through(self, route: Route, operation: Operation, reader: Reader | None) -> Iterator[Chain]:
        if route.kind == "mixing":
            carrier = value_operand(self.tape, operation)
            pattern = frozenset(item for item in operation.inputs if item != carrier)
            yield from self.chains_to(carrier, _holding(reader, pattern))
        elif route.kind == "norm":
            yield from self._through_norm(operation, reader)
        else:
            if route.kind == "sum":
                addends = self.router.sums[route.anchor]
                product, matrix = summed_matrix(self.region, self.prober, route.anchor, addends)
            else:
                product = weight_product(self.tape, operation)
                matrix = matrix_factor(self.tape, product)
            if reader is not None:
                rows = rows_read(self.prober, self.region, product, route.anchor, reader)
                matrix = replace(matrix, rows=rows)
            for chain in self.chains_to(product.data, Reader(product)):
                yield (matrix, *chain)

    def _through_norm(self, operation: Operation, reader: Reader | None) -> Iterator[Chain]:
        source = self._normalized(operation)
        gain: tuple[int, ...] = ()
        if is_norm(operation):
            gain = refs(operation, 1 if operation.name == "native_group_norm" else 2)
        size = self.tape.shape(gain[0] if gain else source)[-1]
        gains = [replace(factor, role="inner_norm", size=size) for factor in multiplier_factors(self.tape, gain)]
        norm = tuple(gains) or (Factor("inner_norm", None, size=size),)
        if not self._reaches_product(source):
            # Nothing but the stream stands before the norm, and the norm removes the scale of that.
            yield norm
            return
        for chain in self.chains_to(source, reader):
            yield (*norm, *chain)

    def _normalized(self, operation: Operation) -> int:
        source = operation.inputs[0] if is_norm(operation) else normalized_operand(self.tape, operation)
        assert source is not None
        return source

    def _reaches_product(self, value: int) -> bool:
        for route in self.router.routes(value):
            operation = self.tape.producer(route.anchor)
            if route.kind in ("product", "sum", "mixing"):
                return True
            if route.kind == "norm" and operation is not None and self._reaches_product(self._normalized(operation)):
                return True
        return False


def _holding(reader: Reader | None, frozen: frozenset[int]) -> Reader | None:
    return None if reader is None else replace(reader, frozen=reader.frozen | frozen)


def _with_roles(chain: Chain, kind: BranchKind) -> Chain:
    """Name the matrices by their place: output and value for attention, down and up for an MLP."""
    matrices = [position for position, factor in enumerate(chain) if factor.role == "latent"]
    names: tuple[FactorRole, FactorRole] = ("output", "value") if kind == "attention" else ("down", "up")
    roles = dict(zip(matrices, names, strict=False))
    result = []
    for position, factor in enumerate(chain):
        role = roles.get(position, factor.role)
        if role == "inner_norm" and matrices:
            role = "post_norm" if position < matrices[0] else "pre_norm" if position > matrices[-1] else role
        elif role == "scale" and factor.size is not None and matrices and position > matrices[-1]:
            role = "pre_norm"
        adapters = tuple(tuple(_named(item, role) for item in adapter) for adapter in factor.adapters)
        result.append(replace(factor, role=role, adapters=adapters))
    return _merged_norms(tuple(result))


def _named(factor: Factor, role: FactorRole) -> Factor:
    return replace(factor, role=role) if factor.role == "latent" else factor


def _merged_norms(chain: Chain) -> Chain:
    """A gain that is multiplied onto a weightless norm is that norm's gain."""
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
