"""What steering costs beyond watching: the law after each measurement, and the scales in each training step.

    python benchmarks/rescale.py
    python benchmarks/rescale.py --layers 12 --width 256 --rounds 20

Two copies of the example's model are trained in one process on the same batches, one with residual scales and one
without, a step of the one and a step of the other in turn; both are measured every few steps. After each measurement of
the steered model, the law is timed twice: with every block far outside the zone, so that all scales move, and with
every block in balance, so that none does. Times are seconds of one processor core that the process itself used, so that
whatever else the machine does disturbs them little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from machine import describe
from overhead import GPT, Config, Windows, read_standard_library

from lightning_spectral import ResidualRescaler, find_blocks
from lightning_spectral.control.band import BlockState
from lightning_spectral.control.steering import Steering
from lightning_spectral.measure import Meter
from lightning_spectral.records import Measurement

ZONE = (0.5, 2.0)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 176), ("heads", 8), ("context", 128), ("batch-size", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--every-n-steps", type=int, default=10, help="optimizer steps between two measurements")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


class Trained:
    """One model in training, watched by a meter, with residual scales or without."""

    def __init__(self, args: argparse.Namespace, windows: torch.Tensor, steering: Steering | None) -> None:
        torch.manual_seed(0)
        self.model = GPT(Config(args.layers, args.width, args.heads, args.context))
        blocks = find_blocks(self.model)
        if steering is not None:
            steering.attach(self.model, blocks)
        self.meter = Meter(self.model, blocks)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
        self.windows, self.batch_size = windows, args.batch_size
        self.order = torch.Generator().manual_seed(0)
        self.meter.measure()

    def step(self) -> None:
        """Train for one step."""
        ids = self.windows[torch.randint(len(self.windows), (self.batch_size,), generator=self.order)].long()
        logits = self.model(ids[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def with_ratio(measurement: Measurement, ratio: float) -> Measurement:
    """Return the measurement as if every block had this ratio."""
    layers = tuple(replace(layer, mlp_norm=ratio, attention_norm=1.0) for layer in measurement)
    return replace(measurement, layers=layers)


def seconds(action: Callable[[], object]) -> float:
    """Time one call."""
    start = time.process_time()
    action()
    return time.process_time() - start


def act(steering: Steering, measurement: Measurement, trained: Trained, law: list[dict]) -> tuple[float, int]:
    """Time one decision, whatever it does to the scales, and undo it; count the blocks that moved."""
    assert steering.scales is not None
    kept = [scale.detach().clone() for scale in steering.scales.parameters()]
    start = time.process_time()
    actions, _ = steering.act(measurement, law, [trained.optimizer])
    spent = time.process_time() - start
    with torch.no_grad():
        for scale, value in zip(steering.scales.parameters(), kept, strict=True):
            scale.copy_(value)
    return spent, sum(action.moves for action in actions)


def run(args: argparse.Namespace) -> dict[str, list[float]]:
    """Train both models in turn; return what was timed, by name."""
    windows = Windows(read_standard_library()[0], args.context).windows
    steering = Steering(ResidualRescaler(), ZONE)
    peers = {"watched": Trained(args, windows, None), "steered": Trained(args, windows, steering)}
    steered = peers["steered"]
    active = [BlockState(outside=2, active=True).to_dict()] * args.layers
    times: dict[str, list[float]] = {}
    for number in range(args.rounds + 1):  # the first round warms up
        if number == 1:
            times.clear()
        for _ in range(args.every_n_steps):
            for name, trained in peers.items():
                times.setdefault(f"step, {name}", []).append(seconds(trained.step))
        for name, trained in peers.items():
            times.setdefault(f"measurement, {name}", []).append(seconds(trained.meter.measure))
        measurement = steered.meter.measure()
        for name, ratio, expected in (("every", 4.0, args.layers), ("no", 1.0, 0)):
            spent, moved = act(steering, with_ratio(measurement, ratio), steered, active)
            assert moved == expected
            times.setdefault(f"law, {name}", []).append(spent)
    return times


def compared(times: dict[str, list[float]], what: str) -> str:
    """Return one line: both medians, and the median of the differences between neighbours in time."""
    watched, steered = times[f"{what}, watched"], times[f"{what}, steered"]
    middle = statistics.median(watched)
    extra = statistics.median(after - before for before, after in zip(watched, steered, strict=True))
    return (
        f"{what:<25} {middle * 1e3:>9.2f} ms {statistics.median(steered) * 1e3:>9.2f} ms "
        f"{extra * 1e3:>+9.3f} ms   {extra / middle:+.2%}"
    )


def main() -> None:
    """Print the medians side by side."""
    args = parse()
    torch.set_num_threads(1)
    print(describe())
    times = run(args)
    rounds = f"medians of {args.rounds} rounds of {args.every_n_steps} steps"
    print(f"GPT of {args.layers} blocks, width {args.width}; {rounds}, time of one core\n")
    print(f"{'':<25} {'watching':>12} {'steering':>12} {'added':>12}")
    print(compared(times, "step"))
    print(compared(times, "measurement"))
    whole = statistics.median(times["measurement, watched"])
    for name in ("no", "every"):
        spent = statistics.median(times[f"law, {name}"])
        each = f"{spent * 1e3:>9.3f} ms {spent * 1e3:>+9.3f} ms   {spent / whole:+.2%} of a measurement"
        print(f"{f'law, {name} block moved':<25} {'-':>12} {each}")


if __name__ == "__main__":
    main()
