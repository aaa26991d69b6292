"""What residual scales need of an optimizer: to be in it, to lose momentum when moved, to be absent from old states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_spectral.control.scales import ResidualScales
from lightning_spectral.errors import ConfigurationError

__all__ = ["check_optimized", "forget_momentum", "with_fresh_scales"]

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg", "prev")


def check_optimized(optimizers: Sequence[Optimizer], scales: ResidualScales) -> None:
    """Check that every trainable scale is in an optimizer.

    Raises:
        ConfigurationError: Some are not, so that they would never learn.
    """
    trained = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    lost = [site for site, scale in scales.named_parameters() if scale.requires_grad and id(scale) not in trained]
    if lost:
        raise ConfigurationError(
            f"{len(lost)} of {len(scales)} residual scales are in no optimizer (the first is at {lost[0]!r}). "
            "Build the optimizer in configure_optimizers, from self.parameters(); or add them there, "
            'optimizer.add_param_group({"params": attach_scales(self).parameters()}); or let the controller alone move '
            "them, auto_rescale=ResidualRescaler(learnable=False)"
        )


def forget_momentum(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> None:
    """Set the first moments of some parameters to zero.

    Second moments stay: without them, the next step of Adam would be as large as its first.
    """
    moved = list(parameters)
    for optimizer in optimizers:
        for parameter in moved:
            for name, value in optimizer.state.get(parameter, {}).items():
                if name in _FIRST_MOMENTS and isinstance(value, Tensor):
                    value.zero_()


def with_fresh_scales(
    optimizer: Optimizer, state: Mapping[str, Any], scales: Iterable[Tensor]
) -> dict[str, Any] | None:
    """Make room for the scales in the state of an optimizer that was saved without them.

    Args:
        optimizer: The optimizer, whose groups hold the scales.
        state: The state dict that it shall load.
        scales: The scales.

    Returns:
        The completed state dict, in which the scales have no state yet; ``None`` where the state dict does not differ
        from the optimizer by exactly the scales.
    """
    own = {id(scale) for scale in scales}
    saved, number = list(state["param_groups"]), 0
    numbers: dict[int, int] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        is_scale = [id(parameter) in own for parameter in group["params"]]
        fresh = all(is_scale) and len(saved) + len(groups) < len(optimizer.param_groups)
        if not fresh and not saved:
            return None
        old = (
            {**{key: value for key, value in group.items() if key != "params"}, "params": []} if fresh else saved.pop(0)
        )
        if len(old["params"]) != len(is_scale) - sum(is_scale):
            return None
        rest = iter(old["params"])
        for place, scale in enumerate(is_scale, start=number):
            if not scale:
                numbers[next(rest)] = place
        groups.append({**old, "params": list(range(number, number + len(is_scale)))})
        number += len(is_scale)
    if saved or not own:
        return None
    return {**state, "state": {numbers[key]: value for key, value in state["state"].items()}, "param_groups": groups}
