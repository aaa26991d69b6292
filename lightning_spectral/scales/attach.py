"""Residual scales: one learnable positive factor on every branch, at the branch's site, without a change of its code.

A scale is ``exp(log_scale)``, and ``log_scale = 0`` is the identity. So weight decay pulls a scale to the identity, a
checkpoint without scales means the identity, and ``reset_parameters`` of a model from the meta device gives it too.
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
        ends: The parameters that folding the scale will multiply: paths as :func:`relative_path` gives them, and
            offsets (see :class:`End`). The state dict contains them, so that a checkpoint can be fused without a model.
        reason: The reason why no parameter can take up the scale, ``None`` if one can.
    """

    on_weight = False  # whether it multiplies a weight instead of the output of a module
    fired = False  # whether the hook has run outside of compiled code

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
        # Shape (1,) instead of (), because sharding needs a dimension. In a module of its own for `reset_parameters`.
        self.log_scale = nn.Parameter(zero, requires_grad=learnable)
        self.output_index, self.ends, self.reason = output_index, tuple(ends), reason
        self.register_load_state_dict_pre_hook(fill_in)  # type: ignore[no-untyped-call]

    def reset_parameters(self) -> None:
        """Set the scale to the identity."""
        nn.init.zeros_(self.log_scale)

    def forward(self, x: Any) -> Any:
        """Return the input, since a container such as ``nn.Sequential`` calls all its children, this one too."""
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
        # In the dtype of the branch, so that autocast widens nothing and a factor of exactly 1 rounds nothing. As a
        # 0-dim tensor, because nested tensors accept no other factor.
        return x * self.log_scale.exp().to(x.dtype).squeeze(0)

    def get_extra_state(self) -> Tensor:
        """Return the recipe for folding the scale, as the bytes of a JSON text in a tensor.

        A tensor, because some formats store nothing else. Of floats, because code that averages state dicts by name
        averages this entry too; floats hold bytes exactly in any dtype.
        """
        text = json.dumps({"ends": self.ends, "reason": self.reason})
        return torch.tensor(list(text.encode()), dtype=torch.float32, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Ignore the recipe of a checkpoint. The recipe of the model is newer."""

    def __getattr__(self, name: str) -> Any:
        """Explain a failure of tensor parallelism that the message of torch does not explain."""
        if name == "weight":  # tensor parallelism reads this attribute of all children of a linear layer
            raise AttributeError(
                "a residual scale has no weight; under tensor parallelism, attach the scales after the layers are "
                "parallelized: blocks = find_blocks(model), parallelize_module(...), attach_scales(model, blocks), and "
                "fully_shard last"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Show the value of the scale if it can be read without waiting for a device."""
        at_hand = self.log_scale.device.type == "cpu" and self.log_scale.numel() == 1
        return f"{math.exp(self.log_scale.item()):.4g}" if at_hand else ""


class _WeightScale(ResidualScale):
    """The scale of a branch that no module carries: a parametrization of its last weight."""

    on_weight = True
    order: tuple[str, ...] = ()  # names of the parameters of the module, in their order without the scale

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the weight."""
        return self._times(x)


def _scale_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a site. A module-level function without a closure, so that a copied site uses its own scale."""
    scale: ResidualScale = getattr(module, CHILD)
    if not torch.compiler.is_compiling():
        vars(scale)["fired"] = True
    return scale.scaled(output)


@dataclass(frozen=True, eq=False)
class ResidualScales:
    """The residual scales of a model.

    Attributes:
        model: The model.
        blocks: The blocks of the model. Their factors include the scales.
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

    A forward hook multiplies the output of the branch's site by the scale. If a norm stands behind the branch, the
    scale stands behind the norm. Outputs are bitwise unchanged at first. A second call changes nothing. Call this
    function before the model is compiled or sharded by ``fully_shard``, after layers are made tensor-parallel, and
    before the optimizer is made.

    A copy of the scaled modules elsewhere in the model, such as a momentum teacher, gets scales at the same places. So
    code that walks over model and copy side by side, or by names, still works.

    Args:
        model: The model. It is changed in place: each site gets a module ``residual_scale``, which torch sees, and
            which ``children()``, ``len(site)`` and ``site[-1]`` hide.
        blocks: The blocks; found in the model by default. Found blocks whose self-check failed, and found branches that
            cannot carry a scale, get no scale, and a warning names them. Blocks that you pass or describe by hints get
            scales.
        batch: Example input for finding the blocks, if none can be guessed: a tensor, a tuple of positional arguments
            or a dict of keyword arguments.
        learnable: Whether the scales require gradients. The scale of a branch whose weights are all frozen never does.

    Returns:
        The scales, with the blocks that they belong to.

    Raises:
        ConfigurationError: The model is sharded already, or a branch of the passed blocks cannot carry a scale. The
            model is unchanged then.
        BlocksNotFoundError: The model has no residual block.
        ExampleInputError: The model could not be run on any example input.

    Example:
        >>> len(attach_scales(model))  # 3 blocks of 2 branches
        6
        >>> model.transformer.h[0].mlp.residual_scale.log_scale
        Parameter containing:
        tensor([0.], requires_grad=True)
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
    """Return the branches of blocks that passed their self-check, and warn about the other blocks."""
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
    """Attach scales to the branches that can carry one, and warn about the other branches.

    Args:
        model: The model.
        blocks: All blocks that were found in the model.
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
    """Attach scales to branches without one, and to copies of these branches. Arguments as above.

    Raises:
        ConfigurationError: The model is sharded already, or a branch cannot carry a scale. The model is unchanged
            then.
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
        if log_scale_tensor(home, branch) is None:  # it may have been attached through another block with the same site
            _attach(home, branch, learnable=learnable)
    if missing:
        complete_averages(model, blocks, branches, others)


def _refuse_sharded(model: nn.Module) -> None:
    """Raise an error for a model that is sharded over data-parallel ranks, where a new scale would differ by rank."""
    if any(is_fully_sharded(module) or is_wrapped_by_fsdp(module) for module in model.modules()):
        raise ConfigurationError(
            "the model is sharded already, and scales attached now would silently differ between ranks: call "
            "attach_scales(model) in configure_model, before fully_shard"
        )


def _forget_compiled_code() -> None:
    """Make torch compile again: compiled code ignores later hooks, even in another model of the same class."""
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
    """Remove one scale and its hook. The scale must be the identity, or folded into the weights.

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
    # Without a handle: torch returns a handle only once, and copying the module loses it.
    for key in [key for key, hook in module._forward_hooks.items() if hook is _scale_output]:
        del module._forward_hooks[key]
