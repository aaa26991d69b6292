"""Blocks go through the audit two at a time: while one is read, the other is multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from lightning_spectral.checkpoints.source import Source
from lightning_spectral.records import ResidualBlock
from lightning_spectral.weights.names import parameters_of, scale_key, stored_names
from lightning_spectral.weights.stored import StoredWeights

__all__ = ["two_at_a_time", "weights_of"]

T = TypeVar("T")

# Bytes of a block in float32 up to which it is held so: two blocks at a time are in memory then.
_HELD = 2**27
_PAGE, _PIECE = 4096, 2**15
_SCALED = (".original", ".log_scale")


def two_at_a_time(
    blocks: Sequence[ResidualBlock], source: Source, measure: Callable[[ResidualBlock], T]
) -> Iterator[T]:
    """Measure every block, and yield the results in their order.

    Two threads, each with half of torch's threads, keep disk and cores busy: one reads while the other multiplies, or
    both multiply, which needs no waiting for each other as the threads of one product do. Where a block has to be
    copied out of the file, or put together from pieces, one is in memory at a time.

    Args:
        blocks: The blocks.
        source: Where their weights are.
        measure: Reads a block (:func:`weights_of`), and makes a result of it that does not hold its weights.
    """
    mapped = not source.copied and all(_numbers(block, source) is not None for block in blocks)
    workers, threads = (2 if mapped else 1), torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "audit", torch.set_num_threads, (max(1, threads // workers),))
    try:
        results = [pool.submit(measure, block) for block in blocks]
        for result in results:
            yield result.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # for threads that begin later


def weights_of(block: ResidualBlock, source: Source) -> StoredWeights:
    """Read the weights of a block, and the residual scales that belong to it.

    A small block is converted to float32 once instead of at every product.

    Args:
        block: The block.
        source: Where its weights are.

    Raises:
        CheckpointError: The file is damaged there.
    """
    numbers = _numbers(block, source)
    small = numbers is not None and 4 * numbers <= _HELD
    weights = [name for path in parameters_of([block]) for name in stored_names(path, source.readers) or () if name]
    scales = [key for branch in block.branches if (key := scale_key(branch.site)) in source.readers]
    # What has a scale on it is multiplied by it in the precision of the model, and rounded as there.
    return StoredWeights(
        {
            name: _fetched(source.read(name), small and not name.endswith(_SCALED))
            for name in dict.fromkeys(weights + scales)
        }
    )


def _fetched(tensor: Tensor, convert: bool) -> Tensor:
    tensor = tensor.detach()
    if convert and tensor.dtype in (torch.float16, torch.bfloat16):
        made = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
        # Pieces that torch converts in this thread alone: more of them would be in the way of products.
        for part, place in zip(torch.split(tensor.flatten(), _PIECE), torch.split(made.view(-1), _PIECE), strict=True):
            place.copy_(part)
        return made
    if tensor.is_contiguous() and tensor.numel():
        tensor.flatten()[:: _PAGE // tensor.element_size()].any()  # one number of each page
    return tensor


def _numbers(block: ResidualBlock, source: Source) -> int | None:
    """Return how many numbers a block has, ``None`` if some of them are put together from pieces."""
    stored = [names[0] for path in parameters_of([block]) if (names := stored_names(path, source.readers))]
    if not all(name in source.shapes for name in stored):
        return None
    return sum(math.prod(source.shapes[name]) for name in stored)
