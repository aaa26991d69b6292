"""Made-up images: classification, detection, reconstruction."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from .data import BOXES, PATCHES, PIXELS, SHAPES, boxes, cross_entropy, masked_shapes, shapes, variance
from .parts import Blocks, Detector, Transformer, stock_encoder
from .register import Training, case, supervised

WIDTH, QUERIES = 48, 6
ASSIGNMENTS = torch.tensor(list(permutations(range(QUERIES), BOXES)))  # (ways, boxes): the query of each box


def vision_transformer(body: nn.Module, outputs: int, **options: Any) -> Transformer:
    """Return a model of patches."""
    embed, head = nn.Linear(PIXELS, WIDTH), nn.Linear(WIDTH, outputs)
    return Transformer(embed, body, head, width=WIDTH, length=PATCHES, **options)


@case("logits", math.log(SHAPES))
def vit_high_rate(seed: int, sick: bool) -> Training:
    """Vision Transformer from scratch at a rate 100 times too high.

    Seen: logits in the thousands and more, loss 1.4 to 1.55, residual 0.002 to 0.3. Healthy: 0.42 to 0.46, logits
    9.
    """
    model = vision_transformer(Blocks(6, WIDTH), SHAPES, read="class")
    optimizer = AdamW(model.parameters(), lr=1e-1 if sick else 1e-3)
    return supervised(seed, model, optimizer, shapes, cross_entropy, steps=200)


def set_loss(found: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of the best assignment of queries to boxes: (batch, queries, 5) and (batch, boxes, 4)."""
    distances = (found[:, :, None, 1:] - targets[:, None]).abs().sum(-1)  # (batch, queries, boxes)
    there = F.logsigmoid(found[..., 0])
    costs = (distances - there[..., None])[:, ASSIGNMENTS, torch.arange(BOXES)].sum(-1)
    best = ASSIGNMENTS[costs.argmin(1)]  # (batch, boxes)
    is_box = torch.zeros_like(there).scatter(1, best, 1.0)
    box_loss = distances.gather(1, best[:, None]).squeeze(1)
    return F.binary_cross_entropy_with_logits(found[..., 0], is_box) + box_loss.mean()


@case("tokens", None)
def detr_equal_queries(seed: int, sick: bool) -> Training:
    """Detector with object queries, post-norm decoder at a high rate: all queries become equal.

    Seen: queries equal to 3e-4 or less, loss 0.8. Healthy with pre-norm: 0.25 to 0.28, residual 0.95; the loss is
    0.16 higher when the images of the held-out batch are exchanged, so it looks at them.
    """
    model = Detector(6, WIDTH, QUERIES, pre=not sick)
    return supervised(seed, model, AdamW(model.parameters(), lr=3e-3), boxes, set_loss, steps=200)


@case("tokens", variance(masked_shapes))
def masked_autoencoder(seed: int, sick: bool) -> Training:
    """Masked autoencoder with post-norm layers that paints the mean image for all inputs.

    Seen: loss 0.63 to 0.68, tokens equal to 1e-7. Healthy with pre-norm: 0.33 to 0.38.
    """
    model = vision_transformer(stock_encoder(8, WIDTH, pre=not sick, dropout=0.0), PIXELS)
    return supervised(seed, model, AdamW(model.parameters(), lr=1e-2), masked_shapes, F.mse_loss, steps=120)
