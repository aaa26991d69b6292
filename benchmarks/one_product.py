"""Products of operators of one shape: one after another, or all in one product of stacked weights.

    python benchmarks/one_product.py

8 random MLPs with four times the width, 14 vectors each, as a cold measurement multiplies. Stacked weights have to be
copied first. Times of the clock in one thread, medians; the ways take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from machine import describe
from torch import Tensor

WIDTHS, LAYERS, VECTORS, ROUNDS = (48, 128, 256, 384, 512, 768), 8, 14, 60


def ways_of(width: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    up = [random(4 * width, width) for _ in range(LAYERS)]
    down = [random(width, 4 * width) for _ in range(LAYERS)]
    X = random(LAYERS, VECTORS, width)
    stacked = torch.stack(up), torch.stack(down)
    return {
        "one by one": lambda: torch.stack([x @ U.T @ D.T for x, U, D in zip(X, up, down, strict=True)]),
        "in one product": lambda: X @ stacked[0].mT @ stacked[1].mT,
        "copying": lambda: (torch.stack(up), torch.stack(down)),
    }


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(describe())
    print(f"{'width':>6}" + "".join(f"{name:>18}" for name in ways_of(8)))
    for width in WIDTHS:
        ways = ways_of(width)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, run in ways.items():
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
        print(f"{width:>6}" + "".join(f"{1e3 * statistics.median(found):>15.3f} ms" for found in times.values()))


if __name__ == "__main__":
    main()
