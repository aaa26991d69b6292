"""Read off the tape how a matrix or a gain is made of a parameter: a name and a list of tensor methods.

A recipe holds no tensor. So it can be applied later to a model whose weights have changed, moved or been sharded.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.discovery.trace.operations import base_name, is_copy, moved_input
from lightning_spectral.discovery.trace.tape import Operation, Ref, Tape
from lightning_spectral.records.layout import UNARY, arranged

__all__ = ["NoRecipeError", "Step", "attribute_path", "recipe", "shortest"]

Step = tuple[Any, ...]


class NoRecipeError(Exception):
    """The tensor is not made of one parameter in a way that can be repeated."""


def recipe(tape: Tape, value: int) -> tuple[str, tuple[Step, ...]]:
    """Return the attribute path of a parameter and the tensor methods that make ``value`` of it.

    Args:
        tape: The recorded forward pass.
        value: A value that depends on one parameter (or buffer) and constants.

    Returns:
        Attribute path and steps. ``("experts",)`` stands for picking entries of dimension 0 by the input, and
        ``("expand", k)`` for repeating along k new dimensions in front, and along dimensions of size 1.

    Raises:
        NoRecipeError: Where the value is made of several parameters, or by an unknown operation.
    """
    if value in tape.names:
        return attribute_path(tape.names[value]), ()
    operation = tape.producer(value)
    if operation is None:
        raise NoRecipeError("it is a constant that belongs to no parameter")
    computed = next((path for path, made in tape.attributes.items() if made == value), None)
    if computed is not None:  # a parametrized weight: the attribute gives its value, the parametrization is no step
        return computed, ()
    source, step = _step(tape, operation, value)
    name, steps = recipe(tape, source)
    return name, _simplified((*steps, *step))


def attribute_path(name: str) -> str:
    """Turn ``layer.parametrizations.weight.original`` into ``layer.weight``, the attribute with the computed weight."""
    head, separator, tail = name.partition(".parametrizations.")
    return f"{head}.{tail.split('.')[0]}" if separator else name


def _step(tape: Tape, operation: Operation, value: int) -> tuple[int, tuple[Step, ...]]:
    """Return the input of an operation and the tensor methods that repeat it."""
    name, source = base_name(operation), moved_input(operation)
    if source is not None:
        if is_copy(operation):
            return source, ()
        return source, (_view_step(tape, operation, name, source, value),)
    numbers = [item for item in operation.args if isinstance(item, int | float)]
    if len(operation.inputs) == 1 and name in ("add", "sub", "mul", "div", "pow") and len(numbers) == 1:
        return operation.inputs[0], ((name, numbers[0]),)
    if len(operation.inputs) == 1 and name == "rsub" and len(numbers) == 1:
        return operation.inputs[0], (("neg",), ("add", numbers[0]))
    if len(operation.inputs) == 1 and name in UNARY:
        return operation.inputs[0], ((name,),)
    constants = [item for item in operation.inputs if not tape.made_of_parameters(item)]
    others = [item for item in operation.inputs if item not in constants]
    if len(others) == 1 and len(constants) == 1 and name in ("add", "sub", "mul", "div"):
        tensor = tape.content(constants[0])
        if tensor.numel() == 1 and (name in ("add", "mul") or operation.inputs[0] == others[0]):
            return others[0], ((name, tensor.item()),)
    raise NoRecipeError(f"it is computed by the operation {operation.name!r}")


def _view_step(tape: Tape, operation: Operation, name: str, source: int, value: int) -> Step:
    """Return the tensor method that repeats a view, a rearrangement or a pick."""
    args = tuple(tuple(item) if isinstance(item, list) else item for item in operation.args[1:])
    shape = tape.shape(source)
    if name in ("t", "transpose"):
        dims: tuple[Any, ...] = args[:2] if name == "transpose" else (-2, -1)
        return ("transpose", *sorted(item if item < 0 else item - len(shape) for item in dims))
    if name == "expand":  # the number of new dimensions; along a repeated dimension all copies are equal
        return (name, len(tape.shape(value)) - len(shape))
    if name in ("squeeze", "unsqueeze", "permute", "movedim"):
        return (name, *args)
    if name in ("view", "_unsafe_view", "reshape", "unflatten", "flatten"):
        return ("reshape", tape.shape(value))
    if name in ("index", "index_select", "gather"):
        return _picked_step(tape, operation, name, shape)
    part = _part_step(tape, operation, name, args, shape, value)
    if part is None:
        raise NoRecipeError(f"it is rearranged by the operation {operation.name!r}")
    return part


def _picked_step(tape: Tape, operation: Operation, name: str, shape: tuple[int, ...]) -> Step:
    """Return the step that picks entries by number: experts that the input chooses, or rows in a fixed order."""
    picked = [value for value in operation.inputs[1:] if not tape.tensors[value].is_floating_point()]
    if len(shape) >= 3 and any(tape.is_data(value) for value in picked):
        return ("experts",)
    places = operation.args[1] if name == "index" else ()
    dimension = (
        operation.args[1]
        if name == "index_select"
        else next((place for place, item in enumerate(places) if isinstance(item, Ref)), None)
    )
    if len(picked) != 1 or dimension is None or name == "gather" or tape.is_data(picked[0]):
        raise NoRecipeError(f"it is rearranged by the operation {operation.name!r}")
    numbers = tape.content(picked[0])
    if numbers.dim() != 1 or numbers.dtype in (torch.bool, torch.uint8):
        raise NoRecipeError(f"it is rearranged by the operation {operation.name!r}")
    size = shape[dimension]
    return ("index_select", int(dimension), tuple(int(number) % size for number in numbers.tolist()))


def _part_step(
    tape: Tape, operation: Operation, name: str, args: tuple[Any, ...], shape: tuple[int, ...], value: int
) -> Step | None:
    """Return the step that takes one part of a tensor, ``None`` for an unknown operation."""
    number = operation.outputs.index(value)
    if name == "select":
        return ("select", args[0], args[1])
    if name == "unbind":
        return ("select", args[0] if args else 0, number)
    if name in ("split", "split_with_sizes", "chunk"):
        dimension = int(args[1]) if len(args) > 1 else 0
        start = sum(tape.shape(output)[dimension] for output in operation.outputs[:number])
        return ("narrow", dimension, start, tape.shape(value)[dimension])
    if name == "slice" and (len(args) < 4 or args[3] == 1):
        dimension = int(args[0]) if args else 0
        start = int(args[1] or 0) if len(args) > 1 else 0
        return ("narrow", dimension, start % shape[dimension] if start < 0 else start, tape.shape(value)[dimension])
    return None


def _simplified(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Drop pairs of transpositions that undo each other."""
    result: list[Step] = []
    for step in steps:
        if step[0] == "transpose" and result and result[-1] == step:
            result.pop()
        else:
            result.append(step)
    return tuple(result)


@lru_cache(maxsize=64)
def shortest(steps: tuple[Step, ...], shape: tuple[int, ...]) -> tuple[Step, ...]:
    """Return an equivalent recipe of views where there is one. ``einsum`` rearranges weights in ways that copy them.

    Both recipes are applied to a tensor of numbers 0, 1, 2, …; equal results mean equal recipes.

    Args:
        steps: A recipe; ``("stack",)`` stands for picking entry e of dimension 0.
        shape: Shape of the parameter.
    """
    if not any(step[0] in ("permute", "reshape", "unsqueeze", "squeeze") for step in steps):
        return steps
    numbers = torch.arange(math.prod(shape), dtype=torch.int32, device="cpu").view(shape)
    wanted = _applied(numbers, steps)
    pick = [step for step in steps if step == ("stack",)]
    for candidate in ((), (("flatten", 0, 1),), (("flatten", 1, 2),), (("flatten",),)):
        for turned in ((), (("transpose", -2, -1),)):
            simple = (*candidate, *turned, *pick)
            try:
                if torch.equal(_applied(numbers, simple), wanted):
                    return simple
            except (RuntimeError, IndexError):
                continue
    return steps


def _applied(tensor: Tensor, steps: tuple[Step, ...]) -> Tensor:
    for step in steps:
        tensor = tensor[-1] if step[0] == "stack" else arranged(tensor, (step,))
    return tensor
