"""What scales need of an optimizer: to be in it, to be moved in it, old states without them, steps that count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.presence import is_dtensor
from lightning_spectral.scales.attach import ResidualScales

__all__ = [
    "Lost",
    "check_optimized",
    "forget_momentum",
    "held",
    "lost_steps",
    "own_copies",
    "plain_order",
    "with_fresh_scales",
]

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg", "prev")
# A copy of weights is recognized by this many other weights of at least this size, at half their norm or less from it.
_WITNESSES, _ENOUGH, _NEAR = 4, 8, 0.5


class Lost(NamedTuple):
    """A scale whose steps are lost.

    Attributes:
        name: Of the scale.
        value: Its logarithm.
        distance: From there to the next number of its dtype.
    """

    name: str
    value: float
    distance: float


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


def own_copies(optimizer: Optimizer, scale: Tensor) -> list[Tensor]:
    """Return the copies of a scale that an optimizer keeps: master weights, slow weights, averages.

    What is near to the weights themselves wherever a few other weights are looked up in it is a copy of weights; a
    moment is not.

    Args:
        optimizer: The optimizer.
        scale: One of its parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    large = [item for item in parameters if item.numel() >= _ENOUGH and item.is_floating_point() and item.any()]
    # Matrices first: a bias that begins at 0 is far from its own past.
    witnesses = sorted(large, key=lambda item: (item.ndim < 2, item.numel()))[:_WITNESSES]
    found: dict[int, Tensor] = {}  # by where they lie: one copy may be reached in two ways
    for look_up in _look_ups(optimizer, parameters):
        copy = look_up(scale)
        if not isinstance(copy, Tensor) or copy.shape != scale.shape or copy is scale or not witnesses:
            continue
        if all(_is_copy(look_up(witness), witness) for witness in witnesses):
            found[copy.data_ptr()] = copy
    return list(found.values())


def _is_copy(value: object, weight: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != weight.shape or value.data_ptr() == weight.data_ptr():
        return False
    weight = weight.detach().float()
    return bool((value.detach().float() - weight).norm() <= _NEAR * weight.norm())


def _look_ups(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Iterator[Callable[[Tensor], object]]:
    """Yield the ways in which an optimizer, or one inside it, may find something that belongs to a parameter."""
    for key in dict.fromkeys(key for state in optimizer.state.values() for key in state):
        yield partial(_in_state, optimizer, key)
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from _look_ups(value, parameters)
        elif isinstance(value, dict) and value is not optimizer.state:
            # By id: to look a tensor up among numbers, or a number among tensors, may compare the two.
            yield partial(_in_dict, {id(key) if isinstance(key, Tensor) else key: item for key, item in value.items()})
        elif isinstance(value, list | tuple):
            listed = [item for part in value for item in (part if isinstance(part, list | tuple) else [part])]
            if len(listed) == len(parameters):
                yield partial(_in_list, listed, places)


def _in_state(optimizer: Optimizer, key: str, parameter: Tensor) -> object:
    return optimizer.state.get(parameter, {}).get(key)


def _in_dict(values: Mapping[Any, object], parameter: Tensor) -> object:
    return values.get(id(parameter))


def _in_list(values: Sequence[object], places: Mapping[int, int], parameter: Tensor) -> object:
    return values[places[id(parameter)]] if id(parameter) in places else None


def held(scale: Tensor) -> Tensor:
    """Return what this process holds of a scale: ``(1,)``, or ``(0,)`` where another process has it."""
    if scale.requires_grad or is_dtensor(scale):
        scale = scale.detach()
    return scale.to_local() if is_dtensor(scale) else scale


def lost_steps(
    optimizers: Iterable[Optimizer], scales: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> list[Lost]:
    """Return the scales of 16 bits that stayed where they were because steps are rounded away. One transfer to the CPU.

    Those have not moved, and a step is less than half the distance to the next number: it is about the rate where
    gradients are divided by their size (Adam and its kin have ``betas``), else the rate times the gradient.

    Args:
        optimizers: The optimizers.
        scales: The scales by name. Those without a gradient, or with one of 0, are not meant to move.
        before: What :func:`held` was of them, one or more steps ago.
    """
    groups = {
        id(parameter): group
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    names, rows = [], []
    for name, scale in scales.items():
        now, gradient = held(scale), scale.grad
        if now.numel() and now.element_size() == 2 and name in before and gradient is not None and id(scale) in groups:
            names.append(name)
            rows.append(torch.cat([now, before[name], held(gradient).to(now.dtype)]))
    lost = []
    for name, (now, old, gradient) in zip(names, torch.stack(rows).tolist() if rows else (), strict=True):
        group = groups[id(scales[name])]
        step = float(group.get("lr", 1.0)) * (1.0 if "betas" in group else abs(gradient))
        distance = math.ldexp(torch.finfo(scales[name].dtype).eps, math.frexp(now)[1] - 1)
        if now == old and gradient and 0 < step < distance / 2:
            lost.append(Lost(name, now, distance))
    return lost


def plain_order(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Return what sorts the parameters of a model as they were without scales, by their ids.

    A scale on a weight makes the weight a parameter of another module, which comes later.
    """
    order: dict[int, tuple[int, int]] = {}
    for number, module in enumerate(model.modules()):
        own: dict[str, Any] = dict(module._parameters)
        names = list(own)
        for name, applied in getattr(module, "parametrizations", {}).items():
            own[name] = getattr(applied, "original", None)
            names = max(names, *(list(getattr(item, "order", ())) for item in applied), key=len)
        ranks = {name: rank for rank, name in enumerate(names)}
        for name, parameter in own.items():
            order.setdefault(id(parameter), (number, ranks.get(name, len(ranks))))
    return order


def with_fresh_scales(
    optimizer: Optimizer, state: Mapping[str, Any], scales: Iterable[Tensor], order: Mapping[int, Any] | None = None
) -> dict[str, Any] | None:
    """Make room for the scales in the state of an optimizer that was saved without them.

    Args:
        optimizer: The optimizer, whose groups hold the scales.
        state: The state dict that it shall load.
        scales: The scales.
        order: What sorts the other parameters as they were without scales, by their ids (see
            :func:`plain_order`); by default as they are now.

    Returns:
        The completed state dict, in which the scales have no state yet, and names, if it has any, are those of the
        optimizer's own groups; ``None`` where the state dict does not differ from the optimizer by exactly the scales.
    """
    own = {id(scale) for scale in scales}
    saved, number = list(state.get("param_groups", ())), 0
    numbers: dict[Any, int] = {}
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
        places = [number + place for place, scale in enumerate(is_scale) if not scale]
        before = [(order or {}).get(id(group["params"][place - number]), place) for place in places]
        numbers |= dict(
            zip(old["params"], (place for _, place in sorted(zip(before, places, strict=True))), strict=True)
        )
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        groups.append({**old, "params": list(range(number, number + len(is_scale))), **names})
        number += len(is_scale)
    if saved or not own or any(isinstance(key, int) and key not in numbers for key in state.get("state", ())):
        return None
    own_state = {numbers.get(key, key): value for key, value in state.get("state", {}).items()}
    return {**state, "state": own_state, "param_groups": groups}
