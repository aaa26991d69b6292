"""A model whose residual scales a law moves: attach the scales, sort them by block and kind, save them, fold them away.

    block 3 ── mlp        ── site "h.3.mlp"      ── scale ┐ one kind: all its scales move by one factor
            │             └─ site "h.3.moe"      ── scale ┘
            └─ attention  ── site "h.3.attn"     ── scale

A law decides by block and by kind (MLP or attention), and the norm of a kind is the norm of the sum of its branches. So
a kind can be steered only if every one of its branches has a scale that the law may move.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_spectral.control.band import ResidualRescaler
from lightning_spectral.control.law import Law
from lightning_spectral.control.optimizers import in_groups
from lightning_spectral.discovery import find_blocks
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import Branch, ResidualBlock
from lightning_spectral.scales.attach import (
    ResidualScale,
    ResidualScales,
    attach_to,
    attach_where_possible,
    trusted_branches,
)
from lightning_spectral.scales.carriers import is_frozen, parameters_of
from lightning_spectral.scales.fuse import fuse_scales
from lightning_spectral.scales.loading import MARKER, marked, refuse_lost_scales, saved_sites
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.scaled import scale_module, with_scales

__all__ = ["SteeredModel", "scales_in"]

Kind = dict[str, ResidualScale]
"""The scales of one kind of one block, by site. Empty if the law does not move this kind."""


class SteeredModel:
    """The residual scales of a model, from before a run until its end.

    Args:
        rescaler: The law that will move the scales.

    Attributes:
        rescaler: The law.
        scales: The scales; ``None`` before :meth:`attach` or :meth:`adopt`.
        kinds: The scales of the MLP and of the attention, one pair per block.
    """

    def __init__(self, rescaler: Law) -> None:
        self.rescaler = rescaler
        self.scales: ResidualScales | None = None
        self.kinds: list[tuple[Kind, Kind]] = []
        self._attached = 0  # scales that the model did not have before the run
        self._left_alone: list[Branch] = []  # found in the model, and not given a scale
        self._found = False  # whether the blocks were found, and not passed
        self._unsteered: set[str] = set()  # sites whose scales the law does not move

    @property
    def blocks(self) -> tuple[ResidualBlock, ...] | None:
        """The blocks that have scales, ``None`` before any scale was attached."""
        return None if self.scales is None else self.scales.blocks

    @property
    def has_attached(self) -> bool:
        """Whether the model has scales that it did not have before the run."""
        return self._attached > 0

    def is_of(self, model: nn.Module) -> bool:
        """Whether the scales belong to a model, or to none yet."""
        return self.scales is None or self.scales.model is model

    def call(self, model: str) -> str:
        """Return the call that attaches the scales that the law asks for to a model of this name."""
        return f"attach_scales({model})" if self.rescaler.learnable else f"attach_scales({model}, learnable=False)"

    def set_up(self) -> None:
        """Begin a run: scales that the model has by now count as its own."""
        self._attached = 0

    def attach(
        self,
        model: nn.Module,
        blocks: Sequence[ResidualBlock] | None,
        others: Iterable[object] = (),
        *,
        batch: Any = None,
    ) -> None:
        """Attach scales to a model that has none yet. A dry run attaches nothing.

        Args:
            model: The model.
            blocks: Its blocks, all of whose branches get scales; found in the model by default. Of found blocks, the
                frozen branches and the branches of blocks whose self-check failed get no scale.
            others: Objects that may hold copies of the model, such as callbacks.
            batch: Example input for finding the blocks.

        Raises:
            ConfigurationError, BlocksNotFoundError, ExampleInputError: As
                :func:`~lightning_spectral.scales.attach.attach_scales` does.
        """
        if self.scales is not None and self.scales.model is model:
            return
        before, passed = len(scales_in(model)), blocks is not None
        blocks = find_blocks(model, batch=batch) if blocks is None else blocks
        steered = [item for block in blocks for item in block.branches] if passed else _trained(model, blocks)
        known = set(steered)
        self._found = not passed
        self._left_alone = [branch for block in blocks for branch in block.branches if branch not in known]
        self._unsteered = {branch.site for branch in self._left_alone}
        if not self.rescaler.dry_run:
            attach = attach_to if passed else attach_where_possible
            attach(model, blocks, steered, learnable=self.rescaler.learnable, others=others)
        self._attached += len(scales_in(model)) - before
        self._take(ResidualScales(model, with_scales(ModelWeights(model), blocks)))

    def adopt(self, model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
        """Take over the scales that the user attached to a model that was built late.

        Raises:
            ConfigurationError: The model has no scales.
        """
        scales = ResidualScales(model, with_scales(ModelWeights(model), blocks))
        if not len(scales) and not self.rescaler.dry_run:
            raise ConfigurationError(
                f"{type(model).__name__} is built or parallelized in configure_model, after callbacks could attach "
                f"anything to it: call lightning_spectral.{self.call('self')} there, before fully_shard"
            )
        self._take(scales)

    def leave_untrained_alone(self, optimizers: Sequence[Optimizer]) -> None:
        """Sort the scales again, now that optimizers show which of the found blocks are trained."""
        if self.scales is None:
            return
        model, blocks = self.scales.model, self.scales.blocks
        if self._found:
            self._unsteered = {branch.site for branch in self._left_alone} | _untrained(model, blocks, optimizers)
        self._take(ResidualScales(model, with_scales(ModelWeights(model), blocks)))

    def _take(self, scales: ResidualScales) -> None:
        self.scales = scales
        self.kinds = [
            (self._steered(block.mlp_branches), self._steered(block.attention_branches)) for block in scales.blocks
        ]

    def _steered(self, branches: Sequence[Branch]) -> Kind:
        """Return the scales of a kind; none if one branch is left alone: the norm of the sum would not follow."""
        assert self.scales is not None
        found = {branch.site: scale_module(self.scales.model, branch) for branch in branches}
        if self.rescaler.dry_run:  # as if every branch had a scale
            found = {site: module or ResidualScale() for site, module in found.items()}
        whole = {site: module for site, module in found.items() if isinstance(module, ResidualScale)}
        return whole if len(whole) == len(found) and self._unsteered.isdisjoint(whole) else {}

    def held_still(self) -> str | None:
        """Say which blocks the law will not move because one of their kinds is left alone; ``None`` for none."""
        still = [
            block.name
            for block, (mlp, attention) in zip(self.blocks or (), self.kinds, strict=True)
            if block.mlp and block.attention and bool(mlp) is not bool(attention)
        ]
        both = isinstance(self.rescaler, ResidualRescaler) and self.rescaler.mode == "both"
        if not still or not both or self.rescaler.dry_run:
            return None
        return (
            f"residual scales: {len(still)} block(s) are held still, because one of their two kinds of branches is "
            f"frozen or cannot carry a scale (the first is {still[0]}). ResidualRescaler(mode=...) moves one kind alone"
        )

    # The scales at the end of a run, and in its checkpoints

    def check_foldable(self) -> None:
        """Check that :meth:`fold` will be able to fold every scale, at any value.

        Raises:
            ConfigurationError: No weight can take up one of the scales.
        """
        scales = [] if self.scales is None else scales_in(self.scales.model)
        lost = [scale for scale in scales if not scale.on_weight and not scale.ends]
        if lost and self._attached:
            raise ConfigurationError(
                f"{len(lost)} residual scale(s) would be lost: the processes of this strategy send back only weights "
                "that your module has already, and these scales cannot be folded into weights "
                f"({lost[0].reason}). Call {self.call('module')} before trainer.fit(module)"
            )

    def fold(self) -> int:
        """Fold the scales into the weights if the model had none before; return how many were folded."""
        if self.scales is None or not self._attached:
            return 0
        count = len(scales_in(self.scales.model))
        fuse_scales(self.scales.model)
        return count

    def listen(self, model: nn.Module) -> RemovableHandle:
        """Hook a model until it has loaded its checkpoint, so that no scale of the checkpoint is lost.

        A branch that this run leaves alone may have a scale in the checkpoint. The hook attaches a scale for it, which
        the law does not move.
        """
        hook = partial(_take_in, tuple(self._left_alone), self.rescaler.dry_run)
        handle: RemovableHandle = model.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
        return handle

    def mark(self, checkpoint: dict[str, Any]) -> None:
        """Write into a checkpoint that its model has residual scales, and which values they have."""
        sites = [] if self.scales is None else [site for site, _ in self.scales.named_parameters()]
        if sites:
            checkpoint[MARKER] = marked(sites, checkpoint.get("state_dict", {}))


def scales_in(model: nn.Module) -> list[ResidualScale]:
    """Return every residual scale of a model, copies and scales outside of blocks included."""
    return [module for module in model.modules() if isinstance(module, ResidualScale)]


def _trained(model: nn.Module, blocks: Sequence[ResidualBlock]) -> list[Branch]:
    """Return the branches that are not frozen, of the blocks that passed their self-check."""
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
    """Return the sites of the blocks that no optimizer trains, such as a teacher's or an average's.

    If no block is trained, the result is empty: the optimizers then hold other tensors than the model, such as
    flattened ones.
    """
    trained = in_groups(optimizers)
    groups = [[(branch.site, parameters_of(model, branch)) for branch in block.branches] for block in blocks]
    idle = [group for group in groups if not any(id(item) in trained for _, items in group for item in items)]
    return set() if len(idle) == len(groups) else {site for group in idle for site, _ in group}


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
