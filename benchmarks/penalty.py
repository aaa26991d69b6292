"""What the balance penalty costs: the time of a training step with and without it, on the model of the example.

    python benchmarks/penalty.py
    python benchmarks/penalty.py --layers 12 --width 256 --steps 50

Three copies of one model are trained in one process: without the penalty, with a penalty on ratios inside the safe zone
(which has no gradient and needs no backward pass), and with one on ratios outside. Their steps alternate, so that
whatever else the machine does meets all of them alike, and the extra time is the median over pairs of steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe

from lightning_spectral import find_blocks
from lightning_spectral.balance.penalty import balance_penalty

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Config, Windows, read_standard_library

# Zones that every ratio of the example lies in, and that none does.
ZONES = {"without": None, "all blocks inside": (1e-3, 1e3), "all blocks outside": (1e3, 2e3)}
WEIGHT = 1e-4


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 176), ("heads", 8), ("context", 128), ("batch-size", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, help="fewer than the cores, where other work shares them")
    parser.add_argument("--linearization", default="circuit", choices=["circuit", "paper"])
    return parser.parse_args()


def trainer(args: argparse.Namespace, zone: tuple[float, float] | None) -> Callable[[], tuple[float, float]]:
    """Return a function that trains a new model for one step, and returns the seconds of the step and of the value."""
    torch.manual_seed(0)
    model = GPT(Config(args.layers, args.width, args.heads, args.context))
    blocks = find_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    windows = Windows(read_standard_library()[0], args.context).windows
    generator = torch.Generator().manual_seed(0)

    def step() -> tuple[float, float]:
        ids = windows[torch.randint(len(windows), (args.batch_size,), generator=generator)].long()
        start = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        before = time.perf_counter()
        if zone is not None:
            loss = loss + WEIGHT * balance_penalty(model, blocks, safe_zone=zone, linearization=args.linearization)
        value = time.perf_counter() - before
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - start, value

    return step


def main() -> None:
    """Print one line per kind of step."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(describe())
    steps = {kind: trainer(args, zone) for kind, zone in ZONES.items()}
    print(f"GPT of {args.layers} blocks, width {args.width}, {args.steps} steps")
    for _ in range(10):  # the first steps move the weights most, and the first call starts cold
        for step in steps.values():
            step()
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in ZONES}
    for _ in range(args.steps):
        for kind, step in steps.items():
            seconds[kind].append(step())
    plain = [total for total, _ in seconds["without"]]
    alone = statistics.median(plain)
    print(f"\n{'penalty':<18}   {'step':>9}   {'its value':>9}   {'extra':>9}   share of the step without")
    for kind, both in seconds.items():
        total, value = (statistics.median(column) for column in zip(*both, strict=True))
        extra = statistics.median(more - less for (more, _), less in zip(both, plain, strict=True))
        times = "   ".join(f"{item * 1e3:>6.1f} ms" for item in (total, value, extra))
        print(f"{kind:<18}   {times}   {extra / alone:>24.1%}")


if __name__ == "__main__":
    main()
