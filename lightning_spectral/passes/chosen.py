"""Of several forward passes through one block, the one whose numbers count."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["Passes"]


class Passes:
    """Keeps numbers by the index of a block: those of the last pass, or of the last one that trained.

    A training step may run a model many times: to decode, for a target, for a metric, in two views, and once more where
    activations are recomputed. What trained is what the backward pass goes through.

    Args:
        training: Whether only passes that train count. Where nothing in a block can be trained, any pass with a graph
            around it counts; a pass without grad mode never does.
    """

    def __init__(self, *, training: bool = False) -> None:
        self.training = training
        self._count = 0
        self._counting: dict[int, tuple[int, Tensor]] = {}  # the number of the pass, and what was seen in it
        self._frozen: dict[int, Tensor] = {}

    @property
    def listens(self) -> bool:
        """Whether a pass that runs now may count."""
        return torch.is_grad_enabled() or not self.training

    @property
    def numbers(self) -> dict[int, Tensor]:
        """What was seen, by the index of the block."""
        return self._frozen | {index: numbers for index, (_, numbers) in self._counting.items()}

    def trained(self, index: int) -> bool:
        """Whether the numbers of a block are of a pass that has trained."""
        return index in self._counting

    def note(self, index: int, output: Tensor, numbers: Tensor) -> None:
        """Take what was seen in a pass.

        Args:
            index: Of the block.
            output: What the block, or the last of its branches, has returned.
            numbers: What is known of it.
        """
        self._count += 1
        if not self.training:
            self._counting[index] = self._count, numbers
        elif not output.requires_grad:
            self._frozen[index] = numbers
        elif output.grad_fn is not None:
            # On the node and not on the tensor, which a user may want to pickle.
            output.grad_fn.register_prehook(partial(self._went_through, index, self._count, numbers))

    def _went_through(self, index: int, count: int, numbers: Tensor, _: Any) -> None:
        if count > self._counting.get(index, (0,))[0]:
            self._counting[index] = count, numbers
