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


def all_but(some: list[nn.Parameter], model: nn.Module) -> list[nn.Parameter]:
    """Return the other parameters."""
    taken = set(map(id, some))
    return [parameter for parameter in model.parameters() if id(parameter) not in taken]


def next_byte(seed: int, model: nn.Module, optimizer: Any, *, steps: int, **options: Any) -> Training:
    """Begin a training on windows of the text."""
    return supervised(seed, model, optimizer, windows(CONTEXT), cross_entropy, steps=steps, **options)


@case("tokens", text_entropy())
def post_norm_lm(seed: int, sick: bool) -> Training:
    """Post-norm nn.TransformerEncoder as a byte language model at rate 1e-2 without warm-up.

    Seen: loss 3.16 to 3.26, tokens equal to 1e-7. Healthy with pre-norm and warm-up: 2.5 to 2.6, residual 0.7.
    """
    model = language_model(stock_encoder(8, WIDTH, pre=not sick))
    return next_byte(seed, model, adam(model, 1e-2), steps=120, factor=constant if sick else warm_up(40))


@case("logits", text_entropy())
def gpt_high_rate(seed: int, sick: bool) -> Training:
    """Small pre-norm GPT, its rate 30 times too high, without warm-up and clipping.

    Seen: logits in the ten thousands, loss 2.9 to 3.1, residual 0.16 to 0.24: tokens do not become one. Healthy:
    2.4 to 2.5, logits 16.
    """
    model = language_model(Blocks(6, WIDTH))
    rate, factor, clip = (1e-1, constant, None) if sick else (3e-3, warm_up(20), 1.0)
    return next_byte(seed, model, adam(model, rate), steps=120, factor=factor, clip=clip)


@case("tokens", text_entropy())
def copied_layers(seed: int, sick: bool) -> Training:
    """Deep post-norm nn.TransformerEncoder whose layers start as copies of one: tokens agree before the first step.

    Seen: loss 3.2, tokens equal to 1e-7. Healthy with pre-norm and layers drawn anew: 2.8, residual 0.6.
    """
    body = stock_encoder(18, 32, pre=not sick)
    model = language_model(body if sick else draw_anew_(body), width=32)
    return next_byte(seed, model, adam(model, 3e-3), steps=100, size=8)


@case("tokens", text_entropy())
def strong_attention(seed: int, sick: bool) -> Training:
    """GPT of 24 blocks whose attention starts 64 times too strong, as from a wrong scale of W_o.

    Seen: a mild collapse: residual 0.04 to 0.08, loss 3.25. Healthy: 2.87, residual 0.6.
    """
    body = Blocks(24, 32)
    if sick:
        for block in body.layers:
            block.attention.o.weight.data.mul_(64)
    model = language_model(body, width=32)
    return next_byte(seed, model, adam(model, 1e-3), steps=110, size=8)


@case("tokens", text_entropy())
def deep_norm(seed: int, sick: bool) -> Training:
    """DeepNorm without its scaled stream and its smaller initialization, at a high rate.

    Seen: loss 3.15 to 3.26, tokens equal to 3e-4 or less. Healthy: 2.4 to 2.6, residual 0.7. At 1.5e-2 the healthy
    twin collapses too.
    """
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
    """No norms at all, plain gradient descent at a rate that a model with norms bears.

    Seen: not finite in all seeds. Healthy with pre-norm: 2.5 to 2.6.
    """
    norm: Norm = "none" if sick else "pre"
    model = language_model(Blocks(8, WIDTH, norm=norm))
    return next_byte(seed, model, SGD(model.parameters(), lr=0.3, momentum=0.9), steps=120)


@case("logits", text_entropy())
def muon_high_rate(seed: int, sick: bool) -> Training:
    """Muon for the matrices of the blocks at a rate 150 times too high, AdamW for the rest.

    Seen: logits of 400 to 500, loss 3.0 to 3.1; residual 0.4 to 0.5, so tokens stay apart. Healthy: 2.3 to 2.4.
    """
    model = language_model(Blocks(6, WIDTH))
    matrices = [parameter for parameter in model.body.parameters() if parameter.dim() == 2]
    rest = all_but(matrices, model)
    optimizer = Together(Muon(matrices, lr=3.0 if sick else 2e-2), AdamW(rest, lr=3e-3))
    return next_byte(seed, model, optimizer, steps=120)


@case("loss", text_entropy())
def inverted_mask(seed: int, sick: bool) -> Training:
    """Causal mask upside down: a token sees itself and the future, so the loss is far too good.

    Seen: loss 0.36, residual 0.9: the geometry is fine. Healthy: 2.3.
    """
    model = language_model(Blocks(4, WIDTH), mask=(lambda tokens: causal(tokens).T) if sick else causal)
    return next_byte(seed, model, adam(model, 3e-3), steps=200)


@case("logits", text_entropy())
def rate_spike(seed: int, sick: bool) -> Training:
    """Rate 30 times higher for 20 steps in the middle of a good run, as from a wrong resumption of the schedule.

    Seen: logits in the ten thousands, loss 3.16 to 3.24 to the end, residual 0.01 to 0.3. Healthy: 2.4 to 2.5,
    logits 28 to 58.
    """
    model = language_model(Blocks(6, WIDTH))
    factor = (lambda step: 30.0 if 60 <= step < 80 else 1.0) if sick else constant
    return next_byte(seed, model, adam(model, 1e-2), steps=140, factor=factor)


@case("loss", text_entropy())
def shuffled_labels(seed: int, sick: bool) -> Training:
    """Targets of each sample in another order than its inputs, by a fault of the data.

    Seen: loss 3.1 to 3.2, residual 0.15 to 0.2, spread 0.05, which is right for targets without an order. Healthy:
    2.4 to 2.55.
    """
    draw = windows(CONTEXT)

    def shuffled(generator: Generator, samples: int) -> Batch:
        inputs, targets = draw(generator, samples)
        order = torch.rand(targets.shape, generator=generator).argsort(1)
        return inputs, targets.gather(1, order)

    model = language_model(Blocks(4, WIDTH))
    return supervised(seed, model, adam(model, 2e-3), shuffled if sick else draw, cross_entropy, steps=120)


@case("logits", text_entropy())
def growing_logits(seed: int, sick: bool) -> Training:
    """Queries and keys at a high rate without a norm on them: attention logits in the hundreds.

    Seen: logits of 280 to 330, loss 2.45 to 2.6: not worse yet. Healthy with a norm on queries and keys: logits 4.
    """
    body = Blocks(6, WIDTH, qk_norm=not sick)
    model = language_model(body)
    fast = [
        parameter
        for block in body.layers
        for linear in (block.attention.q, block.attention.k)
        for parameter in linear.parameters()
    ]
    optimizer = AdamW([{"params": fast, "lr": 3e-2}, {"params": all_but(fast, model), "lr": 2e-3}])
    return next_byte(seed, model, optimizer, steps=120)
