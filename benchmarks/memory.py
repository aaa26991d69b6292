"""What watching needs: the peak of memory while measuring, beyond what the model has, over the bytes of its weights.

    python benchmarks/memory.py

Each case runs in a process of its own, because the peak of a process never falls. The peak is read where the operating
system keeps it; on a machine without /proc the script says so and stops.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from pathlib import Path

import torch
from machine import describe

from lightning_spectral import find_blocks
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.weights.model import ModelWeights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Config

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CASES = ((8, 176), (12, 512), (24, 512), (12, 1024), (8, 2048))  # blocks, width
MEBI = 2**20


def resident(field: str) -> int:
    """Return ``VmRSS`` (now) or ``VmHWM`` (peak) in bytes."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def measure_one(layers: int, width: int, linearization: str) -> None:
    """Print the bytes of the weights and the extra bytes of a cold and of a warm measurement."""
    torch.manual_seed(0)
    model = GPT(Config(layers, width, heads=8))
    meter = Meter(ModelWeights(model), find_blocks(model), linearization=linearization)  # type: ignore[arg-type]
    # A tiny model first: what torch loads on the first product of any size is not ours.
    tiny = GPT(Config(1, 64))
    Meter(ModelWeights(tiny), find_blocks(tiny)).measure()
    extra = []
    for _ in range(2):
        # What was freed before goes back to the system and the peak begins anew, so that nothing is reused unseen.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        RESET.write_text("5")
        before = resident("VmRSS")
        meter.measure()
        extra.append(resident("VmHWM") - before)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(weights, *extra)


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--linearization", default="circuit", choices=["circuit", "paper"])
    parser.add_argument("--case", type=int, nargs=2, metavar=("BLOCKS", "WIDTH"), help="measure only this one")
    args = parser.parse_args()
    if args.case:
        measure_one(*args.case, args.linearization)
        return
    if not RESET.exists():
        raise SystemExit("the peak of memory is read from /proc, which this machine does not have")
    print(describe(), "\n")
    print("blocks   width     weights   cold extra            warm extra")
    for layers, width in CASES:
        command = [sys.executable, __file__, "--case", str(layers), str(width), "--linearization", args.linearization]
        weights, cold, warm = map(
            int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        )
        parts = [f"{extra / MEBI:>7.1f} MiB ({extra / weights:>5.1%})" for extra in (cold, warm)]
        print(f"{layers:>6}   {width:>5}   {weights / MEBI:>5.0f} MiB   {'   '.join(parts)}")


if __name__ == "__main__":
    main()
