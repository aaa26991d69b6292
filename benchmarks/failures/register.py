"""What a case of the register is, and what a training of one is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

FailsBy = Literal["tokens", "samples", "logits", "weights", "still", "loss"]
Batch = tuple[tuple[Tensor, ...], Tensor]  # the arguments of the model, the targets
Draw = Callable[[Generator, int], Batch]  # how many samples
HELD_OUT = 16
_HELD_OUT_STEP = 999_999


def constant(step: int) -> float:
    """Leave the rates as the optimizer has them."""
    return 1.0


def warm_up(steps: int) -> Callable[[int], float]:
    """Raise the rates linearly over the first steps."""
    return lambda step: min(1.0, (step + 1) / steps)


@dataclass
class Training:
    """One training run, step by step in the hands of the caller.

    ``schedule(step)``, ``batch(step)``, ``loss(batch)``, backward, clip to ``clip`` where it is not None, optimizer.

    Attributes:
        model: Called by ``loss`` as ``model(*inputs(batch))``.
        optimizer: As the schedule begins; ``schedule`` multiplies the rates that it has now.
        steps: Length of the run.
        held_out: One batch that no step trains on, at least 8 samples.
        batch: From a step to its batch; the same for the same seed and step.
        loss: Forward pass or passes of a training step; the model is in training mode.
        inputs: From a batch to the arguments of the model.
        factor: From a step to the factor on all rates.
        clip: The largest norm of the gradient, None for no clipping.
    """

    model: nn.Module
    optimizer: Optimizer
    steps: int
    held_out: Any
    batch: Callable[[int], Any]
    loss: Callable[[Any], Tensor]
    inputs: Callable[[Any], tuple[Any, ...]] = lambda batch: batch[0]
    factor: Callable[[int], float] = constant
    clip: float | None = None
    _rates: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.model.train()
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def schedule(self, step: int) -> None:
        """Set the rates of a step, before the step."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.factor(step)


@dataclass(frozen=True)
class Case:
    """A training that fails, and its healthy twin.

    Attributes:
        name: Of the function that begins it.
        source: The kind of public report, in one line.
        fails_by: What the failure shows in: all tokens of a sample become one ("tokens"), the outputs of all samples
            become one ("samples"), attention logits in the hundreds ("logits"), weights that are not finite
            ("weights"), weights that do not move ("still"), or nothing but the loss ("loss").
        begin: From a seed, and whether the training is to fail, to its beginning.
        chance: Loss of a model that knows the targets' distribution and nothing about its inputs, None where it has
            no meaning.
    """

    name: str
    source: str
    fails_by: FailsBy
    begin: Callable[[int, bool], Training]
    chance: float | None


def case(fails_by: FailsBy, chance: float | None) -> Callable[[Callable[[int, bool], Training]], Case]:
    """Make a case of the function that begins it.

    The function's name is the case's name, the first line of its docstring the source. The lines after it say what was
    seen with the seeds 0, 2 and 4 (torch 2.13, one thread). The global random numbers start from the seed.
    """

    def register(begin: Callable[[int, bool], Training]) -> Case:
        def seeded(seed: int, sick: bool) -> Training:
            torch.manual_seed(seed)
            return begin(seed, sick)

        source = (begin.__doc__ or "").partition("\n")[0]
        return Case(begin.__name__, source, fails_by, seeded, chance)

    return register


def generator(seed: int, step: int) -> Generator:
    """Return the random numbers of one step."""
    return Generator().manual_seed(seed * 1_000_000 + step)


def batches(draw: Draw, seed: int, size: int) -> tuple[Callable[[int], Batch], Batch]:
    """Return the batch of each step, and the held-out batch."""
    return lambda step: draw(generator(seed, step), size), draw(generator(seed, _HELD_OUT_STEP), HELD_OUT)


def supervised(
    seed: int,
    model: nn.Module,
    optimizer: Optimizer,
    draw: Draw,
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    size: int = 12,
    factor: Callable[[int], float] = constant,
    clip: float | None = None,
) -> Training:
    """Begin a training whose loss compares the model's output with the batch's targets."""
    batch, held_out = batches(draw, seed, size)

    def loss(batch: Batch) -> Tensor:
        inputs, targets = batch
        return criterion(model(*inputs), targets)

    return Training(model, optimizer, steps, held_out, batch, loss, factor=factor, clip=clip)
