"""What watching costs: the share of training time that measuring takes, on the model of the example.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --layers 12 --width 256 --rounds 20

One model is trained in one process. Rounds without and with measurements alternate, so that whatever else the machine
does meets all of them alike. A round is as many optimizer steps as the longest interval.
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
from lightning_spectral.measure import Meter

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Config, Windows, read_standard_library

INTERVALS = (1, 10, 50)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 176), ("heads", 8), ("context", 128), ("batch-size", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-steps", type=int, default=50)
    parser.add_argument("--threads", type=int, help="fewer than the cores, where other work shares them")
    parser.add_argument("--linearization", default="circuit", choices=["circuit", "paper"])
    return parser.parse_args()


def trainer(args: argparse.Namespace) -> tuple[GPT, Callable[[], None]]:
    """Return the example's model and a function that trains it for one step."""
    torch.manual_seed(0)
    model = GPT(Config(args.layers, args.width, args.heads, args.context))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    windows = Windows(read_standard_library()[0], args.context).windows
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        ids = windows[torch.randint(len(windows), (args.batch_size,), generator=generator)].long()
        logits = model(ids[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return model, step


def run_round(
    step: Callable[[], None], meter: Meter | None, interval: int, steps: int
) -> tuple[list[float], list[float]]:
    """Train for some steps; return the seconds of each step and of each measurement."""
    seconds, measuring = [], []
    for index in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        if meter is not None and index % interval == interval - 1:
            start = time.perf_counter()
            meter.measure(index)
            measuring.append(time.perf_counter() - start)
    return seconds, measuring


def main() -> None:
    """Print one line per interval."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(describe())
    model, step = trainer(args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"GPT of {args.layers} blocks, width {args.width}, {parameters / 1e6:.1f} M parameters")

    start = time.perf_counter()
    blocks = find_blocks(model)
    found = time.perf_counter()
    Meter(model, blocks, linearization=args.linearization).measure()
    cold = time.perf_counter()
    print(f"finding {len(blocks)} blocks: {found - start:.2f} s; first measurement: {(cold - found) * 1e3:.0f} ms\n")

    run_round(step, None, 1, 5)  # warm up
    # Each interval keeps its own meter: the longer the interval, the more the weights move between two measurements.
    meters = {interval: Meter(model, blocks, linearization=args.linearization) for interval in INTERVALS}
    for meter in meters.values():
        meter.measure()
    plain, watched = [], {interval: ([], []) for interval in INTERVALS}
    for _ in range(args.rounds):
        for interval in INTERVALS:
            plain += run_round(step, None, interval, args.round_steps)[0]
            seconds, measuring = run_round(step, meters[interval], interval, args.round_steps)
            watched[interval][0].extend(seconds)
            watched[interval][1].extend(measuring)

    print("every_n_steps   step alone   step watched   measurement   share of training time")
    for interval, (seconds, measuring) in watched.items():
        each, alone = statistics.median(measuring), statistics.median(plain)
        print(
            f"{interval:>13}   {alone * 1e3:>7.1f} ms   {statistics.median(seconds) * 1e3:>9.1f} ms   "
            f"{each * 1e3:>8.1f} ms   {each / (interval * alone):>22.2%}"
        )


if __name__ == "__main__":
    main()
