"""What repairs a training that fails: six remedies on sick trainings of the register of failures.

    python benchmarks/remedies.py            # runs what is missing, about 15 minutes of one core, and prints the table

A remedy changes one thing of a sick training before its first step, or while it runs. A run is repaired where nothing
of `failures_check.verdict` is left. A finished run is a line of `results/remedies.jsonl`, and is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from failures import CASES, Case, Training
from failures.parts import Attention
from failures.register import warm_up
from failures_check import Outcome, judge, verdict
from machine import describe
from torch import nn

from lightning_spectral import GainCeiling, Watch, balance_init_
from lightning_spectral.errors import ConfigurationError

RESULTS = Path(__file__).parent / "results" / "remedies.jsonl"
NAMES = (
    *("post_norm_lm", "post_norm_class_token", "copied_layers", "masked_autoencoder", "detr_equal_queries"),
    *("bert_fine_tuning", "gpt_high_rate", "growing_logits", "deep_norm"),
)  # of the cases that rules were chosen on, those that fail by tokens, samples or logits
SEEDS = (0, 2, 4)


def longer_warm_up(training: Training) -> None:
    """Warm up over half of the run."""
    training.factor = warm_up(training.steps // 2)


def tenth_of_the_rate(training: Training) -> None:
    """Train at a tenth of the rate."""
    before = training.factor
    training.factor = lambda step: 0.1 * before(step)


def pre_norm(training: Training) -> None:
    """Put the norms of stock layers in front of their branches."""
    layers = [module for module in training.model.modules() if hasattr(module, "norm_first")]
    if not layers or all(layer.norm_first for layer in layers):
        raise NotImplementedError
    for layer in layers:
        layer.norm_first = True


def normalized_queries_and_keys(training: Training) -> None:
    """Normalize queries and keys; of the register's own attention alone."""
    layers = [module for module in training.model.modules() if isinstance(module, Attention)]
    if not layers or not isinstance(layers[0].q_norm, nn.Identity):
        raise NotImplementedError
    for layer in layers:
        width = layer.q.out_features // layer.heads
        layer.q_norm, layer.k_norm = (nn.RMSNorm(width, elementwise_affine=False) for _ in range(2))


def balanced_start(training: Training) -> None:
    """Begin with both branches of every block at the ceiling of the law; not a model that was trained before."""
    try:
        balance_init_(training.model, batch=training.inputs(training.held_out), gain=3.0)
    except ConfigurationError as error:
        raise NotImplementedError from error


def ceiling_law(training: Training) -> None:
    """Steer with the ceiling law, whose scales do not learn here."""


REMEDIES: dict[str, Callable[[Training], None]] = {
    "nothing": lambda training: None,
    "warm-up": longer_warm_up,
    "a tenth of the rate": tenth_of_the_rate,
    "pre-norm": pre_norm,
    "QK-norm": normalized_queries_and_keys,
    "balance_init_(gain=3)": balanced_start,
    "auto_rescale": ceiling_law,
}


def run(case: Case, remedy: str, seed: int) -> dict[str, Any] | None:
    """Train one sick twin with a remedy; ``None`` where the remedy has nothing to change."""
    training = case.begin(seed, True)
    try:
        REMEDIES[remedy](training)
    except NotImplementedError:
        return None
    model, losses = training.model, []
    start = [parameter.detach().clone() for parameter in model.parameters()]
    watch: Any = nullcontext()
    if remedy == "auto_rescale":
        law = GainCeiling(learnable=False)
        options = {"every_n_steps": 5, "auto_rescale": law, "optimizers": training.optimizer}
        watch = Watch(model, batch=training.inputs(training.held_out), geometry=False, **options)
    with watch:
        for step in range(training.steps):
            training.schedule(step)
            batch = training.batch(step)
            if remedy == "auto_rescale":
                watch.before_step(batch)
            loss = training.loss(batch)
            training.optimizer.zero_grad()
            loss.backward()
            if training.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            training.optimizer.step()
            if remedy == "auto_rescale":
                watch.step(step + 1)
            losses.append(loss.item())
    finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    moved = any(not torch.equal(old, new) for old, new in zip(start, model.parameters(), strict=False))
    outcome = Outcome(losses[0], mean(losses[-20:]), finite, moved, *judge(training), 0.0)
    signs = verdict(case, outcome)
    return {"case": case.name, "remedy": remedy, "seed": seed, "loss": outcome.last, "signs": signs}


def lines() -> Iterator[dict[str, Any]]:
    """Yield what has been run."""
    if RESULTS.exists():
        yield from map(json.loads, RESULTS.read_text().splitlines())


def table() -> str:
    """Return how many runs of each case were repaired by each remedy."""
    found: dict[tuple[str, str], list[bool]] = {}
    for line in lines():
        found.setdefault((line["case"], line["remedy"]), []).append(line["signs"] == "")
    rows = ["| case | " + " | ".join(REMEDIES) + " |", "|---" * (len(REMEDIES) + 1) + "|"]
    for name in NAMES:
        cells = [found.get((name, remedy)) for remedy in REMEDIES]
        shown = ("-" if cell is None else f"{sum(cell)} of {len(cell)}" for cell in cells)
        rows.append(f"| {name} | " + " | ".join(shown) + " |")
    totals = [[ok for (_, of), oks in found.items() if of == remedy for ok in oks] for remedy in REMEDIES]
    rows.append("| all | " + " | ".join(f"{sum(oks)} of {len(oks)}" if oks else "-" for oks in totals) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    logging.getLogger("lightning_spectral").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    print(describe())
    known = {(line["case"], line["remedy"], line["seed"]) for line in lines()}
    cases = {case.name: case for case in CASES}
    for seed, name, remedy in product(SEEDS, NAMES, REMEDIES):
        if (name, remedy, seed) not in known and (found := run(cases[name], remedy, seed)) is not None:
            with RESULTS.open("a") as file:
                file.write(json.dumps(found) + "\n")
    print(table())


if __name__ == "__main__":
    main()
