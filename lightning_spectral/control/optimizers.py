"""Scales inside an optimizer.

Six separate questions:

* ``check_optimized``: is every trainable scale in a parameter group?
* ``trained_beside``: does an optimizer train scales that the law alone should move?
* ``forget_momentum`` and ``own_copies``: what else must change when the law moves a scale?
* ``lost_steps``: are the steps of 16-bit scales smaller than the distance between two 16-bit numbers?
* ``hooked``: what of an optimizer can be listened to?
* ``with_fresh_scales``: how can an optimizer with scales load a state that was saved without them?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.presence import is_dtensor
from lightning_spectral.scales.attach import ResidualScales

__all__ = [
    "Lost",
    "check_optimized",
    "forget_momentum",
    "held",
    "hooked",
    "in_groups",
    "lost_steps",
    "own_copies",
    "plain_order",
    "trained_beside",
    "with_fresh_scales",
]

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg", "prev")
# own_copies compares 4 other weights (witnesses) of at least 8 entries. A copy is at most half of the norm away.
_WITNESSES, _ENOUGH, _NEAR = 4, 8, 0.5


class Lost(NamedTuple):
    """A scale whose steps are rounded away.

    Attributes:
        name: Name of the scale.
        value: Logarithm of the scale.
        distance: Distance from the value to the next number of the dtype.
    """

    name: str
    value: float
    distance: float


def check_optimized(optimizers: Sequence[Optimizer], scales: ResidualScales) -> None:
    """Check that every trainable scale is in an optimizer.

    Raises:
        ConfigurationError: A scale is in no optimizer, so that it would never learn.
    """
    trained = in_groups(optimizers)
    lost = [site for site, scale in scales.named_parameters() if scale.requires_grad and id(scale) not in trained]
    if lost:
        raise ConfigurationError(
            f"{len(lost)} of {len(scales)} residual scales are in no optimizer (the first is at {lost[0]!r}). "
            "Build the optimizer in configure_optimizers, from self.parameters(); or add them there, "
            'optimizer.add_param_group({"params": attach_scales(self).parameters()}); or let the controller alone move '
            "them, auto_rescale=ResidualRescaler(learnable=False)"
        )


def trained_beside(optimizers: Iterable[Optimizer], scales: ResidualScales) -> str | None:
    """Say that optimizers train scales of a law that says ``learnable=False``; ``None`` if they train none.

    The law attaches no such scales. The user has attached them before.
    """
    trained = in_groups(optimizers)
    found = [site for site, scale in scales.named_parameters() if scale.requires_grad and id(scale) in trained]
    if not found:
        return None
    return (
        f"an optimizer trains {len(found)} of {len(scales)} residual scales (the first is at {found[0]!r}), and the "
        "law has learnable=False, by which it alone would move them. Attach them with attach_scales(model, "
        "learnable=False), or give the law learnable=True"
    )


def in_groups(optimizers: Iterable[Optimizer]) -> set[int]:
    """Return the identities of all parameters in the groups of some optimizers."""
    return {id(item) for optimizer in optimizers for group in optimizer.param_groups for item in group["params"]}


def hooked(optimizer: object, register: str, hook: Callable[..., Any]) -> list[RemovableHandle]:
    """Register a hook of an optimizer, or of one inside it.

    Args:
        optimizer: The optimizer. A wrapper that never called ``Optimizer.__init__`` has no place for hooks.
        register: Name of the method that registers the hook.
        hook: The hook.

    Returns:
        The handle; none where nothing takes the hook.
    """
    seen, waiting = set[int](), [optimizer]  # wrappers may hold each other
    while waiting:
        item = waiting.pop()
        if isinstance(item, Optimizer) and id(item) not in seen:
            seen.add(id(item))
            with suppress(AttributeError):
                return [getattr(item, register)(hook)]
            waiting += reversed(vars(item).values())
    return []


def forget_momentum(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> None:
    """Set the first moments of some parameters to zero.

    Second moments stay. Without them, the next step of Adam would be as large as its first step.
    """
    moved = list(parameters)
    for optimizer in optimizers:
        for parameter in moved:
            for name, value in optimizer.state.get(parameter, {}).items():
                if name in _FIRST_MOMENTS and isinstance(value, Tensor):
                    value.zero_()


def own_copies(optimizer: Optimizer, scale: Tensor) -> list[Tensor]:
    """Return the copies of a scale that an optimizer keeps: master weights, slow weights, averages.

    Optimizers have no common name for such copies, so every store of per-parameter tensors is tested: entries of the
    state, dicts, lists. A store holds copies if its entries of 4 other weights (witnesses) are near these weights.

    Args:
        optimizer: The optimizer.
        scale: One of its parameters.
    """
    #     store       entry of a witness W      verdict
    #     "exp_avg"   far from W                a moment
    #     "master"    W up to rounding          copies of weights, so its entry of the scale is a copy of the scale
    #
    # The scale itself cannot be the witness: its logarithm is near 0, and so is a moment.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    large = [item for item in parameters if item.numel() >= _ENOUGH and item.is_floating_point() and item.any()]
    # Matrices first. A bias starts at 0, so a slow copy of it is relatively far away.
    witnesses = sorted(large, key=lambda item: (item.ndim < 2, item.numel()))[:_WITNESSES]
    found: dict[int, Tensor] = {}  # by address, because two stores may lead to one copy
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
    """Yield one function per store of an optimizer, and of optimizers inside it: parameter -> its entry, if any."""
    for key in dict.fromkeys(key for state in optimizer.state.values() for key in state):
        yield partial(_in_state, optimizer, key)
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from _look_ups(value, parameters)
        elif isinstance(value, dict) and value is not optimizer.state:
            # By id: a lookup by tensor may compare tensors by value, or a tensor with a number.
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
    """Return the part of a scale in this process: ``(1,)``, or ``(0,)`` if another process has the scale."""
    if scale.requires_grad or is_dtensor(scale):
        scale = scale.detach()
    return scale.to_local() if is_dtensor(scale) else scale


def lost_steps(
    optimizers: Iterable[Optimizer], scales: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> list[Lost]:
    """Return the 16-bit scales that have not moved because their steps are rounded away.

    A step is lost if it is shorter than half of the distance between two neighbouring numbers of the dtype. For a value
    v = m · 2^e with m in [0.5, 1), this distance is ε · 2^(e−1). The length of a step is about the rate for Adam and
    its relatives (``betas``), which divide by the size of the gradient, and the rate times the gradient for others.

    All values are read in one transfer to the CPU.

    Args:
        optimizers: The optimizers.
        scales: The scales by name. A scale without a gradient, or with a gradient of 0, is not meant to move.
        before: The results of :func:`held` one or more steps ago, by name.
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
    """Return sort keys that put the parameters of a model into their order without scales, by parameter id.

    The order matters because the state of an optimizer numbers the parameters. A scale on a weight changes the order:
    it moves the weight from its module into a parametrization, which comes later in ``model.parameters()``. So the sort
    key is the place of the module, and the place that the weight had in it.
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
    """Insert the scales into the state of an optimizer that was saved without them.

    Args:
        optimizer: The optimizer, with the scales in its groups.
        state: The state dict to load.
        scales: The scales.
        order: Sort keys that put the other parameters into their order without scales (see :func:`plain_order`); their
            order now by default.

    Returns:
        The completed state dict. Scales have no state in it, and the names of parameters, if any, come from the groups
        of the optimizer. ``None`` if the state dict differs from the optimizer by anything but the scales.
    """
    # The state of an optimizer numbers all parameters. Scales in a group shift the numbers behind them:
    #
    #     now      W0   s0   W1   s1        saved    W0   W1
    #     number    0    1    2    3                  0    1        so state[1] becomes state[2]
    #
    # A group of scales alone did not exist when the state was saved. It is added with its settings of now.
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
