"""Where the series of measurements of one run stands: when the next is due, what is logged, what a checkpoint keeps."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_spectral.alarms import Memory, observe
from lightning_spectral.records import Event, Forecast, LayerMeasurement, Linearization, Measurement

__all__ = ["Series", "logged_values"]


@dataclass
class Series:
    """The memory of a watched run, without the Trainer. All of it is plain values and tensors.

    A measurement changes it only when it is acted on. So a state that is saved between the two is one before the
    measurement, and a run that goes on from there takes it anew, from the same warm start.

    Attributes:
        linearization: The linearization of every measurement in the series.
        run: Name of the run that the series belongs to, the same in the header of its file.
        scheduled_step: Optimizer step of the last measurement that the schedule asked for, whether or not it succeeded.
            The one at the end of fit is not in it, so that a run that goes on later keeps its schedule.
        measured_step: Optimizer step of the last measurement of any kind.
        counts_batches: Whether the run takes steps that the Trainer does not count, so that batches count as steps.
        batches: Index at which the last measurement was logged: the loggers' axis. Index k holds what belongs to the
            weights after k stepping batches, which are the weights that the loss logged at k was computed with.
        values: What was logged last.
        blocks: The blocks that are measured, as plain values: an audit of the checkpoint knows them by this.
        warm_start: State of the meter.
        law: State of the control law, one entry per block; empty without one.
        memory: What the alarms remember.
        unanswered: Alarms that were told and not acted on yet, as plain values.
    """

    linearization: Linearization
    run: str = ""
    scheduled_step: int | None = None
    measured_step: int | None = None
    counts_batches: bool = False
    batches: int = 0
    values: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)
    warm_start: dict[str, Any] = field(default_factory=dict)
    law: list[dict[str, Any]] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    unanswered: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, linearization: Linearization) -> Series:
        """Begin the series of a new run, under a new name."""
        return cls(linearization, run=uuid.uuid4().hex)  # of the operating system's randomness: no stream is drawn from

    def reaches(self, step: int) -> bool:
        """Tell whether the series can go on from an optimizer step: it has begun, and not later than there."""
        return self.measured_step is not None and self.measured_step <= step

    def due(self, step: int, every_n_steps: int) -> bool:
        """Tell whether the schedule asks for a measurement: first at once, then whenever enough steps have passed."""
        return self.scheduled_step is None or step - self.scheduled_step >= every_n_steps

    def observe(self, measurement: Measurement) -> tuple[Event, ...]:
        """Note a measurement and return what is new in it."""
        self.measured_step = measurement.step
        events, self.memory = observe(self.memory, measurement)
        self.unanswered += [asdict(event) for event in events if event.level == "alarm"]
        return events

    def take_alarms(self) -> list[Event]:
        """Return the alarms that were not acted on yet, once."""
        alarms, self.unanswered = self.unanswered, []
        return [_event(values) for values in alarms]

    def state_dict(self) -> dict[str, Any]:
        """Return copies of plain values and tensors."""
        return {"version": 1, **asdict(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up an earlier state.

        Unknown keys are ignored and missing ones keep their value. The state of another linearization is ignored as a
        whole, because the numbers of two linearizations do not belong into one series.
        """
        if state.get("linearization", self.linearization) != self.linearization:
            return
        for known in fields(self):
            if known.name in state:
                value = copy.deepcopy(state[known.name])
                setattr(self, known.name, Memory.from_dict(value) if known.name == "memory" else value)


def _event(values: Mapping[str, Any]) -> Event:
    coming = values["forecast"]
    forecast = None if coming is None else Forecast(**coming)
    return Event(**{**values, "blocks": tuple(values["blocks"]), "forecast": forecast})


def logged_values(
    measurement: Measurement, memory: Memory, prefix: str, *, per_layer: bool, rescaled: int | None = None
) -> dict[str, float]:
    """Return what is logged of a measurement, by key; what does not exist is absent.

    Args:
        measurement: What was measured.
        memory: What is remembered of the run, this measurement included.
        prefix: First part of every key.
        per_layer: Whether to add the ratio and both norms of every block.
        rescaled: How many blocks were steered after this measurement; ``None`` in a run that is only watched.

    Returns:
        ``{prefix}/ratio_min`` and the other summary values and, if asked for, ``{prefix}/ratio/07`` and the like. The
        index is padded with zeros so that keys sort like blocks. In a steered run also the smallest and the largest
        residual scale, as they were when the ratio was measured with them, and those of every block.
    """
    values = {f"{prefix}/{name}": value for name, value in measurement.summary().items()}
    values |= {f"{prefix}/drifting": float(len(memory.drifting)), f"{prefix}/alarm": float(memory.told == "alarm")}
    if rescaled is not None:
        scales = [scale for layer in measurement for scale in (layer.mlp_scale, layer.attention_scale)]
        values |= {f"{prefix}/scale_min": min(scales), f"{prefix}/scale_max": max(scales)}
        values[f"{prefix}/rescaled"] = float(rescaled)
    if per_layer:
        width = max(2, len(str(max((layer.index for layer in measurement), default=0))))
        for layer in measurement:
            numbers = _numbers(layer, steered=rescaled is not None)
            values |= {f"{prefix}/{name}/{layer.index:0{width}d}": value for name, value in numbers}
    return values


def _numbers(layer: LayerMeasurement, *, steered: bool) -> list[tuple[str, float]]:
    numbers = [("ratio", layer.ratio), ("mlp_norm", layer.mlp_norm), ("attention_norm", layer.attention_norm)]
    numbers += [("token_residual", layer.token_residual), ("effective_rank", layer.effective_rank)]
    numbers += [("update_ratio", None if layer.functional is None else layer.functional.update_ratio)]
    if steered:
        numbers += [("mlp_scale", layer.mlp_scale), ("attention_scale", layer.attention_scale)]
    return [(name, value) for name, value in numbers if value is not None]
