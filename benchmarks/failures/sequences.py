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
from .register import Batch, Training, batches, case, supervised, warm_up

WIDTH, LENGTH = 48, 24
HISTORY, AHEAD, PATCH = 48, 8, 4
EMPTY_FROM, BAD_STEP = 60, 60
topic_words = topics(LENGTH)
waves = series(HISTORY, AHEAD, PATCH)


def classifier(body: nn.Module, **options: Any) -> Transformer:
    """Return a model of the topic."""
    return Transformer(nn.Embedding(WORDS, WIDTH), body, nn.Linear(WIDTH, TOPICS), width=WIDTH, length=LENGTH, **options)


@case("tokens", math.log(TOPICS))
def post_norm_class_token(seed: int, sick: bool) -> Training:
    """Post-norm nn.TransformerEncoder of 12 layers that classifies through a class token, without warm-up."""
    model = classifier(stock_encoder(12, WIDTH, pre=not sick), read="class")
    optimizer = AdamW(model.parameters(), lr=3e-3)
    return supervised(seed, model, optimizer, topic_words, cross_entropy, steps=100)


@case("tokens", math.log(SYMBOLS))
def post_norm_seq2seq(seed: int, sick: bool) -> Training:
    """nn.Transformer with its default post-norm that is to reverse its input, without warm-up."""
    model = SequenceToSequence(5, WIDTH, SYMBOLS, 10, pre=not sick)
    optimizer = AdamW(model.parameters(), lr=5e-3)
    return supervised(seed, model, optimizer, reversal(10), cross_entropy, steps=120)


@case("samples", variance(waves))
def post_norm_forecaster(seed: int, sick: bool) -> Training:
    """Time-series regressor with a post-norm encoder that predicts the mean for all inputs."""
    body = stock_encoder(8, WIDTH, pre=not sick)
    model = Transformer(
        nn.Linear(PATCH, WIDTH), body, nn.Linear(WIDTH, AHEAD), width=WIDTH, length=HISTORY // PATCH, read="last"
    )
    return supervised(seed, model, AdamW(model.parameters(), lr=3e-3), waves, F.mse_loss, steps=200)


@case("samples", variance(speech))
def speech_sigmoid(seed: int, sick: bool) -> Training:
    """Speech to positions in (0, 1) through a sigmoid and a post-norm encoder: a constant for all inputs."""
    head = nn.Sequential(nn.Linear(WIDTH, JOINTS), nn.Sigmoid())
    model = Transformer(nn.Linear(FRAME, WIDTH), stock_encoder(8, WIDTH, pre=not sick), head, width=WIDTH, length=32)
    return supervised(seed, model, AdamW(model.parameters(), lr=5e-3), speech, F.mse_loss, steps=120)


@case("weights", math.log(TOPICS))
def padding_rows(seed: int, sick: bool) -> Training:
    """A sample that is all padding from step 60 on: the softmax over nothing is NaN."""
    model = classifier(Blocks(4, WIDTH))
    model.read = "mean"
    batch, held_out = batches(padded, seed, 12)

    def loss(batch: Batch) -> Tensor:
        inputs, labels = batch
        return cross_entropy(model(*inputs), labels)

    def with_empty(step: int) -> Batch:
        (ids, padding), labels = batch(step)
        if step >= EMPTY_FROM:
            padding[0] = True
            if not sick:
                padding[0, 0] = False
        return (ids, padding), labels

    return Training(model, AdamW(model.parameters(), lr=1e-3), 120, held_out, with_empty, loss)


def padded(generator: Generator, samples: int) -> Batch:
    """Draw texts of different lengths: the words, where they are padding, and the topics."""
    (ids,), labels = topic_words(generator, samples)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (samples, 1), generator=generator)
    padding = torch.arange(LENGTH) >= lengths
    return (ids.masked_fill(padding, 0), padding), labels


@case("weights", variance(waves))
def bad_batch(seed: int, sick: bool) -> Training:
    """One batch in raw units, 10,000 times too large, in the middle of a good regression without clipping."""
    model = Transformer(
        nn.Linear(PATCH, WIDTH), Blocks(4, WIDTH), nn.Linear(WIDTH, AHEAD), width=WIDTH, length=HISTORY // PATCH, read="last"
    )
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
    """Classifier of the tokens' mean, whose tokens rightly agree when it is trained; sick at 30 times the rate."""
    model = classifier(stock_encoder(4, WIDTH, pre=False), read="mean")
    optimizer = AdamW(model.parameters(), lr=3e-2 if sick else 1e-3)
    return supervised(seed, model, optimizer, topic_words, cross_entropy, steps=160)


@case("samples", math.log(TOPICS))
def mean_pooled_outside(seed: int, sick: bool) -> Training:
    """The same with the mean and the head in the training step: the model returns tokens."""
    model = classifier(stock_encoder(4, WIDTH, pre=False))
    model.head = nn.Identity()
    head = nn.Linear(WIDTH, TOPICS)
    optimizer = AdamW([*model.parameters(), *head.parameters()], lr=3e-2 if sick else 1e-3)

    def criterion(tokens: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(head(tokens.mean(1)), labels)

    return supervised(seed, model, optimizer, topic_words, criterion, steps=160)
