"""Turn the multipliers of a path into factors: constants, single parameters, and gains per channel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning_spectral.discovery.chains.recipes import NoRecipeError, recipe
from lightning_spectral.discovery.trace.operands import UnmeasurableError
from lightning_spectral.discovery.trace.operations import Divisor, Multiplier
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.records import Factor

__all__ = ["multiplier_factors"]


_RESHAPING = frozenset({"expand", "unsqueeze", "squeeze", "reshape"})
_TURNING = frozenset({"permute", "transpose", "movedim", "t"})


def multiplier_factors(tape: Tape, multipliers: Sequence[Multiplier], *, by_head: bool = False) -> Iterator[Factor]:
    """Yield the multipliers of a path as factors.

    Args:
        tape: The recorded forward pass.
        multipliers: Numbers, and values that are made of parameters or are constant.
        by_head: Whether gains of several dimensions are allowed, such as one entry per head and channel. The caller
            then finds the channel that each entry multiplies.

    Raises:
        UnmeasurableError: A multiplier cannot be read again later, or differs between tokens.
    """
    for multiplier in multipliers:
        if isinstance(multiplier, float):
            if multiplier != 1.0:
                yield Factor("scale", None, constant=multiplier)
            continue
        divides = isinstance(multiplier, Divisor)
        value = multiplier.value if isinstance(multiplier, Divisor) else multiplier
        if tape.made_of_parameters(value):
            gain = _gain(tape, value, by_head)
            yield replace(gain, layout=(*gain.layout, ("reciprocal",))) if divides else gain
        elif not tape.is_data(value):
            content = tape.wide(value)
            if float(content.min()) != float(content.max()):
                raise UnmeasurableError("it is multiplied by a tensor that belongs to no parameter and no buffer")
            number = float(content.max())
            yield Factor("scale", None, constant=1 / number if divides else number)


def _gain(tape: Tape, value: int, by_head: bool) -> Factor:
    """Return a multiplier that is made of parameters as a factor."""
    try:
        name, steps = recipe(tape, value)
    except NoRecipeError as error:
        raise UnmeasurableError(f"a multiplier on the path cannot be read: {error}") from None
    shape = [size for size in tape.shape(value) if size != 1]
    if len(shape) > 1 and not by_head:
        raise UnmeasurableError("a multiplier on the path differs between tokens")
    # A gain is read as a flat vector, so steps that keep the order of its entries are dropped. Every reshaping does;
    # a transposition does if the parameter has one dimension larger than 1.
    vector = all(sum(size > 1 for size in tape.shape(parent)) < 2 for parent in tape.parents_with_names(value))
    idle = _RESHAPING | (_TURNING if vector else frozenset())
    steps = tuple(step for step in steps if step[0] not in idle)
    return Factor("scale", name, layout=steps, size=math.prod(shape) if shape else None)
