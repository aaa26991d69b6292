"""Whether the moves of scales stay.

Some optimizers keep copies of the weights: master weights in float32, slow weights of Lookahead, averages of
schedule-free methods. Such an optimizer writes its copy over the weight, and so undoes a move of the law:

    step        0      1      2
    copy      0.00   0.01   0.02        the optimizer updates its copy
    scale     0.00   0.01   0.02        ... and copies it over the scale
    move             -0.50              the law moves only the scale: -0.49
                            0.02        ... and the next step brings back the copy: the move is undone

A scale that moves against the last move is no proof: gradient descent may do that too. The proof is a step that goes
against the move and is longer than the optimizer's rule allows for the gradient of this step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_spectral.control.optimizers import hooked, own_copies
from lightning_spectral.linalg.sharding.presence import is_dtensor

__all__ = ["Moves"]

_PART = 0.25  # a move counts as undone when this part of it is undone


class Moves:
    """Watches the scales that were moved last, and reacts when a move is undone.

    Scales with a gradient are compared after every step of an optimizer. Scales without a gradient, which only weight
    decay may change, are compared at the next measurement. When a move was undone, the optimizers are searched for
    copies of the scale. If there are copies, the law moves them too from then on. If there are none, the law no longer
    moves the scale.

    Attributes:
        given_up: Sites of the scales that the law no longer moves.
    """

    def __init__(self) -> None:
        self.given_up: set[str] = set()
        self._copies = False  # whether the law moves the copies in the optimizers too
        self._told: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._trained, self._still = _Watched({}, {}), _Watched({}, {})
        self._steps = 0  # steps since the last move

    def start(self, optimizers: Iterable[Optimizer]) -> None:
        """Listen to the optimizers."""
        for optimizer in optimizers:
            self._handles += hooked(optimizer, "register_step_post_hook", self._look)

    def stop(self) -> None:
        """Remove the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def note(self, moved: Mapping[str, tuple[nn.Parameter, float]], optimizers: Iterable[Optimizer]) -> None:
        """Watch the scales of the last move, instead of the scales watched so far.

        Args:
            moved: By site, each scale after its move, and the change of its logarithm. A scale that is sharded over
                several processes is not watched.
            optimizers: The optimizers.
        """
        # Two groups, because hooks see every step of trained scales, and looking at the others costs nothing until
        # asked.
        trained: dict[str, tuple[nn.Parameter, float]] = {}
        still: dict[str, tuple[nn.Parameter, float]] = {}
        for site, (scale, change) in moved.items():
            if not is_dtensor(scale) and scale.numel() == 1:
                (trained if scale.requires_grad else still)[site] = scale, change
        self._trained = _Watched(trained, _groups(optimizers) if trained else {})
        self._still = _Watched(still, {})
        self._steps = 0

    def copies(self, scale: nn.Parameter, optimizers: Iterable[Optimizer]) -> list[Tensor]:
        """Return the copies that have to be moved with a scale."""
        return [copy for optimizer in optimizers for copy in own_copies(optimizer, scale)] if self._copies else []

    def notice(self, optimizers: Sequence[Optimizer]) -> str | None:
        """React to moves that were undone, and return a message for the user. Each message comes once."""
        undone = {site: scale for site, scale in self._undone(optimizers).items() if site not in self.given_up}
        if not undone:
            return None
        copied = all(any(own_copies(optimizer, scale) for optimizer in optimizers) for scale in undone.values())
        if copied and not self._copies:
            self._copies, what = True, "From now on the law moves the copies too"
        else:
            self.given_up |= set(undone)
            what = "The law leaves such scales alone from now on"
        if what in self._told:
            return None
        self._told.add(what)
        return (
            f"{len(undone)} residual scale(s) did not stay where the law had moved them (the first is at "
            f"{min(undone)!r}): an optimizer or an average that keeps weights of its own writes them back. {what}. To "
            "keep the scales out of the optimizer, set learnable=False in the law, and give the optimizer only "
            "parameters that require gradients"
        )

    def _undone(self, optimizers: Iterable[Optimizer]) -> dict[str, nn.Parameter]:
        """Return the scales whose last move was undone by a quarter or more."""
        if not self._still.changed():  # the usual case
            return self._trained.mostly_undone()
        self._still.groups = _groups(optimizers)
        self._still.look(self._steps)
        return self._trained.mostly_undone() | self._still.mostly_undone()

    @torch.no_grad()
    def _look(self, *_: Any) -> None:
        self._steps += 1
        if not torch.compiler.is_compiling():
            self._trained.look()


class _Watched:
    """Scales that were moved, and how much of each move has been undone since.

    Args:
        moved: By site, each scale after its move, and the change of its logarithm.
        groups: The parameter groups of the optimizers, by the ids of their parameters.
    """

    def __init__(
        self, moved: Mapping[str, tuple[nn.Parameter, float]], groups: Mapping[int, Mapping[str, Any]]
    ) -> None:
        self.groups = groups
        self._sites = list(moved)
        self._scales = [scale for scale, _ in moved.values()]
        if moved:
            with torch.no_grad():
                self._last = self._values()
            self._changes = self._last.new_tensor([change for _, change in moved.values()])
            self._undone = torch.zeros_like(self._last)

    @torch.no_grad()
    def look(self, steps: int = 1) -> None:
        """Add up how much the last steps of the optimizers have undone."""
        if not self._scales:
            return
        last, self._last = self._last, self._values()
        jump = self._last - last
        # A jump undoes a move if it goes against the move and is longer than gradient descent can step. Either
        # condition alone is normal: the gradient may disagree with the law, and a large gradient makes a long step.
        # Undone parts add up, because slow averages take back a move in many small jumps.
        against = (jump * self._changes < 0) & (jump.abs() > steps * self._allowed(last))
        self._undone = self._undone + torch.where(against, jump.abs(), 0.0)

    @torch.no_grad()
    def changed(self) -> bool:
        """Whether a scale has changed since the last comparison."""
        return bool(self._scales) and not torch.equal(self._values(), self._last)

    def mostly_undone(self) -> dict[str, nn.Parameter]:
        """Return the scales whose move was undone by a quarter or more."""
        if not self._scales:
            return {}
        parts = (self._undone / self._changes.abs()).tolist()
        watched = zip(self._sites, self._scales, parts, strict=True)
        return {site: scale for site, scale, part in watched if part >= _PART}

    def _allowed(self, last: Tensor) -> Tensor:
        """Return the longest step that the usual optimizers could make on each scale.

        A step is at most rate · (least + slope · |gradient| + decay · |value|), see :func:`_settings`. Rounding adds
        2 ε (1 + |value|).
        """
        # A scale without a gradient moves only by weight decay, hence the `where` around least + slope · |gradient|.
        gradients = [
            torch.zeros_like(scale).float() if scale.grad is None else scale.grad.float() for scale in self._scales
        ]
        sizes = torch.cat([gradient.to(last.device) for gradient in gradients]).abs()
        settings = [_settings(self.groups.get(id(scale))) for scale in self._scales]
        rate, least, slope, decay = last.new_tensor(settings).unbind(1)
        steps = rate * (torch.where(sizes > 0, least + slope * sizes, 0.0) + decay * last.abs())
        return steps + 2 * torch.finfo(self._scales[0].dtype).eps * (1 + last.abs())

    def _values(self) -> Tensor:
        device = self._scales[0].device
        return torch.cat([scale if scale.device == device else scale.to(device) for scale in self._scales]).float()


def _groups(optimizers: Iterable[Optimizer]) -> dict[int, Mapping[str, Any]]:
    """Return the parameter groups by the ids of their parameters."""
    return {
        id(parameter): group
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _settings(group: Mapping[str, Any] | None) -> tuple[float, float, float, float]:
    """Return ``(rate, least, slope, decay)`` of a parameter group; its keys tell the rule.

    In units of the rate, a step is at most ``least + slope · |gradient|``:

    * Adam and its relatives (``betas``): at most 3.2 whatever the gradient, here 4.
    * Other rules that divide by the size of the gradient (``eps``): at most 10, in the first steps.
    * Gradient descent with momentum m: |gradient| · (1 + m + m² + …) = |gradient| / (1 − m), here with a margin of 3.
    * Unknown rules: the sum of both kinds.
    """
    if group is None:
        return 0.0, 0.0, 0.0, 0.0
    if "betas" in group:
        bound = 4.0, 0.0
    elif "eps" in group:
        bound = 10.0, 0.0
    elif "momentum" in group:
        bound = 0.0, 3.0 / (1.0 - min(float(group["momentum"]), 0.99))
    else:
        bound = 3.0, 3.0
    return float(group.get("lr", 1.0)), *bound, float(group.get("weight_decay", 0.0))
