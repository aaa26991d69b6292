"""Loading of state dicts with and without residual scales: scales are neither reset by accident nor lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.weights.names import common_parts, plain_name, scale_keys, site_of
from lightning_spectral.weights.paths import module_at

__all__ = [
    "MARKER",
    "fill_in",
    "hook_loading",
    "lost_scales",
    "marked",
    "refuse_lost_scales",
    "rename_weight",
    "restore_marked",
    "restore_unsaved",
    "saved_sites",
    "unhook_loading",
]

MARKER = "lightning_spectral"
"""Key of the entry of a Lightning checkpoint that lists the residual scales of its model."""


# Scales that a state dict does not have


def fill_in(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any = None, *_: Any) -> None:
    """Load pre-hook of a scale: a state dict without the scale leaves it unchanged."""
    if f"{prefix}log_scale" not in state_dict:
        log_scale = module.get_parameter("log_scale").detach()
        is_new = _is_assigned(log_scale, local_metadata)
        state_dict[f"{prefix}log_scale"] = _identity(module, local_metadata) if is_new else log_scale.clone()
    state_dict.setdefault(f"{prefix}_extra_state", module.get_extra_state())


def hook_loading(model: nn.Module, scale: str, ends: Sequence[str]) -> None:
    """Add a hook that sets a scale to the identity when a state dict has all weights of its branch and no scale.

    A state dict without all of these weights, such as one of adapters or of a head, leaves the scale unchanged.

    Args:
        model: The model.
        scale: Module path of the scale.
        ends: Attribute paths of the weights.
    """
    around = common_parts([scale.rpartition(".")[0], *(path.rpartition(".")[0] for path in ends)])
    anchor, start = module_at(model, ".".join(around)), len(".".join([*around, ""]))
    if anchor is not None and ends:
        hook = partial(_identity_if_plain, scale[start:], tuple(path[start:] for path in ends))
        anchor.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]


def _identity_if_plain(
    scale: str,
    ends: tuple[str, ...],
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any = None,
    *_: Any,
) -> None:
    holder = module_at(module, scale)
    if holder is not None and all(f"{prefix}{end}" in state_dict for end in ends):
        state_dict.setdefault(f"{prefix}{scale}.log_scale", _identity(holder, local_metadata))


def rename_weight(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any = None, *_: Any
) -> None:
    """Load pre-hook of a module with a scale on a weight: accept a weight that was saved without the scale."""
    for name, applied in getattr(module, "parametrizations", {}).items():
        if f"{prefix}{name}" in state_dict:
            inner = f"{prefix}parametrizations.{name}"
            state_dict[f"{inner}.original"] = state_dict.pop(f"{prefix}{name}")
            for place, item in enumerate(applied):
                if hasattr(item, "log_scale"):
                    state_dict.setdefault(f"{inner}.{place}.log_scale", _identity(item, local_metadata))


def _identity(scale: nn.Module, local_metadata: Any) -> Tensor:
    log_scale = scale.get_parameter("log_scale")
    return torch.zeros_like(log_scale, device="cpu" if _is_assigned(log_scale, local_metadata) else None)


def _is_assigned(parameter: Tensor, local_metadata: Any) -> bool:
    """Whether the loaded tensor replaces a parameter on the meta device."""
    return parameter.is_meta and bool((local_metadata or {}).get("assign_to_params_buffers", False))


def unhook_loading(model: nn.Module) -> None:
    """Remove the load hooks of scales that were removed."""
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):  # torch returns a handle only once, and none for copies
            function: Any = getattr(hook, "hook", hook)
            of_output = getattr(function, "func", None) is _identity_if_plain
            if (of_output and module_at(module, function.args[0]) is None) or (
                function is rename_weight and not hasattr(module, "parametrizations")
            ):
                del hooks[key]


# Scales that a model does not have


def saved_sites(checkpoint: Mapping[str, Any]) -> set[str]:
    """Return the sites of the residual scales that a Lightning checkpoint contains or lists in its marker."""
    marker = checkpoint.get(MARKER, {})
    keys = [*scale_keys(checkpoint.get("state_dict", {})), *marker.get("log_scales", ())]
    return {*map(site_of, map(plain_name, keys)), *map(plain_name, marker.get("scales", ()))}


def lost_scales(model: nn.Module, sites: Iterable[str]) -> str | None:
    """Return a message if a model would lose scales of a checkpoint, ``None`` if it would not.

    Args:
        model: The model that the checkpoint is loaded into.
        sites: The sites of the scales in the checkpoint.
    """
    sites, own = set(sites), set(map(site_of, _own_scales(model)))
    lost = sorted(sites - own)
    if not lost:
        return None
    where = f"the model has none at {', '.join(lost[:3])}{', …' * (len(lost) > 3)}" if own else "the model has none"
    return (
        f"the checkpoint has {len(sites)} residual scales, and {where}, so it would compute something else: "
        "fold them into the weights, fuse_scales(torch.load(path)), or give the model its scales, attach_scales(model) "
        "or auto_rescale=True"
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
    """Load pre-hook of a model: report an error instead of dropping scales, as torch does without ``strict``."""
    keys = (key.removeprefix(prefix) for key in scale_keys(state_dict))
    message = lost_scales(module, map(site_of, map(plain_name, keys)))
    if message is not None:
        error_msgs.append(message)


def _own_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {plain_name(key): parameters[key] for key in scale_keys(parameters)}


# Scales that a checkpoint names and does not hold


def marked(sites: Sequence[str], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the marker of a checkpoint: the sites of its scales and, for scales that are not sharded, their values.

    The values restore scales that the user's code removes from the state dict, for example in ``on_save_checkpoint`` of
    a module that saves only the parameters it trains.

    Args:
        sites: The sites of the scales.
        state_dict: The state of the model. The user's code may still change it.
    """
    values = {key: state_dict[key] for key in scale_keys(state_dict)}
    whole = {
        plain_name(key): float(value)
        for key, value in values.items()
        if type(value) in (Tensor, nn.Parameter) and value.numel() == 1
    }
    return {"version": 1, "scales": list(sites), "log_scales": whole}


def restore_unsaved(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Restore scales that the marker of a checkpoint lists and its state dict lacks, with the values of the marker.

    Raises:
        ConfigurationError: The marker is of an earlier version and has no values.
    """
    if not checkpoint.get("state_dict"):  # a sharded checkpoint, whose scales were loaded with its shards
        return
    values, own = checkpoint.get(MARKER, {}).get("log_scales", {}), _own_scales(model)
    held = {site_of(plain_name(key)) for key in scale_keys(checkpoint["state_dict"])}
    absent = {key: parameter for key, parameter in own.items() if site_of(key) in saved_sites(checkpoint) - held}
    unknown = [site_of(key) for key in absent if key not in values]
    if unknown:
        raise ConfigurationError(
            f"the checkpoint names {len(absent)} residual scales that it does not hold (the first is at "
            f"{unknown[0]!r}), so they would become 1: load one whose state_dict has the keys ending in log_scale, "
            "or say that 1 is right, checkpoint.pop('lightning_spectral')"
        )
    restore_marked(model, {key: values[key] for key in absent})


def restore_marked(model: nn.Module, values: Mapping[str, float]) -> None:
    """Set scales of a model to the values that a marker has for them, by their names."""
    with torch.no_grad():
        for key, parameter in _own_scales(model).items():
            if key in values:
                parameter.fill_(values[key])
