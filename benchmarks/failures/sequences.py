"""Classifiers of made-up texts, a model that reverses, and regressions on made-up series and speech."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from .data import FRAME, JOINTS, SYMBOLS, TOPICS, WORDS, cross_entropy, reversal, series, speech, topics, variance
from .parts import Blocks, SequenceToSequence, Transformer, stock_encoder
from .register import Batch, Training, case, supervised

WIDTH, LENGTH = 48, 24
HISTORY, AHEAD, PATCH = 48, 8, 4
EMPTY_FROM, BAD_STEP = 60, 60
topic_words = topics(LENGTH)
waves = series(HISTORY, AHEAD, PATCH)


def classifier(body: nn.Module, **options: Any) -> Transformer:
    """Return a model of the topic."""
    embed, head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, TOPICS)
    return Transformer(embed, body, head, width=WIDTH, length=LENGTH, **options)


def forecaster(body: nn.Module) -> Transformer:
    """Return a model of how a series goes on, read from its last patch."""
    embed, head = nn.Linear(PATCH, WIDTH), nn.Linear(WIDTH, AHEAD)
    return Transformer(embed, body, head, width=WIDTH, length=HISTORY // PATCH, read="last")


@case("tokens", math.log(TOPICS))
def post_norm_class_token(seed: int, sick: bool) -> Training:
    """Post-norm nn.TransformerEncoder of 12 layers that classifies through a class token, without warm-up.

    Seen: loss 1.40, tokens and samples equal to 1e-7. Healthy with pre-norm: 0.02 to 0.07, residual 0.08.
    """
    model = classifier(stock_encoder(12, WIDTH, pre=not sick), read="class")
    optimizer = AdamW(model.parameters(), lr=5e-3)
    return supervised(seed, model, optimizer, topic_words, cross_entropy, steps=100)


@case("tokens", math.log(SYMBOLS))
def post_norm_seq2seq(seed: int, sick: bool) -> Training:
    """nn.Transformer with its default post-norm that is to reverse its input, without warm-up.

    Seen: loss 1.5 to 1.9, the decoder's tokens equal to 1e-3, while samples stay apart. Healthy with pre-norm:
    0.97, residual 0.1: it knows which symbols occur, not yet their order.
    """
    model = SequenceToSequence(5, WIDTH, SYMBOLS, 10, pre=not sick)
    optimizer = AdamW(model.parameters(), lr=5e-3)
    return supervised(seed, model, optimizer, reversal(10), cross_entropy, steps=120)


@case("samples", variance(waves))
def post_norm_forecaster(seed: int, sick: bool) -> Training:
    """Time-series regressor with a post-norm encoder that predicts the mean for all inputs.

    Seen: loss 1.0 to 1.1, outputs equal to 6e-4. Healthy with pre-norm: 0.36 to 0.43.
    """
    model = forecaster(stock_encoder(8, WIDTH, pre=not sick))
    return supervised(seed, model, AdamW(model.parameters(), lr=3e-3), waves, F.mse_loss, steps=200)


@case("samples", variance(speech))
def speech_sigmoid(seed: int, sick: bool) -> Training:
    """Speech to positions in (0, 1) through a sigmoid and a post-norm encoder: a constant for all inputs.

    Seen: loss 0.080, the variance of the targets, outputs equal to 1e-6. Healthy with pre-norm: 0.003 to 0.005.
    """
    head = nn.Sequential(nn.Linear(WIDTH, JOINTS), nn.Sigmoid())
    model = Transformer(nn.Linear(FRAME, WIDTH), stock_encoder(8, WIDTH, pre=not sick), head, width=WIDTH, length=32)
    return supervised(seed, model, AdamW(model.parameters(), lr=5e-3), speech, F.mse_loss, steps=120)


@case("weights", math.log(TOPICS))
def padding_rows(seed: int, sick: bool) -> Training:
    """A sample that is all padding from step 60 on: the softmax over nothing is NaN.

    Seen: not finite from step 60 on. Healthy, where that sample shows its first token: 0.08 to 0.14.
    """
    model = classifier(Blocks(4, WIDTH), read="mean")
    optimizer = AdamW(model.parameters(), lr=1e-3)
    training = supervised(seed, model, optimizer, padded, cross_entropy, steps=120)
    good = training.batch

    def batch(step: int) -> Batch:
        (ids, padding), labels = good(step)
        if step >= EMPTY_FROM:
            padding[0] = True
            padding[0, 0] = sick
        return (ids, padding), labels

    training.batch = batch
    return training


def padded(generator: Generator, samples: int) -> Batch:
    """Draw texts of different lengths: the words, where they are padding, and the topics."""
    (ids,), labels = topic_words(generator, samples)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (samples, 1), generator=generator)
    padding = torch.arange(LENGTH) >= lengths
    return (ids.masked_fill(padding, 0), padding), labels


@case("weights", variance(waves))
def bad_batch(seed: int, sick: bool) -> Training:
    """One batch in raw units, 10,000 times too large, in the middle of a good regression without clipping.

    Seen: not finite. Healthy without that batch: 0.52.
    """
    model = forecaster(Blocks(4, WIDTH))
    training = supervised(seed, model, SGD(model.parameters(), lr=2e-2, momentum=0.9), waves, F.mse_loss, steps=160)
    good = training.batch

    def batch(step: int) -> Batch:
        (x,), targets = good(step)
        scale = 1e4 if sick and step == BAD_STEP else 1.0
        return (scale * x,), scale * targets

    training.batch = batch
    return training


@case("samples", math.log(TOPICS))
def mean_pooled(seed: int, sick: bool) -> Training:
    """Classifier of the tokens' mean, whose tokens rightly agree when it is trained; sick at 30 times the rate.

    Seen: loss 1.4, all samples equal to 1e-6. Healthy: 0.008, residual 0.13 to 0.16, lower than before training.
    """
    model = classifier(stock_encoder(4, WIDTH, pre=False), read="mean")
    optimizer = AdamW(model.parameters(), lr=3e-2 if sick else 1e-3)
    return supervised(seed, model, optimizer, topic_words, cross_entropy, steps=160)


@case("samples", math.log(TOPICS))
def mean_pooled_outside(seed: int, sick: bool) -> Training:
    """The classifier of the tokens' mean, with mean and head in the training step: the model returns tokens.

    Seen: loss and residual of `mean_pooled`, to all digits when healthy.
    """
    model = classifier(stock_encoder(4, WIDTH, pre=False))
    head, model.head = model.head, nn.Identity()
    optimizer = AdamW([*model.parameters(), *head.parameters()], lr=3e-2 if sick else 1e-3)

    def criterion(tokens: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(head(tokens.mean(1)), labels)

    return supervised(seed, model, optimizer, topic_words, criterion, steps=160)
