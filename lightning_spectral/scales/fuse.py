"""Fold residual scales into the weights behind them, so that the plain model remains."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import Branch
from lightning_spectral.records.plain import FORMAT, from_plain, to_plain
from lightning_spectral.scales.attach import ResidualScale, detach_scale
from lightning_spectral.scales.loading import MARKER, unhook_loading
from lightning_spectral.weights.names import CHILD, absolute_path, plain_name, scale_keys, weight_of
from lightning_spectral.weights.paths import resolve

__all__ = ["fuse_scales"]

_Model = TypeVar("_Model", bound=nn.Module)
_EXTRA = "_extra_state"
_OF_TRAINING = {MARKER, "optimizer_states", "lr_schedulers"}


class _Recipe(NamedTuple):
    """How to fold one scale: the parameters to multiply, or the reason why there are none."""

    ends: tuple[tuple[str, float], ...]
    reason: str | None


@overload
def fuse_scales(target: _Model) -> _Model: ...
@overload
def fuse_scales(target: Mapping[str, Any]) -> dict[str, Any]: ...
def fuse_scales(target: nn.Module | Mapping[str, Any]) -> nn.Module | dict[str, Any]:
    """Fold every residual scale into the weights and biases behind it, and remove it.

    A branch that ends in a norm has its scale folded into the gain (and bias) of that norm, by the convention of the
    model (``w`` or ``1 + w``). The result computes the same function, and its state dict is the plain model's.

    Args:
        target: A model, which is changed in place. Or a state dict, or a checkpoint with state dicts anywhere inside
            (averaged copies, several models, lists); the result is a fused copy, and no model is needed. The copy has
            no states of optimizers and schedulers, because these belong to the weights before fusing. To resume
            training, use the original.

    Returns:
        The model, or the fused copy.

    Raises:
        ConfigurationError: No weight can take up a scale (for example, a norm without weights stands behind the
            branch), or a weight or recipe is missing. The target is unchanged then.

    Example:
        >>> scales = attach_scales(model)
        >>> fused = fuse_scales(model)  # the model itself
        >>> [name for name in fused.state_dict() if "log_scale" in name]
        []
    """
    if isinstance(target, nn.Module):
        return _fuse_model(target)
    if not _has_scales(target):
        return dict(target)
    _refuse_nameless(target)
    fused = _fused(target, dict(_recipes(target)))
    assert isinstance(fused, dict)
    return fused


# A model


def _fuse_model(model: nn.Module) -> nn.Module:
    scales = {name: module for name, module in model.named_modules() if isinstance(module, ResidualScale)}
    on_outputs = {name: scale for name, scale in scales.items() if not scale.on_weight}
    found = {name: (scale.log_scale, _Recipe(scale.ends, scale.reason)) for name, scale in on_outputs.items()}
    folds = _folds(found, lambda path: _parameter(model, path))
    with torch.no_grad():
        for path, factor, offset in folds:
            tensor = _parameter(model, path)
            assert tensor is not None
            tensor.copy_(_times(tensor, factor, offset))
    for name in scales:
        detach_scale(model, name)
    unhook_loading(model)
    return model


def _parameter(model: nn.Module, path: str) -> Tensor | None:
    try:
        found = resolve(model, path)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


# A checkpoint


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the keys and values of a dict, or the indices and items of a list."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the items of a part of a checkpoint that also belong to the fused checkpoint."""
    yield from ((key, item) for key, item in _items(value) if not _is_left_out(key, item))


def _is_left_out(key: Any, value: Any) -> bool:
    """Whether an item is the state of an optimizer or scheduler, or the marker of a checkpoint with scales."""
    if key in _OF_TRAINING and not isinstance(value, int):
        return True
    if not isinstance(value, Mapping):
        return False
    flat = any(isinstance(key, str) and key.startswith("param_groups.") for key in value)
    return flat or isinstance(value.get("param_groups"), list | tuple) or {"last_epoch", "_last_lr"} <= value.keys()


def _own_keys(value: Any) -> list[str]:
    """Return the keys of the scales at the top level of a part of a checkpoint."""
    if not isinstance(value, Mapping):
        return []
    return scale_keys(key for key, item in value.items() if isinstance(key, str) and isinstance(item, Tensor))


def _is_record(value: Any) -> bool:
    """Whether an item is the blocks of a model, which a monitor writes into a checkpoint."""
    return isinstance(value, Mapping) and FORMAT in value and "blocks" in value


def _is_touched(value: Any) -> bool:
    """Whether a part of a checkpoint contains items that fusing removes or rewrites."""
    return _is_record(value) or any(_is_left_out(key, item) or _is_touched(item) for key, item in _items(value))


def _without_scales(record: Mapping[str, Any]) -> dict[str, Any]:
    def plain(branch: Branch) -> Branch:
        paths = (
            replace(path, factors=tuple(item for item in path.factors if not scale_keys([item.parameter or ""])))
            for path in branch.paths
        )
        return replace(branch, paths=tuple(paths))

    try:
        blocks = from_plain(record)
    except ValueError:  # of a later version, or not from this package
        return dict(record)
    return to_plain(replace(block, branches=tuple(map(plain, block.branches))) for block in blocks)


def _has_scales(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return any(isinstance(module, ResidualScale) for module in value.modules())
    return bool(_own_keys(value)) or any(key == CHILD or _has_scales(item) for key, item in _children(value))


def _recipes(value: Any) -> Iterator[tuple[str, _Recipe]]:
    """Yield the recipe of every scale that has one, by the scale's name."""
    for key in _own_keys(value):
        scale = key.removesuffix(".log_scale")
        if f"{scale}.{_EXTRA}" in value:
            yield plain_name(scale), _recipe(scale, value[f"{scale}.{_EXTRA}"])
    for _, item in _children(value):
        yield from _recipes(item)


def _recipe(scale: str, state: Tensor) -> _Recipe:
    try:
        read = json.loads(bytes(round(number) for number in state.tolist()))
        return _Recipe(tuple((path, offset) for path, offset in read["ends"]), read["reason"])
    except (ValueError, KeyError, TypeError):
        raise ConfigurationError(
            f"{scale}.{_EXTRA}, which says what to fold the scale into, cannot be read: it was changed after it was "
            "saved. Fuse the model instead, fuse_scales(model)"
        ) from None


def _fused(value: Any, recipes: Mapping[str, _Recipe]) -> Any:
    if not _has_scales(value) and not _is_touched(value):
        return value
    if _is_record(value):
        return _without_scales(value)
    if isinstance(value, nn.Module):
        return _fuse_model(copy.deepcopy(value))
    if isinstance(value, Mapping):
        if CHILD in value:
            raise ConfigurationError(
                f"a state dict is nested module by module ({CHILD!r} is a key by itself): expected keys with dots, as "
                f"model.state_dict() has them, such as 'blocks.0.mlp.{CHILD}.log_scale'"
            )
        parts = {key: _fused(item, recipes) for key, item in _children(value)}
        return _fuse_state_dict(parts, recipes) if _own_keys(value) else parts
    items = [_fused(item, recipes) for _, item in _children(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _fuse_state_dict(state: Mapping[str, Any], recipes: Mapping[str, _Recipe]) -> dict[str, Any]:
    plain = {plain_name(key): key for key in state}
    found = {}
    for key in _own_keys(state):
        scale = plain_name(key.removesuffix(".log_scale"))
        found[scale] = (state[key], _recipe_of(scale, recipes))
    fused = {key: value for key, value in state.items() if not _is_of_scale(key)}
    for path, factor, offset in _folds(found, lambda path: state.get(plain.get(path, path))):
        key = plain[path]
        fused[key] = _times(fused[key], factor, offset)
    return {_plain_weight(key, state): value for key, value in fused.items()}


def _recipe_of(scale: str, recipes: Mapping[str, _Recipe]) -> _Recipe:
    """Return the recipe of a scale. A copy without recipes uses the recipes of the model that it copies, by name."""
    names = scale.split(".")
    nearest = max(recipes, key=lambda name: (name == scale, _shared_end(names, name.split("."))), default="")
    if _shared_end(names, nearest.split(".")) < min(len(names), len(nearest.split("."))) - 2:
        nearest = ""
    if nearest not in recipes:
        raise ConfigurationError(
            f"the state dict has {f'{scale}.log_scale'!r} but not {scale}.{_EXTRA}, which says what to fold it into: "
            "fuse the model instead, fuse_scales(model)"
        )
    return recipes[nearest]


def _shared_end(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _refuse_nameless(target: Mapping[str, Any]) -> None:
    """Raise an error for a list of weights without names, which some averages save: its scales cannot be told apart."""
    shapes = [
        [tuple(item.shape) for item in part.values() if isinstance(item, Tensor)]
        for _, part in _walk("", target)
        if _own_keys(part)
    ]
    for place, part in _walk("", target):
        if isinstance(part, list | tuple) and len(part) > 1 and all(isinstance(item, Tensor) for item in part):
            listed = [tuple(item.shape) for item in part]
            if any(2 * len(listed) >= len(known) and _is_subsequence(listed, known) for known in shapes):
                raise ConfigurationError(
                    f"{place} is a list of {len(listed)} weights without names, in which no scale can be told from "
                    "a weight: take it out of the checkpoint, or load it into the model and fuse that, "
                    "fuse_scales(model)"
                )


def _is_subsequence(short: Iterable[Any], long: Iterable[Any]) -> bool:
    rest = iter(long)
    return all(item in rest for item in short)


def _walk(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield place, value
    for name, item in _children(value):
        yield from _walk(f"{place}[{name!r}]" if place else name, item)


# Both


def _folds(
    scales: Mapping[str, tuple[Tensor, _Recipe]], lookup: Callable[[str], Tensor | None]
) -> list[tuple[str, float, float]]:
    """Return path, factor and offset of every parameter to multiply. One error lists all problems beforehand."""
    folds, problems = [], []
    for name, (log_scale, recipe) in scales.items():
        factor, site = math.exp(log_scale.detach().item()), name.rpartition(".")[0]
        paths = [(absolute_path(site, path), offset) for path, offset in recipe.ends]
        absent = [path for path, _ in paths if lookup(path) is None]
        if absent:
            problems.append(f"{site or 'the model'}: {', '.join(absent)} is not there")
        elif not paths and factor != 1.0:
            problems.append(f"{site or 'the model'} (scale {factor:.4g}): {recipe.reason or 'no weight is behind it'}")
        folds += [(path, factor, offset) for path, offset in paths if factor != 1.0]
    if problems:
        raise ConfigurationError(
            f"{len(problems)} residual scale(s) cannot be folded into weights, so none was: {'; '.join(problems)}. "
            "Keep the scales in the model (call attach_scales before loading its checkpoints), or set them to 1"
        )
    return folds


def _times(tensor: Tensor, factor: float, offset: float) -> Tensor:
    """Return c · (w + offset) − offset: the effective value of a parameter is w + offset."""
    return ((tensor.detach().double() + offset) * factor - offset).to(tensor.dtype)


def _is_of_scale(key: str) -> bool:
    return bool(scale_keys([key, key.replace(_EXTRA, "log_scale")]))


def _plain_weight(key: str, state: Mapping[str, Any]) -> str:
    """Return the key that a weight has without the residual scale on it; other keys as they are."""
    return (key.replace(".original", ".0.log_scale") in state and weight_of(key)) or key
