"""Text of the standard library, and made-up sequences, series, images and speech.

A function that draws returns a batch: the arguments of the model, and the targets.
"""

from __future__ import annotations

import math
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .register import Batch, Draw

BYTES = 128  # what is not ASCII becomes the last
TEXT_BYTES = 1_000_000

TOPICS, WORDS, WORDS_OF_TOPIC, PADDING = 4, 64, 12, 0
FRAME, JOINTS = 20, 4
SIDE, PATCH = 16, 4
PATCHES, PIXELS = (SIDE // PATCH) ** 2, PATCH * PATCH
SHAPES, BOXES = 4, 3
SYMBOLS, BEGIN = 8, 8


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over all labels, in nats: (..., classes) and (...)."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def variance(draw: Draw) -> float:
    """Return the mean squared error of the targets' mean, entry by entry."""
    targets = draw(Generator().manual_seed(0), 512)[1]
    return (targets - targets.mean(0)).square().mean().item()


@cache
def text() -> Tensor:
    """Return the first bytes of the standard library's modules in alphabetical order: (bytes,) integers below 128."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    content = b"".join(path.read_bytes() for path in files)[:TEXT_BYTES]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long().clamp(max=BYTES - 1)


@cache
def text_entropy() -> float:
    """Return the entropy of single bytes, in nats."""
    frequencies = text().bincount(minlength=BYTES) / len(text())
    return torch.special.entr(frequencies).sum().item()


def windows(context: int) -> Draw:
    """Draw (samples, context) bytes, and the byte that follows each."""

    def draw(generator: Generator, samples: int) -> Batch:
        starts = torch.randint(len(text()) - context - 1, (samples, 1), generator=generator)
        ids = text()[starts + torch.arange(context + 1)]
        return (ids[:, :-1],), ids[:, 1:]

    return draw


def topics(length: int) -> Draw:
    """Draw (samples, length) words of which three in four belong to the topic, and the topics. No word is padding."""

    def draw(generator: Generator, samples: int) -> Batch:
        labels = torch.randint(TOPICS, (samples,), generator=generator)
        own = torch.randint(WORDS_OF_TOPIC, (samples, length), generator=generator) + WORDS_OF_TOPIC * labels[:, None]
        other = torch.randint(WORDS - 1, (samples, length), generator=generator)
        is_own = torch.rand(samples, length, generator=generator) < 0.75
        return (1 + torch.where(is_own, own, other),), labels

    return draw


def series(length: int, ahead: int, patch: int) -> Draw:
    """Draw sums of two waves in patches, (samples, length / patch, patch), and how they go on, (samples, ahead)."""

    def draw(generator: Generator, samples: int) -> Batch:
        times = torch.arange(length + ahead, dtype=torch.float32)
        speeds, phases = torch.rand(2, samples, 2, 1, generator=generator)
        waves = torch.sin((0.15 + 0.5 * speeds) * times + 2 * math.pi * phases).sum(1)
        waves = waves + 0.05 * torch.randn(waves.shape, generator=generator)
        return (waves[:, :length].unflatten(1, (-1, patch)),), waves[:, length:]

    return draw


def speech(generator: Generator, samples: int, frames: int = 32) -> Batch:
    """Draw spectra with moving peaks, (samples, frames, 20), and the places of the peaks in (0, 1), (..., 4)."""
    times = torch.linspace(0, 2 * math.pi, frames)[:, None]
    speeds, phases = torch.rand(2, samples, 1, JOINTS, generator=generator)
    places = 0.5 + 0.4 * torch.sin((0.5 + speeds) * times + 2 * math.pi * phases)
    own = torch.linspace(0, 1, FRAME // JOINTS)  # each peak has its own part of the spectrum
    peaks = torch.exp(-(((places[..., None] - own) / 0.2) ** 2)).flatten(2)
    return (peaks + 0.05 * torch.randn(peaks.shape, generator=generator),), places


def patches(images: Tensor) -> Tensor:
    """Cut (samples, side, side) into (samples, patches, pixels)."""
    cut = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return cut.flatten(3).flatten(1, 2)


def _shape(kind: int, centre: Tensor, size: Tensor) -> Tensor:
    """Paint a disc, a ring, a cross or a plate: (side, side) of 0 and 1."""
    y, x = (torch.arange(SIDE)[:, None] - centre[0], torch.arange(SIDE)[None] - centre[1])
    radius, largest, smallest = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    inside = (
        radius <= size,
        (radius <= size) & (radius > size - 1.5),
        (largest <= size) & (smallest <= 0.5),
        largest <= size,
    )[kind]
    return inside.float()


def shapes(generator: Generator, samples: int) -> Batch:
    """Draw noisy images of one shape each, (samples, 16, 16) in patches, and the kinds."""
    labels = torch.randint(SHAPES, (samples,), generator=generator)
    centres = torch.randint(5, SIDE - 5, (samples, 2), generator=generator)
    sizes = torch.randint(3, 6, (samples,), generator=generator)
    images = [_shape(int(label), *place) for label, *place in zip(labels, centres, sizes, strict=True)]
    noise = 0.1 * torch.randn(samples, SIDE, SIDE, generator=generator)
    return (2 * patches(torch.stack(images) + noise) - 0.5,), labels


def masked_shapes(generator: Generator, samples: int) -> Batch:
    """Draw images with half of the patches blanked, and the whole images: both (samples, patches, pixels)."""
    (whole,), _ = shapes(generator, samples)
    keep = torch.rand(samples, PATCHES, 1, generator=generator) < 0.5
    return (whole * keep,), whole


def boxes(generator: Generator, samples: int) -> Batch:
    """Draw images of three plates, in patches, and their boxes, (samples, 3, 4): centre, height and width in (0, 1)."""
    centres = 0.2 + 0.6 * torch.rand(samples, BOXES, 2, generator=generator)
    sizes = 0.15 + 0.25 * torch.rand(samples, BOXES, 2, generator=generator)
    pixels = (torch.arange(SIDE) + 0.5) / SIDE
    rows, columns = ((pixels - centres[..., [i]]).abs() <= sizes[..., [i]] / 2 for i in (0, 1))
    images = (rows[..., :, None] & columns[..., None, :]).float().sum(1)
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    return (2 * patches(images) - 0.5,), torch.cat((centres, sizes), -1)


def reversal(length: int) -> Draw:
    """Draw (samples, length) symbols and the reverse shifted by one, which starts with ``BEGIN``; target: the reverse.

    A sample has at most three kinds of symbols, so that a model learns something long before it learns to reverse.
    """

    def draw(generator: Generator, samples: int) -> Batch:
        kinds = torch.randint(SYMBOLS, (samples, 3), generator=generator)
        source = kinds.gather(1, torch.randint(3, (samples, length), generator=generator))
        target = source.flip(1)
        return (source, F.pad(target, (1, 0), value=BEGIN)[:, :-1]), target

    return draw


def views(generator: Generator, samples: int) -> Batch:
    """Draw two views of each image, as inputs: half of the patches blanked, other noise. The targets are the kinds."""
    (whole,), labels = shapes(generator, samples)
    one, other = (
        (whole + 0.2 * torch.randn(whole.shape, generator=generator))
        * (torch.rand(samples, PATCHES, 1, generator=generator) < 0.7)
        for _ in range(2)
    )
    return (one, other), labels
