"""Each metric beside what it is on the whole; as a script, one of the processes that stream to it together."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from processes import join, leave
from tiny_run import TinyGPT
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_spectral.metrics import EffectiveRank, SpectralRatio, StableRank, TokenResidual, TokenSimilarity
from lightning_spectral.tokens import (
    effective_rank,
    stable_rank,
    token_residual,
    token_similarity,
)

WIDTH = 6


def rows(rank: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    """Return the rank of all tokens as the rows of one matrix."""

    def whole(x: Tensor, mask: Tensor | None = None) -> Tensor:
        return rank(x.reshape(-1, WIDTH), None if mask is None else mask.reshape(-1), **options)

    return whole


def average(value: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    """Return the mean over the sequences."""
    return lambda x, mask=None: value(x, mask, **options).mean()


# Each metric beside what it is on the whole.
METRICS: dict[str, tuple[Callable[[], Metric], Callable[..., Tensor]]] = {
    "effective rank of σ": (lambda: EffectiveRank(WIDTH), rows(effective_rank, power=1)),
    "effective rank of σ²": (lambda: EffectiveRank(WIDTH, power=2), rows(effective_rank, power=2)),
    "centred effective rank": (
        lambda: EffectiveRank(WIDTH, centred=True),
        rows(effective_rank, power=1, centred=True),
    ),
    "stable rank": (lambda: StableRank(WIDTH), rows(stable_rank)),
    "centred stable rank": (lambda: StableRank(WIDTH, centred=True), rows(stable_rank, centred=True)),
    "residual": (TokenResidual, average(token_residual)),
    "similarity": (TokenSimilarity, average(token_similarity)),
    "residual without massive tokens": (lambda: TokenResidual(massive=3.0), average(token_residual, massive=3.0)),
}
MAKE = {name: make for name, (make, _) in METRICS.items()}


def tokens(generator: torch.Generator, *shape: int) -> Tensor:
    """Return tokens around a mean, ``(*shape, WIDTH)``, some of them massive."""
    X = torch.randn(*shape, WIDTH, generator=generator) * torch.logspace(0, -1, WIDTH) + 0.5
    X[..., 0, 2] *= 20
    return X


def some(generator: torch.Generator, *shape: int) -> Tensor:
    """Return a mask that leaves at least three tokens of every sequence."""
    mask = torch.rand(*shape, generator=generator) < 0.5
    mask[..., :3] = True
    return mask


def collection() -> MetricCollection:
    return MetricCollection({name: make() for name, make in MAKE.items()} | {"ratio": SpectralRatio()}, prefix="val/")


def ratio_model(seed: int) -> TinyGPT:
    torch.manual_seed(seed)
    return TinyGPT()


def distributed_data() -> tuple[Tensor, Tensor, TinyGPT]:
    """Return five sequences, one of which has a NaN, their mask and a model."""
    generator = torch.Generator().manual_seed(0)
    X, mask = tokens(generator, 5, 9), some(generator, 5, 9)
    X[3, 1, 1] = math.nan
    return X, mask, ratio_model(0)


def main(folder: Path) -> None:
    """Stream this process's share, and write what all processes make of it."""
    torch.set_num_threads(1)
    join(folder)
    rank = int(os.environ["RANK"])
    metrics, (X, mask, model) = collection(), distributed_data()
    share = slice(0, 2) if rank == 0 else slice(2, None)
    for x, m in zip(X[share].split(1), mask[share].split(1), strict=True):
        metrics.update(x=x, mask=m, model=model)
    values = {name: value.item() for name, value in metrics.compute().items()}
    unmeasured = {}
    for name, metric in metrics.items(keep_base=True, copy_state=False):
        metric.sync()
        unmeasured[name] = int(metric.unmeasured)
        metric.unsync()
    (folder / f"{rank}.json").write_text(json.dumps([values, unmeasured]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
