"""The tensors of factors: read by their names without side effects, small ones gathered from all processes at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.flattened import FlatShard
from lightning_spectral.linalg.sharding.presence import is_dtensor
from lightning_spectral.linalg.sharding.sharded import agreed, in_one_piece
from lightning_spectral.passes.aside import kept
from lightning_spectral.passes.aside.memento import of_library
from lightning_spectral.records import Factor, Path
from lightning_spectral.weights.fsdp import flattened
from lightning_spectral.weights.paths import resolve

__all__ = ["reading", "refuse_lazy", "small_tensors", "stored"]

_SMALL = ("scale", "pre_norm", "inner_norm", "post_norm")


def small_tensors(model: nn.Module, paths: Iterable[Path], mesh: DeviceMesh) -> dict[str, Tensor]:
    """Gather the norm gains and multipliers of some paths where weights are sharded: two collectives for all of them.

    What every process has for itself beside a sharded matrix has to be the same in all of them, or sums would mix them:
    the first process decides.

    Args:
        model: The model, the same on all processes, which have to call this together.
        paths: The paths.
        mesh: The processes, as :func:`~lightning_spectral.linalg.sharding.sharded.mesh_around` returns them.

    Returns:
        The tensors by parameter, as they are stored, without those that cannot be read.
    """
    found: dict[str, Tensor | FlatShard] = {}
    for factor in (part for path in paths for whole in path.factors for part in whole.flat()):
        if factor.role in _SMALL and factor.parameter is not None and factor.parameter not in found:
            # What cannot be read is told to those who ask for it.
            with suppress(ConfigurationError, AttributeError), torch.no_grad(), stored(model, factor) as tensor:
                found[factor.parameter] = tensor
    return dict(zip(found, agreed(in_one_piece(list(found.values())), [mesh] * len(found)), strict=True))


@contextmanager
def stored(model: nn.Module, factor: Factor) -> Iterator[Tensor | FlatShard]:
    """Fetch the parameter of a factor: the tensor, or what this process holds of it if it was flattened and cut."""
    assert factor.parameter is not None
    shard = flattened(model, factor.parameter)
    if shard is not None:
        yield shard
        return
    with reading(model, factor.parameter) as tensor:
        # A DTensor cannot be detached in inference mode; without grad mode, what is read of it is detached anyway.
        yield tensor if torch.is_grad_enabled() or is_dtensor(tensor) else tensor.detach()


@contextmanager
def reading(model: nn.Module, path: str) -> Iterator[Tensor]:
    """Fetch a parameter by attribute path without side effects.

    Reading a ``spectral_norm``-parametrized weight in training mode advances its power iteration, so parametrizations
    are in evaluation mode meanwhile. A weight that a hook makes anew for every forward pass (pruning, and the norms of
    ``torch.nn.utils`` that are no parametrizations) is made of its parts as they are now: the attribute is the weight
    of the last pass, before the last step.

    Args:
        model: The model.
        path: Attribute path of a parameter, a buffer or a computed weight.

    Yields:
        The tensor.

    Raises:
        ConfigurationError: A hook makes it of the input of a pass, or it belongs to a lazy layer that has not run yet.
    """
    owner, _, attribute = path.rpartition(".")
    module = resolve(model, owner) if owner else model
    assert isinstance(module, nn.Module)
    parametrizations = getattr(module, "parametrizations", None)
    inner = [] if parametrizations is None or attribute not in parametrizations else [*parametrizations.modules()]
    modes = [(item, item.training) for item in inner]
    for item in inner:
        item.training = False
    try:
        tensor: object = _made_by_hook(module, attribute, path)
        tensor = _computed(module, attribute, inner) if tensor is None else tensor
        assert isinstance(tensor, Tensor)
        if is_lazy(tensor):
            raise ConfigurationError(f"{path} has no content before the first forward pass, because its layer is lazy")
        yield tensor
    finally:
        for item, training in modes:
            item.training = training


def _made_by_hook(module: nn.Module, attribute: str, path: str) -> Tensor | None:
    """Return the weight that hooks would make for a forward pass in evaluation mode, ``None`` where none makes it."""
    before = vars(module).get(attribute)
    if not isinstance(before, Tensor) or not module._forward_pre_hooks:
        return None  # it is a parameter, a buffer, or made by a property
    hook: Any
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == attribute:
            return hook.apply_mask(module)  # type: ignore[no-any-return, no-untyped-call]
        if isinstance(hook, WeightNorm) and hook.name == attribute:
            return hook.compute_weight(module)  # type: ignore[no-any-return]
        if isinstance(hook, SpectralNorm) and hook.name == attribute:
            return hook.compute_weight(module, do_power_iteration=False)
    with kept(module):
        module.training = False
        try:
            for key, hook in module._forward_pre_hooks.items():
                hook(module, (), {}) if key in module._forward_pre_hooks_with_kwargs else hook(module, ())
        except Exception as error:  # whatever a hook raises that wants to see the input
            raise ConfigurationError(
                f"{path} may be made by a hook in every forward pass, which needs the input of the pass "
                f"({type(error).__name__}): expected a parameter, or a weight that torch.nn.utils.parametrize makes"
            ) from error
        made = vars(module).get(attribute)
    return made if isinstance(made, Tensor) and made is not before else None


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a model with layers that have no weights yet, where what is measured depends on all weights.

    Raises:
        ConfigurationError: There is one.
    """
    name = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if name is not None:
        raise ConfigurationError(
            f"{name} has no content before the first forward pass, because its layer is lazy, and what is measured "
            "depends on it: call the model once on a batch, model(batch), then measure"
        )


def _computed(module: nn.Module, attribute: str, parametrizations: Sequence[nn.Module]) -> object:
    """Return an attribute that is computed by some parametrizations. The user's own may count, draw or write."""
    if all(of_library(type(item).__module__) for item in parametrizations):
        return getattr(module, attribute)
    with kept(*parametrizations):
        return getattr(module, attribute)
