"""What is seen of the training batch of a measured step: token geometry, and how the branches' updates compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lightning_spectral.errors import ExampleInputError
from lightning_spectral.measuring.block_outputs import BlockOutputs, with_geometry
from lightning_spectral.measuring.jacobians import watch_updates
from lightning_spectral.measuring.updates import UpdateWatch
from lightning_spectral.passes.chosen import Passes
from lightning_spectral.records import FunctionalMeasurement, Measurement, ResidualBlock
from lightning_spectral.watch.first_forward import Call
from lightning_spectral.weights.paths import compiled_modules, is_compiled

__all__ = ["BatchWatch", "unheard"]


class BatchWatch:
    """Listens to the forward passes between :meth:`start` and :meth:`stop`; of several, the last that trained counts.

    Args:
        model: The model that the blocks were found in.
        blocks: The blocks. What is compiled is not listened to.
        calls: The calls of modules of the model that show the blocks; a call of the model is guessed where there are
            none. They are traced once, to see which constants follow the branches.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[ResidualBlock], calls: Sequence[Call] = ()) -> None:
        self._model, self._indices = model, [block.index for block in blocks]
        self._outputs = BlockOutputs(model, blocks)
        self._updates = _update_watch(model, blocks, calls)
        self._listens = False

    @property
    def complete(self) -> bool:
        """Whether every block has been seen in a pass that trained."""
        return all(map(self._outputs.passes.trained, self._indices))

    @property
    def heard(self) -> bool:
        """Whether any block has run in a pass that counts."""
        return bool(self._outputs.passes.numbers) or self._outputs.error is not None

    def start(self) -> None:
        """Begin to listen, unless it does already (gradient accumulation)."""
        if self._listens:
            return
        self._listens, compiled = True, compiled_modules(self._model)
        self._outputs.start(Passes(training=True), leave_out=compiled.__contains__)
        if self._updates is not None:
            self._updates.start(Passes(training=True), leave_out=compiled.__contains__)

    def stop(self) -> None:
        """Leave the model as it was."""
        self._listens = False
        self._outputs.stop()
        if self._updates is not None:
            self._updates.stop()

    def add_to(self, measurement: Measurement) -> Measurement:
        """Stop, and add what was heard to the layers of a measurement.

        Raises:
            Exception: What went wrong while listening.
        """
        self.stop()
        measurement = with_geometry(measurement, self._outputs.values())
        if self._updates is None:
            return measurement
        if self._updates.error is not None:
            raise self._updates.error
        known = {
            index: FunctionalMeasurement(update_ratio=update.ratio, update_cosine=update.cosine)
            for index, update in self._updates.updates.items()
        }
        layers = (replace(layer, functional=known.get(layer.index)) for layer in measurement)
        return replace(measurement, layers=tuple(layers))


def _update_watch(model: nn.Module, blocks: Sequence[ResidualBlock], calls: Sequence[Call]) -> UpdateWatch | None:
    """Return what listens to the branches; ``None`` where the blocks were given, and no input is known."""
    try:
        if not calls:
            return watch_updates(model, blocks, (), {})
        watches = [watch_updates(model, blocks, call.args, call.kwargs, through=call.module) for call in calls]
    except ExampleInputError:
        return None
    return UpdateWatch(model, blocks, {branch: c for watch in watches for branch, c in watch.behind.items()})


def unheard(model: nn.Module, blocks: Sequence[ResidualBlock]) -> str | None:
    """Say what is not measured of the tokens because it is compiled, ``None`` where nothing is."""
    whole = [block.name for block in blocks if any(is_compiled(model, name) for name in block.modules)]
    sites = [branch.site for block in blocks for branch in block.branches if is_compiled(model, branch.site)]
    if not whole and not sites:
        return None
    what, name = ("token geometry", whole[0]) if whole else ("update ratio", sites[0])
    part = "" if len(whole) in (0, len(blocks)) else f" of {len(whole)} of {len(blocks)} blocks"
    return f"no {what}{part}, because {name or 'the model'} is compiled"
