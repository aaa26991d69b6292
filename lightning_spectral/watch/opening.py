"""What a run says of itself when it has measured for the first time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_spectral.records import Measurement, ResidualBlock
from lightning_spectral.records.text import numbered

__all__ = ["doubts", "found", "is_lazy", "nothing_to_compare"]


def found(blocks: Sequence[ResidualBlock], measurement: Measurement, every_n_steps: int) -> str:
    """Say what is measured, and how often: "8 blocks, all verified, measured every 10 steps"."""
    with_ratio = sum(layer.ratio is not None for layer in measurement)
    part = "" if with_ratio == len(blocks) else f"{with_ratio} with a ratio, "
    if not with_ratio and _begins_at_zero(measurement):
        part = "none with a ratio while norms are zero, "
    verified = sum(block.verified for block in blocks)
    checked = f"{'all' if verified == len(blocks) else verified or 'none'} verified"
    every = "step" if every_n_steps == 1 else f"{every_n_steps} steps"
    return f"{_many(blocks)}, {part}{checked}, measured every {every}"


def nothing_to_compare(measurement: Measurement) -> str | None:
    """Say that no block has a ratio, and why the first one has none; ``None`` where some block has one or will have."""
    known = any(layer.ratio is not None for layer in measurement)
    if known or not measurement.layers or _begins_at_zero(measurement):
        return None
    first = measurement.layers[0]
    return (
        f"{_many(measurement.layers)}, none with a spectral ratio, so there is nothing to compare "
        f"(block {numbered(first)}: {first.reason})"
    )


def _begins_at_zero(measurement: Measurement) -> bool:
    """Whether some block has no ratio because a branch begins at zero, as many initializations have it."""
    pairs = ((layer.mlp_norm, layer.attention_norm) for layer in measurement)
    return any(None not in pair and 0 in pair for pair in pairs)


def is_lazy(measurement: Measurement) -> bool:
    """Whether nothing could be measured yet, because layers get their weights in the first forward pass."""
    return all("its layer is lazy" in (layer.reason or "") for layer in measurement)


def doubts(measurement: Measurement) -> Iterator[str]:
    """Say which norms are not to be trusted."""
    doubtful = [
        layer
        for layer in measurement
        if layer.doubt is not None and (layer.mlp_norm is not None or layer.attention_norm is not None)
    ]
    if doubtful:
        many = f"{len(doubtful)} of {len(measurement.layers)} blocks"
        first = f"{doubtful[0].name or 'the model'}: {doubtful[0].doubt}"
        yield f"{many} are not verified, so their numbers may be wrong ({first})"


def _many(blocks: Sequence[object]) -> str:
    return "1 block" if len(blocks) == 1 else f"{len(blocks)} blocks"
