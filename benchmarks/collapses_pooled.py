"""What the residual of what an output is made of (class tokens, last tokens, means) adds to the rules.

    python benchmarks/collapses.py run --seeds 0 1 2 3 4 5
    python benchmarks/collapses_pooled.py

Reads the journals that `collapses.py` left, and asks the rules of this version twice: with `pooled_residual`, and as if
it had not been measured. Runs whose model has no such number say nothing here and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from collapses import RUNS
from collapses_signals import events_of, verdict_of

from lightning_spectral import History, Measurement
from lightning_spectral.alarms.rules import FAILURES

SPLIT = Path(__file__).parent / "results" / "failures_split.json"


@dataclass(frozen=True)
class Judged:
    """One run: what it was, its smallest pooled residual, and the failures told with and without it, by first step."""

    case: str
    twin: str
    seed: int
    verdict: str
    smallest: float
    told: dict[str, int]
    told_without: dict[str, int]


def failures_of(measurements: Sequence[Measurement]) -> dict[str, int]:
    """Return the first step of each failure that the rules tell."""
    found: dict[str, int] = {}
    for name, _, step, _ in events_of(measurements):
        if name in FAILURES:
            found.setdefault(name, step)
    return found


def blinded(measurement: Measurement) -> Measurement:
    """Return a measurement as if what the output is made of had not been looked at."""
    output = None if measurement.output is None else replace(measurement.output, pooled_residual=None)
    return replace(measurement, output=output)


def judged(folder: Path) -> Judged | None:
    """Return what came of one run, ``None`` where the number was not measured."""
    measurements = History.read(folder / "spectral.jsonl").measurements
    known = [item.output.pooled_residual for item in measurements if item.output is not None]
    pooled = [value for value in known if value is not None]
    if not pooled:
        return None
    training = json.loads((folder / "training.json").read_text())
    told, without = failures_of(measurements), failures_of([blinded(item) for item in measurements])
    names = training["case"], training["twin"], training["seed"]
    return Judged(*names, verdict_of(training), min(pooled), told, without)


def main() -> None:
    """Print the counts, then every run that the number changes."""
    split = json.loads(SPLIT.read_text())
    runs = [run for path in sorted(RUNS.glob("*/training.json")) if (run := judged(path.parent)) is not None]
    print(
        f"{'runs':<10} {'failing':>7} {'told':>5} {'without':>8} {'healthy':>8} {'false':>6} {'smallest, healthy':>18}"
    )
    for name in ("for rules", "held out"):
        kept = [
            run
            for run in runs
            if (run.case in split["cases_held_out"] or run.seed in split["seeds_held_out"]) == (name == "held out")
        ]
        sick = [run for run in kept if run.twin == "sick" and run.verdict not in ("", "loss")]
        healthy = [run for run in kept if run.twin == "healthy" and not run.verdict]
        told, without = (sum(bool(getattr(run, which)) for run in sick) for which in ("told", "told_without"))
        false = sum(bool(run.told) for run in healthy)
        least = min((run.smallest for run in healthy), default=float("nan"))
        print(f"{name:<10} {len(sick):>7} {told:>5} {without:>8} {len(healthy):>8} {false:>6} {least:>18.2g}")
    print()
    for run in runs:
        if run.told != run.told_without:
            print(f"{run.case} {run.twin} {run.seed}: {run.told}, without {run.told_without or 'nothing'}")


if __name__ == "__main__":
    main()
