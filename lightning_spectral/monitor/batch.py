"""What is measured on the training batch of a measured step: token geometry, and how the branches' updates compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_spectral.block_outputs import BlockOutputs, with_geometry
from lightning_spectral.discovery.updates import UpdateWatch
from lightning_spectral.errors import ExampleInputError
from lightning_spectral.functional import watch_updates
from lightning_spectral.records import FunctionalMeasurement, Measurement, ResidualBlock

__all__ = ["BatchWatch"]


class BatchWatch:
    """Listens to the forward passes between :meth:`start` and :meth:`stop`; at other times the model has no hook of it.

    Args:
        model: The model that the blocks were found in.
        blocks: The blocks.
        args: Positional arguments of one forward pass, guessed where there are no arguments. It is traced once, to see
            which constants follow the branches.
        kwargs: Its keyword arguments.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[ResidualBlock], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._outputs = BlockOutputs(model, blocks)
        self._updates: UpdateWatch | None = None
        try:
            self._updates = watch_updates(model, blocks, args, kwargs)
        except ExampleInputError:  # the blocks were given: no input is needed for anything else
            self._updates = None
        self._listening: ExitStack | None = None
        self._heard = False  # a pass that no measurement has been given yet

    def start(self) -> None:
        """Begin to listen, unless it does already (gradient accumulation): the last pass counts."""
        if self._listening is None:
            self._listening, self._heard = ExitStack(), True
            self._listening.callback(self._outputs.stop)
            self._outputs.start()
            if self._updates is not None:
                self._listening.enter_context(self._updates)

    def stop(self) -> None:
        """Leave the model as it was."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def add_to(self, measurement: Measurement) -> Measurement:
        """Add what was heard to the layers of a measurement, once.

        Raises:
            Exception: What went wrong while listening.
        """
        if not self._heard:
            return measurement
        self._heard = False
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
