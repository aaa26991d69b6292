"""Read the weights of the next block while those of this one are multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor, nn

from lightning_spectral.audit.skeleton import parameters_of, skeleton, stored_names
from lightning_spectral.audit.source import Source
from lightning_spectral.records import ResidualBlock

__all__ = ["ReadAhead"]

# Bytes of a block in float32 up to which it is held so: two blocks at a time are in memory then.
_HELD = 2**27
_PAGE, _PIECE = 4096, 2**15
_SCALED = (".original", ".log_scale")


class ReadAhead:
    """Reads blocks in their order, in a thread of its own and at most one block ahead.

    A small block is converted to float32 there, once instead of at every product. Of a large one, whose pages stay in
    the file, only the pages are fetched; one that would have to be copied is read when its turn comes.

    Args:
        blocks: The blocks, in the order in which they will be asked for.
        source: Where their weights are.
    """

    def __init__(self, blocks: Sequence[ResidualBlock], source: Source) -> None:
        self._blocks, self._source = blocks, source
        self._next: Future[nn.Module] | None = None
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    def __enter__(self) -> ReadAhead:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the thread."""
        self._thread.shutdown(cancel_futures=True)

    def read(self, position: int) -> nn.Module:
        """Return the weights of a block, and begin to read the next one. Whoever calls lets go of the last one before.

        Args:
            position: Of the block; 0 at first, and then one after the other.

        Raises:
            CheckpointError: The file is damaged there.
        """
        waiting, self._next = self._next, None
        model = _read(self._blocks[position], self._source) if waiting is None else waiting.result()
        for following in self._blocks[position + 1 : position + 2]:
            numbers = _numbers(following, self._source)
            if numbers is not None and (not self._source.copied or 4 * numbers <= _HELD):
                self._next = self._thread.submit(_read, following, self._source)
        return model


def _read(block: ResidualBlock, source: Source) -> nn.Module:
    numbers = _numbers(block, source)
    small = numbers is not None and 4 * numbers <= _HELD
    # What has a scale on it is multiplied by it in the precision of the model, and rounded as there.
    return skeleton(
        block, source.readers, lambda name: _fetched(source.read(name), small and not name.endswith(_SCALED))
    )


def _fetched(tensor: Tensor, convert: bool) -> Tensor:
    tensor = tensor.detach()
    if convert and tensor.dtype in (torch.float16, torch.bfloat16):
        made = torch.empty(tensor.shape)
        # Pieces that torch converts in this thread: a second team of threads would be in the way of the first.
        for part, place in zip(tensor.flatten().split(_PIECE), made.view(-1).split(_PIECE), strict=True):
            place.copy_(part)
        return made
    if tensor.is_contiguous() and tensor.numel():
        tensor.flatten()[:: _PAGE // tensor.element_size()].any()  # one number of each page
    return tensor


def _numbers(block: ResidualBlock, source: Source) -> int | None:
    """Return how many numbers a block has, ``None`` if some of them are put together from pieces."""
    stored = [names[0] for path in parameters_of(block) if (names := stored_names(path, source.readers))]
    if not all(name in source.shapes for name in stored):
        return None
    return sum(math.prod(source.shapes[name]) for name in stored)
