"""The series of measurements of one run: when the next one is due, what is logged, what a checkpoint keeps."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_spectral.alarms import Memory, observe
from lightning_spectral.alarms.rules import FAILURES
from lightning_spectral.records import Event, Forecast, LayerMeasurement, Linearization, Measurement

__all__ = ["HEALTH", "Series", "logged_values"]

HEALTH = ("alarm", "drifting", "unmeasured", "seconds")
"""Names of the values about the run and its measuring. Their keys form a group of their own."""


@dataclass
class Series:
    """The memory of a watched run, without the Trainer. All of it is plain values and tensors.

    A measurement changes the series only after the run has acted on the measurement. A state that is saved between the
    two is the state before the measurement, and a run that resumes from it measures again from the same warm start.

    Attributes:
        linearization: The linearization of every measurement in the series.
        run: Name of the run that the series belongs to, the same in the header of its file.
        scheduled_step: Optimizer step of the last measurement that the schedule asked for, whether or not it succeeded.
            The measurement at the end of fit does not count, so that a run that is continued keeps its schedule.
        measured_step: Optimizer step of the last measurement of any kind.
        counts_batches: Whether batches count as steps, because the run takes steps that the Trainer does not count.
        batches: Index on the loggers' axis of the last measurement. Index k belongs to the weights after k stepping
            batches; the loss that is logged at k was computed with the same weights.
        values: The values that were logged last, by key.
        blocks: The measured blocks as plain values, for an audit of the checkpoint.
        warm_start: State of the meter.
        law: State of the control law, one entry per block; empty in a run without a law.
        memory: Memory of the rules.
        first_weights: Fingerprint of the weights at the first measurement, by parameter.
        unanswered: Failures that the run has not acted on yet, as plain values.
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
    first_weights: dict[str, tuple[bool, int]] = field(default_factory=dict)
    unanswered: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, linearization: Linearization) -> Series:
        """Begin the series of a new run, under a new name."""
        return cls(linearization, run=uuid.uuid4().hex)  # from the system: no random stream is touched

    def reaches(self, step: int) -> bool:
        """Whether the series can be continued at an optimizer step: it has a measurement, and none of a later step."""
        return self.measured_step is not None and self.measured_step <= step

    def due(self, step: int, every_n_steps: int) -> bool:
        """Whether the schedule asks for a measurement: at first, then every ``every_n_steps`` steps or more."""
        return self.scheduled_step is None or step - self.scheduled_step >= every_n_steps

    def observe(self, measurement: Measurement) -> tuple[Event, ...]:
        """Add a measurement and return its events."""
        self.measured_step = measurement.step
        events, self.memory = observe(self.memory, measurement)
        self.unanswered += [asdict(event) for event in events if event.level == "failure"]
        return events

    def take_failures(self) -> list[Event]:
        """Return the failures that the run has not acted on yet, and forget them."""
        failures, self.unanswered = self.unanswered, []
        return [_event(values) for values in failures]

    def state_dict(self) -> dict[str, Any]:
        """Return copies of plain values and tensors."""
        return {"version": 1, **asdict(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore an earlier state.

        Unknown keys are ignored, and missing keys keep their value. Fingerprints of shards are left out: the state is
        that of one process, and another one holds other shards. A state of another linearization is ignored as a
        whole, because numbers of two linearizations do not belong into one series.
        """
        if state.get("linearization", self.linearization) != self.linearization:
            return
        for known in fields(self):
            if known.name in state:
                value = copy.deepcopy(state[known.name])
                setattr(self, known.name, _READ[known.name](value) if known.name in _READ else value)
        self.first_weights = {name: (whole, total) for name, (whole, total) in self.first_weights.items() if whole}


def _event(values: Mapping[str, Any]) -> Event:
    coming = values["forecast"]
    forecast = None if coming is None else Forecast(**coming)
    tuples = {name: tuple(values[name]) for name in ("blocks", "advice") if name in values}
    return Event(**{**values, **tuples, "forecast": forecast})


def logged_values(
    measurement: Measurement, memory: Memory, prefix: str, *, per_layer: bool, rescaled: int | None = None
) -> dict[str, float]:
    """Return the values to log for a measurement, by key. A value that does not exist has no key.

    Args:
        measurement: The measurement.
        memory: Memory of the rules, this measurement included.
        prefix: First part of every key.
        per_layer: Whether to add the values of every block.
        rescaled: Number of blocks that were steered after this measurement; ``None`` in a run without steering.

    Returns:
        The summary values, such as ``{prefix}/ratio_min``, and those of :data:`HEALTH`, such as
        ``{prefix}_health/alarm``. With ``per_layer`` also the values of each block, such as
        ``{prefix}_blocks/ratio/07``, with an index that is padded so that keys sort like blocks. In a steered run also
        the smallest and the largest residual scale at the time of the measurement, and with ``per_layer`` every scale.
        Loggers fold keys by what stands in front of the first ``/``: the summary, the health, the blocks.
    """
    summary = measurement.summary() | {"drifting": float(len(memory.drifting)), "alarm": float(memory.is_on(*FAILURES))}
    if rescaled is not None:
        scales = [scale for layer in measurement for scale in (layer.mlp_scale, layer.attention_scale)]
        summary |= {"scale_min": min(scales), "scale_max": max(scales), "rescaled": float(rescaled)}
    values = {f"{prefix}_health/{name}" if name in HEALTH else f"{prefix}/{name}": summary[name] for name in summary}
    if per_layer:
        width = max(2, len(str(max((layer.index for layer in measurement), default=0))))
        for layer in measurement:
            numbers = _numbers(layer, steered=rescaled is not None)
            values |= {f"{prefix}_blocks/{name}/{layer.index:0{width}d}": value for name, value in numbers}
    return values


def _renamed(values: Mapping[str, float]) -> dict[str, float]:
    """Return logged values by the keys of this release. In earlier ones all keys had the group ``{prefix}``."""
    renamed = {}
    for key, value in values.items():
        group, _, name = key.partition("/")
        if "/" in name and not group.endswith("_blocks"):
            group = f"{group}_blocks"
        elif name in HEALTH and not group.endswith("_health"):
            group = f"{group}_health"
        if name != "worst_layer":  # an index, which is not logged any more
            renamed[f"{group}/{name}"] = value
    return renamed


_READ: Mapping[str, Callable[[Any], Any]] = {"memory": Memory.from_dict, "values": _renamed}


def _numbers(layer: LayerMeasurement, *, steered: bool) -> list[tuple[str, float]]:
    numbers = [("ratio", layer.ratio), ("mlp_norm", layer.mlp_norm), ("attention_norm", layer.attention_norm)]
    numbers += [("token_residual", layer.token_residual), ("effective_rank", layer.effective_rank)]
    numbers += [("update_ratio", None if layer.functional is None else layer.functional.update_ratio)]
    if layer.weights is not None:
        numbers += [(name, value) for name, value in asdict(layer.weights).items() if not name.endswith("_moved")]
    if steered:
        numbers += [("mlp_scale", layer.mlp_scale), ("attention_scale", layer.attention_scale)]
    return [(name, value) for name, value in numbers if value is not None]
