"""The weights of a live model: read by their names without side effects, flattened ones as what a process holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.flattened import FlatShard, flat_meshes, flat_shard, is_flattened
from lightning_spectral.linalg.sharding.presence import is_dtensor, is_wrapped_by_fsdp
from lightning_spectral.linalg.sharding.sharded import agreed, in_one_piece, is_sharded
from lightning_spectral.passes.aside import kept
from lightning_spectral.passes.aside.memento import of_library
from lightning_spectral.records import Branch, Path
from lightning_spectral.weights.names import CHILD, scale_key
from lightning_spectral.weights.paths import module_at, resolve

__all__ = ["ModelWeights", "is_quantized", "refuse_lazy"]

_SMALL = ("scale", "pre_norm", "inner_norm", "post_norm")


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The weights of a model; see :class:`~lightning_spectral.weights.protocol.Weights`.

    Attributes:
        model: The outermost wrapper, if any: what is inside of it does not know it. Paths are those of the model that
            it wraps, which the wrappers pass on.
        small: Weights that were gathered in one piece, by path.
    """

    model: nn.Module
    small: Mapping[str, Tensor] = field(default_factory=dict)

    def gathered(self, paths: Iterable[Path]) -> tuple[ModelWeights, DeviceMesh | None]:
        """Gather the norm gains and multipliers of some paths where weights are sharded, in two collectives.

        What every process has for itself beside a sharded matrix has to be the same in all of them, or sums would mix
        them: the first process decides.

        Returns:
            The weights, and the largest mesh over which parameters are cut, ``None`` where every process has all.
        """
        meshes = [item.device_mesh for item in self.model.parameters() if is_sharded(item) and is_dtensor(item)]
        mesh = max((*meshes, *flat_meshes(self.model)), key=lambda mesh: mesh.size(), default=None)
        if mesh is None:
            return self, None
        found: dict[str, Tensor | FlatShard] = {}
        for factor in (part for path in paths for whole in path.factors for part in whole.flat()):
            if factor.role in _SMALL and factor.parameter is not None and factor.parameter not in found:
                # An unreadable parameter is skipped here; the caller that needs it gets the error.
                with (
                    suppress(ConfigurationError, AttributeError),
                    torch.no_grad(),
                    self.read(factor.parameter) as small,
                ):
                    found[factor.parameter] = small
        together = agreed(in_one_piece(list(found.values())), [mesh] * len(found))
        return replace(self, small=dict(zip(found, together, strict=True))), mesh

    def log_scale(self, branch: Branch) -> str | None:
        """Return the path of the logarithm of a branch's residual scale, ``None`` where it has none.

        A scale is a child of the module that carries the branch; where a weight alone carries it (``param:`` sites), it
        is a parametrization of that weight.
        """
        if branch.site.startswith("param:"):
            owner, _, name = branch.site.removeprefix("param:").rpartition(".")
            listed = getattr(getattr(module_at(self.model, owner), "parametrizations", None), name, ())
            found = [place for place, item in enumerate(listed) if hasattr(item, "log_scale")]
            return f"{owner}.parametrizations.{name}.{found[0]}.log_scale".removeprefix(".") if found else None
        child = getattr(module_at(self.model, branch.site), CHILD, None)
        return scale_key(branch.site) if hasattr(child, "log_scale") else None

    @contextmanager
    def read(self, path: str) -> Iterator[Tensor | FlatShard]:
        """Fetch a parameter, a buffer or a computed weight by attribute path, without side effects.

        Reading a ``spectral_norm``-parametrized weight in training mode advances its power iteration, so
        parametrizations are in evaluation mode meanwhile. A weight that a hook makes anew for every forward pass
        (pruning, and the norms of ``torch.nn.utils`` that are no parametrizations) is made of its parts as they are
        now: the attribute is the weight of the last pass, before the last step.

        Yields:
            The tensor, with its graph where gradients are enabled; or what this process holds of it if
            ``FullyShardedDataParallel`` has flattened and cut it.

        Raises:
            AttributeError: There is none.
            ConfigurationError: A hook makes it of the input of a pass, it belongs to a lazy layer that has not run yet,
                or it is computed from flattened parameters.
        """
        ready = self.small[path] if path in self.small else _shard(self.model, path)
        if ready is not None:
            yield ready
            return
        owner, _, attribute = path.rpartition(".")
        module = resolve(self.model, owner) if owner else self.model
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
                raise ConfigurationError(
                    f"{path} has no content before the first forward pass, because its layer is lazy"
                )
            if is_quantized(tensor):
                raise ConfigurationError(f"{path} is quantized: {type(tensor).__name__} is no matrix of numbers")
            # A DTensor cannot be detached in inference mode; without grad mode, what is read of it is detached anyway.
            yield tensor if torch.is_grad_enabled() or is_dtensor(tensor) else tensor.detach()
        finally:
            for item, training in modes:
                item.training = training


def _shard(model: nn.Module, path: str) -> FlatShard | None:
    """Return what this process holds of a parameter, ``None`` if that is all of it or not flattened."""
    *owners, name = path.split(".")
    value: object = model
    wrapper = None
    for owner in ("", *owners):
        value = getattr(value, owner) if owner else value
        wrapper = value if is_wrapped_by_fsdp(value) else wrapper
    if wrapper is None:
        return None
    assert isinstance(value, nn.Module)
    if parametrize.is_parametrized(value, name) and is_flattened(wrapper):
        raise ConfigurationError(f"{path} is computed from other parameters, and those are flattened and cut")
    return flat_shard(wrapper, getattr(value, name))


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


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that knows how to undo its own quantization."""
    return type(tensor).dequantize is not Tensor.dequantize


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
