"""The largest report that is promised: how big it is, how long it takes to make, and to open in a browser.

    python benchmarks/report.py
    python benchmarks/report.py --blocks 12 --measurements 200 --opens 5

A run is made up, with every series that a run can have: slow random walks under noise of a few per cent, since what
wanders slowly compresses better than what is measured. It is opened in headless Chromium, if there is one, from disk
and with a fresh profile, until every chart is drawn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from machine import describe

from lightning_spectral import History, Measurement, report
from lightning_spectral.alarms import Event
from lightning_spectral.records import LayerMeasurement

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=96)
    parser.add_argument("--measurements", type=int, default=2000)
    parser.add_argument("--noise", type=float, default=0.03, help="of each value, relative")
    parser.add_argument("--opens", type=int, default=5, help="how often the page is opened")
    parser.add_argument("--keep", help="folder to keep the run and its page in")
    return parser.parse_args()


def write_run(path: Path, blocks: int, measurements: int, noise: float) -> None:
    """Write a made-up run, line by line."""
    rng = np.random.default_rng(0)

    def walk(level: float) -> np.ndarray:
        steps = rng.normal(scale=0.01, size=(blocks, measurements)).cumsum(axis=1)
        return np.exp(level + steps + noise * rng.normal(size=(blocks, measurements)))

    mlp, attention, mlp_scale, attention_scale, rank = (walk(level) for level in (1.0, 0.8, 0.0, 0.0, 3.0))
    residual = 1 / (1 + walk(0.0))
    header = {"lightning_spectral": 1, "linearization": "circuit", "safe_zone": [0.5, 2.0], "every_n_steps": 50}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(header | {"rescaler": {"gain": 0.3}}) + "\n")
        for k in range(measurements):
            step = 50 * k
            layers = tuple(
                LayerMeasurement(
                    b,
                    f"model.layers.{b}",
                    float(mlp[b, k]),
                    float(attention[b, k]),
                    float(mlp_scale[b, k]),
                    float(attention_scale[b, k]),
                    error_bound=1e-3,
                    token_residual=float(residual[b, k]),
                    typical_token_residual=float(residual[b, k]),
                    effective_rank=float(rank[b, k]),
                )
                for b in range(blocks)
            )
            lines = [Measurement(step, "circuit", layers, seconds=0.1).to_dict()]
            if k % 20 == 0:
                lines.append(asdict(Event("note", step, step, (k % blocks,), f"block {k % blocks} is above the zone")))
            changes = {"ratio": 2.5, "mlp_log_change": -0.01, "attention_log_change": 0.01, "reason": "above the zone"}
            lines += [{"step": step, "action": "rescale", "block": b} | changes for b in range(0, blocks, 8)]
            file.writelines(json.dumps(line) + "\n" for line in lines)


def opened(page: Path, times: int) -> list[float]:
    """Return the seconds from asking for the page until every chart is drawn, in a new browser each time."""
    from browser import chromium

    seconds = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
            seconds.append(browser.open(page))
    return seconds


def main() -> None:
    """Print one line per quantity."""
    args = parse()
    folder = Path(args.keep or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "spectral.jsonl"
    write_run(run, args.blocks, args.measurements, args.noise)
    print(describe())
    print(f"{args.blocks} blocks, {args.measurements} measurements, noise {args.noise:g}\n")
    print(f"{'file of the run':<24}{run.stat().st_size / 1e6:>8.1f} MB")
    began = time.perf_counter()
    History.read(run)
    print(f"{'read':<24}{time.perf_counter() - began:>8.1f} s")
    began = time.perf_counter()
    page = report(run)
    print(f"{'read, drawn, written':<24}{time.perf_counter() - began:>8.1f} s")
    print(f"{'page':<24}{page.stat().st_size / 1e6:>8.2f} MB")
    if shutil.which("chromedriver") is None:
        print("no browser to open it in")
    else:
        seconds = opened(page, args.opens)
        print(f"{'opened':<24}{statistics.median(seconds):>8.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})")
    if not args.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
