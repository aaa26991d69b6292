"""Check that an attention pattern passes the values on unscaled, whatever happens to it behind its softmax."""

from __future__ import annotations

from torch import Tensor

from lightning_spectral.discovery.trace.operands import UnmeasurableError
from lightning_spectral.discovery.trace.operations import (
    is_contraction,
    is_fused_attention,
    is_softmax,
    matrix_operands,
    moved_input,
)
from lightning_spectral.discovery.trace.replay import replay
from lightning_spectral.discovery.trace.tape import Operation, Tape

__all__ = ["check_pattern"]

_TOLERANCE = 1e-3  # patterns are recorded in the precision of the model


def check_pattern(tape: Tape, operation: Operation, carrier: int) -> None:
    """Check that an attention pattern is a softmax, up to data movement, or that its rows add up to 1.

    The linearization leaves the pattern out. A number that multiplies the pattern would then be left out, although the
    same number behind the pattern counts. A multiplier that depends on the tokens is a gate, and is left out like every
    gate. The sums are taken twice, the second time with other parameters: learned numbers change them.

    Args:
        tape: The recorded forward pass.
        operation: The product of pattern and values.
        carrier: The operand that carries the values.

    Raises:
        UnmeasurableError: Learned numbers multiply the pattern, or its rows all add up to a number other than 1.
    """
    operands = matrix_operands(operation)
    if is_fused_attention(operation) or carrier not in operands or _is_plain(tape, operands[carrier == operands[0]]):
        return
    pattern, dimension = operands[carrier == operands[0]], -1 if carrier == operands[1] else -2
    learned = _learned(tape, pattern)
    sums = [tape.wide(pattern).sum(dimension)]
    if learned:
        other: dict[int, Tensor] = {value: 0.5 + 1.7 * tape.wide(value) for value in learned}
        sums.append(replay(tape, other, pattern).sum(dimension))
    if all(bool((total - 1).abs().max() <= _TOLERANCE) for total in sums):
        return
    if learned:
        names = sorted(tape.names[value] for value in learned)
        raise UnmeasurableError(f"its attention pattern is multiplied by what is made of {' and '.join(names)}")
    total = round(float(sums[0].flatten()[0]), 3) + 0.0  # no minus in front of a zero
    if bool((sums[0] - total).abs().max() <= _TOLERANCE * max(1.0, abs(total))):
        raise UnmeasurableError(f"its attention pattern adds up to {total:g} at every token, and not to 1")


def _is_plain(tape: Tape, value: int) -> bool:
    """Whether a value is a softmax, up to data movement."""
    while True:
        operation = tape.producer(value)
        if operation is not None and is_softmax(operation):
            return True
        moved = None if operation is None else moved_input(operation)
        if moved is None:
            return False
        value = moved


def _learned(tape: Tape, pattern: int) -> set[int]:
    """Return the parameters that enter a pattern behind its last softmax."""
    found, seen, queue = set[int](), {pattern}, [pattern]
    while queue:
        operation = tape.producer(queue.pop())
        if operation is None or is_softmax(operation) or is_contraction(operation):
            continue
        for item in operation.inputs:
            if tape.made_of_parameters(item):
                found.update(name for name in tape.parents_with_names(item) if tape.tensors[name].is_floating_point())
            elif item not in seen:
                seen.add(item)
                queue.append(item)
    return found
