"""How far what a model returns for a batch is from being the same for every sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_spectral.measuring.readout import Readout, pooled_residual
from lightning_spectral.records import OutputMeasurement
from lightning_spectral.records.measurements import OutputKind
from lightning_spectral.tokens import token_residual

__all__ = ["Outputs"]

_NUMBERS = 4096  # of a longer output of a sample, so many evenly spaced ones are looked at


class Outputs:
    """What a model returns: for a few samples aside, and for the batch in the training step. The last call counts.

    Args:
        widths: The widths of the streams that were heard, as the pass aside fills them.

    Attributes:
        kind: Of the output that was noted last.
    """

    def __init__(self, widths: set[int]) -> None:
        self._widths = widths
        self._spreads: dict[str, Tensor] = {}  # residual over samples, whether all is finite
        self.kind: OutputKind = "sample"
        self._width = 0
        self._few: Tensor | None = None
        self._pooled: Tensor | None = None
        self._gradient: list[Tensor] = []

    def clear(self) -> None:
        """Forget everything."""
        self._spreads, self._few, self._pooled, self._gradient = {}, None, None, []

    @torch.no_grad()
    def _note(self, what: Literal["few", "batch"], result: Any, samples: int | None) -> Tensor | None:
        """Note how far the output is from being the same for all samples, and return the output."""
        if samples is None or samples < 2:
            return None
        leaves = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        output = next((leaf for leaf in leaves if leaf.dim() > 1 and leaf.shape[0] == samples), None)
        if output is None or not output.numel():
            return None
        flat = output.detach().flatten(1)
        with torch.autocast(flat.device.type, enabled=False), _disable_current_modes():
            spread = token_residual(flat[:, :: math.ceil(flat.shape[1] / _NUMBERS)])
            ends = torch.stack([flat.amax(), flat.amin()])  # NaN and infinities are among them
        self._spreads[what] = torch.stack([spread, ends.isfinite().all().to(spread.dtype)])
        self._width = output.shape[-1]
        self.kind = "sample" if output.dim() < 3 else "stream" if self._width in self._widths else "token"
        return output

    def note_few(self, result: Any, samples: int | None, readout: Readout | None, *, sharded: bool) -> None:
        """Note what the pass aside has returned.

        Args:
            result: Of the pass.
            samples: How many it has run.
            readout: What has listened to the last block; ``None`` where nothing has.
            sharded: Whether weights are sharded: then a stream may be too, and is not kept.
        """
        output = self._note("few", result, samples)
        self._few = self._pooled = None
        if output is None:
            return
        if self.kind == "sample" and readout is not None:
            self._pooled = readout.pooled_residual(output)
        elif self.kind == "stream" and output.dim() == 3 and not sharded:
            self._few = output.detach()

    def note_batch(self, result: Any, samples: int | None, few: Sequence[int] | None) -> None:
        """Note what the training step's own pass has returned.

        What a training step reads of a stream, the gradient of its loss says. To hear it changes nothing.

        Args:
            result: Of the pass.
            samples: Samples of the batch.
            few: The places of the few samples; ``None`` for all of them.
        """
        output = self._note("batch", result, samples)
        if output is None or self._few is None or not output.requires_grad:
            return
        whole = few is None or len(self._few) == samples
        gradients: list[Tensor] = []

        def hear(gradient: Tensor) -> None:
            gradients[:] = [gradient.detach().clone() if whole else gradient.detach()[few]]

        output.register_hook(hear)  # type: ignore[no-untyped-call]
        self._gradient = gradients

    def measurement(self) -> OutputMeasurement | None:
        """Return what was noted, ``None`` for nothing. One transfer from the device."""
        if not self._spreads:
            return None
        pooled = self._pooled
        if self._few is not None and self._gradient and self._gradient[0].shape == self._few.shape:
            pooled = pooled_residual(self._few, self._gradient[0], of_one_vector=True)
        nothing = next(iter(self._spreads.values())).new_tensor([math.nan, 1.0])
        numbers = [*(self._spreads.get(what, nothing) for what in ("few", "batch"))]
        numbers.append(nothing[:1] if pooled is None else pooled.reshape(1).to(nothing))
        few, few_finite, batch, batch_finite, read = torch.cat(numbers).tolist()
        finite = bool(few_finite and batch_finite)
        return OutputMeasurement(_known(few), _known(batch), self.kind, self._width, finite, _known(read))


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number
