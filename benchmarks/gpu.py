"""What the package costs on a CUDA device, in one table: solver, discovery on meta, a training step that is watched.

    python benchmarks/gpu.py                          # under 8 minutes on one H100 or H200
    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --device cpu --small     # checks the script where there is no card

Beside the figures stand the goals. All times are medians of wall time up to the end of the work on the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from machine import describe
from torch import Tensor, nn

from lightning_spectral import SpectralError, Watch, find_blocks
from lightning_spectral.linalg import Diagonal, Matrix, Product, RandomizedSVD, SolverState

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Config

PER = 25e6  # weights that times of the solver are given for
GOAL_WARM, GOAL_SHARE = 1.0, 0.005  # ms per 25 M weights; of a step at interval 50


@dataclass(frozen=True)
class Row:
    """One figure, and what is aimed at."""

    section: str
    name: str
    value: float
    unit: str
    goal: str = ""


class Device:
    """The device: waiting for it, and counting how often others wait for it."""

    def __init__(self, name: str) -> None:
        self.name, self.cuda = name, name.startswith("cuda")

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Return the median time of some work, after one run that does not count."""
        times = []
        for _ in range(repeats + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def waits(self, work: Callable[[], object]) -> float:
        """Return how often the host waits for the device, NaN where there is none."""
        if not self.cuda:
            work()
            return float("nan")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(item.message) for item in caught)

    def wait(self) -> None:
        """Wait until everything has been computed."""
        if self.cuda:
            torch.cuda.synchronize()


# --- the solver ----------------------------------------------------------------------------------------------------


def branches(width: int, layers: int, device: Device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return W_out, W_in and a gain, in bfloat16, of an MLP branch and an attention branch per layer."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for inner in (4 * width, width) * layers:
        shapes = ((width, inner), (inner, width))
        out, into = (torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes)
        found.append(tuple(x.to(device.name, torch.bfloat16) for x in (out, into, torch.ones(width))))
    return found  # type: ignore[return-value]


def power_iteration(out: Tensor, into: Tensor, steps: int = 30) -> Tensor:
    """Iterate on the factors in bfloat16, as spectral penalties do; without a bound."""
    v = torch.randn(into.shape[1], device=into.device, dtype=into.dtype)
    for _ in range(steps):
        v = nn.functional.normalize(into.mT @ (out.mT @ (out @ (into @ v))), dim=0)
    return torch.linalg.vector_norm(out @ (into @ v))


def bandwidth(device: Device, size: int) -> float:
    """Return the bytes per second that a sum over a large tensor reads."""
    numbers = torch.ones(size, device=device.name)
    return numbers.nbytes / device.seconds(numbers.sum, 10)


def solver_rows(device: Device, width: int, layers: int, repeats: int) -> list[Row]:
    """Measure all branches of a model, beside what one would use otherwise."""
    items = branches(width, layers, device)
    weights = sum(out.numel() + into.numel() for out, into, _ in items)
    operators = [Product(Matrix(out), Matrix(into), Diagonal(gain)) for out, into, gain in items]
    solver = RandomizedSVD()
    state: list[SolverState] = [solver.compute(operators, solver.init(operators))[1]]

    def warm() -> None:
        state[0] = solver.compute(operators, state[0])[1]

    def drifted() -> None:
        for out, into, _ in items:
            for weight in (out, into):
                weight.add_(torch.randn_like(weight), alpha=1e-3 * width**-0.5)

    drifted()
    warm()
    drifted()
    dense = [(out.float() @ into.float()) for out, into, _ in items]
    cold = partial(solver.compute, operators, solver.init(operators))
    contestants: dict[str, tuple[Callable[[], object], int, str]] = {
        "cold": (cold, repeats, ""),
        "warm": (warm, repeats, f"<= {GOAL_WARM} ms"),
        "30 power iterations, no bound": (lambda: [power_iteration(out, into) for out, into, _ in items], repeats, ""),
        "svd_lowrank of the formed product": (lambda: [torch.svd_lowrank(A, 6, niter=2) for A in dense], 3, ""),
        "matrix_norm of the formed product": (lambda: [torch.linalg.matrix_norm(A, ord=2) for A in dense], 1, ""),
    }
    rows = [
        Row("solver", name, device.seconds(work, count) * 1e3 * PER / weights, "ms / 25 M weights", goal)
        for name, (work, count, goal) in contestants.items()
    ]
    limit = 2 * 2 * PER / bandwidth(device, 2**28 if device.cuda else 2**22)
    rows.append(Row("solver", "limit: each weight read twice", limit * 1e3, "ms / 25 M weights"))
    rows.append(Row("solver", "waits of a cold start", device.waits(cold), ""))
    rows.append(Row("solver", "waits of a warm start", device.waits(warm), "", "1 with a gap, <= 3"))
    return rows


# --- discovery and training ----------------------------------------------------------------------------------------


def discovery_rows(layers: int, width: int) -> list[Row]:
    """Find the blocks of a model without content."""
    with torch.device("meta"):
        model = GPT(Config(layers, width, heads=8, vocabulary=50257))
    start = time.perf_counter()
    try:
        found = find_blocks(model)
    except SpectralError as error:
        print(f"discovery on meta: {error}")
        return []
    name = f"{len(found)} blocks of width {width} on meta"
    return [Row("discovery", name, time.perf_counter() - start, "s", "< 15 s")]


def training_rows(device: Device, config: Config, batch: int, rounds: int, compiled: bool) -> list[Row]:
    """Train with and without a watch; rounds of 50 steps alternate."""
    torch.manual_seed(0)
    model = GPT(config).to(device.name)
    network = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(config.vocabulary, (batch, config.context + 1), device=device.name)
    section = "training, compiled" if compiled else "training"

    def step() -> None:
        with torch.autocast(device.name.partition(":")[0], torch.bfloat16):
            logits = network(ids[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def steps(count: int, watch: Watch | None = None) -> None:
        for _ in range(count):
            if watch is not None:
                watch.before_step(ids)
            step()
            if watch is not None:
                done[0] += 1
                watch.step(done[0])

    done = [0]
    watches = {every: Watch(model, every_n_steps=every, geometry=False) for every in (1, 10, 50)}
    count = 50 if device.cuda else 2
    steps(2)
    for watch in watches.values():
        steps(1, watch)  # finds the blocks, and measures cold
    times: dict[int, list[float]] = {every: [] for every in (0, *watches)}
    for _ in range(rounds):
        for every in times:
            times[every].append(device.seconds(partial(steps, count, watches.get(every)), 1) / count)
    plain = statistics.median(times[0])
    rows = [Row(section, "a step", plain * 1e3, "ms")]
    for every in watches:
        share = statistics.median(watched / bare - 1 for watched, bare in zip(times[every], times[0], strict=True))
        goal = f"<= {GOAL_SHARE:.1%}" if every == 50 else ""
        rows.append(Row(section, f"more with a watch every {every} steps", share * 100, "%", goal))
    quiet = Watch(model, every_n_steps=10**6, geometry=False)
    steps(1, quiet)
    waited = device.waits(partial(steps, 3, quiet)) - device.waits(partial(steps, 3))
    rows.append(Row(section, "waits inside 3 steps without a measurement", waited, "", "0"))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, to check the script")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py measures a CUDA device, and torch sees none on this machine")
    device = Device(args.device)
    card = torch.cuda.get_device_name(device.name) if device.cuda else "no card: these figures say nothing"
    print(f"{card}\n{describe()}\n")
    small, repeats = args.small, 3 if args.small else 10
    config = Config(2, 64, 4, 32) if small else Config(12, 768, 12, 1024, vocabulary=50304)  # GPT-2 small
    rows: list[Row] = []
    sections: list[Callable[[], list[Row]]] = [
        partial(solver_rows, device, 128 if small else 2048, 2 if small else 16, repeats),
        partial(discovery_rows, 4 if small else 80, 64 if small else 8192),
        partial(training_rows, device, config, 2 if small else 8, 1 if small else 5, compiled=False),
    ]
    if device.cuda:
        sections.append(partial(training_rows, device, config, 8, 5, compiled=True))
    for section in sections:
        for row in section():
            rows.append(row)
            print(f"{row.section:<20}{row.name:<44}{row.value:>10.3f} {row.unit:<20}{row.goal}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"card": card, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
