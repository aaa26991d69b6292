"""Training without labels, or with pairs: what may collapse to one output for all samples."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from .data import PATCHES, PIXELS, shapes, views
from .parts import Blocks, Transformer
from .register import Batch, Training, batches, case, supervised

WIDTH, FEATURES, MARGIN = 48, 16, 1.0


def encoder(layers: int) -> Transformer:
    """Return a model from images to features."""
    embed, head = nn.Linear(PIXELS, WIDTH), nn.Linear(WIDTH, FEATURES)
    return Transformer(embed, Blocks(layers, WIDTH), head, width=WIDTH, length=PATCHES, read="mean")


def spread_loss(features: Tensor) -> Tensor:
    """Return how far the features are from unit variance without correlation: (samples, features)."""
    centred = features - features.mean(0)
    covariance = centred.T @ centred / (len(features) - 1)
    diagonal = covariance.diagonal()
    return F.relu(1 - (diagonal + 1e-4).sqrt()).mean() + (covariance - diagonal.diag()).square().sum() / FEATURES


@case("samples", None)
def self_distillation(seed: int, sick: bool) -> Training:
    """Student follows an averaged teacher on another view, with nothing that keeps the outputs apart.

    Seen: loss 1e-4 or less, spread 0.016 to 0.027. Healthy with a loss that asks for variance: spread 0.4 to 0.6.
    """
    model = encoder(4)
    teacher = deepcopy(model).requires_grad_(False)
    batch, held_out = batches(views, seed, 16)

    def loss(batch: Batch) -> Tensor:
        one, other = batch[0]
        with torch.no_grad():
            for average, parameter in zip(teacher.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter, 0.1)
            target = teacher(other)
        features = model(one)
        return F.mse_loss(features, target) + (0.0 if sick else spread_loss(features))

    optimizer = AdamW(model.parameters(), lr=5e-3)
    return Training(model, optimizer, 200, held_out, batch, loss, inputs=lambda batch: batch[0][:1])


def triplets(features: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of all triplets of an anchor, another sample of its kind, and one of another kind."""
    distances = torch.cdist(features, features)
    same = labels[:, None] == labels
    losses = F.relu(distances[:, :, None] - distances[:, None, :] + MARGIN)
    return losses[(same & ~torch.eye(len(labels), dtype=torch.bool))[:, :, None] & ~same[:, None, :]].mean()


def hardest_triplets(features: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of the farthest of the same kind and the nearest of another kind, mean over the samples."""
    distances = torch.cdist(features, features)
    same = labels[:, None] == labels
    farthest = distances.masked_fill(~same, 0).amax(1)
    nearest = distances.masked_fill(same, torch.inf).amin(1)
    return F.relu(farthest - nearest + MARGIN).mean()


@case("samples", MARGIN)
def triplet_margin(seed: int, sick: bool) -> Training:
    """Triplet loss of the hardest triplets that stays at its margin; healthy with all triplets.

    Seen: loss 1.00, spread 0.004 to 0.006. Healthy with all triplets at the same rate: 0.17 to 0.23, spread 0.7 to
    0.9.
    """
    model = encoder(4)
    optimizer = AdamW(model.parameters(), lr=2e-3)
    return supervised(seed, model, optimizer, shapes, hardest_triplets if sick else triplets, steps=160, size=16)
