"""What finding the blocks costs: one traced forward pass and the probes, beside a plain forward pass.

    python benchmarks/discovery.py
    python benchmarks/discovery.py --threads 1 --width 512

The model is the example's GPT at several depths. Forward passes and discoveries alternate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import describe

from lightning_spectral import find_blocks

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Config


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 48, 96])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="fewer than the cores, where other work shares them")
    return parser.parse_args()


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print one row per depth, medians over the repeats."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(describe())
    print(f"GPT of width {args.width}\n")
    print(f"{'blocks':>6}   {'forward pass':>12}   {'find_blocks':>11}   {'beyond it':>9}   {'verified':>8}")
    for depth in args.depths:
        model = GPT(Config(depth, args.width, 8, 128)).eval()
        ids = torch.randint(0, 256, (2, 13))
        model(ids)
        run, find = partial(model, ids), partial(find_blocks, model, batch=ids)
        pairs = [(seconds(run), seconds(find)) for _ in range(args.repeats)]
        forward, found = (statistics.median(column) for column in zip(*pairs, strict=True))
        verified = sum(block.verified for block in find_blocks(model, batch=ids))
        print(f"{depth:>6}   {forward:>10.3f} s   {found:>9.3f} s   {found - forward:>7.3f} s   {verified:>8}")


if __name__ == "__main__":
    main()
