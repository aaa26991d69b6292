"""A solver beside other work: in one thread, with a second thread for every step, and for large products alone.

    python benchmarks/busy.py               # half a minute alone, then half a minute beside a busy process

Random weights, MLPs with four times the width. Times of the clock, medians; the three ways take turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from machine import describe

from lightning_spectral.linalg import Matrix, Product, RandomizedSVD
from lightning_spectral.linalg.norms import precision
from lightning_spectral.linalg.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SIZES = ((128, 8), (384, 8), (512, 8), (1024, 4), (2048, 2))
BUSY = "import torch; torch.set_num_threads({}); A = torch.randn(1000, 1000)\nwhile True: A @ A"


@contextmanager
def way(name: str) -> Iterator[None]:
    """Choose the threads of a solver."""
    torch.set_num_threads(1 if name == "one thread" else torch.get_num_threads())
    precision.one_thread = nullcontext if name == "all, every step" else one_thread  # type: ignore[assignment]
    try:
        yield
    finally:
        precision.one_thread = one_thread


def chains(width: int, layers: int) -> list[Product]:
    """Return random MLPs."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((width, 4 * width), (4 * width, width))
    return [
        Product(*(Matrix(torch.randn(*size, generator=generator) / width**0.5) for size in sizes))
        for _ in range(layers)
    ]


def table(threads: int, rounds: int) -> None:
    """Print the times of a cold and a warm measurement."""
    solver = RandomizedSVD()
    ways = ("one thread", "all, every step", "as built")
    print(f"{'':>10}" + "".join(f"{f'{name}, cold':>24}{'warm':>8}" for name in ways), flush=True)
    for width, layers in SIZES:
        operators = chains(width, layers)
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for name in ways:
                torch.set_num_threads(threads)
                with way(name):
                    start = time.perf_counter()
                    _, state = solver.compute(operators, solver.init(operators))
                    middle = time.perf_counter()
                    solver.compute(operators, state)
                    end = time.perf_counter()
                times.setdefault((name, "cold"), []).append(middle - start)
                times.setdefault((name, "warm"), []).append(end - middle)
        cells = (tuple(1e3 * statistics.median(times[name, start]) for start in ("cold", "warm")) for name in ways)
        print(f"{width:>5} x {layers} " + "".join(f"{cold:>21.1f} ms{warm:>8.1f}" for cold, warm in cells), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    print(describe())
    print("\nalone")
    table(given.threads, given.rounds)
    print(f"\nbeside a process that multiplies in {given.threads} threads")
    other = subprocess.Popen([sys.executable, "-c", BUSY.format(given.threads)])
    try:
        table(given.threads, given.rounds)
    finally:
        other.kill()


if __name__ == "__main__":
    main()
