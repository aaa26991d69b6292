"""Residual scales: one learnable positive factor on every branch, at the branch's site, without touching its code.

A scale is ``exp(log_scale)``. In log space zero means identity, so weight decay pulls to the identity, a checkpoint
without scales means the identity, and so does ``reset_parameters`` after a model was materialized from the meta device.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.utils import parametrize

from lightning_spectral.discovery import find_blocks
from lightning_spectral.discovery.paths import relative_path, resolve
from lightning_spectral.discovery.scaled import CHILD, log_scale_tensor, with_scales
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import Branch, ResidualBlock

__all__ = ["ResidualScale", "ResidualScales", "attach_scales", "detach_scale"]


class ResidualScale(nn.Module):
    """One residual scale. A forward hook of its parent multiplies the parent's output by it.

    Args:
        output_index: Element of the parent's output that is the branch, ``None`` where the output is a tensor.
        ends: What folding the scale away will multiply: paths as :func:`relative_path` gives them, and offsets (see
            :class:`End`). They travel with the state dict, so that a checkpoint can be fused without its model.
        reason: Why there is nothing to fold it into, ``None`` where there is.
    """

    on_weight = False  # whether it multiplies a weight, and not the output of a module

    def __init__(
        self,
        output_index: int | str | None = None,
        ends: Sequence[tuple[str, float]] = (),
        reason: str | None = None,
        *,
        learnable: bool = True,
        like: Tensor | None = None,
    ) -> None:
        super().__init__()
        wide = like is not None and like.dtype == torch.float64
        zero = torch.zeros(
            1, dtype=torch.float64 if wide else torch.float32, device=None if like is None else like.device
        )
        # Never 0-dim (sharding needs a dimension), and a module of its own (see `reset_parameters`).
        self.log_scale = nn.Parameter(zero, requires_grad=learnable)
        self.output_index, self.ends, self.reason = output_index, tuple(ends), reason
        self.register_load_state_dict_pre_hook(_fill_in)  # type: ignore[no-untyped-call]

    def reset_parameters(self) -> None:
        """Become the identity."""
        nn.init.zeros_(self.log_scale)

    def forward(self, x: Any) -> Any:
        """Return the input: a container that calls all its children, such as ``nn.Sequential``, calls this one too."""
        return x

    def scaled(self, output: Any) -> Any:
        """Multiply the branch in its parent's output."""
        if self.output_index is None:
            return self._times(output)
        part = self._times(output[self.output_index])
        if isinstance(output, tuple):
            fields = [part if place == self.output_index else item for place, item in enumerate(output)]
            return type(output)(*fields) if hasattr(output, "_fields") else tuple(fields)
        result = copy.copy(output)
        result[self.output_index] = part
        return result

    def _times(self, x: Tensor) -> Tensor:
        # In the dtype of the branch, which autocast must not widen; a factor of exactly 1 costs no rounding.
        return x * self.log_scale.exp().to(x.dtype)

    def get_extra_state(self) -> Tensor:
        """Return how to fold the scale away, as bytes: a tensor, because some formats store nothing else."""
        text = json.dumps({"ends": self.ends, "reason": self.reason})
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Ignore what a checkpoint says: the model knows better."""

    def __getattr__(self, name: str) -> Any:
        """Explain the one failure of which torch's own message tells nothing."""
        if name == "weight":  # what the plans of tensor parallelism look for in all children of a linear layer
            raise AttributeError(
                "a residual scale has no weight; under tensor parallelism, attach the scales after the layers are "
                "parallelized: blocks = find_blocks(model), parallelize_module(...), attach_scales(model, blocks), and "
                "fully_shard last"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Show the scale where it can be read without waiting for a device."""
        at_hand = self.log_scale.device.type == "cpu" and self.log_scale.numel() == 1
        return f"{math.exp(self.log_scale.item()):.4g}" if at_hand else ""


class _WeightScale(ResidualScale):
    """The scale of a branch that no module carries: a parametrization of its last weight."""

    on_weight = True

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the weight."""
        return self._times(x)


def _scale_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a site. At the top level of a module and without a closure, so that copies use their own."""
    scale: ResidualScale = getattr(module, CHILD)
    return scale.scaled(output)


def _fill_in(module: ResidualScale, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Read a checkpoint without this scale as one where it is the identity, which it is."""
    if f"{prefix}log_scale" not in state_dict:
        state_dict[f"{prefix}log_scale"] = torch.zeros_like(module.log_scale)
    state_dict.setdefault(f"{prefix}_extra_state", module.get_extra_state())


def _rename_weight(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Read a weight from a checkpoint that was written before it was parametrized."""
    for name in getattr(module, "parametrizations", ()):
        if f"{prefix}{name}" in state_dict:
            state_dict[f"{prefix}parametrizations.{name}.original"] = state_dict.pop(f"{prefix}{name}")


@dataclass(frozen=True, eq=False)
class ResidualScales:
    """The residual scales of a model.

    Attributes:
        model: The model.
        blocks: Its blocks, the scales among their factors.
    """

    model: nn.Module
    blocks: tuple[ResidualBlock, ...]

    def __len__(self) -> int:
        """Count the scales."""
        return len(dict(self.named_parameters()))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the site and the ``log_scale`` parameter of every scale, each of shape (1,)."""
        seen = set()
        for block in self.blocks:
            for branch in block.branches:
                parameter = log_scale_tensor(self.model, branch)
                if isinstance(parameter, nn.Parameter) and branch.site not in seen:
                    seen.add(branch.site)
                    yield branch.site, parameter

    def parameters(self) -> list[nn.Parameter]:
        """Return the ``log_scale`` parameters, for an optimizer or a parameter group of their own."""
        return [parameter for _, parameter in self.named_parameters()]


def attach_scales(
    model: nn.Module, blocks: Sequence[ResidualBlock] | None = None, *, learnable: bool = True
) -> ResidualScales:
    """Put one learnable positive scalar on every branch of every residual block.

    The scale multiplies the output of the branch's site (behind a norm, where one stands behind the branch) through a
    forward hook. Outputs are bitwise unchanged at first. A second call changes nothing. Call it before the model is
    compiled or sharded by ``fully_shard``, after layers are made tensor-parallel, and before the optimizer is made.

    Args:
        model: The model. It is changed in place: each site gets a child module ``residual_scale``.
        blocks: The blocks; found in the model by default. Found blocks whose self-check failed get no scale, and a
            warning says so; blocks that are passed, or described by hints, get one.
        learnable: Whether the scales require gradients. The scale of a branch whose weights are all frozen never does.

    Returns:
        The scales, with the blocks that they belong to.

    Raises:
        ConfigurationError: The model is sharded already, or a site has another child of that name.
        BlocksNotFoundError: The model has no residual block.
        ExampleInputError: The model could not be run on any example input.
    """
    chosen = blocks
    if blocks is None:
        blocks = find_blocks(model)
        chosen = _trusted(blocks)
    missing = [branch for block in chosen or () for branch in block.branches if log_scale_tensor(model, branch) is None]
    if missing:
        _refuse_sharded(model)
        _forget_compiled_code()
    for branch in missing:
        if log_scale_tensor(model, branch) is None:  # not attached through another block that shares the site
            _attach(model, branch, learnable=learnable)
    return ResidualScales(model, with_scales(model, blocks))


def _trusted(blocks: Sequence[ResidualBlock]) -> list[ResidualBlock]:
    doubtful = [f"{block.name} ({block.evidence})" for block in blocks if not block.verified]
    if doubtful:
        warnings.warn(
            f"{len(doubtful)} block(s) get no residual scale, because their self-check failed: {'; '.join(doubtful)}. "
            "Pass them as blocks=find_blocks(model) if you know that their sites are right.",
            stacklevel=3,
        )
    return [block for block in blocks if block.verified]


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse a model that is sharded over data-parallel ranks: a scale attached now would differ between ranks."""
    if any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()):
        raise ConfigurationError(
            "the model is sharded already, and scales attached now would silently differ between ranks: call "
            "attach_scales(model) in configure_model, before fully_shard"
        )


def _forget_compiled_code() -> None:
    """Let compiled code be compiled anew: it ignores hooks that came later, even in another model of the same class."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _attach(model: nn.Module, branch: Branch, *, learnable: bool) -> None:
    by_weight = branch.site.startswith("param:")
    owner, _, name = branch.site.removeprefix("param:").rpartition(".") if by_weight else (branch.site, "", "")
    try:
        module = resolve(model, owner) if owner else model
    except AttributeError:
        raise ConfigurationError(
            f"the model has no {branch.site!r}: pass blocks that were found in this very model, find_blocks(model)"
        ) from None
    assert isinstance(module, nn.Module)
    parameters = [resolve(model, end.parameter) for end in branch.ends] or list(module.parameters())
    tensors = [parameter for parameter in parameters if isinstance(parameter, Tensor)]
    frozen = bool(tensors) and not any(tensor.requires_grad for tensor in tensors)
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), next(model.parameters(), None))
    ends = [(relative_path(branch.site, end.parameter), end.offset) for end in branch.ends]
    if by_weight:
        others = [end.parameter for end in branch.ends if f"param:{end.parameter}" != branch.site]
        if others:
            raise ConfigurationError(
                f"no module carries the branch of {branch.site!r}, and its end is more than that parameter "
                f"({', '.join(others)}): compute the branch in a module of its own"
            )
        if parametrize.is_parametrized(module, name):
            raise ConfigurationError(
                f"{branch.site.removeprefix('param:')} is parametrized, and no module carries its branch: compute the "
                "branch in a module of its own"
            )
        on_weight = _WeightScale(None, [(".original", 0.0)], learnable=learnable and not frozen, like=like)
        parametrize.register_parametrization(module, name, on_weight)
        module.register_load_state_dict_pre_hook(_rename_weight)  # type: ignore[no-untyped-call]
        return
    if hasattr(module, CHILD):
        raise ConfigurationError(f"{branch.site}.{CHILD} exists already and is no residual scale: rename it")
    scale = ResidualScale(branch.output_index, ends, branch.ends_reason, learnable=learnable and not frozen, like=like)
    module.add_module(CHILD, scale)
    module.register_forward_hook(_scale_output)


def detach_scale(model: nn.Module, name: str) -> None:
    """Remove one scale, which must be the identity or folded into the weights, and its hook.

    Args:
        model: The model.
        name: Module path of the scale. The scale of a weight is multiplied into the weight.
    """
    owner, _, child = name.rpartition(".")
    module = resolve(model, owner) if owner else model
    if isinstance(module, parametrize.ParametrizationList):
        owner, _, weight = f".{owner}".rpartition(".parametrizations.")
        holder = resolve(model, owner[1:]) if owner else model
        assert isinstance(holder, nn.Module)
        parametrize.remove_parametrizations(holder, weight, leave_parametrized=True)
        return
    assert isinstance(module, nn.Module)
    delattr(module, child)
    # torch gives out a hook's handle only once, and a handle does not survive copying the module.
    for key in [key for key, hook in module._forward_hooks.items() if hook is _scale_output]:
        del module._forward_hooks[key]
