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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_spectral.discovery import find_blocks
from lightning_spectral.discovery.asked import check_blocks, check_model
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.presence import is_fully_sharded, is_wrapped_by_fsdp
from lightning_spectral.records import Branch, ResidualBlock
from lightning_spectral.scales.carriers import is_frozen, parameters_of, why_not, why_taken
from lightning_spectral.scales.copies import branches_of_copies, complete_averages
from lightning_spectral.scales.loading import fill_in, hook_loading, rename_weight
from lightning_spectral.scales.placement import place, remove
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.names import CHILD, relative_path
from lightning_spectral.weights.scaled import log_scale_tensor, with_scales

__all__ = [
    "ResidualScale",
    "ResidualScales",
    "attach_scales",
    "attach_to",
    "attach_where_possible",
    "detach_scale",
    "trusted_branches",
]


class ResidualScale(nn.Module):
    """One residual scale. A forward hook of its parent multiplies the parent's output by it.

    Args:
        output_index: Element of the parent's output that is the branch, ``None`` where the output is a tensor.
        ends: What folding the scale away will multiply: paths as :func:`relative_path` gives them, and offsets (see
            :class:`End`). They travel with the state dict, so that a checkpoint can be fused without its model.
        reason: Why there is nothing to fold it into, ``None`` where there is.
    """

    on_weight = False  # whether it multiplies a weight, and not the output of a module
    fired = False  # whether it has multiplied anything outside of compiled code

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
        self.register_load_state_dict_pre_hook(fill_in)  # type: ignore[no-untyped-call]

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
        # In the dtype of the branch, which autocast must not widen; a factor of exactly 1 costs no rounding. Without a
        # dimension, because nested tensors can be multiplied by nothing else.
        return x * self.log_scale.exp().to(x.dtype).squeeze(0)

    def get_extra_state(self) -> Tensor:
        """Return how to fold the scale away, as bytes in a tensor, because some formats store nothing else.

        The tensor is of floats, which hold bytes exactly in any dtype: code that averages state dicts by name averages
        this entry too.
        """
        text = json.dumps({"ends": self.ends, "reason": self.reason})
        return torch.tensor(list(text.encode()), dtype=torch.float32, device="cpu")

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
    order: tuple[str, ...] = ()  # of the parameters of its module, before it came

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the weight."""
        return self._times(x)


def _scale_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a site. At the top level of a module and without a closure, so that copies use their own."""
    scale: ResidualScale = getattr(module, CHILD)
    if not torch.compiler.is_compiling():
        vars(scale)["fired"] = True
    return scale.scaled(output)


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
    model: nn.Module, blocks: Sequence[ResidualBlock] | None = None, *, batch: Any = None, learnable: bool = True
) -> ResidualScales:
    """Put one learnable positive scalar on every branch of every residual block.

    The scale multiplies the output of the branch's site (behind a norm, where one stands behind the branch) through a
    forward hook. Outputs are bitwise unchanged at first. A second call changes nothing. Call it before the model is
    compiled or sharded by ``fully_shard``, after layers are made tensor-parallel, and before the optimizer is made.

    A copy of the scaled modules elsewhere in the model, such as a momentum teacher, gets scales at the same places, so
    that code that walks over both side by side, or by names, still does.

    Args:
        model: The model. It is changed in place: each site gets a module ``residual_scale``, which torch sees and
            ``children()``, ``len(site)``, ``site[-1]`` do not show.
        blocks: The blocks; found in the model by default. Found blocks whose self-check failed, and found branches that
            cannot carry a scale, get none, and a warning says so; blocks that are passed, or described by hints, do.
        batch: Example input for finding the blocks, if none can be guessed: a tensor, a tuple of positional arguments
            or a dict of keyword arguments.
        learnable: Whether the scales require gradients. The scale of a branch whose weights are all frozen never does.

    Returns:
        The scales, with the blocks that they belong to.

    Raises:
        ConfigurationError: The model is sharded already, or a branch of blocks that are passed cannot carry a scale.
            Nothing has been changed then.
        BlocksNotFoundError: The model has no residual block.
        ExampleInputError: The model could not be run on any example input.
    """
    check_model(model, "attach_scales")
    check_blocks(blocks, "attach_scales(model, find_blocks(model))")
    if blocks is None:
        blocks = find_blocks(model, batch=batch)
        attach_where_possible(model, blocks, trusted_branches(blocks), learnable=learnable)
    else:
        attach_to(model, blocks, [branch for block in blocks for branch in block.branches], learnable=learnable)
    return ResidualScales(model, with_scales(ModelWeights(model), blocks))


def trusted_branches(blocks: Sequence[ResidualBlock]) -> list[Branch]:
    """Return the branches of the blocks that passed their self-check, and warn of the others."""
    doubtful = [f"{block.name} ({block.evidence})" for block in blocks if not block.verified]
    if doubtful:
        warnings.warn(
            f"{len(doubtful)} block(s) get no residual scale, because their self-check failed: {'; '.join(doubtful)}. "
            "Pass them as blocks=find_blocks(model) if you know that their sites are right.",
            stacklevel=3,
        )
    return [branch for block in blocks if block.verified for branch in block.branches]


def attach_where_possible(
    model: nn.Module,
    blocks: Sequence[ResidualBlock],
    branches: Iterable[Branch],
    *,
    learnable: bool,
    others: Iterable[object] = (),
) -> None:
    """Attach scales to those branches that can carry one, and warn of the others.

    Args:
        model: The model.
        blocks: All blocks that were found in it.
        branches: The branches to scale.
        learnable: As in :func:`attach_scales`.
        others: Objects that may hold copies of the model, such as callbacks.

    Raises:
        ConfigurationError: The model is sharded already.
    """
    able, problems = [], []
    for branch in branches:
        problem = why_not(model, branch)
        if problem is None:
            able.append(branch)
        else:
            problems.append(problem)
    if problems:
        warnings.warn(
            f"{len(problems)} branch(es) get no residual scale: {'; '.join(problems)}. The others are scaled.",
            stacklevel=3,
        )
    attach_to(model, blocks, able, learnable=learnable, others=others)


def attach_to(
    model: nn.Module,
    blocks: Sequence[ResidualBlock],
    branches: Sequence[Branch],
    *,
    learnable: bool,
    others: Iterable[object] = (),
) -> None:
    """Attach scales to branches that have none, and to the copies of them; as :func:`attach_where_possible` does.

    Raises:
        ConfigurationError: The model is sharded already, or a branch cannot carry a scale. Nothing was changed then.
    """
    problems = (why_taken(model, branch) or why_not(model, branch) for branch in branches)
    problem = next(filter(None, problems), None)
    if problem is not None:
        raise ConfigurationError(problem)
    copied = [
        (twin, at_home)
        for twin, at_home in branches_of_copies(model, blocks, branches, others)
        if log_scale_tensor(twin, at_home) is None and why_not(twin, at_home) is None
    ]
    missing = [branch for branch in branches if log_scale_tensor(model, branch) is None]
    if missing or copied:
        _refuse_sharded(model)
        _forget_compiled_code()
    for home, branch in [*((model, branch) for branch in missing), *copied]:
        if log_scale_tensor(home, branch) is None:  # not attached through another block that shares the site
            _attach(home, branch, learnable=learnable)
    if missing:
        complete_averages(model, blocks, branches, others)


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse a model that is sharded over data-parallel ranks: a scale attached now would differ between ranks."""
    if any(is_fully_sharded(module) or is_wrapped_by_fsdp(module) for module in model.modules()):
        raise ConfigurationError(
            "the model is sharded already, and scales attached now would silently differ between ranks: call "
            "attach_scales(model) in configure_model, before fully_shard"
        )


def _forget_compiled_code() -> None:
    """Let compiled code be compiled anew: it ignores hooks that came later, even in another model of the same class."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _attach(model: nn.Module, branch: Branch, *, learnable: bool) -> None:
    parameters = parameters_of(model, branch)
    like = next((tensor for tensor in parameters if tensor.dtype.is_floating_point), next(model.parameters(), None))
    settings: Any = {"learnable": learnable and not is_frozen(model, branch), "like": like}
    if branch.site.startswith("param:"):
        owner, _, name = branch.site.removeprefix("param:").rpartition(".")
        module, scale = model.get_submodule(owner), _WeightScale(None, [(".original", 0.0)], **settings)
        scale.order = tuple(module._parameters)
        parametrize.register_parametrization(module, name, scale)
        module.register_load_state_dict_pre_hook(rename_weight)  # type: ignore[no-untyped-call]
        return
    module = model.get_submodule(branch.site)
    ends = [(relative_path(branch.site, end.parameter), end.offset) for end in branch.ends]
    place(module, ResidualScale(branch.output_index, ends, branch.ends_reason, **settings))
    module.register_forward_hook(_scale_output)
    weights = [end.parameter for end in branch.ends] or [
        factor.parameter for factor in branch.factors if factor.parameter is not None
    ]
    hook_loading(model, f"{branch.site}.{CHILD}".lstrip("."), weights)


def detach_scale(model: nn.Module, name: str) -> None:
    """Remove one scale, which must be the identity or folded into the weights, and its hook.

    Args:
        model: The model.
        name: Module path of the scale. The scale of a weight is multiplied into the weight.
    """
    owner, _, _ = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, parametrize.ParametrizationList):
        owner, _, weight = f".{owner}".rpartition(".parametrizations.")
        parametrize.remove_parametrizations(model.get_submodule(owner[1:]), weight, leave_parametrized=True)
        return
    remove(module)
    # torch gives out a hook's handle only once, and a handle does not survive copying the module.
    for key in [key for key, hook in module._forward_hooks.items() if hook is _scale_output]:
        del module._forward_hooks[key]
