"""The processes of a run: each measures a share of the blocks, all of them know the same afterwards.

Whatever is decided, by the law, by a rule or by an error, is decided from numbers that every process has from the
same collective, bit by bit. Which collectives run, and in which order, depends on the optimizer step and on such
numbers only, never on what one process alone has seen: that is what keeps a run from hanging.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import distributed, nn

from lightning_spectral.linalg.norms.solution import OUT_OF_RANGE
from lightning_spectral.measuring.meter import EMPTY_NORM
from lightning_spectral.records import (
    FunctionalMeasurement,
    LayerMeasurement,
    Measurement,
    OutputMeasurement,
    WeightSignals,
)
from lightning_spectral.records.measurements import NOT_FINITE, OutputKind

__all__ = ["Peers"]

# What only the process that measured a branch can know, as a number.
_REASONS = (None, NOT_FINITE, OUT_OF_RANGE, EMPTY_NORM)
_SIGNALS = ("mlp_change", "attention_change", "mlp_stable_rank", "attention_stable_rank", "alignment", "logit_bound")
_OWN = 6 + len(_SIGNALS)  # numbers per block of the one process that measured it
_LARGEST = 4  # numbers per block of every process, whose largest counts
_KINDS: tuple[OutputKind, ...] = get_args(OutputKind)
_OUTPUT = 6  # numbers of the output of the model


class Peers:
    """The processes of one run, seen from one of them.

    Args:
        rank: Number of this process.
        count: How many there are.
        model: Its device is where collectives run.
    """

    def __init__(self, rank: int, count: int, model: nn.Module) -> None:
        self.rank, self.count = rank, count
        self._device = next((item.device for item in model.parameters()), torch.device("cpu"))

    def agree(self, fine: bool) -> bool:
        """Whether all is fine in every process."""
        if self.count == 1:
            return fine
        doubts = torch.tensor(int(not fine), device=self._device)
        distributed.all_reduce(doubts)
        return not int(doubts)

    def same(self, text: str) -> str:
        """Return the text of the first process, in all of them."""
        texts = [text]
        if self.count > 1:
            distributed.broadcast_object_list(texts, device=self._device)
        return texts[0]

    def combined(self, measurement: Measurement) -> tuple[Measurement, bool]:
        """Return the measurement of all processes, and whether the residual scales are the same in all of them.

        Norms come from the process that measured the block (:meth:`Meter.measure` says which does). What belongs to the
        batch of a process is averaged over the processes: the token residuals and ranks, the logarithm of the update
        ratio, its cosine. Of attention logits and of the size of the stream, the largest counts. A branch has moved if
        it has in one process: each may hold another part of it.

        Args:
            measurement: What this process has measured.
        """
        if self.count == 1:
            return measurement, True
        width = math.ceil(len(measurement.layers) / self.count)
        own = [number for layer in measurement.layers[self.rank :: self.count] for number in _own(layer)]
        own += [math.nan] * (_OWN * width - len(own))
        means = [number for layer in measurement for number in _averaged(layer)] + _output(measurement.output)
        largest = [number for layer in measurement for number in _largest(layer)]
        scales = [scale for layer in measurement for scale in (layer.mlp_scale, layer.attention_scale)]
        numbers = torch.tensor(
            [measurement.seconds, *own, *means, *largest, *scales], dtype=torch.float64, device=self._device
        )
        parts = [torch.empty_like(numbers) for _ in range(self.count)]
        distributed.all_gather(parts, numbers)
        gathered = torch.stack(parts).cpu()
        lengths = [1, len(own), len(means), len(largest), len(scales)]
        seconds, owned, averaged, greatest, scaled = torch.split(gathered, lengths, dim=1)
        rows = owned.view(self.count, width, _OWN).transpose(0, 1).flatten(0, 1).tolist()  # block r + w·i is row i of r
        mean, output = torch.split(averaged.nanmean(0), [len(means) - _OUTPUT, _OUTPUT])
        greatest = greatest.nan_to_num(-math.inf, math.inf).amax(0)
        peaks = greatest.where(greatest > -math.inf, math.nan).view(-1, _LARGEST).tolist()
        pairs = scaled[0].view(-1, 2).tolist()
        count = len(measurement.layers)
        layers = tuple(map(_layer, measurement, rows, mean.view(count, -1).tolist(), peaks, pairs))
        alike = bool((scaled == scaled[0]).all())
        found = _read_output(*output.tolist())
        return replace(measurement, layers=layers, seconds=float(seconds.max()), output=found), alike


def _own(layer: LayerMeasurement) -> Sequence[float]:
    """Return what only the process that measured a block knows of it."""
    expert = {None: -1.0, "shared": -2.0}.get(layer.mlp_expert)  # type: ignore[arg-type]
    return (
        _number(layer.mlp_norm),
        _number(layer.attention_norm),
        _number(layer.error_bound),
        float(layer.mlp_expert or 0) if expert is None else expert,
        _code(layer.mlp_reason),
        _code(layer.attention_reason),
        *(_number(getattr(layer.weights, name, None)) for name in _SIGNALS),
    )


_MEANS = ("token_residual", "typical_token_residual", "effective_rank", "sample_residual")
_LOG_MEANS = ("update_ratio", "mlp_share", "attention_share")


def _averaged(layer: LayerMeasurement) -> Sequence[float]:
    """Return what every process has of a block, from its own batch, and what is averaged."""
    update = layer.functional or FunctionalMeasurement()
    logs = (getattr(update, name) for name in _LOG_MEANS)
    return (
        *(_number(getattr(layer, name)) for name in _MEANS),
        *(math.nan if value is None or not value else math.log(value) for value in logs),
        _number(update.update_cosine),
    )


def _largest(layer: LayerMeasurement) -> Sequence[float]:
    """Return what every process has of a block, and whose largest counts."""
    update, weights = layer.functional or FunctionalMeasurement(), layer.weights or WeightSignals()
    rms = _number(layer.stream_rms) if layer.stream_finite else math.inf
    return rms, _number(update.attention_logit), _number(weights.mlp_moved), _number(weights.attention_moved)


def _layer(
    layer: LayerMeasurement,
    own: Sequence[float],
    mean: Sequence[float],
    largest: Sequence[float],
    scales: Sequence[float],
) -> LayerMeasurement:
    """Return a layer that is the same in all processes; structural reasons each of them knows by itself."""
    mlp_norm, attention_norm, bound, expert, mlp_code, attention_code, *signals = own
    *logs, cosine = mean[len(_MEANS) :]
    rms, logit, *moved = largest
    update: dict[str, Any] = {name: _value(math.exp(value)) for name, value in zip(_LOG_MEANS, logs, strict=True)}
    tokens: dict[str, Any] = {name: _value(value) for name, value in zip(_MEANS, mean, strict=False)}
    heard = FunctionalMeasurement(**update, update_cosine=_value(cosine), attention_logit=_value(logit))
    return replace(
        layer,
        mlp_norm=_value(mlp_norm),
        attention_norm=_value(attention_norm),
        error_bound=_value(bound),
        mlp_expert={-1: None, -2: "shared"}.get(int(expert), int(expert)),
        mlp_reason=_REASONS[int(mlp_code)] or layer.mlp_reason,
        attention_reason=_REASONS[int(attention_code)] or layer.attention_reason,
        mlp_scale=scales[0],
        attention_scale=scales[1],
        **tokens,
        stream_rms=None if math.isinf(rms) else _value(rms),
        stream_finite=not math.isinf(rms),
        functional=None if heard == FunctionalMeasurement() else heard,
        weights=_signals(signals, moved),
    )


def _output(output: OutputMeasurement | None) -> list[float]:
    if output is None:
        return [math.nan] * _OUTPUT
    residuals = map(_number, (output.sample_residual, output.batch_residual, output.pooled_residual))
    return [*residuals, float(_KINDS.index(output.kind)), float(output.width), float(output.finite)]


def _read_output(
    few: float, batch: float, pooled: float, kind: float, width: float, finite: float
) -> OutputMeasurement | None:
    if math.isnan(kind):
        return None
    return OutputMeasurement(_value(few), _value(batch), _KINDS[int(kind)], int(width), finite == 1.0, _value(pooled))


def _signals(numbers: Sequence[float], moved: Sequence[float]) -> WeightSignals | None:
    mlp, attention = (None if math.isnan(any_moved) else any_moved > 0 for any_moved in moved)
    values = dict(zip(_SIGNALS, map(_value, numbers), strict=True))
    weights = WeightSignals(**values, mlp_moved=mlp, attention_moved=attention)
    return None if weights == WeightSignals() else weights


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _value(number: float) -> float | None:
    return None if math.isnan(number) else number


def _code(reason: str | None) -> float:
    return float(_REASONS.index(reason)) if reason in _REASONS else 0.0
