"""Between the control law, which knows numbers, and a model: read its scales, move them, see that they are alive."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_spectral.control.band import ResidualRescaler
from lightning_spectral.control.law import Action, Law, Reading
from lightning_spectral.control.moves import Moves
from lightning_spectral.control.muon import check_muon
from lightning_spectral.control.optimizers import (
    check_optimized,
    forget_momentum,
    held,
    lost_steps,
    plain_order,
    with_fresh_scales,
)
from lightning_spectral.discovery import find_blocks
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import Branch, LayerMeasurement, Measurement, ResidualBlock
from lightning_spectral.scales.attach import (
    ResidualScale,
    ResidualScales,
    attach_to,
    attach_where_possible,
    trusted_branches,
)
from lightning_spectral.scales.carriers import is_frozen, parameters_of
from lightning_spectral.scales.fuse import fuse_scales
from lightning_spectral.scales.liveness import Liveness
from lightning_spectral.scales.loading import MARKER, marked, refuse_lost_scales, saved_sites
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.scaled import scale_module, with_scales

__all__ = ["Steering"]

_Kind = dict[str, ResidualScale]  # the scales of one kind of a block, by their sites; none where the law moves none


class Steering:
    """The residual scales of a model in the life of a run: attach, check, act, mark checkpoints.

    Args:
        rescaler: The law.
        safe_zone: The interval of ratios that counts as balanced.

    Raises:
        ConfigurationError: The settings of the law do not go with the safe zone.
    """

    def __init__(self, rescaler: Law, safe_zone: tuple[float, float]) -> None:
        rescaler.check(safe_zone)
        self.rescaler, self.safe_zone = rescaler, safe_zone
        self.scales: ResidualScales | None = None
        self.doubt: str | None = None  # what to tell of the optimizers
        self.disarmed = False  # the scales of several processes have come apart
        self._attached = 0  # scales that the model did not have before the run
        self._left_alone: list[Branch] = []  # found, and without scales
        self._found = False  # the blocks, and not passed
        self._unsteered: set[str] = set()  # the sites of what the law leaves alone
        self._pairs: list[tuple[_Kind, _Kind]] = []  # the scales of MLP and attention, by block
        self._kinds: list[int] = []  # how many kinds of branches a block has
        self._liveness: Liveness | None = None
        self._moves = Moves()
        self._before: dict[str, Tensor] = {}  # the scales whose steps may be rounded away, after the last action
        self._told_rounding = False
        self._handles: list[RemovableHandle] = []

    @property
    def blocks(self) -> tuple[ResidualBlock, ...] | None:
        """The blocks that have scales, ``None`` before any were attached."""
        return None if self.scales is None else self.scales.blocks

    @property
    def has_attached(self) -> bool:
        """Whether the model has scales that it did not have before the run."""
        return self._attached > 0

    def is_of(self, model: nn.Module) -> bool:
        """Whether it steers a model, or nothing yet."""
        return self.scales is None or self.scales.model is model

    def set_up(self) -> None:
        """Begin a run: what the model has by now, it had before."""
        self._attached = 0

    def attach(self, model: nn.Module, blocks: Sequence[ResidualBlock] | None, others: Iterable[object] = ()) -> None:
        """Attach the scales to a model, unless they are; a dry run attaches nothing.

        Args:
            model: The model.
            blocks: Its blocks, all of whose branches get scales; found in it by default. Branches of found blocks that
                are frozen, or whose self-check failed, are left alone.
            others: Objects that may hold copies of the model, such as callbacks.

        Raises:
            ConfigurationError, BlocksNotFoundError, ExampleInputError: As
                :func:`~lightning_spectral.scales.attach.attach_scales` does.
        """
        if self.scales is not None and self.scales.model is model:
            return
        before, passed = _count(model), blocks is not None
        blocks = find_blocks(model) if blocks is None else blocks
        steered = [item for block in blocks for item in block.branches] if passed else _trained(model, blocks)
        known = set(steered)
        self._found = not passed
        self._left_alone = [branch for block in blocks for branch in block.branches if branch not in known]
        self._unsteered = {branch.site for branch in self._left_alone}
        if not self.rescaler.dry_run:
            attach = attach_to if passed else attach_where_possible
            attach(model, blocks, steered, learnable=self.rescaler.learnable, others=others)
        self._attached += _count(model) - before
        self._take(ResidualScales(model, with_scales(ModelWeights(model), blocks)))

    def adopt(self, model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
        """Take over the scales that the user attached to a model that was built late.

        Raises:
            ConfigurationError: There are none.
        """
        scales = ResidualScales(model, with_scales(ModelWeights(model), blocks))
        if not len(scales) and not self.rescaler.dry_run:
            raise ConfigurationError(
                f"{type(model).__name__} is built or parallelized in configure_model, after callbacks could attach "
                "anything to it: call lightning_spectral.attach_scales(self) there, before fully_shard"
            )
        self._take(scales)

    def _take(self, scales: ResidualScales) -> None:
        self.scales = scales
        self._pairs = [
            (self._steered(block.mlp_branches), self._steered(block.attention_branches)) for block in scales.blocks
        ]
        self._kinds = [len(block.kinds) for block in scales.blocks]

    def _steered(self, branches: Sequence[Branch]) -> _Kind:
        """Return the scales of a kind, none where one of its branches is left alone: their sum would not follow."""
        assert self.scales is not None
        found = {branch.site: scale_module(self.scales.model, branch) for branch in branches}
        if self.rescaler.dry_run:  # as if all had one
            found = {site: module or ResidualScale() for site, module in found.items()}
        whole = {site: module for site, module in found.items() if isinstance(module, ResidualScale)}
        return whole if len(whole) == len(found) and self._unsteered.isdisjoint(whole) else {}

    # In the life of a run

    def check_foldable(self) -> None:
        """Check that :meth:`fold` will be able to fold the scales, whatever becomes of them.

        Raises:
            ConfigurationError: One has nothing that it could be folded into.
        """
        scales = [] if self.scales is None else _scales_in(self.scales.model)
        lost = [scale for scale in scales if not scale.on_weight and not scale.ends]
        if lost and self._attached:
            raise ConfigurationError(
                f"{len(lost)} residual scale(s) would be lost: this strategy starts its processes from yours, which "
                "gets back only weights that its module has already, and these scales cannot be folded into weights "
                f"({lost[0].reason}). Call attach_scales(module) before trainer.fit(module)"
            )

    def fold(self) -> int:
        """Fold the scales into the weights if the model had none before; return how many were folded."""
        if self.scales is None or not self._attached:
            return 0
        count = _count(self.scales.model)
        fuse_scales(self.scales.model)
        return count

    def listen(self, model: nn.Module) -> RemovableHandle:
        """Hook a model until it has loaded its checkpoint: no scale is lost, also none that this run would not attach.

        Branches that are left alone may have got scales in the run that saved the checkpoint.
        """
        hook = partial(_take_in, tuple(self._left_alone), self.rescaler.dry_run)
        handle: RemovableHandle = model.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
        return handle

    def begin(self, optimizers: Sequence[Optimizer]) -> None:
        """Check that the optimizers train the scales; until :meth:`release`, let them load states without scales.

        Raises:
            ConfigurationError: A trainable scale is in no optimizer, or in one that trains matrices.
        """
        if self.scales is None:
            return
        if self._found:
            self._unsteered = {branch.site for branch in self._left_alone}
            self._unsteered |= _untrained(self.scales.model, self.scales.blocks, optimizers)
        self._take(ResidualScales(self.scales.model, with_scales(ModelWeights(self.scales.model), self.scales.blocks)))
        check_optimized(optimizers, self.scales)
        self.doubt = check_muon(optimizers, self.scales.named_parameters())
        every = [item.log_scale for item in _scales_in(self.scales.model)]
        completed = partial(with_fresh_scales, scales=every, order=plain_order(self.scales.model))
        self._handles += [
            optimizer.register_load_state_dict_pre_hook(completed)
            for optimizer in optimizers
            if isinstance(optimizer, Optimizer)
        ]

    def held_still(self) -> str | None:
        """Say which blocks the law will not move because one of their kinds is left alone; ``None`` for none."""
        still = [
            block.name
            for block, (mlp, attention) in zip(self.blocks or (), self._pairs, strict=True)
            if block.mlp and block.attention and bool(mlp) is not bool(attention)
        ]
        both = isinstance(self.rescaler, ResidualRescaler) and self.rescaler.mode == "both"
        if not still or not both or self.rescaler.dry_run:
            return None
        return (
            f"residual scales: {len(still)} block(s) are held still, because one of their two kinds of branches is "
            f"frozen or cannot carry a scale (the first is {still[0]}). ResidualRescaler(mode=...) moves one kind alone"
        )

    def start(self, optimizers: Sequence[Optimizer]) -> None:
        """Watch from the first step on whether every scale multiplies its branch, and whether moves stay."""
        if self.scales is not None and not self.rescaler.dry_run:
            self._liveness = Liveness(self.scales.model, self.scales.blocks)
            self._moves.start(optimizers)

    def release(self) -> None:
        """Remove all hooks. The scales stay: the model shall go on computing what it did."""
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
            ConfigurationError: One does not (see :class:`Liveness`).
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
            optimizers: Their momentum of the scales that are moved is forgotten, or it would undo the move.
            falling: Indices of the blocks whose token residual falls over training.
            trained: Whether the model was trained before the run.

        Returns:
            The actions, and the new state of the law.
        """
        assert self.scales is not None
        if self.disarmed:
            return (), [dict(values) for values in law]
        readings = [
            self._reading(layer, pair, kinds, tokens_fall=layer.index in falling, trained=trained)
            for layer, pair, kinds in zip(measurement, self._pairs, self._kinds, strict=True)
        ]
        actions, after = self.rescaler.decide(self.safe_zone, measurement.step, readings, law)
        if not self.rescaler.dry_run:
            self._move(actions, list(optimizers))
            self._before = {site: held(scale).clone() for site, scale in self._in_16_bits()}
        return actions, after

    def _reading(self, layer: LayerMeasurement, pair: tuple[_Kind, _Kind], kinds: int, **more: bool) -> Reading:
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

    def _follows(self, kind: _Kind) -> bool:
        """Whether the norm of a kind follows the law."""
        return bool(kind) and self._moves.given_up.isdisjoint(kind)

    @torch.no_grad()
    def _move(self, actions: Iterable[Action], optimizers: Sequence[Optimizer]) -> None:
        """Move the scales, those of all branches of a kind alike, and with them the copies that optimizers keep."""
        moved: dict[str, tuple[nn.Parameter, float]] = {}
        for action in actions:
            for kind, change in zip(self._pairs[action.block], (action.mlp, action.attention), strict=True):
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

    def _in_16_bits(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the scales that an optimizer may train in 16 bits."""
        for kind in itertools.chain.from_iterable(self._pairs):
            for site, module in kind.items():
                scale = _parameter(module)
                if scale.requires_grad and scale.element_size() == 2:
                    yield site, scale

    def notices(self, optimizers: Sequence[Optimizer]) -> list[str]:
        """Return what to tell of the steps since the last action. Call it before :meth:`act`."""
        found = (self._check_rounding(optimizers), self._moves.notice(optimizers))
        return [notice for notice in found if notice is not None]

    def _check_rounding(self, optimizers: Iterable[Optimizer]) -> str | None:
        """Find out once whether rounding swallows the steps of scales of 16 bits."""
        if self.scales is None or self._told_rounding or not self._before:
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
        """Say in a checkpoint that its model has residual scales, and which values they have."""
        sites = [] if self.scales is None else [site for site, _ in self.scales.named_parameters()]
        if sites:
            checkpoint[MARKER] = marked(sites, checkpoint.get("state_dict", {}))


def _together(one: float, other: float) -> float:
    """Return the change of a scale that is of both kinds: lowered for both, it is lowered once, by the larger."""
    return min(one, other) if one < 0 and other < 0 else one + other


def _trained(model: nn.Module, blocks: Sequence[ResidualBlock]) -> list[Branch]:
    """Return the branches of the blocks that passed their self-check, without frozen ones."""
    trusted = trusted_branches(blocks)
    trained = [branch for branch in trusted if not is_frozen(model, branch)]
    if trusted and not trained:
        warnings.warn(
            "auto_rescale steers nothing: every branch is frozen. Pass blocks=find_blocks(model) to steer frozen "
            "branches",
            stacklevel=2,
        )
    return trained


def _untrained(model: nn.Module, blocks: Sequence[ResidualBlock], optimizers: Iterable[Optimizer]) -> set[str]:
    """Return the sites of whole blocks that no optimizer trains, where there are others: teachers, averages."""
    trained = {id(item) for optimizer in optimizers for group in optimizer.param_groups for item in group["params"]}
    groups = [[(branch.site, parameters_of(model, branch)) for branch in block.branches] for block in blocks]
    idle = [group for group in groups if not any(id(item) in trained for _, items in group for item in items)]
    return set() if len(idle) == len(groups) else {site for group in idle for site, _ in group}


def _scales_in(model: nn.Module) -> list[ResidualScale]:
    return [module for module in model.modules() if isinstance(module, ResidualScale)]


def _parameter(module: ResidualScale) -> nn.Parameter:
    """Return the ``log_scale`` of a module, at a tenth of what reading the attribute takes."""
    parameter = module._parameters["log_scale"]
    assert parameter is not None
    return parameter


def _count(model: nn.Module) -> int:
    return len(_scales_in(model))


def _take_in(
    left_alone: tuple[Branch, ...],
    dry_run: bool,
    module: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    *rest: Any,
) -> None:
    """Load pre-hook of a model. At the top level of a module, and with plain values only: copies may be pickled."""
    if not dry_run:
        sites = saved_sites({"state_dict": {key.removeprefix(prefix): value for key, value in state_dict.items()}})
        attach_to(module, (), [branch for branch in left_alone if branch.site in sites], learnable=False)
    refuse_lost_scales(module, state_dict, prefix, *rest)
