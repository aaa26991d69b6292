"""Between the control law, which knows numbers, and a model: read its scales, move them, see that they are alive."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_spectral.control.fuse import MARKER
from lightning_spectral.control.law import Action, BlockState, Reading, ResidualRescaler, check_zones, decide
from lightning_spectral.control.optimizers import check_optimized, forget_momentum, held, lost_steps, with_fresh_scales
from lightning_spectral.control.scales import ResidualScale, ResidualScales, attach_scales
from lightning_spectral.discovery import find_blocks
from lightning_spectral.discovery.paths import is_compiled, resolve
from lightning_spectral.discovery.scaled import log_scale_tensor, scale_module, with_scales
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import Branch, LayerMeasurement, Measurement, ResidualBlock

__all__ = ["Steering"]

_Pair = tuple[nn.Module | None, nn.Module | None]
_MATRICES = {"output", "value", "latent", "down", "up"}


class Steering:
    """The residual scales of a model in the life of a run: attach, check, act, mark checkpoints.

    Args:
        rescaler: The settings of the law.
        safe_zone: The interval of ratios that counts as balanced.

    Raises:
        ConfigurationError: The inner zone of the law does not lie inside the safe zone.
    """

    def __init__(self, rescaler: ResidualRescaler, safe_zone: tuple[float, float]) -> None:
        check_zones(rescaler, safe_zone)
        self.rescaler, self.safe_zone = rescaler, safe_zone
        self.scales: ResidualScales | None = None
        self.disarmed = False  # the scales of several processes have come apart
        self._pairs: list[_Pair] = []  # of MLP and attention, by block
        self._unseen: list[Branch] = []
        self._before: dict[str, Tensor] = {}  # the scales after the last action
        self._told_rounding = False
        self._handles: list[RemovableHandle] = []

    @property
    def blocks(self) -> tuple[ResidualBlock, ...] | None:
        """The blocks that have scales, ``None`` before any were attached."""
        return None if self.scales is None else self.scales.blocks

    def is_of(self, model: nn.Module) -> bool:
        """Whether it steers a model, or nothing yet."""
        return self.scales is None or self.scales.model is model

    def attach(self, model: nn.Module, blocks: Sequence[ResidualBlock] | None) -> None:
        """Attach the scales to a model, unless they are; a dry run attaches nothing.

        Args:
            model: The model.
            blocks: Its blocks; found in it by default.

        Raises:
            ConfigurationError, BlocksNotFoundError, ExampleInputError: As :func:`attach_scales` does.
        """
        if self.scales is not None and self.scales.model is model:
            return
        if self.rescaler.dry_run:
            self._take(ResidualScales(model, with_scales(model, find_blocks(model) if blocks is None else blocks)))
        else:
            self._take(attach_scales(model, blocks, learnable=self.rescaler.learnable))

    def adopt(self, model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
        """Take over the scales that the user attached to a model that was built late.

        Raises:
            ConfigurationError: There are none.
        """
        scales = ResidualScales(model, with_scales(model, blocks))
        if not len(scales) and not self.rescaler.dry_run:
            raise ConfigurationError(
                f"{type(model).__name__} is built or parallelized in configure_model, after callbacks could attach "
                "anything to it: call lightning_spectral.attach_scales(self) there, before fully_shard"
            )
        self._take(scales)

    def _take(self, scales: ResidualScales) -> None:
        self.scales = scales
        find = partial(scale_module, scales.model)
        self._pairs = [(find(block.mlp), find(block.attention)) for block in scales.blocks]

    def begin(self, optimizers: Sequence[Optimizer]) -> None:
        """Check that the optimizers train the scales; until :meth:`release`, let them load states without scales.

        Raises:
            ConfigurationError: A trainable scale is in no optimizer.
        """
        if self.scales is None:
            return
        check_optimized(optimizers, self.scales)
        self._unseen = [branch for block in self.scales.blocks for branch in block.branches]
        completed = partial(with_fresh_scales, scales=self.scales.parameters())
        self._handles += [optimizer.register_load_state_dict_pre_hook(completed) for optimizer in optimizers]

    def release(self) -> None:
        """Remove the hooks from the optimizers. The scales stay: the model shall go on computing what it did."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def act(
        self,
        measurement: Measurement,
        law: Sequence[Mapping[str, Any]],
        optimizers: Iterable[Optimizer],
        falling: Collection[int] = (),
    ) -> tuple[tuple[Action, ...], list[dict[str, Any]]]:
        """Decide after a measurement, and move the scales unless the run is dry.

        Args:
            measurement: The measurement, one layer per block.
            law: State of the law: plain values, as the previous call returned them; empty at first.
            optimizers: Their momentum of the scales that are moved is forgotten, or it would undo the move.
            falling: Indices of the blocks whose token residual falls over training.

        Returns:
            The actions, and the new state of the law.
        """
        assert self.scales is not None
        if self.disarmed:
            return (), [dict(values) for values in law]
        pairs = zip(measurement, self.scales.blocks, self._pairs, strict=True)
        readings = [
            replace(self._reading(layer, block, pair), tokens_fall=layer.index in falling)
            for layer, block, pair in pairs
        ]
        states = [BlockState.from_dict(values) for values in law] if len(law) == len(readings) else []
        actions, after = decide(self.rescaler, self.safe_zone, measurement.step, readings, states)
        if not self.rescaler.dry_run:
            forget_momentum(optimizers, self._moved(actions))
            self._before = {site: held(scale).clone() for site, scale in self.scales.named_parameters()}
        return actions, [state.to_dict() for state in after]

    def _reading(self, layer: LayerMeasurement, block: ResidualBlock, pair: _Pair) -> Reading:
        dry = self.rescaler.dry_run
        has_mlp = pair[0] is not None or (dry and block.mlp is not None)
        has_attention = pair[1] is not None or (dry and block.attention is not None)
        return Reading(
            layer.log_ratio,
            math.log(layer.mlp_scale) if has_mlp else None,
            math.log(layer.attention_scale) if has_attention else None,
        )

    @torch.no_grad()
    def _moved(self, actions: Iterable[Action]) -> list[Tensor]:
        """Move the scales and return those that moved."""
        moved = []
        for action in actions:
            for module, change in zip(self._pairs[action.block], (action.mlp, action.attention), strict=True):
                if change and module is not None:
                    scale = getattr(module, "log_scale")  # noqa: B009  # a Module knows no such attribute
                    moved.append(scale.add_(change))
        return moved

    def check_gradients(self) -> None:
        """Check after a backward pass that every trainable scale received a gradient.

        A scale whose branch had no part in this pass (a dropped layer) is checked again after the next one.

        Raises:
            ConfigurationError: The weights of a branch received gradients and its scale did not: the scale multiplies
                nothing. The message names the site and says why.
        """
        if not self._unseen or self.scales is None:
            return
        model = self.scales.model
        waiting: list[Branch] = []
        dead: list[Branch] = []
        for branch in self._unseen:
            scale = log_scale_tensor(model, branch)
            if scale is None or not scale.requires_grad or scale.grad is not None or not scale.numel():
                continue  # an empty one belongs to another process, which checks it
            (dead if _ran(model, branch) else waiting).append(branch)
        if dead:
            told = "; ".join(f"{branch.site} ({_cause_of_death(model, branch)})" for branch in dead)
            raise ConfigurationError(
                f"{len(dead)} residual scale(s) received no gradient although the weights of their branches did, so "
                f"they multiply nothing: {told}"
            )
        self._unseen = waiting

    def check_rounding(self, optimizers: Iterable[Optimizer]) -> str | None:
        """Return what to tell if rounding swallows the steps of scales of 16 bits; it is found out once.

        Call it before :meth:`act`, while the gradients of the last step are there.
        """
        if self.scales is None or self._told_rounding:
            return None
        scales = dict(self.scales.named_parameters())
        lost = lost_steps(optimizers, scales, self._before)
        if not lost:
            return None
        self._told_rounding, first = True, lost[0]
        return (
            f"{len(lost)} of {len(scales)} residual scales have gradients and have not moved since the last "
            f"measurement: in 16 bits, next to {first.value:.4g}, the logarithm of the scale of {first.name!r}, "
            f"numbers are {first.distance:.2g} apart, and steps of less than half of that are rounded away. Train with "
            "precision='bf16-mixed' or at a larger rate, or let the controller alone move the scales, "
            "auto_rescale=ResidualRescaler(learnable=False)"
        )

    def mark(self, checkpoint: dict[str, Any]) -> None:
        """Say in a checkpoint that its model has residual scales."""
        sites = [] if self.scales is None else [site for site, _ in self.scales.named_parameters()]
        if sites:
            checkpoint[MARKER] = {"version": 1, "scales": sites}


def _ran(model: nn.Module, branch: Branch) -> bool:
    """Whether a matrix of the branch received a gradient; a gain may get one from another branch that shares it."""
    matrices = [factor.parameter for factor in branch.factors if factor.role in _MATRICES and factor.parameter]
    return any(
        isinstance(weight := resolve(model, path), nn.Parameter) and weight.grad is not None for path in matrices
    )


def _cause_of_death(model: nn.Module, branch: Branch) -> str:
    site = resolve(model, branch.site) if branch.site else model
    assert isinstance(site, nn.Module)
    if not any(hook.__module__ == ResidualScale.__module__ for hook in site._forward_hooks.values()):
        return "its forward hook was removed; attach_scales puts it back only on a fresh model"
    if is_compiled(model, branch.site):
        return (
            "the model was compiled and run before the scale was attached, and compiled code ignores later hooks; "
            "attach first, or call torch._dynamo.reset()"
        )
    return (
        "its forward is never called, because something reads its weights directly; name another site in the hints "
        "for find_blocks"
    )
