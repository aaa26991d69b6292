"""Where a checkpoint keeps the weights of a model: behind a prefix, under older names, or in pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.checkpoints.files import Checkpoint
from lightning_spectral.checkpoints.untrusted import printable
from lightning_spectral.errors import CheckpointError
from lightning_spectral.weights.placing import differences, place

__all__ = ["ADAPTER", "Source", "find_source", "find_transformers_source", "refuse_differences"]

_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|(weight\.)?absmax|quant_map|SCB|weight_scale(_inv)?)$|_blocks$"
)

ADAPTER = re.compile(r"(.*\.|)(lora_(?!dropout)\w+|lok[rh]_\w+|hada_\w+|ia3_l|oft_[rs]|vera_lambda_\w+|boft_\w+)(\.|$)")
"""A weight that is added to another one, or multiplies it, by the names that libraries give; before it, whose."""


_Convert = Callable[[str, Sequence[tuple[str | None, str]]], dict[str, Callable[[], Tensor]]]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The weights of a model in a checkpoint.

    Attributes:
        readers: What reads a weight, by its name in the model.
        shapes: Shape of every weight; not of those that are put together from pieces.
        copied: Whether to read one copies it out of the file.
        pieces: What each weight is called in the file, or what it is put together from.
    """

    readers: Mapping[str, Callable[[], Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    copied: bool
    pieces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """Read one weight.

        Raises:
            CheckpointError: It holds 8-bit floats: those of a quantized checkpoint are to be multiplied by scales.
        """
        tensor = self.readers[name]()
        if tensor.is_floating_point() and tensor.element_size() < 2:
            raise CheckpointError(f"{printable(name)} holds {tensor.dtype}, whose scales are not understood")
        return tensor


def find_source(
    checkpoint: Checkpoint, expected: Iterable[str], convert: _Convert | None = None, **conversion: Any
) -> Source:
    """Return the weights of a model whose names are known.

    Args:
        checkpoint: The checkpoint. Its names may have a prefix, as those of a LightningModule have.
        expected: Names of the model.
        convert: Returns what reads the weights that are made of several tensors.
        **conversion: How names are converted, not at all by default; see :func:`place`.

    Raises:
        CheckpointError: The checkpoint has several copies of the model.
    """
    found, twice = place(checkpoint.shapes, set(expected), checkpoint.dicts, **conversion)
    if twice is not None:
        one, two = twice
        keys = " or ".join(f"key={printable(item.removesuffix('.'))!r}" for item in (two, one) if item)
        raise CheckpointError(
            f"{printable(checkpoint.path)}: found the weights of the model twice, as {printable(one)!r} and as "
            f"{printable(two)!r}, expected one copy: choose one, audit(path, {keys}), or --key on the command line"
        )
    readers: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for target, stored in found.items():
        if stored[0][0] is None:
            _refuse_two_names(checkpoint, target, [name for _, name in stored])
            made: dict[str, Callable[[], Tensor]] = {target: partial(checkpoint.read, stored[0][1])}
            shapes[target] = checkpoint.shapes[stored[0][1]]
        else:
            assert convert is not None
            made = convert(target, stored)
        readers |= made
        sources |= dict.fromkeys(made, tuple(name for _, name in stored))
    return Source(readers, shapes, checkpoint.copied, sources)


def _refuse_two_names(checkpoint: Checkpoint, target: str, names: Sequence[str]) -> None:
    """Refuse a weight that is stored under two names, an older one and the present one, with different numbers."""
    for name in names[1:]:
        one, two = checkpoint.read(names[0]), checkpoint.read(name)
        if one.shape != two.shape or not torch.equal(one, two):
            raise CheckpointError(
                f"{printable(checkpoint.path)}: found {printable(target)} twice, as {printable(names[0])!r} and as "
                f"{printable(name)!r}, with different numbers, expected one copy"
            )


def _converted(
    checkpoint: Checkpoint,
    model: Any,
    converters: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    target: str,
    stored: Sequence[tuple[str | None, str]],
) -> dict[str, Callable[[], Tensor]]:
    """Return readers of the weights that a converter of the library makes of some tensors."""
    converter = converters[str(stored[0][0])]

    def read(wanted: str) -> Tensor:
        copy = deepcopy(converter)
        for pattern, name in stored:
            copy.add_tensor(target, name, pattern, partial(checkpoint.read, name))
        try:
            made = copy.convert(target, model=model, config=model.config)[wanted]
        except Exception as error:  # the pieces of a damaged file fit in any way but the right one
            raise CheckpointError(
                f"{printable(checkpoint.path)}: {printable(wanted)} cannot be put together from {len(stored)} "
                f"tensor(s): {printable(error, 200)}"
            ) from None
        tensor = made[0] if isinstance(made, list) else made
        assert isinstance(tensor, Tensor)
        expected = shapes.get(wanted, tuple(tensor.shape))
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{printable(checkpoint.path)}: {printable(wanted)}, which is put together from {len(stored)} "
                f"tensor(s), is {tuple(tensor.shape)}, expected {expected}"
            )
        return tensor

    head = converter.target_patterns[0]
    targets = [target.replace(head, pattern, 1) for pattern in converter.target_patterns]
    return {name: partial(read, name) for name in targets}


def find_transformers_source(checkpoint: Checkpoint, model: Any, expected: Iterable[str]) -> Source:
    """Return the weights of a transformers model, by the conversions that this library makes on loading.

    Args:
        checkpoint: The checkpoint.
        model: The model, on the meta device.
        expected: Names of the model.

    Raises:
        CheckpointError: The checkpoint has several copies of the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    wanted = dict.fromkeys(expected, True)
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]

    def rename(name: str) -> tuple[str, str | None]:
        for changes in ((renamings, converters), ([], [])):
            target, pattern = rename_source_key(name, *changes, model.base_model_prefix, wanted)
            if target in wanted:
                return target, pattern
        return name, None

    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    convert = partial(_converted, checkpoint, model, by_pattern, shapes)
    return find_source(checkpoint, wanted, convert, rename=rename, order=dot_natural_key)


def refuse_differences(checkpoint: Checkpoint, source: Source, expected: Mapping[str, tuple[int, ...] | None]) -> None:
    """Refuse a checkpoint that has not the weights that its structure says.

    Args:
        checkpoint: The checkpoint.
        source: Its weights.
        expected: Shapes of the weights that will be read, ``None`` where they are not known.

    Raises:
        CheckpointError: A weight is not there, or of another shape.
    """
    problem, wrong = differences(expected, source.readers, source.shapes)
    if problem:
        told = printable(problem, 500)
        raise CheckpointError(f"{printable(checkpoint.path)}: {told}{_remark(checkpoint, source, wrong)}")


def _remark(
    checkpoint: Checkpoint, source: Source, wrong: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]
) -> str:
    """Return what explains weights that do not fit, and the way from there, where something does."""
    packed = any(not source.readers[name]().is_floating_point() for name, *_ in wrong[:1] if name in source.readers)
    if packed or any(_QUANTIZED.search(name) for name in checkpoint.shapes):
        return ". They are quantized, which is not read: load the model, dequantize it, and audit what you save of that"
    if any("flat_param" in name.split(".")[-1] for name in checkpoint.shapes):
        return ". FSDP has flattened them, which is not read: save the model with its full state dict"
    parts = {_parts(found, wide) for _, found, wide in wrong}
    if len(parts) == 1 and None not in parts:
        return (
            f". Each of these is one of {parts.pop()} equal parts of a matrix, as model-parallel training stores it: "
            "put the parts together first"
        )
    if any(ADAPTER.search(name) for name in checkpoint.shapes):
        return ". It has weights of adapters: merge them first, or pass the blocks of the model with its adapters"
    return "".join(f" ({printable(note)})" for note in checkpoint.notes)


def _parts(found: tuple[int, ...], wide: tuple[int, ...]) -> int | None:
    """Return into how many equal parts a matrix was cut along one dimension, if it was."""
    differing = [(small, large) for small, large in zip(found, wide, strict=False) if small != large]
    if len(found) != len(wide) or len(differing) != 1:
        return None
    ((small, large),) = differing
    return large // small if 0 < small < large and large % small == 0 else None
