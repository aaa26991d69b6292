"""Read a product with a weight: which matrix it applies to which channels, and which of its rows are read next."""

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
STACK = ("stack",)  # stands for picking an expert from dimension 0
_TRANSPOSE = ("transpose", -2, -1)

Columns = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightProduct:
    """How a product reads its operands: its weight or the transpose of it, applied to the channels of the data.

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
    """Give dimensions along which a weight is repeated a size of 1: one of the copies is meant."""
    once: list[Step] = []
    for step in steps:
        once += [("unsqueeze", 0)] * step[1] if step[0] == "expand" else [step]
    return tuple(once)


@dataclass(frozen=True, slots=True)
class Reader:
    """What reads what is looked for next: a product, or the end of the branch.

    Attributes:
        value: The value that is read.
        channel: The dimension of its channels.
        product: The product, ``None`` at the end of the branch.
        held: Values on other ways to it, which count as zero.
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
        """The value that is read, and the dimension of its channels."""
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
        if any(size != 1 for size in kernel) or operation.args[-1] != 1:
            raise UnmeasurableError(f"it passes through a convolution with kernel {tuple(kernel)}")
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
    """Whether a batch of matrices is a batch of one, or one matrix repeated over the batch, and not one of experts."""
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
    # Of the parents of a parametrized weight (a magnitude, a scale), the largest has its shape.
    shapes = [tape.shape(parameter) for parameter in tape.parents_with_names(product.weight)]
    try:
        steps = shortest(steps, max(shapes, key=math.prod))
    except (RuntimeError, IndexError):
        raise UnmeasurableError(f"the weight made of {name} is repeated in a way that cannot be read") from None
    return Factor("latent", name, layout=steps)


def rows_read(
    linear: LinearPart, product: WeightProduct, result: int, reader: Reader
) -> tuple[tuple[range, ...] | None, Columns | None]:
    """Return the rows of a matrix in the order in which the next one reads them, and the part that they are of it.

    Args:
        linear: The linear part of the branch.
        product: The product whose rows are asked for.
        result: The value of that product.
        reader: Who reads them.

    Returns:
        The rows, ``None`` for all of them in order; and the columns of the reader that they feed, ``None`` for all.

    Raises:
        UnmeasurableError: Channels are mixed on the way, or the matrix feeds a part of the stream only.
    """
    # One product for all experts at once: the reader's channels are those of each expert in turn.
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
    """Return the columns of a matrix that one of several matrices side by side feeds.

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
    if length == 1 or len({run.step for run in runs}) > 1:
        return tuple(runs)
    return tuple(run[start : start + length] for run in runs for start in range(0, len(run), length))
