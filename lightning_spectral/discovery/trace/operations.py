"""What each recorded operation means: data movement, a sum, a multiplier, a product with a weight, a norm, attention.

Every list of operation names stands in this file. Other files ask its functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lightning_spectral.discovery.trace.tape import Operation, Ref, Tape

__all__ = [
    "Divisor",
    "Multiplier",
    "added_operand",
    "addends",
    "attended",
    "base_name",
    "is_addition",
    "is_allocation",
    "is_attention",
    "is_broadcast",
    "is_contraction",
    "is_convolution",
    "is_copy",
    "is_division",
    "is_fused_attention",
    "is_join",
    "is_mixing_without_weights",
    "is_multiplication",
    "is_norm",
    "is_part",
    "is_pick",
    "is_plain_product",
    "is_product",
    "is_softmax",
    "is_wide_convolution",
    "is_zero_allocation",
    "matrix_operands",
    "moved_input",
    "moved_values",
    "multiplied_input",
    "norm_channels_second",
    "norm_gain",
    "norm_groups",
    "parameter_of",
    "refs",
    "scattered_inputs",
    "shifted_input",
    "term_factor",
    "weight_operand",
]

# Data movement, casts and linear reductions: every output entry is an entry of one input, or a sum of such entries.
# The number is the position of that input among the arguments.
# fmt: off
_MOVES = dict.fromkeys((
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "movedim", "flatten",
    "unflatten", "expand", "expand_copy", "squeeze", "squeeze_copy", "unsqueeze", "slice", "select", "split",
    "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk", "unbind", "narrow", "as_strided", "unfold",
    "diagonal", "index", "index_select", "gather", "take_along_dim", "roll", "flip", "repeat", "repeat_interleave",
    "constant_pad_nd", "pad", "pixel_shuffle", "pixel_unshuffle", "im2col", "col2im", "clone", "contiguous", "alias",
    "detach", "lift_fresh", "_to_copy", "to", "_conj", "resolve_conj", "real", "view_as_real", "view_as_complex",
    "sum", "mean", "cumsum", "avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "tril", "triu", "masked_fill",
    "dropout", "native_dropout",
), 0) | {"copy": 1, "where": 1}
# fmt: on

_MULTIPLICATIONS = {"mul", "multiply"}
_DIVISIONS = {"div", "true_divide"}
_ADDITIONS = {"add", "sub", "rsub"}
_JOINS = {"cat", "stack", "refresh"}
_COPIES = {"_to_copy", "clone", "detach", "contiguous", "alias", "lift_fresh", "to", "copy"}
_BROADCASTS = {"expand", "unsqueeze", "_to_copy"}
_PARTS = {"select", "slice", "index", "index_select"}
_PICKS = {"index", "index_select", "gather", "take_along_dim", "masked_select", "embedding"}
# A fresh allocation is zero, or is written before it is read.
_ZEROS = {"zeros_like", "new_zeros", "empty_like", "new_empty"}
_FILLED = {"ones_like", "full_like", "new_ones", "new_full"}
_SCATTERS = {
    "index_add": 3,
    "index_put": 2,
    "scatter_add": 3,
    "index_copy": 3,
    "scatter": 3,
    "slice_scatter": 1,
    "select_scatter": 1,
    "masked_scatter": 2,
    "_unsafe_index_put": 2,
    "scatter_reduce": 3,
}
# `weight_operand` finds the weight of a product: the operand that derives from a parameter.
_PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_grouped_mm",
    "grouped_mm",
    "convolution",
    "linear",
    "matmul",
    "addbmm",
    "mv",
    "addmv",
    "_convolution",
    "conv1d",
    "conv2d",
    "_addmm_activation",
    "mkldnn_rnn_layer",
    "_thnn_fused_gru_cell",
    "_thnn_fused_lstm_cell",
    "_scaled_mm",
    "_int_mm",
    "_weight_int4pack_mm",
    "_weight_int8pack_mm",
}
# Products whose two matrix operands stand next to each other, in the order of the multiplication.
_PLAIN_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "grouped_mm", "_addmm_activation", "matmul"}
_WITH_BIAS_FIRST = {"addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation"}
_WEIGHTLESS_MIXERS = ("fft", "pool", "cumsum", "cumprod")


def base_name(operation: Operation) -> str:
    """Return the name of the operation without the underscore that marks it as in-place."""
    name = operation.name
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


def is_addition(operation: Operation) -> bool:
    """Whether the operation adds or subtracts two operands."""
    return base_name(operation) in _ADDITIONS


def is_multiplication(operation: Operation) -> bool:
    """Whether the operation multiplies two operands entry by entry."""
    return base_name(operation) in _MULTIPLICATIONS


def is_division(operation: Operation) -> bool:
    """Whether the operation divides its first operand by its second."""
    return base_name(operation) in _DIVISIONS


def is_join(operation: Operation) -> bool:
    """Whether the operation puts its inputs side by side."""
    return base_name(operation) in _JOINS


def is_copy(operation: Operation) -> bool:
    """Whether the output equals the input, another dtype or memory format aside."""
    return base_name(operation) in _COPIES


def is_broadcast(operation: Operation) -> bool:
    """Whether the operation repeats its input along dimensions, adds dimensions of size 1, or casts."""
    return operation.name in _BROADCASTS


def is_part(operation: Operation) -> bool:
    """Whether the operation takes some entries of a tensor along one dimension."""
    return operation.name in _PARTS


def is_pick(operation: Operation) -> bool:
    """Whether the operation picks entries at places that a tensor of integers or booleans names."""
    return base_name(operation) in _PICKS


def is_allocation(operation: Operation) -> bool:
    """Whether the operation reads the shape of its input and nothing else."""
    return operation.name in _ZEROS or operation.name in _FILLED


def is_zero_allocation(operation: Operation) -> bool:
    """Whether the operation makes zeros, or memory that is written before it is read."""
    return operation.name in _ZEROS or operation.name in ("empty", "zero_")


def refs(operation: Operation, position: int) -> tuple[int, ...]:
    """Return the values at one positional argument (several where the argument is a list)."""
    if position >= len(operation.args):
        return ()
    return tuple(_collect(operation.args[position]))


def _collect(structure: object) -> Iterator[int]:
    if isinstance(structure, Ref):
        yield structure.value
    elif isinstance(structure, list | tuple):
        for item in structure:
            yield from _collect(item)


def moved_input(operation: Operation) -> int | None:
    """Return the value whose entries the operation moves; ``None`` for an operation that also computes."""
    name = base_name(operation)
    if name == "refresh":
        # A view that is read again after writes. If the last write covers the view, the view holds what it wrote.
        return operation.inputs[-1] if len(operation.inputs) == 2 and operation.args[0] else None
    position = _MOVES.get(name)
    if position is None:
        return None
    found = refs(operation, position)
    return found[0] if len(found) == 1 else None


def moved_values(tape: Tape, value: int) -> Iterator[int]:
    """Yield a value, then the value that it was moved from, and so on back to the first that was computed."""
    while True:
        yield value
        operation = tape.producer(value)
        moved = None if operation is None else moved_input(operation)
        if moved is None:
            return
        value = moved


class Divisor(NamedTuple):
    """A value by which another one is divided."""

    value: int


# A number, the value that holds it, or the value that holds its reciprocal.
Multiplier = float | int | Divisor


def multiplied_input(tape: Tape, operation: Operation) -> tuple[int, Multiplier] | None:
    """Return ``(value, multiplier)`` for a product of data with a constant or with something made of parameters."""
    name = base_name(operation)
    if name == "neg":
        return operation.inputs[0], -1.0
    divides = is_division(operation)
    if not (divides or is_multiplication(operation)) or (divides and not refs(operation, 0)):
        return None
    data = [value for value in operation.inputs if tape.is_data(value)]
    if len(data) != 1 or (divides and data[0] not in refs(operation, 0)):
        return None
    if refs(operation, 0) == refs(operation, 1):
        return None  # a square
    others = [value for value in operation.inputs if value != data[0]]
    if others:
        return data[0], Divisor(others[0]) if divides else others[0]
    number = next(
        (item for item in (*operation.args, *operation.kwargs.values()) if isinstance(item, int | float)), 1.0
    )
    return data[0], 1.0 / number if divides else float(number)


def addends(tape: Tape, operation: Operation) -> tuple[int, ...]:
    """Return the values that the operation adds up: data of the size of the result. Fewer than two mean no sum.

    Integers are places of tokens, in a packed batch for instance, and never a stream.
    """
    size = tape.shape(operation.outputs[0]) if operation.outputs else ()

    def fits(value: int) -> bool:
        return tape.is_data(value) and tape.shape(value) == size and tape.is_real(value)

    if is_addition(operation):
        return tuple(filter(fits, operation.inputs))
    if base_name(operation) == "sum":
        stack = tape.producer(operation.inputs[0])
        if stack is not None and stack.name == "stack" and len(stack.inputs) > 1 and all(map(fits, stack.inputs)):
            return stack.inputs
    return ()


def shifted_input(tape: Tape, operation: Operation, stream: int) -> int | None:
    """Return the operand of an addition that depends on the stream, where the other (a bias, a position code) does not.

    ``None`` where both depend on the stream, or neither does.
    """
    if not is_addition(operation):
        return None
    found = [value for value in operation.inputs if tape.depends(value, stream)]
    return found[0] if len(found) == 1 else None


def scattered_inputs(operation: Operation) -> tuple[int, ...]:
    """Return ``(base, source)`` of an operation that writes a source into a base or adds it there; else ``()``."""
    position = _SCATTERS.get(base_name(operation))
    return () if position is None else (*refs(operation, 0), *refs(operation, position))


def parameter_of(tape: Tape, value: int) -> int | None:
    """Return the parameter that a value is a moved copy of; ``None`` for a value that was computed."""
    while value not in tape.names:
        operation = tape.producer(value)
        source = None if operation is None else moved_input(operation)
        if source is None:
            return None
        value = source
    return value


def added_operand(operation: Operation) -> int | None:
    """Return the value that a fused product adds to its result, usually a bias."""
    found = refs(operation, 0) if base_name(operation) in _WITH_BIAS_FIRST else ()
    return found[0] if found else None


def term_factor(operation: Operation, value: int) -> float:
    """Return the number by which an addition multiplies one of its terms."""
    name = base_name(operation)
    first, second = (refs(operation, position) for position in ((1, 0) if name == "rsub" else (0, 1)))
    alpha = float(operation.kwargs.get("alpha", 1)) * (1 if name == "add" else -1)
    return float(value in first) + alpha * (value in second)


def matrix_operands(operation: Operation) -> tuple[int, ...]:
    """Return the two values that a product multiplies, without the bias that fused forms add."""
    first = 1 if base_name(operation) in _WITH_BIAS_FIRST else 0
    found = [value for position in (first, first + 1) for value in refs(operation, position)]
    return tuple(found) if len(found) == 2 else operation.inputs


def weight_operand(tape: Tape, operation: Operation) -> int | None:
    """Return the operand of a matrix product that comes from a parameter of at least two dimensions."""
    # A stream can begin with learned queries or latents. These parameters count as data, and are no weights.
    found = (value for value in matrix_operands(operation) if not tape.is_data(value))
    operands = [value for value in found if len(tape.shape(value)) >= 2]
    for value in operands:
        if parameter_of(tape, value) is not None:
            return value
    return next((value for value in operands if tape.made_of_parameters(value)), None)


def is_product(tape: Tape, operation: Operation) -> bool:
    """Whether the operation multiplies data with a weight matrix. A foreign kernel that takes both counts, too."""
    if operation.index not in tape.products:
        tape.products[operation.index] = _is_product(tape, operation)
    return tape.products[operation.index]


def _is_product(tape: Tape, operation: Operation) -> bool:
    known = base_name(operation) in _PRODUCTS
    schema = getattr(operation.function, "_schema", None)
    foreign = schema is not None and not schema.name.startswith(("aten::", "prims::"))
    if not (known or foreign) or not any(tape.is_data(output) for output in operation.outputs):
        return False
    weight = weight_operand(tape, operation)
    return weight is not None and any(tape.is_data(value) for value in matrix_operands(operation) if value != weight)


def is_softmax(operation: Operation) -> bool:
    """Whether the operation is a softmax, of attention or of a router."""
    return "softmax" in operation.name


def is_fused_attention(operation: Operation) -> bool:
    """Whether the operation is a kernel that computes attention from queries, keys and values, in this order."""
    return "attention" in operation.name


def is_attention(operation: Operation) -> bool:
    """Whether the operation is a fused attention kernel or a softmax."""
    return is_softmax(operation) or is_fused_attention(operation)


def attended(tape: Tape, operation: Operation) -> int:
    """Return the number of positions that attention attends to: the size of the dimension of its softmax."""
    if is_softmax(operation):
        dim = operation.args[1]
        return tape.shape(operation.inputs[0])[dim] if isinstance(dim, int) else 0
    keys = refs(operation, 1)
    return tape.shape(keys[0])[-2] if keys else 0


def is_contraction(operation: Operation) -> bool:
    """Whether the operation is a matrix product of two tensors, or a fused attention kernel."""
    return base_name(operation) in _PRODUCTS or is_fused_attention(operation)


def is_convolution(operation: Operation) -> bool:
    """Whether the operation is a convolution, whose channels are dimension 1."""
    return "convolution" in operation.name


def is_wide_convolution(tape: Tape, operation: Operation) -> bool:
    """Whether the operation is a convolution with a kernel of more than one entry."""
    return is_convolution(operation) and max(tape.shape(operation.inputs[1])[2:], default=1) > 1


def is_plain_product(operation: Operation) -> bool:
    """Whether the operation multiplies two matrices, or two batches of matrices, in the layout of ``torch.matmul``."""
    return base_name(operation) in _PLAIN_PRODUCTS


def is_mixing_without_weights(operation: Operation) -> bool:
    """Whether the operation mixes tokens without a weight (a Fourier transform, a pooling)."""
    return any(word in operation.name for word in _WEIGHTLESS_MIXERS)


# Fused norms: the position of the gain among the arguments, and whether the channels are dimension 1 (feature maps).
_NORMS = {
    **dict.fromkeys(("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"), (2, False)),
    **dict.fromkeys(("native_group_norm", "group_norm", "native_batch_norm", "cudnn_batch_norm"), (1, True)),
    **dict.fromkeys(("batch_norm", "_batch_norm_no_update", "_native_batch_norm_legit_no_training"), (1, True)),
}


def is_norm(operation: Operation) -> bool:
    """Whether the operation is a fused normalization."""
    return operation.name in _NORMS


def norm_gain(operation: Operation) -> int | None:
    """Return the gain of a fused norm, ``None`` where it has none."""
    found = refs(operation, _NORMS[operation.name][0])
    return found[0] if found else None


def norm_groups(operation: Operation) -> int:
    """Return the number of groups of channels that a fused norm normalizes separately."""
    position = {"native_group_norm": 6, "group_norm": 1}.get(operation.name)
    return 1 if position is None else int(operation.args[position])


def norm_channels_second(operation: Operation) -> bool:
    """Whether the channels of a fused norm are dimension 1; else they are the last dimension."""
    return _NORMS[operation.name][1]
