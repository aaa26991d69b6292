"""What watching costs: the share of training time that measuring takes, on the model of the example.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --layers 12 --width 256 --rounds 20

One model is trained in one process. Rounds without and with measurements alternate, so that whatever else the machine
does meets all of them alike. A round is as many optimizer steps as the longest interval.

What is seen of a batch comes from a pass of a few samples in front of the training pass. A clock runs around it: a
difference of whole steps would drown in their scatter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import describe

from lightning_spectral import find_blocks
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.records import Measurement
from lightning_spectral.watch.batch import BatchWatch
from lightning_spectral.watch.outermost import Call
from lightning_spectral.weights.model import ModelWeights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Config, Windows, read_standard_library

# Steps between two measurements, and whether these are of the tokens too.
WATCHES = ((1, False), (10, False), (10, True), (50, False))


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


def now() -> float:
    """Return seconds; with one thread those of the processor, which other work on the machine disturbs less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Tokens(BatchWatch):
    """What a measurement sees of a batch, with a clock around all that it adds to a step."""

    seconds = 0.0

    def begin(self, batch: object) -> None:
        """Look at the calls of the next training step."""
        begin, self.seconds = now(), 0.0
        self.start(batch)
        self.seconds += now() - begin

    def add_to(self, measurement: Measurement) -> Measurement:
        """Stop, and add what was seen to a measurement."""
        begin = now()
        measurement = super().add_to(measurement)
        self.seconds += now() - begin
        return measurement

    def _hear(self, call: Call, make: Callable[[], Any]) -> Any:
        inside = 0.0

        def real() -> Any:
            nonlocal inside
            begin = now()
            result = make()
            inside = now() - begin
            return result

        begin = now()
        result = super()._hear(call, real)
        self.seconds += now() - begin - inside
        return result


@dataclass
class Watched:
    """Seconds of every step, and of every measurement: of weights and of tokens."""

    steps: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)


def run_round(
    step: Callable[[], None],
    steps: int,
    seconds: Watched,
    interval: int = 1,
    meter: Meter | None = None,
    tokens: Tokens | None = None,
) -> None:
    """Train for some steps and measure at each interval; note what each takes."""
    for index in range(steps):
        due = meter is not None and index % interval == interval - 1
        if due and tokens is not None:
            tokens.begin(None)
        start = now()
        step()
        stepped = now()
        seconds.steps.append(stepped - start)
        if due:
            measurement = meter.measure(index)
            seconds.weights.append(now() - stepped)
            if tokens is not None:
                tokens.add_to(measurement)
            seconds.tokens.append(0.0 if tokens is None else tokens.seconds)


def main() -> None:
    """Print one line per way of watching."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(describe())
    model, step = trainer(args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"GPT of {args.layers} blocks, width {args.width}, {parameters / 1e6:.1f} M parameters")

    start = now()
    blocks = find_blocks(model)
    found = now()
    Meter(ModelWeights(model), blocks, linearization=args.linearization).measure()
    cold = now()
    print(f"finding {len(blocks)} blocks: {found - start:.2f} s; first measurement: {(cold - found) * 1e3:.0f} ms\n")

    run_round(step, 5, Watched())  # warm up
    # Each watch keeps its own meter: the longer the interval, the more the weights move between two measurements.
    meters = {watch: Meter(ModelWeights(model), blocks, linearization=args.linearization) for watch in WATCHES}
    for meter in meters.values():
        meter.measure()
    tokens = Tokens(model, blocks)
    plain, watched = Watched(), {watch: Watched() for watch in WATCHES}
    for _ in range(args.rounds):
        for interval, geometry in WATCHES:
            run_round(step, args.round_steps, plain)
            watch = (interval, geometry)
            run_round(step, args.round_steps, watched[watch], interval, meters[watch], tokens if geometry else None)

    alone = statistics.median(plain.steps)
    print("every_n_steps   step alone   step watched    weights     tokens   share of training time")
    for (interval, _), seconds in watched.items():
        if not seconds.weights:  # the round was shorter than the interval
            continue
        each, of_tokens = statistics.median(seconds.weights), statistics.median(seconds.tokens)
        print(
            f"{interval:>13}   {alone * 1e3:>7.1f} ms   {statistics.median(seconds.steps) * 1e3:>9.1f} ms   "
            f"{each * 1e3:>5.1f} ms   {of_tokens * 1e3:>5.1f} ms   {(each + of_tokens) / (interval * alone):>22.2%}"
        )


if __name__ == "__main__":
    main()
