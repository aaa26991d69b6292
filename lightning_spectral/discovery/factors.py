"""Turn the linear routes of a branch into chains of factors, read off a recorded forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_spectral.discovery.operations import base_name, is_norm, matrix_operands, refs, weight_operand
from lightning_spectral.discovery.probe import Prober, Region
from lightning_spectral.discovery.recipes import NoRecipeError, recipe, shortest
from lightning_spectral.discovery.routes import Route, Router, UnmeasurableError, normalized_operand, value_operand
from lightning_spectral.discovery.tape import Operation, Tape
from lightning_spectral.records import BranchKind, Factor, FactorRole

__all__ = ["Chain", "chains"]

Chain = tuple[Factor, ...]
_MAX_CHAINS = 4096
TRANSPOSE = ("transpose", -2, -1)
MATRICES = ("output", "value", "latent", "down", "up")
STACK = ("stack",)  # stands for picking an expert from dimension 0


@dataclass(frozen=True, slots=True)
class _Reader:
    """The matrix that reads what is looked for next: its data operand, channel dimension, and what is held fixed."""

    value: int
    channel: int
    stacked: bool
    frozen: frozenset[int]


def chains(
    tape: Tape,
    region: Region,
    prober: Prober,
    kind: BranchKind,
    multipliers: Sequence[tuple[int, int | float]] = (),
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
    router = Router(tape, region, prober)
    found: list[Chain] = []
    outer = tuple(_scales(tape, Route(region.leaf, "product", multipliers=tuple(item for _, item in multipliers))))
    for inner in _walk(tape, router, region.leaf, None, kind == "attention"):
        chain = (*outer, *inner)
        if chain not in found:
            found.append(chain)
        if len(found) > _MAX_CHAINS:
            raise UnmeasurableError(f"more than {_MAX_CHAINS} ways lead through the branch")
    weighted = [_with_roles(chain, kind) for chain in found if any(factor.role == "latent" for factor in chain)]
    if not weighted:
        raise UnmeasurableError("no weight matrix lies on a linear path through the branch")
    if len({sum(factor.role in MATRICES for factor in chain) for chain in weighted}) > 1:
        raise UnmeasurableError(
            "its output is a sum over paths of different length (a low-rank update beside a weight): merge the update "
            "into the weight to measure it"
        )
    return tuple(weighted)


def _walk(tape: Tape, router: Router, value: int, reader: _Reader | None, single: bool) -> Iterator[Chain]:
    routes = router.routes(value)
    if single and len(routes) > 1:
        raise UnmeasurableError(f"its output is a sum over {len(routes)} paths, not a product of matrices")
    for route in routes:
        scales = () if route.nonlinear else tuple(_scales(tape, route))
        if route.kind == "stream":
            yield scales
            continue
        if reader is not None:
            reader = replace(reader, frozen=reader.frozen | route.frozen)
        operation = tape.producer(route.anchor)
        assert operation is not None
        for chain in _from_anchor(tape, router, route, operation, reader, single):
            yield scales + chain


def _from_anchor(
    tape: Tape, router: Router, route: Route, operation: Operation, reader: _Reader | None, single: bool
) -> Iterator[Chain]:
    if route.kind == "mixing":
        carrier = value_operand(tape, operation)
        held = frozenset(item for item in operation.inputs if item != carrier)
        if reader is not None:
            reader = replace(reader, frozen=reader.frozen | held)
        yield from _walk(tape, router, carrier, reader, single)
    elif route.kind == "norm":
        yield from _from_norm(tape, router, route.anchor, operation, reader, single)
    else:
        geometry = _geometry(tape, operation)
        matrix = _matrix(tape, geometry)
        if reader is not None:
            matrix = replace(matrix, rows=_rows(tape, router, geometry, route.anchor, reader))
        following = _Reader(geometry.data, geometry.channel, geometry.stacked, frozenset())
        for chain in _walk(tape, router, geometry.data, following, single):
            yield (matrix, *chain)


def _from_norm(
    tape: Tape, router: Router, anchor: int, operation: Operation, reader: _Reader | None, single: bool
) -> Iterator[Chain]:
    gain: tuple[int | float, ...] = ()
    if is_norm(operation):
        position = 1 if operation.name == "native_group_norm" else 2
        gain, source = refs(operation, position), operation.inputs[0]
        size = tape.shape(gain[0])[-1] if gain else tape.shape(source)[-1]
    else:
        found = normalized_operand(tape, operation)
        assert found is not None
        source, size = found, tape.shape(found)[-1]
    factors = tuple(_scales(tape, Route(anchor, "norm", multipliers=gain)))
    norm = tuple(replace(factor, role="inner_norm", size=size) for factor in factors) or (
        Factor("inner_norm", None, size=size),
    )
    if not _reaches_product(tape, router, source):
        # Nothing but the stream stands before it: its input's own scale is not ours.
        yield norm
        return
    for chain in _walk(tape, router, source, reader, single):
        yield (*norm, *chain)


def _reaches_product(tape: Tape, router: Router, value: int) -> bool:
    for route in router.routes(value):
        operation = tape.producer(route.anchor)
        if route.kind in ("product", "mixing"):
            return True
        if route.kind == "norm" and operation is not None:
            source = operation.inputs[0] if is_norm(operation) else normalized_operand(tape, operation)
            if source is not None and _reaches_product(tape, router, source):
                return True
    return False


def _scales(tape: Tape, route: Route) -> Iterator[Factor]:
    for multiplier in route.multipliers:
        if isinstance(multiplier, float | int) and not _is_value(multiplier):
            if multiplier != 1:
                yield Factor("scale", None, constant=float(multiplier))
            continue
        value = int(multiplier)
        if tape.made_of_parameters(value):
            try:
                name, steps = recipe(tape, value)
            except NoRecipeError as error:
                raise UnmeasurableError(f"a multiplier on the path cannot be read: {error}") from None
            shape = [size for size in tape.shape(value) if size != 1]
            if len(shape) > 1:
                raise UnmeasurableError("a multiplier on the path differs between tokens")
            steps = tuple(step for step in steps if step[0] not in ("expand", "unsqueeze", "squeeze", "reshape"))
            yield Factor("scale", name, layout=steps, size=shape[0] if shape else None)
        elif tape.tensors[value].numel() == 1 and not tape.is_data(value):
            yield Factor("scale", None, constant=float(tape.tensors[value]))


@dataclass(frozen=True, slots=True)
class _Geometry:
    """How a product reads its operands: M = weight or its transpose, applied to the channels of the data."""

    data: int
    weight: int
    transposed: bool
    channel: int
    stacked: bool


def _geometry(tape: Tape, operation: Operation) -> _Geometry:
    name, weight = base_name(operation), weight_operand(tape, operation)
    operands = matrix_operands(operation)
    assert weight is not None
    if name in ("convolution", "_convolution"):
        kernel = tape.shape(weight)[2:]
        if any(size != 1 for size in kernel) or operation.args[-1] != 1:
            raise UnmeasurableError(f"it passes through a convolution with kernel {tuple(kernel)}")
        return _Geometry(operands[0], weight, False, 1, False)
    if name == "linear":
        return _Geometry(operands[0], weight, False, -1, False)
    if name not in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "grouped_mm", "_addmm_activation", "matmul"):
        raise UnmeasurableError(f"it passes through the kernel {operation.name!r}, whose weight layout is unknown")
    stacked = len(tape.shape(weight)) == 3
    if weight == operands[1]:
        return _Geometry(operands[0], weight, True, -1, stacked)
    return _Geometry(operands[1], weight, False, -2, stacked)


def _matrix(tape: Tape, geometry: _Geometry) -> Factor:
    try:
        name, steps = recipe(tape, geometry.weight)
    except NoRecipeError as error:
        names = [tape.names[known] for known in tape.parents_with_names(geometry.weight)]
        raise UnmeasurableError(
            f"the weight made of {', '.join(names) or 'constants'} cannot be read: {error}"
        ) from None
    steps = tuple(step for step in steps if step != ("experts",))
    if geometry.channel == 1:
        steps = (*steps, ("flatten", 1))
    if geometry.transposed:
        steps = steps[:-1] if steps and steps[-1] == TRANSPOSE else (*steps, TRANSPOSE)
    if geometry.stacked:
        # A batch of one, or one matrix repeated over the batch, is a matrix; else the batch is one of experts.
        single = tape.shape(geometry.weight)[0] == 1 or any(step[0] == "expand" for step in steps)
        steps = (*steps, ("select", 0, 0) if single else STACK)
    parameter = tape.parents_with_names(geometry.weight)[0]
    steps = shortest(steps, tape.shape(parameter))
    return Factor("latent", name, layout=steps)


def _rows(tape: Tape, router: Router, geometry: _Geometry, anchor: int, reader: _Reader) -> tuple[range, ...] | None:
    # One product for all experts at once: the reader's channels are those of each expert in turn.
    joined = reader.stacked and not (geometry.stacked and tape.shape(geometry.weight)[0] > 1)
    dims = (0, reader.channel) if joined else (reader.channel,)
    found = router.prober.channel_map(router.region, (anchor, geometry.channel), (reader.value, *dims), reader.frozen)
    if found is None:
        raise UnmeasurableError("channels are mixed between two of its matrices, so they do not form a product")
    if not joined and found == tuple(range(tape.shape(anchor)[geometry.channel])):
        return None
    return _as_ranges(found)


def _as_ranges(numbers: tuple[int, ...]) -> tuple[range, ...]:
    """Write a sequence of numbers as ranges of one length and one step where that is possible (heads, mostly)."""
    runs: list[range] = []
    for number in numbers:
        last = runs[-1] if runs else range(0)
        step = number - last[-1] if last else 1
        if (len(last) == 1 and step > 0) or (len(last) > 1 and step == last.step):
            runs[-1] = range(last[0], number + 1, step)
        else:
            runs.append(range(number, number + 1))
    length = math.gcd(*map(len, runs))
    return (
        tuple(run[start : start + length] for run in runs for start in range(0, len(run), length))
        if len({run.step for run in runs}) == 1 and len(runs) > 1 and length > 1
        else tuple(runs)
    )


def _is_value(multiplier: int | float) -> bool:
    # Values of the tape are ints, constants are floats.
    return isinstance(multiplier, int)


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
        result.append(replace(factor, role=role))
    return _merged_norms(tuple(result))


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
