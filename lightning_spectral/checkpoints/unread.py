"""Weights of a file that no block reads, where another block reads the same: they are counted and told."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

import torch

from lightning_spectral.checkpoints.files import Checkpoint
from lightning_spectral.checkpoints.source import ADAPTER, Source
from lightning_spectral.checkpoints.untrusted import printable
from lightning_spectral.errors import CheckpointError
from lightning_spectral.records import ResidualBlock
from lightning_spectral.weights.names import parameters_of, stored_names

__all__ = ["refuse_unread_adapters", "unread"]

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")
_SHOWN = 3


def unread(checkpoint: Checkpoint, source: Source, blocks: Sequence[ResidualBlock]) -> Iterator[str]:
    """Yield a sentence on the matrices of layers, or of experts, that belong to no block.

    Embeddings, heads, queries and keys are read by no block at all and are not counted: counted are matrices whose name
    is that of one that is read, but for its numbers.

    Args:
        checkpoint: The checkpoint.
        source: The weights of the model in it.
        blocks: The blocks that are measured.
    """
    used = _used(source, blocks)
    like = {_NUMBER.sub("*", name): name for name in used}
    left = [
        name
        for name, shape in checkpoint.shapes.items()
        if name not in used and len(shape) > 1 and _NUMBER.sub("*", name) in like
    ]
    if any(branch.aliases for block in blocks for branch in block.branches):
        left = [name for name in left if not _is_one_of(checkpoint, name, used)]
    if left:
        read = {name[: match.end()] for name in used for match in _NUMBER.finditer(name)}
        modules = list(dict.fromkeys(_module(name, read) for name in left))
        shown = ", ".join(printable(name, 60) for name in modules[:_SHOWN]) + (", ..." if len(modules) > _SHOWN else "")
        yield (
            f"{len(left)} matrices of the file belong to none of {len(blocks)} blocks, though their like do: {shown}"
        )


def _used(source: Source, blocks: Sequence[ResidualBlock]) -> set[str]:
    """Return the names in the file of what the blocks read."""
    needed = (stored_names(path, source.readers) for path in parameters_of(blocks))
    return {name for found in needed if found is not None for name in source.pieces.get(found[0], ())}


def _is_one_of(checkpoint: Checkpoint, name: str, used: Collection[str]) -> bool:
    """Whether a weight is one that is read, under another name: of a layer that is run several times, for example."""
    pattern, shape = _NUMBER.sub("*", name), checkpoint.shapes[name]
    alike = (other for other in used if checkpoint.shapes[other] == shape and _NUMBER.sub("*", other) == pattern)
    return any(torch.equal(checkpoint.read(other), checkpoint.read(name)) for other in alike)


def _module(name: str, read: Collection[str]) -> str:
    """Return the outermost layer or expert of a weight in which nothing is read."""
    return next((name[: match.end()] for match in _NUMBER.finditer(name) if name[: match.end()] not in read), name)


def refuse_unread_adapters(checkpoint: Checkpoint, source: Source, blocks: Sequence[ResidualBlock]) -> None:
    """Refuse adapters on weights that are read without them: the model computes with both.

    Args:
        checkpoint: The checkpoint.
        source: The weights of the model in it.
        blocks: The blocks that are measured.

    Raises:
        CheckpointError: There are some.
    """
    used = _used(source, blocks)
    owners = {name.rpartition(".")[0] for name in used}
    around = owners | {owner.rpartition(".")[0] for owner in owners}
    left = [
        name
        for name in checkpoint.shapes
        if name not in used and (match := ADAPTER.match(name)) and match[1].removesuffix(".") in around
    ]
    if left:
        raise CheckpointError(
            f"{printable(checkpoint.path)}: found {len(left)} weights of adapters, such as {printable(left[0])}, on "
            "matrices that the blocks have without them, and the model computes with both: merge them first "
            "(merge_and_unload), or pass the blocks of the model with its adapters: audit(path, find_blocks(model))"
        )
