"""Read a product with a weight: its matrix, the channels that it applies to, and the rows that are read next.

Rows matter because of fused projections. Of a fused QKV matrix, attention reads the rows of V, head by head::

    weight (3d, d)                 channels of the output projection's input
    ┌─────────┐
    │    Q    │
    │    K    │
    │    V    │──── rows 2d … 3d − 1 ────► 0 … d − 1          so W_v is these rows, in this order
    └─────────┘
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_spectral.discovery.chains.linear import LinearPart
from lightning_spectral.discovery.chains.recipes import NoRecipeError, Step, recipe, shortest
from lightning_spectral.discovery.trace.operands import UnmeasurableError
from lightning_spectral.discovery.trace.operations import (
    base_name,
    is_plain_product,
    matrix_operands,
    moved_values,
    weight_operand,
)
from lightning_spectral.discovery.trace.tape import Operation, Tape
from lightning_spectral.records import Factor

__all__ = [
    "Columns",
    "Reader",
    "WeightProduct",
    "as_ranges",
    "columns_read",
    "matrix_factor",
    "rows_read",
    "weight_product",
]

MATRICES = ("output", "value", "latent", "down", "up")
STACK = ("stack",)  # a step of a layout: the entry of an expert in dimension 0, filled in later
_TRANSPOSE = ("transpose", -2, -1)

Columns = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightProduct:
    """How a product reads its operands: the weight, or its transpose, multiplies the channels of the data.

    Attributes:
        data: The value that is multiplied.
        weight: The value of the weight.
        transposed: Whether the matrix is the transpose of the weight.
        channel: Dimension of the channels, in the data and in the result.
        stacked: Whether the weight is a stack of matrices, one per expert.
    """

    data: int
    weight: int
    transposed: bool
    channel: int
    stacked: bool


def _without_repetition(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Return steps that keep one copy of a repeated weight: new dimensions of size 1 instead of repetitions."""
    once: list[Step] = []
    for step in steps:
        once += [("unsqueeze", 0)] * step[1] if step[0] == "expand" else [step]
    return tuple(once)


@dataclass(frozen=True, slots=True)
class Reader:
    """The place that a backward walk comes from, which reads the next value: a product, or the end of the branch.

    Attributes:
        value: The value that is read.
        channel: The dimension of its channels.
        product: The product that reads it, ``None`` at the end of the branch.
        held: Values on other ways to ``value``, which are held at zero.
    """

    value: int
    channel: int
    product: WeightProduct | None = None
    held: tuple[int, ...] = ()

    @classmethod
    def of(cls, product: WeightProduct) -> Reader:
        """Return a product as the reader of its data."""
        return cls(product.data, product.channel, product)

    @property
    def target(self) -> tuple[int, int]:
        """The value that is read, and the dimension of its channels, as :meth:`LinearPart.channels` takes them."""
        return self.value, self.channel


def weight_product(tape: Tape, operation: Operation) -> WeightProduct:
    """Read the operands of a product with a weight.

    Raises:
        UnmeasurableError: The operation is a convolution over tokens, or a kernel of unknown layout.
    """
    name, weight = base_name(operation), weight_operand(tape, operation)
    operands = matrix_operands(operation)
    assert weight is not None
    if name in ("convolution", "_convolution"):
        kernel = tape.shape(weight)[2:]
        if any(size != 1 for size in kernel):
            raise UnmeasurableError(f"it passes through a convolution with kernel {tuple(kernel)}")
        if operation.args[-1] != 1:
            raise UnmeasurableError(f"it passes through a convolution in {operation.args[-1]} groups of channels")
        return WeightProduct(operands[0], weight, False, 1, False)
    if name == "linear":
        return WeightProduct(operands[0], weight, False, -1, False)
    if not is_plain_product(operation):
        raise UnmeasurableError(f"it passes through the kernel {operation.name!r}, whose weight layout is unknown")
    stacked = len(tape.shape(weight)) == 3 and not _is_repeated(tape, weight)
    if weight == operands[1]:
        return WeightProduct(operands[0], weight, True, -1, stacked)
    return WeightProduct(operands[1], weight, False, -2, stacked)


def _is_repeated(tape: Tape, weight: int) -> bool:
    """Whether a batch of matrices has one matrix only, alone or repeated over the batch. Else it is one of experts."""
    producers = (tape.producer(value) for value in moved_values(tape, weight))
    return tape.shape(weight)[0] == 1 or any(item is not None and item.name == "expand" for item in producers)


def matrix_factor(tape: Tape, product: WeightProduct) -> Factor:
    """Return the matrix of a product as a factor whose role is still open.

    Raises:
        UnmeasurableError: The weight is made of its parameters in a way that cannot be repeated.
    """
    try:
        name, steps = recipe(tape, product.weight)
    except NoRecipeError as error:
        names = [tape.names[known] for known in tape.parents_with_names(product.weight)]
        raise UnmeasurableError(
            f"the weight made of {', '.join(names) or 'constants'} cannot be read: {error}"
        ) from None
    steps = tuple(step for step in steps if step != ("experts",))
    if product.channel == 1:
        steps = (*steps, ("flatten", 1))
    if product.transposed:
        steps = steps[:-1] if steps and steps[-1] == _TRANSPOSE else (*steps, _TRANSPOSE)
    if len(tape.shape(product.weight)) == 3 and product.channel != 1:
        steps = (*steps, STACK if product.stacked else ("select", 0, 0))
    steps = _without_repetition(steps)
    # A parametrized weight has several parents, such as a magnitude and a direction. The largest has its shape.
    shapes = [tape.shape(parameter) for parameter in tape.parents_with_names(product.weight)]
    try:
        steps = shortest(steps, max(shapes, key=math.prod))
    except (RuntimeError, IndexError):
        raise UnmeasurableError(f"the weight made of {name} is repeated in a way that cannot be read") from None
    return Factor("latent", name, layout=steps)


def rows_read(
    linear: LinearPart, product: WeightProduct, result: int, reader: Reader
) -> tuple[tuple[range, ...] | None, Columns | None]:
    """Return the rows of a matrix in the order of the reader's channels, and the reader's channels that they feed.

    Args:
        linear: The linear part of the branch.
        product: The product with the matrix.
        result: The value of that product.
        reader: Reads the rows.

    Returns:
        The rows, ``None`` for all rows in order; and the columns of the reader that the rows feed, ``None`` for all.

    Raises:
        UnmeasurableError: Channels are mixed on the way, or the matrix feeds a part of the stream only.
    """
    local = linear.region.local
    question = (
        "rows",
        linear.mixes_tokens,
        local(result),
        local(reader.value),
        reader.channel,
        *map(local, reader.held),
    )
    return linear.steps.prober.once(linear.region, question, lambda: _rows_read(linear, product, result, reader))


def _rows_read(
    linear: LinearPart, product: WeightProduct, result: int, reader: Reader
) -> tuple[tuple[range, ...] | None, Columns | None]:
    # A reader that multiplies all experts in one product has channels per expert: dimension 0 counts as a channel.
    tape, read = linear.tape, reader.product
    joined = read is not None and read.stacked and not (product.stacked and tape.shape(product.weight)[0] > 1)
    target = (reader.value, 0, reader.channel) if joined else reader.target
    found = linear.channels((result, product.channel), target, reader.held)
    if found is None:
        raise UnmeasurableError("channels are mixed between two of its matrices, so they do not form a product")
    fed = tuple(place for place, number in enumerate(found) if number >= 0)
    if len(fed) == len(found):
        in_order = not joined and found == tuple(range(tape.shape(result)[product.channel]))
        return None if in_order else as_ranges(found), None
    if joined or read is None or not fed:
        raise UnmeasurableError("a matrix feeds a part of the channels of the stream, or of an expert, only")
    return as_ranges(tuple(found[place] for place in fed)), fed


def columns_read(matrix: Factor, columns: Columns) -> Factor:
    """Return some columns of a matrix as a factor: the columns that one of several inner matrices feeds.

    Raises:
        UnmeasurableError: The matrix has adapters, whose columns are not known.
    """
    if matrix.adapters:
        raise UnmeasurableError("a matrix with adapters reads several matrices side by side")
    first, count = columns[0], len(columns)
    together = columns == tuple(range(first, first + count))
    step = ("narrow", 1, first, count) if together else ("index_select", 1, columns)
    return replace(matrix, layout=(*matrix.layout, step))


def as_ranges(numbers: tuple[int, ...]) -> tuple[range, ...]:
    """Write a sequence of numbers as ranges, of equal lengths where all steps are equal: one range per head."""
    runs: list[range] = []
    for number in numbers:
        last = runs[-1] if runs else range(0)
        step = number - last[-1] if last else 1
        if (len(last) == 1 and step > 0) or (len(last) > 1 and step == last.step):
            runs[-1] = range(last[0], number + 1, step)
        else:
            runs.append(range(number, number + 1))
    length = math.gcd(*map(len, runs))
    if length == 1 or len({run.step for run in runs}) > 1:
        return tuple(runs)
    return tuple(run[start : start + length] for run in runs for start in range(0, len(run), length))
