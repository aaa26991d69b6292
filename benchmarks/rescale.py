"""What steering costs beyond watching: the law after each measurement, and the scales in each training step.

    python benchmarks/rescale.py
    python benchmarks/rescale.py --layers 12 --width 256 --rounds 20

Three copies of the example's model are trained in one process on the same batches: without residual scales, with
scales that only a law moves, and with scales that the optimizer trains too. They take their steps in turn, and are
measured every few steps. After each measurement of a model with scales, each law is timed twice: with every branch far
too strong, so that all scales move, and with every block in balance, so that none does. Times are seconds of one
processor core that the process itself used, so that whatever else the machine does disturbs them little.
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

from lightning_spectral import GainCeiling, ResidualRescaler, find_blocks
from lightning_spectral.control.band import BlockState
from lightning_spectral.control.steering import Steering
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.records import Measurement
from lightning_spectral.weights.model import ModelWeights

ZONE = (0.5, 2.0)
PLAIN, STEERED, LEARNED = "no scales", "scales", "learned scales"
LAWS = {"ceiling": GainCeiling, "band": ResidualRescaler}
STATES = {"ceiling": {"begun": True}, "band": BlockState(outside=2, active=True).to_dict()}


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

    def __init__(self, args: argparse.Namespace, windows: torch.Tensor, name: str) -> None:
        torch.manual_seed(0)
        self.model = GPT(Config(args.layers, args.width, args.heads, args.context))
        self.blocks, self.learnable = find_blocks(self.model), name == LEARNED
        self.running = None if name == PLAIN else self.steering("ceiling")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
        self.meter = Meter(ModelWeights(self.model), self.blocks)
        self.windows, self.batch_size = windows, args.batch_size
        self.order = torch.Generator().manual_seed(0)
        measurement = self.meter.measure()
        if self.running is not None:  # acts once and then watches every step, as in a run: that is a part of the steps
            self.running.begin([self.optimizer])
            self.running.start([self.optimizer])
            self.running.act(with_norms(measurement, 1.0, 1.0), [], [self.optimizer])

    def steering(self, law: str) -> Steering:
        """Return what steers the model by a law, and has not acted yet."""
        steering = Steering(LAWS[law](learnable=self.learnable), ZONE)
        steering.attach(self.model, self.blocks)
        return steering

    def step(self) -> None:
        """Train for one step."""
        ids = self.windows[torch.randint(len(self.windows), (self.batch_size,), generator=self.order)].long()
        logits = self.model(ids[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        if self.running is not None:
            self.running.check_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def with_norms(measurement: Measurement, mlp: float, attention: float) -> Measurement:
    """Return the measurement as if every block had these norms."""
    layers = tuple(replace(layer, mlp_norm=mlp, attention_norm=attention) for layer in measurement)
    return replace(measurement, layers=layers)


def seconds(action: Callable[[], object]) -> float:
    """Time one call."""
    start = time.process_time()
    action()
    return time.process_time() - start


def act(trained: Trained, law: str, measurement: Measurement) -> tuple[float, int]:
    """Time all that follows from a measurement, and undo what it does; count the blocks that moved."""
    steering, states = trained.steering(law), [STATES[law]] * len(measurement.layers)
    assert steering.scales is not None
    kept = [scale.detach().clone() for scale in steering.scales.parameters()]
    start = time.process_time()
    actions, _ = steering.act(measurement, states, [trained.optimizer])
    steering.notices([trained.optimizer])
    spent = time.process_time() - start
    with torch.no_grad():
        for scale, value in zip(steering.scales.parameters(), kept, strict=True):
            scale.copy_(value)
    return spent, sum(action.moves for action in actions)


def run(args: argparse.Namespace) -> dict[str, list[float]]:
    """Train the models in turn; return what was timed, by name."""
    windows = Windows(read_standard_library()[0], args.context).windows
    peers = {name: Trained(args, windows, name) for name in (PLAIN, STEERED, LEARNED)}
    times: dict[str, list[float]] = {}
    for number in range(args.rounds + 1):  # the first round warms up
        if number == 1:
            times.clear()
        for _ in range(args.every_n_steps):
            for name, trained in peers.items():
                times.setdefault(f"step, {name}", []).append(seconds(trained.step))
        for name, trained in peers.items():
            times.setdefault(f"measurement, {name}", []).append(seconds(trained.meter.measure))
        for name in (STEERED, LEARNED):
            measurement = peers[name].meter.measure()
            for law in LAWS:
                for moved, norms in (("no", (0.1, 0.1)), ("every", (400.0, 100.0))):
                    spent, count = act(peers[name], law, with_norms(measurement, *norms))
                    assert count == (args.layers if moved == "every" else 0)
                    times.setdefault(f"{law}, {name}, {moved} block moved", []).append(spent)
    return times


def compared(times: dict[str, list[float]], what: str, name: str) -> str:
    """Return one line: both medians, and the median of the differences between neighbours in time."""
    plain, scaled = times[f"{what}, {PLAIN}"], times[f"{what}, {name}"]
    middle = statistics.median(plain)
    extra = statistics.median(after - before for before, after in zip(plain, scaled, strict=True))
    return (
        f"{f'{what}, {name}':<44} {middle * 1e3:>9.2f} ms {statistics.median(scaled) * 1e3:>9.2f} ms "
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
    print(f"{'':<44} {'watching':>12} {'steering':>12} {'added':>12}")
    for what in ("step", "measurement"):
        for name in (STEERED, LEARNED):
            print(compared(times, what, name))
    whole = statistics.median(times[f"measurement, {PLAIN}"])
    for name, each in times.items():
        if name.endswith("moved"):
            spent = statistics.median(each)
            line = f"{spent * 1e3:>9.3f} ms {spent * 1e3:>+9.3f} ms   {spent / whole:+.2%} of a measurement"
            print(f"{name:<44} {'-':>12} {line}")


if __name__ == "__main__":
    main()
