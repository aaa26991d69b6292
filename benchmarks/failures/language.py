"""Causal language models over the bytes of the standard library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import SGD, AdamW, Muon

from .data import BYTES, cross_entropy, text_entropy, windows
from .parts import Blocks, Norm, Together, Transformer, causal, draw_anew_, stock_encoder
from .register import Batch, Training, case, constant, supervised, warm_up

WIDTH, CONTEXT = 48, 32


def language_model(body: nn.Module, *, width: int = WIDTH, mask: Callable[[int], Tensor] = causal) -> Transformer:
    """Return a model of the next byte."""
    embed, head = nn.Embedding(BYTES, width), nn.Linear(width, BYTES)
    return Transformer(embed, body, head, width=width, length=CONTEXT, mask=mask)


def adam(model: nn.Module, rate: float) -> AdamW:
    """Return AdamW over all parameters."""
    return AdamW(model.parameters(), lr=rate)


def next_byte(seed: int, model: nn.Module, optimizer: Any, *, steps: int, **options: Any) -> Training:
    """Begin a training on windows of the text."""
    return supervised(seed, model, optimizer, windows(CONTEXT), cross_entropy, steps=steps, **options)


@case("tokens", text_entropy())
def post_norm_lm(seed: int, sick: bool) -> Training:
    """Post-norm nn.TransformerEncoder as a byte language model at rate 1e-2 without warm-up."""
    model = language_model(stock_encoder(8, WIDTH, pre=not sick))
    return next_byte(seed, model, adam(model, 1e-2), steps=120, factor=constant if sick else warm_up(40))


@case("logits", text_entropy())
def gpt_high_rate(seed: int, sick: bool) -> Training:
    """Small pre-norm GPT, its rate 30 times too high, without warm-up and clipping."""
    model = language_model(Blocks(6, WIDTH))
    rate, factor, clip = (1e-1, constant, None) if sick else (3e-3, warm_up(20), 1.0)
    return next_byte(seed, model, adam(model, rate), steps=120, factor=factor, clip=clip)


@case("tokens", text_entropy())
def copied_layers(seed: int, sick: bool) -> Training:
    """Deep post-norm nn.TransformerEncoder, whose layers start as copies of one: tokens agree before the first step."""
    body = stock_encoder(18, 32, pre=not sick)
    model = language_model(body if sick else draw_anew_(body), width=32)
    return next_byte(seed, model, adam(model, 3e-3), steps=100, size=8)


@case("tokens", text_entropy())
def strong_attention(seed: int, sick: bool) -> Training:
    """GPT of 12 blocks whose attention starts 64 times too strong, as from a wrong scale of W_o."""
    body = Blocks(12, 32)
    if sick:
        for block in body.layers:
            block.attention.o.weight.data.mul_(64)
    model = language_model(body, width=32)
    for table in (model.embed.weight, model.positions):  # as small as in GPT-2
        nn.init.normal_(table, std=0.02)
    return next_byte(seed, model, adam(model, 1e-3), steps=150, size=8)


@case("tokens", text_entropy())
def deep_norm(seed: int, sick: bool) -> Training:
    """DeepNorm without its scaled stream and its smaller initialization, at a high rate."""
    layers = 8
    body = Blocks(layers, WIDTH, norm="post", alpha=1.0 if sick else (2 * layers) ** 0.25)
    if not sick:
        for block in body.layers:
            for linear in (block.attention.v, block.attention.o, block.mlp[0], block.mlp[2]):
                linear.weight.data.mul_((8 * layers) ** -0.25)
    model = language_model(body)
    return next_byte(seed, model, adam(model, 1e-2), steps=120)


@case("weights", text_entropy())
def no_norms(seed: int, sick: bool) -> Training:
    """No norms at all, plain gradient descent at a rate that a model with norms bears."""
    norm: Norm = "none" if sick else "pre"
    model = language_model(Blocks(8, WIDTH, norm=norm))
    return next_byte(seed, model, SGD(model.parameters(), lr=0.3, momentum=0.9), steps=120)


@case("logits", text_entropy())
def muon_high_rate(seed: int, sick: bool) -> Training:
    """Muon for the matrices of the blocks at a rate 150 times too high, AdamW for the rest."""
    model = language_model(Blocks(6, WIDTH))
    matrices = [parameter for parameter in model.body.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if not any(parameter is matrix for matrix in matrices)]
    optimizer = Together(Muon(matrices, lr=3.0 if sick else 2e-2), AdamW(rest, lr=3e-3))
    return next_byte(seed, model, optimizer, steps=120)


@case("loss", text_entropy())
def inverted_mask(seed: int, sick: bool) -> Training:
    """Causal mask upside down: a token sees itself and the future, so the loss is far too good."""
    model = language_model(Blocks(4, WIDTH), mask=(lambda tokens: causal(tokens).T) if sick else causal)
    return next_byte(seed, model, adam(model, 3e-3), steps=200)


@case("logits", text_entropy())
def rate_spike(seed: int, sick: bool) -> Training:
    """Rate 30 times higher for 20 steps in the middle of a good run, as from a wrong resumption of the schedule."""
    model = language_model(Blocks(6, WIDTH))
    factor = (lambda step: 30.0 if 60 <= step < 80 else 1.0) if sick else constant
    return next_byte(seed, model, adam(model, 1e-2), steps=140, factor=factor)


@case("loss", text_entropy())
def shuffled_labels(seed: int, sick: bool) -> Training:
    """Targets in another order than the inputs, by a fault of the data."""
    draw = windows(CONTEXT)

    def shuffled(generator: Generator, samples: int) -> Batch:
        inputs, targets = draw(generator, samples)
        order = torch.rand(targets.shape, generator=generator).argsort(1)
        return inputs, targets.gather(1, order)

    model = language_model(Blocks(4, WIDTH))
    return supervised(seed, model, adam(model, 2e-3), shuffled if sick else draw, cross_entropy, steps=120)


@case("logits", text_entropy())
def growing_logits(seed: int, sick: bool) -> Training:
    """Queries and keys at a high rate without a norm on them: attention logits in the hundreds."""
    body = Blocks(6, WIDTH, qk_norm=not sick)
    model = language_model(body)
    fast = [p for block in body.layers for name in ("q", "k") for p in getattr(block.attention, name).parameters()]
    slow = [parameter for parameter in model.parameters() if not any(parameter is other for other in fast)]
    optimizer = AdamW([{"params": fast, "lr": 3e-2}, {"params": slow, "lr": 2e-3}])
    return next_byte(seed, model, optimizer, steps=120)
