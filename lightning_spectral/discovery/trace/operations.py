"""What the recorded operations mean: data movement, sums, multipliers, products with weights, norms, attention."""

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
    "is_attention",
    "is_contraction",
    "is_mixing_without_weights",
    "is_norm",
    "is_product",
    "is_wide_convolution",
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

# Data movement, casts and linear reductions: the output holds the entries of one input. The number is the position of
# that input among the arguments.
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

_MULTIPLICATIONS = {"mul", "div", "multiply", "true_divide"}
_ADDITIONS = {"add", "sub", "rsub"}
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
# The position of the weight is found by asking which operand derives from a parameter.
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
_WITH_BIAS_FIRST = {"addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation"}
_WEIGHTLESS_MIXERS = ("fft", "pool", "cumsum", "cumprod")


def base_name(operation: Operation) -> str:
    """Return the name of the operation without the underscore that marks it as in-place."""
    name = operation.name
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


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
    """Return the value whose entries the operation moves, ``None`` where it does more than moving."""
    name = base_name(operation)
    if name == "refresh":
        # A view re-read after writes: it holds what was written last where that covers it.
        return operation.inputs[-1] if len(operation.inputs) == 2 and operation.args[0] else None
    position = _MOVES.get(name)
    if position is None:
        return None
    found = refs(operation, position)
    return found[0] if len(found) == 1 else None


def moved_values(tape: Tape, value: int) -> Iterator[int]:
    """Yield a value, what it was moved from, what that was moved from, and so on."""
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
    if name not in _MULTIPLICATIONS:
        return None
    if name in ("div", "true_divide") and not refs(operation, 0):
        return None
    data = [value for value in operation.inputs if tape.is_data(value)]
    if len(data) != 1 or (name in ("div", "true_divide") and data[0] not in refs(operation, 0)):
        return None
    if refs(operation, 0) == refs(operation, 1):
        return None  # a square
    others = [value for value in operation.inputs if value != data[0]]
    if others:
        return data[0], Divisor(others[0]) if name in ("div", "true_divide") else others[0]
    number = next(
        (item for item in (*operation.args, *operation.kwargs.values()) if isinstance(item, int | float)), 1.0
    )
    return data[0], 1.0 / number if name in ("div", "true_divide") else float(number)


def addends(tape: Tape, operation: Operation) -> tuple[int, ...]:
    """Return the data-dependent values of one size that the operation adds up; fewer than two mean no such sum."""
    name = base_name(operation)
    if name in _ADDITIONS:
        size = tape.shape(operation.outputs[0])
        return tuple(value for value in operation.inputs if tape.is_data(value) and tape.shape(value) == size)
    if name == "sum":
        stack = tape.producer(operation.inputs[0])
        if stack is not None and stack.name == "stack" and len(stack.inputs) > 1:
            size = tape.shape(operation.outputs[0])
            if all(tape.is_data(value) and tape.shape(value) == size for value in stack.inputs):
                return stack.inputs
    return ()


def shifted_input(tape: Tape, operation: Operation, stream: int) -> int | None:
    """Return the value to which something independent of the stream (a bias, a position code) is added."""
    if base_name(operation) not in _ADDITIONS:
        return None
    found = [value for value in operation.inputs if tape.depends(value, stream)]
    return found[0] if len(found) == 1 else None


def scattered_inputs(operation: Operation) -> tuple[int, ...]:
    """Return ``(base, source)`` of an operation that writes or adds a source into a base."""
    position = _SCATTERS.get(base_name(operation))
    return () if position is None else (*refs(operation, 0), *refs(operation, position))


def parameter_of(tape: Tape, value: int) -> int | None:
    """Return the parameter that a value was made of by data movement alone, ``None`` where there is more to it."""
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
    """Return the values that a product multiplies, without the bias that fused forms add."""
    first = 1 if base_name(operation) in _WITH_BIAS_FIRST else 0
    found = [value for position in (first, first + 1) for value in refs(operation, position)]
    return tuple(found) if len(found) == 2 else operation.inputs


def weight_operand(tape: Tape, operation: Operation) -> int | None:
    """Return the operand of a matrix product that comes from a parameter of at least two dimensions."""
    # Learned queries and latents, with which a stream begins, are data.
    found = (value for value in matrix_operands(operation) if not tape.is_data(value))
    operands = [value for value in found if len(tape.shape(value)) >= 2]
    for value in operands:
        if parameter_of(tape, value) is not None:
            return value
    return next((value for value in operands if tape.made_of_parameters(value)), None)


def is_product(tape: Tape, operation: Operation) -> bool:
    """Whether the operation multiplies data with a weight matrix (or is a kernel of unknown kind that takes one)."""
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


def is_attention(operation: Operation) -> bool:
    """Whether the operation is a fused attention kernel or a softmax."""
    return "softmax" in operation.name or "attention" in operation.name


def attended(tape: Tape, operation: Operation) -> int:
    """Return to how many positions attention attends: over how many the softmax goes."""
    if "softmax" in operation.name:
        dim = operation.args[1]
        return tape.shape(operation.inputs[0])[dim] if isinstance(dim, int) else 0
    keys = refs(operation, 1)
    return tape.shape(keys[0])[-2] if keys else 0


def is_contraction(operation: Operation) -> bool:
    """Whether the operation is a product of two tensors or a fused attention kernel."""
    return base_name(operation) in _PRODUCTS or "attention" in operation.name


def is_wide_convolution(tape: Tape, operation: Operation) -> bool:
    """Whether the operation is a convolution with a kernel of more than one entry."""
    return "convolution" in operation.name and max(tape.shape(operation.inputs[1])[2:], default=1) > 1


def is_mixing_without_weights(operation: Operation) -> bool:
    """Whether the operation mixes tokens without a weight (a Fourier transform, a pooling)."""
    return any(word in operation.name for word in _WEIGHTLESS_MIXERS)


# Fused norms, with the position of their gain, and whether channels stand second, as in feature maps.
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
    """Return the number of groups of channels that a fused norm takes one by one."""
    position = {"native_group_norm": 6, "group_norm": 1}.get(operation.name)
    return 1 if position is None else int(operation.args[position])


def norm_channels_second(operation: Operation) -> bool:
    """Whether the channels of a fused norm stand in the second dimension, and not in the last ones."""
    return _NORMS[operation.name][1]
