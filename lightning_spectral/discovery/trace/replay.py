"""Run a slice of a recorded forward pass again: on other content, in float64, without touching the model.

Only values that depend on a source are computed again. All other values keep their recorded content::

    stream ──► norm ──► product ──► add ──► target       recomputed: everything between the source and the target
                          ▲          ▲
                        weight     held                  read from the tape, or from `held`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_spectral.discovery.trace.hankel import grouped, product
from lightning_spectral.discovery.trace.tape import Operation, Ref, Tape, bits, probe_device
from lightning_spectral.passes.arguments import map_leaves, tensors_in, written_tensors
from lightning_spectral.passes.aside.streams import random_streams_kept

__all__ = ["execute", "replay", "restored"]


def replay(
    tape: Tape, sources: Mapping[int, Tensor], target: int, *, held: Mapping[int, Tensor] | None = None
) -> Tensor:
    """Compute a value from other values.

    Args:
        tape: The recorded forward pass.
        sources: New content for some values, in float64 where it is floating point.
        target: The value to compute.
        held: Content for values that are not recomputed even where they depend on a source. A value that depends on
            held values alone keeps its recorded content; a value that depends on a source does not.

    Returns:
        The content that ``target`` has with the new sources.
    """
    environment: dict[int, Tensor] = dict(sources)
    held = held or {}
    fixed = {*held, *sources}

    def fetch(value: int) -> Tensor:
        if value in environment:
            return environment[value]
        return held[value] if value in held else tape.wide(value)

    done: set[int] = set()
    with torch.no_grad():
        # Values are numbered in the order of their creation: no value before the first source depends on a source.
        for value in bits(tape.ancestors[target] & ~((1 << min(sources)) - 1)):
            operation = tape.producer(value)
            if operation is None or operation.index in done or value in fixed:
                continue
            if not any(parent in environment for parent in operation.inputs):
                continue
            done.add(operation.index)  # an operation with several outputs is reached once for each
            for output, tensor in zip(operation.outputs, execute(tape, operation, fetch), strict=True):
                if output not in fixed and tensor is not None:
                    environment[output] = tensor
    return fetch(target)


def execute(tape: Tape, operation: Operation, fetch: Callable[[int], Tensor]) -> Sequence[Tensor | None]:
    """Run one operation functionally: a tensor that the original wrote to in place is copied before.

    Args:
        tape: The recorded forward pass.
        operation: The operation.
        fetch: Returns the content of an input.

    Returns:
        The content of the outputs, in the order of ``operation.outputs``: first the written tensors, then the results.
    """
    if operation.function is None:
        return [_refresh(tape, operation, fetch)]

    args, kwargs = restored(operation.args, fetch), restored(operation.kwargs, fetch)
    written = written_tensors(operation.function, args, kwargs)
    copies = {id(tensor): tensor.clone() for tensor in written}
    if copies:
        args, kwargs = (
            map_leaves(lambda leaf: copies.get(id(leaf), leaf), part) if part else part for part in (args, kwargs)
        )
    if torch.Tag.nondeterministic_seeded in getattr(operation.function, "tags", ()):
        devices = {tensor.device for tensor in tensors_in((args, kwargs))}
        with random_streams_kept(devices):  # nothing is drawn from the stream of the run, and each replay draws alike
            result = _call(operation, args, kwargs)
    else:
        result = _call(operation, args, kwargs)
    found = [copies[id(tensor)] for tensor in written] + tensors_in(result)
    return [*found, *[None] * len(operation.outputs)][: len(operation.outputs)]


def restored(arguments: Any, fetch: Callable[[int], Tensor]) -> Any:
    """Return recorded arguments with content in the places of their tensors, in float64, on the device of probes."""

    def restore(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return fetch(leaf.value)
        if isinstance(leaf, torch.dtype) and (leaf.is_floating_point or leaf.is_complex):
            return torch.complex128 if leaf.is_complex else torch.float64
        if isinstance(leaf, torch.Generator):
            return leaf.clone_state()  # the model's own generator is left where it is
        return probe_device(leaf) if isinstance(leaf, torch.device) else leaf

    return map_leaves(restore, arguments)


def _call(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call the operation in float64. Where the kernel has no float64, call an equivalent, or the kernel in float32."""
    assert operation.function is not None
    short = product(operation.name, args, kwargs)
    if short is not None:
        return short
    try:
        return operation.function(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        if operation.name == "_grouped_mm":
            return _grouped_product(*args, **kwargs)
        if operation.name in ("view", "_unsafe_view"):  # the result of a kernel can have other strides on a CPU
            return args[0].reshape(args[1])
        if operation.name.startswith("_scaled_dot_product"):
            return _attention(operation.function, *args, **kwargs)
        single = [map_leaves(_in_float32, part) for part in (tuple(args), dict(kwargs))]
        return map_leaves(_in_float64, operation.function(*single[0], **single[1]))


def _attention(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Compute what a fused attention kernel computes. The schema tells the order of its arguments."""
    names = [argument.name for argument in function._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    q, k, v = given["query"], given["key"], given["value"]
    mask, causal = given.get("attn_mask", given.get("attn_bias")), given.get("is_causal", False)
    groups = q.shape[-3] != k.shape[-3]
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(
            q, k, v, mask, 0.0, causal, scale=given.get("scale"), enable_gqa=groups
        )


def _grouped_product(rows: Tensor, weights: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Multiply the rows of each expert by its matrix; ``offsets[e]`` is the end of the rows of expert e."""
    if offsets is None or rows.dim() != 2 or weights.dim() != 3:
        return rows @ weights
    return grouped(rows, weights, offsets)


def _in_float32(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.dtype == torch.float64:
        return leaf.float()
    return torch.float32 if leaf == torch.float64 else leaf


def _in_float64(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf


def _refresh(tape: Tape, operation: Operation, fetch: Callable[[int], Tensor]) -> Tensor:
    """Recompute a view after writes to its storage.

    Three steps in a flat buffer: lay out the old content, write the changed parts in order, read the view.
    """
    old, *writes = operation.inputs
    place = tape.places[operation.outputs[0]]
    extents = [tape.places[value].end for value in operation.inputs]
    content = fetch(old)
    flat = content.new_zeros(max(extents))
    for value in (old, *writes):
        part = tape.places[value]
        flat.as_strided(part.shape, part.strides, part.offset).copy_(fetch(value))
    return flat.as_strided(place.shape, place.strides, place.offset).clone()
