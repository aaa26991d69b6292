"""Choose, of several forward passes through one block, the pass whose numbers count."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["Passes"]


class Passes:
    """Keeps numbers by the index of a block: of the last pass, or of the last pass that trained.

    A training step may run a model many times: to decode, for a target, for a metric, in two views, and once more to
    recompute activations. A pass trained if the backward pass goes through it.

    Args:
        training: Whether only passes that train count. For a block without trainable parameters, any pass in grad mode
            counts. A pass outside of grad mode never counts.
    """

    def __init__(self, *, training: bool = False) -> None:
        self.training = training
        self._count = 0
        self._counting: dict[int, tuple[int, Tensor]] = {}  # the number of the pass, and its numbers
        self._frozen: dict[int, Tensor] = {}

    @property
    def listens(self) -> bool:
        """Whether a pass that runs now can count."""
        return torch.is_grad_enabled() or not self.training

    @property
    def numbers(self) -> dict[int, Tensor]:
        """The numbers of the passes that count, by the index of the block."""
        return self._frozen | {index: numbers for index, (_, numbers) in self._counting.items()}

    def trained(self, index: int) -> bool:
        """Whether the numbers of a block come from a pass that trained."""
        return index in self._counting

    def note(self, index: int, output: Tensor, numbers: Tensor) -> None:
        """Note the numbers of a pass through a block. They count now, or once the backward pass arrives.

        Args:
            index: The index of the block.
            output: The output of the block, or of its last branch.
            numbers: The numbers.
        """
        self._count += 1
        if not self.training:
            self._counting[index] = self._count, numbers
        elif not output.requires_grad:
            self._frozen[index] = numbers
        elif output.grad_fn is not None:
            # A hook on the tensor would keep a user from pickling it; a hook on the node does not.
            output.grad_fn.register_prehook(partial(self._went_through, index, self._count, numbers))

    def _went_through(self, index: int, count: int, numbers: Tensor, _: Any) -> None:
        """Count a pass that the backward pass went through, unless a later one has trained."""
        if count > self._counting.get(index, (0,))[0]:
            self._counting[index] = count, numbers
