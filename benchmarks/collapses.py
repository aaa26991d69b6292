"""Which signals tell that a training fails, how early, and how often they cry wolf.

    python benchmarks/collapses.py run                  # trains what is missing; about 2 hours of one core
    python benchmarks/collapses.py run post_norm_lm --seeds 0 --workers 2
    python benchmarks/collapses.py jacobian --seeds 0 1  # the same runs again, for the ratio by "jacobian"

Every case of `failures` is trained sick and healthy, with a `Watch` that measures every 10 steps. A run leaves its
journal and `training.json` in a folder; a folder with both is not run again.

"jacobian" repeats runs without a watch, measures that ratio on the held-out batch, and leaves `jacobian.json`. The
losses of both must agree to the bit: watching changes nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

EVERY_N_STEPS = 10
JACOBIAN_EVERY_N_STEPS = 40  # one measurement takes as long as 10 steps and more
RUNS = Path(__file__).parent / "results" / "failures"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "jacobian"])
    parser.add_argument("names", nargs="*", help="cases, all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--twins", nargs="+", default=["sick", "healthy"], choices=["sick", "healthy"])
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args()


def folder_of(name: str, twin: str, seed: int) -> Path:
    """Return where a run leaves its files."""
    return RUNS / f"{name}-{twin}-{seed}"


def run(task: tuple[str, str, int]) -> str:
    """Train one twin with a watch, and return a line about it."""
    import torch
    from failures import CASES
    from failures_check import judge
    from torch import nn

    from lightning_spectral import Watch, find_blocks
    from lightning_spectral.measuring.meter import Meter
    from lightning_spectral.measuring.signals import SIGNALS
    from lightning_spectral.weights.model import ModelWeights

    logging.getLogger("lightning_spectral").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # calls no hooks, which the truth is read by
    name, twin, seed = task
    case = next(case for case in CASES if case.name == name)
    training = case.begin(seed, twin == "sick")
    model, folder = training.model, folder_of(name, twin, seed)
    losses: list[float] = []
    gradients: list[float] = []
    by_paper: list[list[Any]] = []  # step, smallest and largest ratio of the linearization "paper"
    truth: list[list[Any]] = []  # step, token residual, spread of the outputs, largest logit, all finite

    def look(step: int) -> None:
        truth.append([step, *judge(training), all(bool(item.isfinite().all()) for item in model.parameters())])
        model.train()
        ratios = [layer.ratio for layer in paper.measure(step) if layer.ratio is not None]
        by_paper.append([step, min(ratios, default=None), max(ratios, default=None)])

    options: dict[str, Any] = {"every_n_steps": EVERY_N_STEPS, "signals": SIGNALS}
    paper = Meter(
        ModelWeights(model), find_blocks(model, batch=training.inputs(training.held_out)), linearization="paper"
    )
    with Watch(model, folder, optimizers=training.optimizer, **options) as watch:
        look(0)
        for step in range(training.steps):
            training.schedule(step)
            batch = training.batch(step)
            watch.before_step(batch)
            loss = training.loss(batch)
            training.optimizer.zero_grad()
            loss.backward()
            limit = math.inf if training.clip is None else training.clip
            gradients.append(float(nn.utils.clip_grad_norm_(model.parameters(), limit)))
            training.optimizer.step()
            losses.append(loss.item())
            watch.step(step + 1)
            if (step + 1) % EVERY_N_STEPS == 0:
                look(step + 1)
    values = {"case": name, "twin": twin, "seed": seed, "fails_by": case.fails_by, "chance": case.chance}
    values |= {"losses": losses, "gradients": gradients, "truth": truth, "paper": by_paper}
    (folder / "training.json").write_text(json.dumps(values))
    return f"{name} {twin} {seed}: loss {losses[0]:.3g} -> {losses[-1]:.3g}, residual {truth[-1][1]:.2g}"


def run_again(task: tuple[str, str, int]) -> str:
    """Train one twin once more with the ratio by "jacobian", and return a line about it."""
    import torch
    from failures import CASES
    from torch import nn

    from lightning_spectral import find_blocks, measure

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    name, twin, seed = task
    training = next(case for case in CASES if case.name == name).begin(seed, twin == "sick")
    model, held_out = training.model, training.inputs(training.held_out)
    blocks = find_blocks(model, batch=held_out)
    losses: list[float] = []
    ratios: list[list[Any]] = []  # step, smallest and largest ratio

    def look(step: int) -> None:
        found = measure(model, blocks, batch=held_out, linearization="jacobian")
        known = [layer.ratio for layer in found if layer.ratio is not None]
        ratios.append([step, min(known, default=None), max(known, default=None)])

    look(0)
    for step in range(training.steps):
        training.schedule(step)
        loss = training.loss(training.batch(step))
        training.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), math.inf if training.clip is None else training.clip)
        training.optimizer.step()
        losses.append(loss.item())
        if (step + 1) % JACOBIAN_EVERY_N_STEPS == 0:
            look(step + 1)
    watched = json.loads((folder_of(*task) / "training.json").read_text())["losses"]
    same = repr(losses) == repr(watched)  # NaN is no number equal to itself
    (folder_of(*task) / "jacobian.json").write_text(json.dumps({"ratios": ratios, "same_losses": same}))
    return f"{name} {twin} {seed}: {ratios[-1]}{'' if same else '  OTHER LOSSES THAN WITH A WATCH'}"


ACTIONS: dict[str, tuple[Callable[[tuple[str, str, int]], str], str]] = {
    "run": (run, "training.json"),
    "jacobian": (run_again, "jacobian.json"),
}


def main() -> None:
    """Train what is missing."""
    from failures import CASES

    args = parse()
    names = args.names or [case.name for case in CASES]
    action, left = ACTIONS[args.action]
    tasks = [task for task in product(names, args.twins, args.seeds) if not (folder_of(*task) / left).exists()]
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=8) as pool:
        for line in pool.imap_unordered(action, tasks):
            print(line, flush=True)


if __name__ == "__main__":
    main()
