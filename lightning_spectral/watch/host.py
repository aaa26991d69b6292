"""What the core of a watched run asks of the loop around it: a Trainer of either kind, or a few lines of the user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_spectral.alarms import Event
from lightning_spectral.watch.outlets import Outlet

__all__ = ["Host"]


class Host(Protocol):
    """A training loop, as the core sees it.

    A *batch* is one forward and backward pass; a *step* is one step of an optimizer, and may take several batches.

    Attributes:
        name: Who speaks to the user: the class that the user has made.
    """

    name: str

    @property
    def model(self) -> nn.Module:
        """What is searched for blocks, and listened to."""

    @property
    def weights(self) -> nn.Module:
        """What is read: the model, or the wrapper around it that has cut its weights."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """What trains it."""

    @property
    def processes(self) -> tuple[int, int]:
        """The number of this process, and how many train together."""

    @property
    def rehearses(self) -> bool:
        """Whether the run only tries its code: it measures once and writes nothing."""

    @property
    def shards(self) -> bool:
        """Whether weights are cut into shards, which are whole for a while behind a forward pass."""

    @property
    def by_hand(self) -> bool:
        """Whether optimizers may step anywhere within a batch, where nobody sees it."""

    def counted(self) -> int:
        """Return the steps that the loop has counted."""

    def now(self, *, done: int = 0) -> int:
        """Return the step that the run has come to; ``done`` is 1 at the end of a batch."""

    def index(self, *, done: int = 0) -> int:
        """Return where loggers put what belongs to the weights of now."""

    def end_batch(self) -> None:
        """Take note that a batch has ended."""

    def doubtful(self, every_n_steps: int) -> bool:
        """Whether it is time to see if weights change although no step is counted."""

    def trained(self) -> Sequence[Tensor]:
        """Return the parameters of the model that the run trains."""

    def outlets(self) -> Sequence[Outlet]:
        """Return the places where values go, beside the console and the journal."""

    def answer(self, failure: Event) -> None:
        """Do at a failure what the user has asked for."""

    def save(self, path: Path) -> None:
        """Save the run as it is now, in all processes together, and keep what was saved before beside it."""
