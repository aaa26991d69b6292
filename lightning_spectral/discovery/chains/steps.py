"""How each operation of a branch carries the stream on, where the branch is taken as linear in its matrices.

A branch is a program. In its circuit an activation passes its input on, a gate passes on the half that it gates, an
attention pattern passes on the values, and a norm multiplies by its gain. This file decides the kind of each operation.
The routes of a branch (``routes``) and its linear part (``linear``) are both read off these decisions.

    silu(gate(x)) * up(x)       mul      gate        sources = up       the half that is linear
    0.5 * y * (1 + erf(y))      mul      activation  sources = y        two operands that are functions of one value
    y + sin(y)²                 add      activation  sources = y
    softmax(s) @ v              bmm      mixing      carrier = v
    p[:, :, None] * expert(x)   mul      gate        selective          one entry per token: a router's weight
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightning_spectral.discovery.trace.operands import UnmeasurableError, normalized_operand, value_operand
from lightning_spectral.discovery.trace.operations import (
    Multiplier,
    added_operand,
    addends,
    base_name,
    is_addition,
    is_broadcast,
    is_contraction,
    is_join,
    is_norm,
    is_pick,
    is_product,
    matrix_operands,
    moved_input,
    multiplied_input,
    refs,
    scattered_inputs,
    shifted_input,
    term_factor,
    weight_operand,
)
from lightning_spectral.discovery.trace.probe import Prober, Region
from lightning_spectral.discovery.trace.tape import Operation, Tape

__all__ = ["Step", "Steps", "picks_by_data"]

Kind = Literal["stream", "none", "move", "multiply", "gate", "sum", "join", "product", "mixing", "norm", "activation"]

# Activations that have a parameter.
_LEARNED_ACTIVATIONS = {"prelu", "_prelu_kernel"}


@dataclass(frozen=True, slots=True)
class Step:
    """What one operation does to the stream.

    Attributes:
        kind: ``"stream"`` (the beginning), ``"none"`` (the stream ends here), ``"move"`` (data movement and linear
            reductions), ``"multiply"`` (by a constant or parameters), ``"gate"``, ``"sum"``, ``"join"`` (several values
            side by side), ``"product"`` (with a weight), ``"mixing"`` (of tokens), ``"norm"``, ``"activation"``.
        sources: The inputs that carry the stream on.
        multiplier: The multiplier of a ``"multiply"``; the size of the output of a written-out ``"norm"``; the slope of
            a written-out ``"activation"``.
        selective: Whether the data chooses the tokens that pass, by a router's weight or by picking them.
    """

    kind: Kind
    sources: tuple[int, ...] = ()
    multiplier: Multiplier = 1.0
    selective: bool = False


class Steps:
    """The steps of one branch, each decided once."""

    def __init__(self, tape: Tape, region: Region, prober: Prober) -> None:
        """Prepare for one branch."""
        self.tape, self.region, self.prober = tape, region, prober
        self._known: dict[int, Step] = {}

    def step(self, value: int) -> Step:
        """Return how a value came from the stream.

        Raises:
            UnmeasurableError: An operation is neither linear, nor a gate, nor an activation.
        """
        if value not in self._known:
            self._known[value] = self._decided(value)
        return self._known[value]

    def _decided(self, value: int) -> Step:
        """Decide the step of a value. The order of the questions matters: a written-out norm is also a product."""
        tape, stream = self.tape, self.region.stream
        if value == stream:
            return Step("stream")
        operation = tape.producer(value)
        if not tape.depends(value, stream) or operation is None:
            return Step("none")
        if not tape.tensors[value].numel():
            return Step("none")  # an expert without a token: its siblings show how it is built
        if is_product(tape, operation):
            return self._product(operation)
        if is_norm(operation):
            return Step("norm", operation.inputs[:1])
        if is_contraction(operation):
            return Step("mixing", tuple(item for item in operation.inputs if tape.depends(item, stream)))
        normalized = normalized_operand(tape, operation)
        if normalized is not None:
            return Step("norm", (normalized,), self._size_of_norm(normalized, value))
        if base_name(operation) in ("where", "masked_fill"):
            return self._masked(operation, value)
        return self._linear(operation, value) or self._joined(operation, value)

    def _masked(self, operation: Operation, value: int) -> Step:
        """Return the step of a choice between two values. If they make the mask themselves, it is an activation."""
        masks = refs(operation, 0 if base_name(operation) == "where" else 1)
        inputs = tuple(dict.fromkeys(item for item in operation.inputs if self.tape.depends(item, self.region.stream)))
        if any(mask in inputs for mask in masks):
            return self._written_activation(value, inputs) or Step(
                "join", tuple(item for item in inputs if item not in masks), selective=True
            )
        return Step("join", inputs)

    def _size_of_norm(self, source: int, value: int) -> float:
        """Return the root mean square of the output of a written-out norm: 1, or 1/√d if it divides by the length.

        Raises:
            UnmeasurableError: The root mean square depends on the input.
        """
        size = self.prober.size_of_norm(self.region, source, value)
        if size is None:
            raise UnmeasurableError(
                "it passes through a norm that does not fix the root mean square of what it returns"
            )
        return size

    def carrier(self, value: int) -> int:
        """Return the operand of a mixing that carries the values.

        Raises:
            UnmeasurableError: Neither operand carries the values, or both do.
        """
        operation = self.tape.producer(value)
        assert operation is not None
        return value_operand(self.tape, operation)

    def _product(self, operation: Operation) -> Step:
        """Return the step of a product with a weight. An added value that depends on the stream is a second source."""
        tape = self.tape
        weight, added = weight_operand(tape, operation), added_operand(operation)
        data = tuple(item for item in matrix_operands(operation) if item != weight)
        if added is not None and tape.depends(added, self.region.stream):
            return Step("product", (*data[:1], added))
        return Step("product", data[:1])

    def _linear(self, operation: Operation, value: int) -> Step | None:
        """Return the step of an operation that is linear in one value, ``None`` for another operation."""
        moved = moved_input(operation)
        if moved is not None:
            return Step("move", (moved,), selective=picks_by_data(self.tape, operation))
        multiplied = multiplied_input(self.tape, operation)
        if multiplied is not None:
            return Step("multiply", multiplied[:1], multiplied[1])
        shifted = shifted_input(self.tape, operation, self.region.stream)
        if shifted is not None:
            return Step("multiply", (shifted,), term_factor(operation, shifted))
        return None

    def _joined(self, operation: Operation, value: int) -> Step:
        """Return the step of an operation that joins several values, or is an activation."""
        tape, name = self.tape, base_name(operation)
        inputs = tuple(dict.fromkeys(item for item in operation.inputs if tape.depends(item, self.region.stream)))
        if is_addition(operation) or len(addends(tape, operation)) > 1:
            # h + sin(h)² is one activation of h, and not h beside another activation.
            of_itself = len(inputs) > 1 and self.region.common_source(inputs) in inputs
            return (self._written_activation(value, inputs) if of_itself else None) or Step("sum", inputs)
        if is_join(operation):
            return Step("join", inputs)
        scattered = scattered_inputs(operation)
        if scattered:
            kept = tuple(item for item in scattered if item in inputs)
            return Step("join", kept, selective=picks_by_data(tape, operation))
        if name in ("mul", "div") and len(operation.inputs) == 2:
            return self._multiplied(operation, value, inputs)
        if name == "glu":
            return Step("gate", inputs)
        return self._activation(operation, value, inputs)

    def _multiplied(self, operation: Operation, value: int, inputs: tuple[int, ...]) -> Step:
        """Return the step of a product of two data-dependent values: a gate, or an activation of one value."""
        if len(inputs) == 1:  # the other operand has another origin, such as a conditioning vector
            if self._is_narrow(inputs[0], operation) or self._is_bounded(inputs[0]):
                return Step("none")  # the stream is the gate, and gates for example a value embedding
            return Step("gate", inputs, selective=self._is_narrow_beside(operation, inputs[0]))
        first, second = inputs
        narrow = [item for item in inputs if self._is_narrow(item, operation)]
        if len(narrow) == 1:
            return Step("gate", (second if narrow[0] == first else first,), selective=True)
        activation = self._written_activation(value, inputs)
        if activation is not None:
            return activation
        if base_name(operation) == "div":
            return Step("gate", (first,))
        return Step("gate", (self._gated(first, second),))

    def _gated(self, first: int, second: int) -> int:
        """Return which of two operands is the linear one; the other is the gate.

        Three signs, in this order: only one operand is affine; only one is a sigmoid, which is the gate; a name with
        "gate" in it. Of two operands without any sign, both not affine, the first one counts as linear.

        Raises:
            UnmeasurableError: Both operands are affine, and no name says which is the gate.
        """
        affine = [self._is_affine(item) for item in (first, second)]
        if affine[1] and not affine[0]:
            return second
        if affine[0] == affine[1] and self._is_sigmoid(first) != self._is_sigmoid(second):
            return second if self._is_sigmoid(first) else first
        if affine[0] == affine[1] and self._named_gate(first):
            # Both halves are linear, or neither: only the name of the weight can tell.
            return second
        if all(affine) and not self._named_gate(second):
            raise UnmeasurableError(
                "its two halves multiply each other and both are linear, so that none of them is the gate (a weight "
                "with 'gate' in its name would be)"
            )
        return first

    def _is_sigmoid(self, value: int) -> bool:
        """Whether a value is the output of a sigmoid, up to moves and multipliers."""
        while (operation := self.tape.producer(value)) is not None and "sigmoid" not in operation.name:
            step = self.step(value)
            if step.kind not in ("move", "multiply"):
                return False
            (value,) = step.sources
        return operation is not None

    def _is_affine(self, value: int) -> bool:
        """Whether a value is affine in its anchors."""
        return self.prober.is_affine(self.region, self._anchors(value), value)

    def _is_bounded(self, value: int) -> bool:
        """Whether a value stays the same while its anchors grow."""
        return self.prober.is_bounded(self.region, self._anchors(value), value)

    def _anchors(self, value: int) -> set[int]:
        """Return the products, mixings and norms from which a value is made by elementwise operations."""
        found, seen, queue = set[int](), {value}, [value]
        while queue:
            item = queue.pop()
            operation = self.tape.producer(item)
            if item == self.region.stream or operation is None or self._is_anchor(operation):
                found.add(item)
                continue
            further = [parent for parent in operation.inputs if self.tape.depends(parent, self.region.stream)]
            queue += [parent for parent in further if parent not in seen]
            seen.update(further)
        return found

    def _is_anchor(self, operation: Operation) -> bool:
        """Whether an operation is a product, a norm or attention, so that no elementwise function goes through it."""
        tape = self.tape
        if is_product(tape, operation) or is_norm(operation) or is_contraction(operation):
            return True
        return normalized_operand(tape, operation) is not None

    def _named_gate(self, value: int) -> bool:
        """Whether every weight that makes a value belongs to a module with "gate" in its path."""
        names = [
            tape_name.rpartition(".")[0]
            for anchor in self._anchors(value)
            if (operation := self.tape.producer(anchor)) is not None and is_product(self.tape, operation)
            for weight in [weight_operand(self.tape, operation)]
            if weight is not None
            for tape_name in (self.tape.names[known] for known in self.tape.parents_with_names(weight))
        ]
        return bool(names) and all("gate" in name for name in names)

    def _is_narrow(self, value: int, operation: Operation) -> bool:
        """Whether the value has one entry per token, as a router's weight has. A gate has one entry per channel."""
        whole, channel = self.tape.shape(operation.outputs[0]), self._channel_of(operation)
        while True:
            shape = self.tape.shape(value)
            if not shape or not whole or (shape[channel:][:1] == (1,) and whole[channel] != 1):
                return True
            producer = self.tape.producer(value)
            if producer is None or not is_broadcast(producer):
                return False
            value = producer.inputs[0]
            if len(self.tape.shape(value)) < len(whole):
                return producer.name == "unsqueeze" and not self.tape.shape(value)

    def _channel_of(self, operation: Operation) -> int:
        """Return the dimension of the channels of a product of data, counted from the end.

        That is the last one, or the one before where experts were put behind the channels and a sum adds them up.
        """
        tape, output = self.tape, operation.outputs[0]
        rank = len(tape.shape(output))
        if rank <= len(tape.shape(self.region.stream)):
            return -1
        readers = (tape.operations[reader] for reader in tape.readers[output])
        added = (reader.args[1] for reader in readers if base_name(reader) == "sum" and len(reader.args) > 1)
        return -2 if any([dim % rank for dim in dims] == [rank - 1] for dims in added) else -1

    def _is_narrow_beside(self, operation: Operation, value: int) -> bool:
        """Whether another operand than the given value has one entry per token."""
        return any(item != value and self._is_narrow(item, operation) for item in operation.inputs)

    def _written_activation(self, value: int, inputs: Iterable[int]) -> Step | None:
        """Return the step of an activation that was written out in several operations, ``None`` for another value.

        The step multiplies by the slope that the function has far from zero. That is 1 for every common activation:
        0.5 · (x · (1 + erf(x/√2))) counts like gelu(x), wherever its constants stand.
        """
        source = self.region.common_source(inputs)
        if self.tape.shape(source) != self.tape.shape(value) or not self._is_weightless(source, value):
            return None
        if not self.prober.is_elementwise(self.region, source, value):
            return None
        learned = any(self.tape.made_of_parameters(item) for item in self._read_between(source, value))
        return Step("activation", (source,), 1.0 if learned else self.prober.slope(self.region, source, value))

    def _read_between(self, source: int, value: int) -> set[int]:
        """Return all values that the operations between two values read."""
        operations = (self.tape.producer(item) for item in self.tape.between(source, value)[1:])
        return {item for operation in operations if operation is not None for item in operation.inputs}

    def _is_weightless(self, source: int, value: int) -> bool:
        """Whether only elementwise operations stand between two values: no product, no norm, no attention."""
        operations = (self.tape.producer(item) for item in self.tape.between(source, value)[1:])
        return not any(operation is not None and self._is_anchor(operation) for operation in operations)

    def _activation(self, operation: Operation, value: int, inputs: tuple[int, ...]) -> Step:
        """Return the step of an operation of no other kind, which has to be elementwise.

        Raises:
            UnmeasurableError: The operation has a parameter, joins several values, or mixes channels or tokens.
        """
        tape, name = self.tape, base_name(operation)
        learned = any(
            tape.made_of_parameters(item) and tape.tensors[item].is_floating_point() for item in operation.inputs
        )
        if learned and name not in _LEARNED_ACTIVATIONS:
            raise UnmeasurableError(f"it passes through the operation {operation.name!r}, which takes a parameter")
        if len(inputs) != 1:
            written = self._written_activation(value, inputs)
            if written is None:
                raise UnmeasurableError(
                    f"it passes through the operation {operation.name!r}, which joins several values"
                )
            return written
        if not self.prober.is_elementwise(self.region, inputs[0], value):
            raise UnmeasurableError(
                f"it passes through the operation {operation.name!r}, which mixes channels or tokens"
            )
        return Step("activation", inputs)


def picks_by_data(tape: Tape, operation: Operation) -> bool:
    """Whether an operation picks or writes entries at data-dependent places, such as the tokens of an expert."""
    if not is_pick(operation) and not scattered_inputs(operation):
        return False
    return any(tape.is_data(item) and not tape.tensors[item].is_floating_point() for item in operation.inputs)
