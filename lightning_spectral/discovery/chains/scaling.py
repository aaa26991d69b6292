"""Walk backwards from a value to its ends: the last parameters that together scale it.

A value f is homogeneous of degree 1 in its ends: f(c · ends) = c · f(ends). The walk passes data movement. It enters
all terms of a sum, and one operand of a product with a gate, a routing weight, a multiplier or a constant. It stops at
a matrix and its bias, or at the gain and bias of a norm::

    y = gate · (W h + b) + γ · n          ends: W, b, γ      (not the gate: scaling it, too, would scale y by c²)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_spectral.discovery.trace.operands import normalized_operand
from lightning_spectral.discovery.trace.operations import (
    base_name,
    is_contraction,
    is_division,
    is_fused_attention,
    is_join,
    is_multiplication,
    is_norm,
    is_product,
    is_zero_allocation,
    matrix_operands,
    moved_input,
    norm_gain,
    refs,
    scattered_inputs,
    weight_operand,
)
from lightning_spectral.discovery.trace.tape import Operation, Tape

__all__ = ["PARAMETRIZED", "Scaling", "ScalingWalk", "UnscalableError"]

PARAMETRIZED = "its last weight is parametrized ({})"


class UnscalableError(Exception):
    """No parameters scale the value; the message is the reason that the user sees."""


@dataclass(slots=True)
class Scaling:
    """The result of a walk.

    Attributes:
        leaves: The parameters by their value on the tape, each with the number that is added to it before its use: 1
            for a gain that a norm uses as 1 + w.
        read: The data that the parameters multiply.
    """

    leaves: dict[int, float] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)

    def update(self, other: Scaling) -> None:
        """Add the parameters of another term of a sum."""
        for leaf, offset in other.leaves.items():
            if self.leaves.setdefault(leaf, offset) != offset:
                raise UnscalableError("its last weight is used with and without an offset")
        self.read |= other.read


@dataclass(frozen=True, slots=True)
class ScalingWalk:
    """Walks backwards from a value to its ends.

    Attributes:
        tape: The recorded forward pass.
        stream: The stream, at which no walk may arrive.
        refused: Parameters that cannot be ends, each with the reason.
    """

    tape: Tape
    stream: int
    refused: Mapping[int, str]

    def ends(self, value: int) -> Scaling:
        """Return the ends of a value; no end for a value that is zero.

        Raises:
            UnscalableError: A part of the value has no end.
        """
        found = Scaling()
        seen, queue = {value}, [value]
        while queue:
            value = queue.pop()
            terms = self._terms(value)
            if terms is None:
                found.update(self._factor(value))
            else:
                queue += [term for term in terms if term not in seen]  # x + x has the ends of x
                seen.update(terms)
        return found

    def _terms(self, value: int) -> Sequence[int] | None:
        """Return the values whose sum, or moved copy, a value is; ``None`` for other values."""
        operation = self.tape.producer(value)
        if value in self.tape.names or value == self.stream or self._is_zero(value, operation):
            return None
        if operation is None:
            return None
        name, moved = base_name(operation), moved_input(operation)
        if name == "where":
            return [item for position in (1, 2) for item in refs(operation, position)]
        if moved is not None:
            return [moved]
        if is_join(operation) or name == "neg" or (name in ("add", "sub") and _number(operation) is None):
            return operation.inputs
        return scattered_inputs(operation) or None

    def _factor(self, value: int) -> Scaling:
        """Return the ends of a value that is no sum."""
        tape, operation = self.tape, self.tape.producer(value)
        if value in tape.names:
            if value in self.refused:
                raise UnscalableError(self.refused[value])
            return Scaling({value: 0.0})
        if self._is_zero(value, operation):
            return Scaling()
        if value == self.stream or (operation is None and tape.is_data(value)):
            raise UnscalableError("a part of it reaches its end without a weight")
        if operation is None:
            raise UnscalableError("a constant is added to it")
        if is_norm(operation):
            return self._normed(operation)
        if is_product(tape, operation):
            weight, operands = weight_operand(tape, operation), matrix_operands(operation)
            assert weight is not None
            found = self._sum([weight, *self._added(operation)])
            found.read.update(item for item in operands if item != weight and tape.is_data(item))
            return found
        return self._multiplied(operation)

    def _added(self, operation: Operation) -> list[int]:
        """Return the biases that a product adds to its result. Integers among its inputs are group sizes, no biases."""
        operands = matrix_operands(operation)
        others = [value for value in operation.inputs if value not in operands]
        return [value for value in others if self.tape.tensors[value].is_floating_point()]

    def _sum(self, values: Iterable[int]) -> Scaling:
        """Return the ends of several values together."""
        found = Scaling()
        for value in values:
            found.update(self.ends(value))
        return found

    def _normed(self, operation: Operation) -> Scaling:
        """Return the gain and the bias of a fused norm as ends."""
        gain = norm_gain(operation)
        if gain is None:
            raise UnscalableError("a norm without weights stands behind it")
        position = next(place for place in range(len(operation.args)) if refs(operation, place) == (gain,))
        return self._sum([gain, *refs(operation, position + 1)])

    def _multiplied(self, operation: Operation) -> Scaling:
        """Return the ends of one operand of a product. The other operands stay fixed."""
        tape, name = self.tape, base_name(operation)
        if normalized_operand(tape, operation) is not None:
            raise UnscalableError("a norm without weights stands behind it")
        if is_division(operation):
            return self._sum(refs(operation, 0))
        if is_fused_attention(operation):
            return self._sum(refs(operation, 2))
        if is_multiplication(operation):
            return self._first(operation.inputs)
        if is_contraction(operation):
            operands = matrix_operands(operation)
            found = self._first(operands)
            found.update(self._sum(self._added(operation)))
            return found
        # 1 + w: scaling w alone does not scale it, but scaling 1 + w does, with the offset 1.
        number = _number(operation)
        if name == "add" and number is not None:
            found = self._sum(operation.inputs)
            if number == 0:
                return found
            if tape.made_of_parameters(operation.outputs[0]) and len(found.leaves) == 1:
                return Scaling({leaf: offset + number for leaf, offset in found.leaves.items()})
            raise UnscalableError("a constant is added to it")
        if tape.made_of_parameters(operation.outputs[0]):
            name = tape.names[tape.parents_with_names(operation.outputs[0])[0]]
            raise UnscalableError(
                PARAMETRIZED.format(name)
                if ".parametrizations." in name
                else f"its last weight is computed from {name} by the operation {operation.name!r}"
            )
        raise UnscalableError(f"no weight follows the operation {operation.name!r} at its end")

    def _first(self, operands: Iterable[int]) -> Scaling:
        """Return the ends of the first operand that has ends: data before parameters, large operands before small."""
        reason: UnscalableError | None = None
        for value in sorted(operands, key=lambda item: (-self.tape.is_data(item), -self.tape.tensors[item].numel())):
            try:
                found = self.ends(value)
            except UnscalableError as error:
                reason = reason or error
                continue
            if found.leaves:
                return found
        if reason is not None:
            raise reason
        return Scaling()

    def _is_zero(self, value: int, operation: Operation | None) -> bool:
        """Whether a value is zero in every pass: an allocation, or a constant of zeros."""
        tape = self.tape
        if operation is not None and is_zero_allocation(operation):
            return True
        constant = not tape.ancestors[value] & (tape.parameters | tape.data)
        return constant and not bool(tape.content(value).any())


def _number(operation: Operation) -> float | None:
    """Return the number among the arguments of an addition."""
    return next((float(item) for item in operation.args if isinstance(item, int | float)), None)
