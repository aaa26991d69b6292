"""Runs made up for the report, written as a monitor writes them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_spectral.alarms import Event
from lightning_spectral.records import Forecast, LayerMeasurement, Measurement
from lightning_spectral.runs.journal import Journal

STEPS = (0, 10, 20, 30, 40, 60, 80)  # not evenly spaced
HOSTILE = (
    "<script>window.harmed = 1</script>",
    "</script><script>window.harmed = 2</script>",
    "<img src=x onerror='window.harmed = 3'>",
    "{{ 7 * 7 }}{% raw %}@name{safe}$x",
    "=HYPERLINK('http://example.com')",
    "../../../etc/passwd\x00\x1b[2J\u202e\u2028\n\"'`&",
    "n" * 10_000,
)


def ratio(block: int, column: int) -> float:
    """Return the ratio of a block: 1 at first, then out of the zone, upwards for the last blocks."""
    return math.exp((block - 2) * column / 6)


def layer(block: int, column: int, name: str, *, tokens: bool) -> LayerMeasurement:
    if block == 1 and column == 3:  # a gap
        return LayerMeasurement(block, name, None, 1.5, mlp_reason="the weights are not finite")
    seen: dict[str, Any] = {}
    if tokens and column % 3:
        residual = 0.5 * math.exp(-column - block / 10)
        seen = {"token_residual": residual, "typical_token_residual": residual, "effective_rank": 9.0 - block}
    scale = math.exp(-0.05 * column)
    return LayerMeasurement(block, name, 1.5 * ratio(block, column), 1.5, scale, 1 / scale, error_bound=1e-3, **seen)


def measurements(
    names: tuple[str, ...], steps: tuple[int, ...] = STEPS, linearization: Any = "circuit", *, tokens: bool = True
) -> list[Measurement]:
    return [
        Measurement(step, linearization, tuple(layer(b, c, name, tokens=tokens) for b, name in enumerate(names)))
        for c, step in enumerate(steps)
    ]


def action(step: int, block: int, kind: str = "rescale") -> dict[str, Any]:
    change = 0.05 if kind == "rescale" else 0.0
    reason = "above the zone" if kind == "rescale" else "a bound holds it"
    entry = {"step": step, "action": kind, "block": block, "name": f"blocks.{block}", "ratio": 2.5}
    changes = {"mlp_log_change": -change, "attention_log_change": change}
    return entry | {"smoothed_ratio": 2.4, "mlp_scale": 1.0, "attention_scale": 1.0, "reason": reason} | changes


def steered_run(path: Path, names: tuple[str, ...] = tuple(f"model.blocks.{index}" for index in range(5))) -> Path:
    """Write a run with everything in it: gaps, tokens, scales, events of every level, actions."""
    header: dict[str, Any] = {"linearization": "circuit", "safe_zone": [0.5, 2.0], "every_n_steps": 10}
    header["rescaler"] = {"gain": 0.3, "dry_run": False}
    header["blocks"] = [
        {"index": index, "name": name, "attention": f"{name}.attn", "mlp": None, "verified": True}
        for index, name in enumerate(names)
    ]
    journal = Journal(path, header)
    for item in measurements(names):
        said: list[dict[str, Any]] = []
        if item.step == 20:
            said.append(asdict(Event("note", 20, 20, (4,), f"block 4 ({names[4]}) is above the zone at 1.9")))
        if item.step == 40:
            said.append(asdict(Event("warning", 40, 20, (4,), "block 4 drifts away")))
            said += [action(40, 4), action(40, 3, "hold")]
        if item.step == 60:
            coming = Forecast(100.0, 90.0, math.inf)
            said.append(asdict(Event("failure", 60, 20, (0,), "tokens become one vector", coming)))
            said += [action(60, 4), action(60, 3)]
        journal.append(item, said)
    return path


def watched_run(path: Path, steps: tuple[int, ...] = STEPS, linearization: str = "circuit") -> Path:
    """Write a run that was only watched, without tokens."""
    journal = Journal(path, {"linearization": linearization, "rescaler": None})
    for item in measurements(("a", "b", "c"), steps, linearization, tokens=False):
        layers = tuple(LayerMeasurement(one.index, one.name, one.mlp_norm, one.attention_norm) for one in item)
        journal.append(Measurement(item.step, item.linearization, layers))
    return path


def append_measurement(path: Path) -> None:
    """Let a run go on for one measurement, 10 steps behind its last one."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if "layers" in line][-1]
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(last | {"step": last["step"] + 10}) + "\n")
