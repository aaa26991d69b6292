"""Steering a run: a law, which knows only numbers, decides; this module reads its numbers and moves the scales."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_spectral.control.law import Action, Law, Reading
from lightning_spectral.control.moves import Moves
from lightning_spectral.control.muon import check_muon
from lightning_spectral.control.optimizers import (
    check_optimized,
    forget_momentum,
    held,
    hooked,
    lost_steps,
    plain_order,
    trained_beside,
    with_fresh_scales,
)
from lightning_spectral.control.steered import Kind, SteeredModel, scales_in
from lightning_spectral.records import LayerMeasurement, Measurement
from lightning_spectral.scales.attach import ResidualScale
from lightning_spectral.scales.liveness import Liveness

__all__ = ["Steering"]


class Steering(SteeredModel):
    """The residual scales of a model in the life of a run: attach, check, act, mark checkpoints.

    Args:
        rescaler: The law.
        safe_zone: The interval of ratios that counts as balanced.

    Attributes:
        doubts: What to tell the user about the optimizers, known after :meth:`begin`.
        disarmed: Whether the law is off, because the scales of several processes have come apart.

    Raises:
        ConfigurationError: The settings of the law do not go with the safe zone.
    """

    def __init__(self, rescaler: Law, safe_zone: tuple[float, float]) -> None:
        rescaler.check(safe_zone)
        super().__init__(rescaler)
        self.safe_zone = safe_zone
        self.doubts: tuple[str, ...] = ()
        self.disarmed = False
        self._liveness: Liveness | None = None
        self._moves = Moves()
        self._before: dict[str, Tensor] = {}  # 16-bit scales after the last action, to see whether steps are lost
        self._told_rounding = False
        self._handles: list[RemovableHandle] = []

    def begin(self, optimizers: Sequence[Optimizer]) -> None:
        """Check that the optimizers train the scales; until :meth:`release`, let them load states without scales.

        Raises:
            ConfigurationError: A trainable scale is in no optimizer, or in one that trains matrices.
        """
        if self.scales is None:
            return
        self.leave_untrained_alone(optimizers)
        check_optimized(optimizers, self.scales)
        beside = None if self.rescaler.learnable else trained_beside(optimizers, self.scales)
        self.doubts = tuple(filter(None, (check_muon(optimizers, self.scales.named_parameters()), beside)))
        every = [item.log_scale for item in scales_in(self.scales.model)]
        completed = partial(with_fresh_scales, scales=every, order=plain_order(self.scales.model))
        for optimizer in optimizers:
            self._handles += hooked(optimizer, "register_load_state_dict_pre_hook", completed)

    def start(self, optimizers: Sequence[Optimizer]) -> None:
        """From the first step on, watch whether every scale multiplies its branch and whether moves stay."""
        if self.scales is not None and not self.rescaler.dry_run:
            self._liveness = Liveness(self.scales.model, self.scales.blocks)
            self._moves.start(optimizers)

    def release(self) -> None:
        """Remove all hooks. The scales stay, so that the model goes on computing the same function."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._moves.stop()
        if self._liveness is not None:
            self._liveness.release()
            self._liveness = None

    def check_gradients(self) -> None:
        """Check after a backward pass that every scale multiplies its branch.

        Raises:
            ConfigurationError: A scale multiplies nothing (see :class:`Liveness`).
        """
        if self._liveness is not None:
            self._liveness.check()

    def act(
        self,
        measurement: Measurement,
        law: Sequence[Mapping[str, Any]],
        optimizers: Iterable[Optimizer],
        falling: Collection[int] = (),
        *,
        trained: bool = False,
    ) -> tuple[tuple[Action, ...], list[dict[str, Any]]]:
        """Decide after a measurement, and move the scales unless the run is dry.

        Args:
            measurement: The measurement, one layer per block.
            law: State of the law: plain values, as the previous call returned them; empty at first.
            optimizers: The optimizers. They forget the momentum of every scale that is moved: momentum from before the
                move would undo it.
            falling: Indices of the blocks whose token residual falls over training.
            trained: Whether the model was trained before the run.

        Returns:
            The actions, and the new state of the law.
        """
        if self.disarmed:
            return (), [dict(values) for values in law]
        readings = [
            self._reading(layer, pair, kinds, tokens_fall=layer.index in falling, trained=trained)
            for layer, pair, kinds in zip(measurement, self.kinds, self._counts(), strict=True)
        ]
        actions, after = self.rescaler.decide(self.safe_zone, measurement.step, readings, law)
        if not self.rescaler.dry_run:
            self._move(actions, list(optimizers))
            self._before = {site: held(scale).clone() for site, scale in self._in_16_bits()}
        return actions, after

    def _counts(self) -> list[int]:
        """Return how many kinds of branches each block has, kinds without scales included."""
        assert self.scales is not None
        return [len(block.kinds) for block in self.scales.blocks]

    def _reading(self, layer: LayerMeasurement, pair: tuple[Kind, Kind], kinds: int, **more: bool) -> Reading:
        mlp, attention = map(self._follows, pair)
        return Reading(
            layer.log_ratio,
            math.log(layer.mlp_scale) if mlp else None,
            math.log(layer.attention_scale) if attention else None,
            mlp_norm=layer.mlp_norm,
            attention_norm=layer.attention_norm,
            kinds=kinds,
            **more,
        )

    def _follows(self, kind: Kind) -> bool:
        """Whether the norm of a kind follows the law."""
        return bool(kind) and self._moves.given_up.isdisjoint(kind)

    @torch.no_grad()
    def _move(self, actions: Iterable[Action], optimizers: Sequence[Optimizer]) -> None:
        """Move all scales of a kind by one factor, and with each scale the copies that optimizers keep of it."""
        moved: dict[str, tuple[nn.Parameter, float]] = {}
        for action in actions:
            for kind, change in zip(self.kinds[action.block], (action.mlp, action.attention), strict=True):
                for site, module in kind.items() if change else ():
                    moved[site] = _parameter(module), _together(change, moved[site][1] if site in moved else 0.0)
        if moved:
            pairs = [
                (held(tensor), change)
                for scale, change in moved.values()
                for tensor in (scale, *self._moves.copies(scale, optimizers))
            ]
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
            forget_momentum(optimizers, [scale for scale, _ in moved.values() if scale.requires_grad])
        self._moves.note(moved, optimizers)

    def notices(self, optimizers: Sequence[Optimizer]) -> list[str]:
        """Return what to tell the user about the steps since the last action. Call this before :meth:`act`."""
        found = (self._check_rounding(optimizers), self._moves.notice(optimizers))
        return [notice for notice in found if notice is not None]

    def _in_16_bits(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the scales that an optimizer may train in 16 bits."""
        for kind in itertools.chain.from_iterable(self.kinds):
            for site, module in kind.items():
                scale = _parameter(module)
                if scale.requires_grad and scale.element_size() == 2:
                    yield site, scale

    def _check_rounding(self, optimizers: Iterable[Optimizer]) -> str | None:
        """Report once that rounding swallows the steps of 16-bit scales."""
        if self.scales is None or self._told_rounding or not self._before:
            return None
        scales = dict(self.scales.named_parameters())
        lost = lost_steps(optimizers, scales, self._before)
        if not lost:
            return None
        self._told_rounding, first = True, lost[0]
        return (
            f"{len(lost)} of {len(scales)} residual scales have gradients and have not moved since the last "
            f"measurement: rounding to 16 bits swallows their steps. At {first.name!r} the logarithm of the scale is "
            f"{first.value:.4g}, the next 16-bit number is {first.distance:.2g} away, and a step of less than half of "
            "that is lost. Train with precision='bf16-mixed' or at a larger rate, or let the controller alone move the "
            "scales, auto_rescale=ResidualRescaler(learnable=False)"
        )


def _together(one: float, other: float) -> float:
    """Return the change of a scale that two kinds share. If both lower the scale, the larger change counts alone."""
    return min(one, other) if one < 0 and other < 0 else one + other


def _parameter(module: ResidualScale) -> nn.Parameter:
    """Return the ``log_scale`` of a module, at a tenth of the cost of reading the attribute."""
    parameter = module._parameters["log_scale"]
    assert parameter is not None
    return parameter
