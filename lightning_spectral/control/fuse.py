"""Fold residual scales into the weights behind them, so that what remains is the plain model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from lightning_spectral.control.scales import ResidualScale, detach_scale
from lightning_spectral.discovery.paths import absolute_path, resolve
from lightning_spectral.discovery.scaled import CHILD
from lightning_spectral.errors import ConfigurationError

__all__ = ["MARKER", "fuse_scales", "lost_scales", "refuse_lost_scales", "scale_keys"]

MARKER = "lightning_spectral"
"""Entry of a Lightning checkpoint that says that its model has residual scales."""

_Model = TypeVar("_Model", bound=nn.Module)
_KEY = re.compile(rf"(?:.*\.|)(?:{CHILD}|parametrizations\.\w+\.\d+)\.log_scale")
_OWN_WEIGHT = re.compile(r"(.*\.|)parametrizations\.(\w+)\.original")
_EXTRA = "_extra_state"
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@overload
def fuse_scales(target: _Model) -> _Model: ...
@overload
def fuse_scales(target: Mapping[str, Any]) -> dict[str, Any]: ...
def fuse_scales(target: nn.Module | Mapping[str, Any]) -> nn.Module | dict[str, Any]:
    """Fold every residual scale into the weights and biases behind it, and remove it.

    A branch that ends in a norm has its scale folded into the gain (and bias) of that norm, by the convention of the
    model (``w`` or ``1 + w``). The result computes the same function, and its state dict is the plain model's.

    Args:
        target: A model, which is changed in place; or a state dict, or a whole checkpoint with a ``"state_dict"``, of
            which a fused copy is made, and no model is needed. The copy of a checkpoint has no states of optimizers and
            schedulers, because they belong to the weights and scales before fusing: resume from the original.

    Returns:
        The model, or the fused copy.

    Raises:
        ConfigurationError: Nothing linear can take a scale (a norm without weights stands behind the branch), or
            something else is missing. Nothing has been changed then.
    """
    if isinstance(target, nn.Module):
        return _fuse_model(target)
    if isinstance(target.get("state_dict"), Mapping):
        fused = {
            key: value for key, value in target.items() if key not in (MARKER, "optimizer_states", "lr_schedulers")
        }
        return {**fused, "state_dict": fuse_scales(target["state_dict"])}
    return _fuse_state_dict(target)


def scale_keys(keys: Iterable[str]) -> list[str]:
    """Return those keys of a state dict that hold a residual scale."""
    return [key for key in keys if _KEY.fullmatch(key)]


def lost_scales(model: nn.Module, names: Sequence[str]) -> str | None:
    """Say that the scales of a checkpoint would be lost in a model, ``None`` where they would not.

    Args:
        model: The model that the checkpoint is loaded into.
        names: The scales of the checkpoint.
    """
    if not names or any(isinstance(module, ResidualScale) for module in model.modules()):
        return None
    return (
        f"the checkpoint has {len(names)} residual scales, and the model has none, so it would compute something else: "
        "fold them into the weights, fuse_scales(torch.load(path)), or give the model its scales, attach_scales(model) "
        "or SpectralMonitor(auto_rescale=True)"
    )


def refuse_lost_scales(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Hook for ``register_load_state_dict_pre_hook``: refuse to drop scales, which torch does without ``strict``."""
    message = lost_scales(module, scale_keys(state_dict))
    if message is not None:
        error_msgs.append(message)


def _fuse_model(model: nn.Module) -> nn.Module:
    scales = {name: module for name, module in model.named_modules() if isinstance(module, ResidualScale)}
    on_outputs = {name: scale for name, scale in scales.items() if not scale.on_weight}
    found = {name: (scale.log_scale, scale.ends, scale.reason) for name, scale in on_outputs.items()}
    folds = _folds(found, lambda path: _parameter(model, path))
    with torch.no_grad():
        for path, factor, offset in folds:
            tensor = _parameter(model, path)
            assert tensor is not None
            tensor.copy_(_times(tensor, factor, offset))
    for name in scales:
        detach_scale(model, name)
    return model


def _fuse_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    plain = {_WRAPPERS.sub("", key): key for key in state}
    found = {}
    for key in scale_keys(state):
        scale = key.removesuffix(".log_scale")
        if f"{scale}.{_EXTRA}" not in state:
            raise ConfigurationError(
                f"the state dict has {key!r} but not {scale}.{_EXTRA}, which says what to fold it into: "
                "fuse the model instead, fuse_scales(model)"
            )
        recipe = json.loads(bytes(state[f"{scale}.{_EXTRA}"].tolist()))
        found[_WRAPPERS.sub("", scale)] = (state[key], recipe["ends"], recipe["reason"])
    fused = {key: value for key, value in state.items() if not _is_of_scale(key)}
    for path, factor, offset in _folds(found, lambda path: state.get(plain.get(path, path))):
        key = plain[path]
        fused[key] = _times(state[key], factor, offset)
    return {_OWN_WEIGHT.sub(r"\1\2", key) if _is_on_weight(key, state) else key: value for key, value in fused.items()}


def _folds(
    scales: Mapping[str, tuple[Tensor, Iterable[tuple[str, float]], str | None]],
    lookup: Callable[[str], Tensor | None],
) -> list[tuple[str, float, float]]:
    """Return what to multiply: path, factor and offset. All problems are told at once, before anything is changed."""
    folds, problems = [], []
    for name, (log_scale, ends, reason) in scales.items():
        factor, site = math.exp(log_scale.detach().item()), name.rpartition(".")[0]
        paths = [(absolute_path(site, path), offset) for path, offset in ends]
        absent = [path for path, _ in paths if lookup(path) is None]
        if absent:
            problems.append(f"{site or 'the model'}: {', '.join(absent)} is not there")
        elif not paths and factor != 1.0:
            problems.append(f"{site or 'the model'} (scale {factor:.4g}): {reason or 'no weight stands behind it'}")
        folds += [(path, factor, offset) for path, offset in paths if factor != 1.0]
    if problems:
        raise ConfigurationError(
            f"{len(problems)} residual scale(s) cannot be folded into weights, so none was: {'; '.join(problems)}. "
            "Keep the scales in the model (call attach_scales before loading its checkpoints), or set them to 1"
        )
    return folds


def _times(tensor: Tensor, factor: float, offset: float) -> Tensor:
    """Scale the value that a stored parameter stands for."""
    return ((tensor.detach().double() + offset) * factor - offset).to(tensor.dtype)


def _parameter(model: nn.Module, path: str) -> Tensor | None:
    try:
        found = resolve(model, path)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def _is_of_scale(key: str) -> bool:
    return bool(_KEY.fullmatch(key) or _KEY.fullmatch(key.replace(_EXTRA, "log_scale")))


def _is_on_weight(key: str, state: Mapping[str, Any]) -> bool:
    """Whether a key is the original of a weight whose parametrization is a residual scale."""
    return bool(_OWN_WEIGHT.fullmatch(key)) and key.replace(".original", ".0.log_scale") in state
