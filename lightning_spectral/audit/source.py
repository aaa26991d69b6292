"""Where a checkpoint keeps the weights of a model: behind a prefix, under older names, or in pieces."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from torch import Tensor

from lightning_spectral.audit.files import Checkpoint
from lightning_spectral.audit.skeleton import stored_names
from lightning_spectral.audit.untrusted import printable
from lightning_spectral.control.fuse import scale_keys
from lightning_spectral.errors import CheckpointError

__all__ = ["Source", "find_source", "find_transformers_source", "refuse_differences"]

_PARAMETRIZED = re.compile(r"(.*\.|)parametrizations\.(\w+)\.original")
_DEPTH = 4  # components of a prefix, as in "trainer.module.net.encoder."


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The weights of a model in a checkpoint.

    Attributes:
        readers: What reads a weight, by its name in the model.
        shapes: Shape of every weight; not of those that are put together from pieces.
        copied: Whether to read one copies it out of the file.
    """

    readers: Mapping[str, Callable[[], Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    copied: bool

    def read(self, name: str) -> Tensor:
        """Read one weight.

        Raises:
            CheckpointError: It holds 8-bit floats: those of a quantized checkpoint are to be multiplied by scales.
        """
        tensor = self.readers[name]()
        if tensor.is_floating_point() and tensor.element_size() < 2:
            raise CheckpointError(f"{printable(name)} holds {tensor.dtype}, whose scales are not understood")
        return tensor


@dataclass(frozen=True, slots=True)
class _Conversion:
    """How a library names and converts the weights of a checkpoint on loading.

    Attributes:
        rename: Returns the name in the model, and the pattern of a converter if one takes part.
        converters: By pattern.
        order: Key to sort names by, so that pieces are put together in their order.
        model: The model, which converters may ask.
    """

    rename: Callable[[str], tuple[str, str | None]] = lambda name: (name, None)
    converters: Mapping[str, Any] | None = None
    order: Callable[[str], Any] = str
    model: Any = None


Pieces = dict[str, list[tuple[str | None, str]]]


def find_source(checkpoint: Checkpoint, expected: Iterable[str], conversion: _Conversion | None = None) -> Source:
    """Return the weights of a model whose names are known.

    Args:
        checkpoint: The checkpoint. Its names may have a prefix, as those of a LightningModule have.
        expected: Names of the model.
        conversion: How names and weights are converted, not at all by default.

    Raises:
        CheckpointError: The checkpoint has several copies of the model.
    """
    conversion, wanted = conversion or _Conversion(), set(expected)
    found: dict[str, Pieces] = {}
    for prefix in _prefixes(checkpoint.shapes):
        names = [name.removeprefix(prefix) for name in checkpoint.shapes if name.startswith(prefix)]
        found[prefix] = _assigned(names, wanted, conversion)
    best = max(found, key=lambda prefix: len(found[prefix]))
    _refuse_copies(checkpoint, found, best)
    readers: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for target, pieces in found[best].items():
        stored = [(pattern, best + name) for pattern, name in pieces]
        if pieces[0][0] is None:
            readers[target] = partial(checkpoint.read, stored[0][1])
            shapes[target] = checkpoint.shapes[stored[0][1]]
        else:
            readers |= _converted(checkpoint, target, stored, conversion)
    return Source(readers, shapes, checkpoint.copied)


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return what a quarter of the names or more begin with, the shortest first."""
    names = list(names)
    counts = Counter(
        prefix for name in names for prefix in accumulate(part + "." for part in name.split(".")[:-1][:_DEPTH])
    )
    return ["", *sorted((prefix for prefix, count in counts.items() if 4 * count >= len(names)), key=len)]


def _assigned(names: Sequence[str], wanted: set[str], conversion: _Conversion) -> Pieces:
    """Return for every weight of the model the names of its pieces."""
    scales = set(scale_keys(names))
    result: Pieces = defaultdict(list)
    for name in sorted(names, key=conversion.order):
        inner = _PARAMETRIZED.fullmatch(name)
        if name in scales or (inner is not None and inner[1] + inner[2] in wanted):
            result[name].append((None, name))
            continue
        target, pattern = conversion.rename(name)
        if target in wanted:
            result[target].append((pattern, name))
    return result


def _refuse_copies(checkpoint: Checkpoint, found: Mapping[str, Pieces], best: str) -> None:
    """Refuse to choose between a model and its moving average, or a student and its teacher."""
    mine = {best + name for pieces in found[best].values() for _, name in pieces}
    for prefix, assigned in found.items():
        theirs = {prefix + name for pieces in assigned.values() for _, name in pieces}
        if theirs and len(assigned) == len(found[best]) and not mine & theirs:
            raise CheckpointError(
                f"{printable(checkpoint.path)}: found the weights of the model twice, as {printable(best)!r} and as "
                f"{printable(prefix)!r}, expected one copy"
            )


def _converted(
    checkpoint: Checkpoint, target: str, stored: Sequence[tuple[str | None, str]], conversion: _Conversion
) -> dict[str, Callable[[], Tensor]]:
    """Return readers of the weights that a converter makes of some tensors."""
    assert conversion.converters is not None
    converter = conversion.converters[str(stored[0][0])]

    def read(wanted: str) -> Tensor:
        copy = deepcopy(converter)
        for pattern, name in stored:
            copy.add_tensor(target, name, pattern, partial(checkpoint.read, name))
        try:
            made = copy.convert(target, model=conversion.model, config=conversion.model.config)[wanted]
        except Exception as error:  # the pieces of a damaged file fit in any way but the right one
            raise CheckpointError(
                f"{printable(checkpoint.path)}: {printable(wanted)} cannot be put together from {len(stored)} "
                f"tensor(s): {printable(error, 200)}"
            ) from None
        tensor = made[0] if isinstance(made, list) else made
        assert isinstance(tensor, Tensor)
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
    return find_source(checkpoint, wanted, _Conversion(rename, by_pattern, dot_natural_key, model))


def refuse_differences(checkpoint: Checkpoint, source: Source, expected: Mapping[str, tuple[int, ...] | None]) -> None:
    """Refuse a checkpoint that has not the weights that its structure says.

    Args:
        checkpoint: The checkpoint.
        source: Its weights.
        expected: Shapes of the weights that will be read, ``None`` where they are not known.

    Raises:
        CheckpointError: A weight is not there, or of another shape.
    """
    stored = {name: stored_names(name, source.readers) for name in expected}
    absent = [name for name, found in stored.items() if found is None]
    wrong = [
        f"{printable(name)} is {source.shapes[found[0]]}, expected {expected[name]}"
        for name, found in stored.items()
        if found is not None and expected[name] not in (None, source.shapes.get(found[0], expected[name]))
    ]
    if absent or wrong:
        problem = wrong[0] if wrong else f"{printable(absent[0])} is not there"
        raise CheckpointError(
            f"{printable(checkpoint.path)}: {len(absent)} of {len(expected)} weights are missing (parametrized ones "
            f"are stored in pieces) and {len(wrong)} have another shape (packed ones do): {problem}"
        )
