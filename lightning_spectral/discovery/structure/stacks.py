"""Find the residual adds of models that keep several streams side by side: hyper-connections and their kin.

Such a model keeps a stack S of streams. It reads one stream z = Σᵢ pᵢ Sᵢ from the stack, and writes the output of a
branch to all streams: S′ⱼ = Σᵢ Rᵢⱼ Sᵢ + qⱼ f(z). The maps p, q and R mix streams, and never channels. So f is an
ordinary branch from z to f(z), and its norm is measured::

              ┌──────────── R ───────── kept ─┐
    before S ─┤                               + ── S′
              └─ p ─ read z ─ f ─ written ─ q ┘
    (b, t, n, d)     (b, t, d)  (b, t, d)       (b, t, n, d)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_spectral.discovery.chains.linear import LinearPart
from lightning_spectral.discovery.chains.steps import Steps
from lightning_spectral.discovery.trace.operands import UnmeasurableError
from lightning_spectral.discovery.trace.operations import (
    Divisor,
    Multiplier,
    base_name,
    is_contraction,
    is_fused_attention,
    is_multiplication,
    is_product,
    matrix_operands,
    moved_input,
    multiplied_input,
)
from lightning_spectral.discovery.trace.probe import Prober, Region
from lightning_spectral.discovery.trace.replay import replay
from lightning_spectral.discovery.trace.tape import Operation, Tape

__all__ = ["Stack", "stack_at"]

_TOLERANCE = 1e-8


@dataclass(frozen=True, slots=True)
class Stack:
    """How a sum writes to a stack of streams.

    Attributes:
        kept: The term R S that carries the streams on.
        before: The streams S before the sum.
        read: The stream z that the branch reads.
        written: The output f(z) of the branch.
        spine: Every value from the sum down to ``written``.
        writers: The multipliers q of ``written`` on the spine: numbers, and values that are made of parameters.
        depends: Whether p, q or R depends on the data.
        count: The number n of streams.
    """

    kept: int
    before: int
    read: int
    written: int
    spine: tuple[int, ...]
    writers: tuple[Multiplier, ...]
    depends: bool
    count: int

    def size(self, tape: Tape) -> float:
        """Return the root mean square of the writers: the size of the written value relative to the branch."""
        product = 1.0
        for writer in self.writers:
            if isinstance(writer, float):
                product *= writer
            else:
                content = tape.wide(writer.value if isinstance(writer, Divisor) else writer)
                content = content.reciprocal() if isinstance(writer, Divisor) else content
                product *= float(content if content.numel() == 1 else content.square().mean().sqrt())
        return product


def stack_at(tape: Tape, prober: Prober, operation: Operation) -> Stack | None:
    """Return how a sum writes to a stack of streams, ``None`` for any other operation."""
    data = [value for value in operation.inputs if tape.is_data(value)]
    if base_name(operation) != "add" or len(data) != 2:
        return None
    # Either operand can be the kept one. Cheap questions about sizes and wiring come before the numerical ones.
    for kept, put in (data, data[::-1]):
        spine = _down_to_one(tape, operation.outputs[0], put)
        before = None if spine is None else _before(tape, kept, spine[-1])
        ends = None if spine is None or before is None else _one_stream(tape, before, spine[-1])
        if spine is None or before is None or ends is None:
            continue
        read, written = ends
        if prober.once(Region(tape, before, read), "reads", partial(_keeps, tape, prober, before, read)) and (
            before == kept or _keeps(tape, prober, before, kept, tape.shape(read)[-1])
        ):
            spine = (*spine, *_moves(tape, spine[-1], written))
            writers = tuple(_writers(tape, spine))
            depends = any(item is None for item in writers) or not _is_fixed(tape, before, kept, read)
            count = tape.tensors[before].numel() // tape.tensors[read].numel()
            known = tuple(item for item in writers if item is not None)
            return Stack(kept, before, read, written, spine, known, depends, count)
    return None


def _down_to_one(tape: Tape, total: int, put: int) -> tuple[int, ...] | None:
    """Return the spine from a sum down to the first value with the size of one stream, ``None`` if there is none.

    Args:
        tape: The recorded forward pass.
        total: The sum.
        put: The term that is written to the streams.
    """
    whole, spine = tape.tensors[total].numel(), [total, put]
    while True:
        size = tape.tensors[spine[-1]].numel()
        # q expands one stream to n: behind it the value is smaller, and n is the quotient of the sizes.
        if 0 < size < whole:
            return tuple(spine) if whole % size == 0 else None
        producer = tape.producer(spine[-1])
        carrier = None if producer is None else _carrier(tape, producer)
        if carrier is None:
            return None
        spine.append(carrier)


def _carrier(tape: Tape, operation: Operation) -> int | None:
    """Return the operand of a map of streams that holds the channels; ``None`` for other operations.

    Of two operands it is the larger one, because p, q and R have no channels.
    """
    moved = moved_input(operation)
    if moved is not None:
        return moved if tape.is_data(moved) else None
    multiplied = multiplied_input(tape, operation)
    if multiplied is not None:
        return multiplied[0]
    if not is_multiplication(operation) and not (is_contraction(operation) and not is_fused_attention(operation)):
        return None
    operands = [value for value in matrix_operands(operation) if tape.is_data(value)]
    return max(operands, key=lambda value: tape.tensors[value].numel(), default=None)


def _before(tape: Tape, kept: int, written: int) -> int | None:
    """Return the streams before the sum, in their own layout, ``None`` if the kept term does not come from them.

    The walk goes back from the kept term, through R, to the first value that the branch was made of.
    """
    value, whole = kept, tape.tensors[kept].numel()
    while True:
        producer = tape.producer(value)
        carrier = None if producer is None else _carrier(tape, producer)
        fits = carrier is not None and tape.tensors[carrier].numel() >= whole
        # Go on even after the branch depends on the value: through views, because the layout of the stack itself is
        # wanted, and through a product that makes the stream to be read and the kept ones at once.
        at_once = tape.tensors[value].numel() > whole
        goes_on = fits and producer is not None and (at_once or moved_input(producer) is not None)
        if tape.depends(written, value) and not goes_on:
            return value
        if carrier is None or not fits:
            return None
        value = carrier


def _one_stream(tape: Tape, before: int, written: int) -> tuple[int, int] | None:
    """Return the stream that the branch reads, and the output of the branch, both in one layout with channels last.

    Every way from the streams to the output leads through the stream that is read: it is the first value of its size
    among the gateways (see :meth:`Region.gateways`). The branch may read it in other views, and its output has views
    too. The pair of views that fits is chosen, equal shapes before equal shapes up to dimensions of size 1.
    """
    size = tape.tensors[written].numel()
    if tape.tensors[before].numel() <= size:
        return None
    gateways = [value for value in Region(tape, before, written).gateways() if tape.tensors[value].numel() == size]
    first = next((value for value in gateways if value != before), None)
    if first is None:
        return None
    # Views of the stream that is read, as long as they follow each other without another operation.
    reads = [first]
    for value in gateways[gateways.index(first) + 1 :]:
        operation = tape.producer(value)
        if operation is None or moved_input(operation) != reads[-1]:
            break
        reads.append(value)
    pairs = [(read, end) for end in _ups(tape, written) for read in reads if _fit(tape, read, end)]
    alike = [pair for pair in pairs if tape.shape(pair[0]) == tape.shape(pair[1])]
    return next((pair for pair in (*alike, *pairs) if _works(tape, *pair)), None)


def _fit(tape: Tape, read: int, written: int) -> bool:
    """Whether two values have the same positions and channels, dimensions of size 1 aside."""
    shape, other = tape.shape(read), tape.shape(written)
    whole, also = ([size for size in item if size > 1] for item in (shape, other))
    return whole == also and len(whole) > 1 and shape[-1] == other[-1] == whole[-1]


def _ups(tape: Tape, value: int | None) -> Iterator[int]:
    """Yield a value, the value that it is a view of, and so on."""
    while value is not None:
        yield value
        operation = tape.producer(value)
        moved = None if operation is None else moved_input(operation)
        value = moved if moved is not None and tape.tensors[moved].numel() == tape.tensors[value].numel() else None


def _moves(tape: Tape, value: int, up: int) -> Iterator[int]:
    """Yield the values behind a value, of which it is a view, up to and including ``up``."""
    for item in _ups(tape, value):
        if item != value:
            yield item
        if item == up:
            return


def _works(tape: Tape, read: int, written: int) -> bool:
    """Whether a product with a weight lies between two values: a branch, and not another map of streams."""
    producers = (tape.producer(value) for value in tape.between(read, written)[1:])
    return any(operation is not None and is_product(tape, operation) for operation in producers)


def _keeps(tape: Tape, prober: Prober, before: int, end: int, width: int | None = None) -> bool:
    """Whether a value is made of a stack of streams channel by channel and token by token.

    The multipliers of the streams keep their recorded content, although they may depend on the streams.

    Args:
        tape: The recorded forward pass.
        prober: Answers numerical questions.
        before: The streams.
        end: The value.
        width: The number of channels, by default the last dimension of the value.
    """
    # Two ways to run the map. If it is a chain of products with maps, replay it with the maps held. If it has other
    # operations (norms, several readers), run its linear part, and check separately that no positions are mixed.
    region = Region(tape, before, end)
    width = tape.shape(end)[-1] if width is None else width
    held = _beside(tape, before, end)
    if held is not None:
        return _channelwise(tape, before, width, lambda content: replay(tape, {before: content}, end, held=held))
    linear = LinearPart(Steps(tape, region, prober), mixes_tokens=False)
    try:
        return prober.moved_positions(region) == 0 and _channelwise(
            tape, before, width, lambda content: linear.run(end, {before: content})
        )
    except (UnmeasurableError, RuntimeError, IndexError):
        return False


def _beside(tape: Tape, before: int, end: int) -> dict[int, Tensor] | None:
    """Return the multipliers of the streams on the way to a value, ``None`` if the way has other operations."""
    held: dict[int, Tensor] = {}
    value = end
    while value != before:
        operation = tape.producer(value)
        carrier = None if operation is None else _carrier(tape, operation)
        if operation is None or carrier is None or not tape.depends(carrier, before):
            return None
        held.update({item: tape.wide(item) for item in operation.inputs if item != carrier})
        value = carrier
    return held


def _is_fixed(tape: Tape, before: int, kept: int, read: int) -> bool:
    """Whether the maps p and R, which read and mix the streams, are made of numbers and parameters alone."""
    between = {value for end in (kept, read) for value in tape.between(before, end) if value != before}
    operations = [operation for value in between if (operation := tape.producer(value)) is not None]
    # Every data-dependent p or R makes a product of two data-dependent operands.
    mapping = [item for item in operations if is_multiplication(item) or is_contraction(item)]
    return not any(sum(map(tape.is_data, matrix_operands(operation))) > 1 for operation in mapping)


def _channelwise(tape: Tape, source: int, width: int, run: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function multiplies channels by numbers only, and mixes none.

    Content u, the same at all tokens and streams, must become g · u, with gains g that do not depend on u. Two random u
    are compared. If channels were mixed, the two gains would differ.

    Args:
        tape: The recorded forward pass.
        source: The input of the function: its shape is used.
        width: The number of channels. The last dimension may hold several streams side by side.
        run: The function.
    """
    generator = torch.Generator().manual_seed(19)
    like, gains = tape.filled(source), list[Tensor]()
    if like.shape[-1] % width:
        return False
    for _ in range(2):
        # Between 1 and 2: a quotient by u is safe.
        u = 1 + torch.rand(width, generator=generator, dtype=torch.float64, device="cpu").to(like)
        result = run(u.repeat(like.shape[-1] // width).expand(like.shape).clone())
        if result.shape[-1] % width:
            return False
        gains.append(result / u.repeat(result.shape[-1] // width))
    largest = gains[0].abs().max()
    return bool(largest > 0) and bool((gains[0] - gains[1]).abs().max() <= _TOLERANCE * largest)


def _writers(tape: Tape, spine: tuple[int, ...]) -> Iterator[Multiplier | None]:
    """Yield the multipliers of a branch on its way to all streams, ``None`` for one that depends on the data.

    A constant vector counts by its root mean square.
    """
    # The ends of the spine are left out: the sum at its top, and the branch itself at its bottom.
    for value in spine[1:-1]:
        operation = tape.producer(value)
        assert operation is not None
        if moved_input(operation) is not None:
            continue
        multiplied = multiplied_input(tape, operation)
        other = None if multiplied is None else multiplied[1]
        if isinstance(other, int) and not tape.made_of_parameters(other) and tape.tensors[other].numel() > 1:
            yield float(tape.wide(other).square().mean().sqrt())
        else:
            yield other
