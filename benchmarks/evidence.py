"""Do the ratios foretell anything, and does steering them help? Experiments on small models; see docs/evidence.md.

    python benchmarks/evidence.py              # whatever is not in benchmarks/results yet, then the report
    python benchmarks/evidence.py --report     # only the tables and figures of docs/evidence.md
    python benchmarks/evidence.py --quick      # a few tiny runs in runs/evidence, to see that it works

All of it takes about half an hour of one core. Every finished run is saved at once, and a second call goes on where the
first was stopped. Results of another recipe, another Python (whose library is the text) or another torch are refused.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import evidence_figures as figures
import evidence_report
import torch
from evidence_synthetic import DEPTH, cases, grouped, least_rank
from evidence_training import Recipe, Run, read_texts, train
from machine import describe

ROOT = Path(__file__).parents[1]
LAYERS, RATES, SEEDS = (4, 8), (1e-3, 3e-3, 8e-3), (0, 1, 2)
# Gains of the MLP and of attention at initialization.
GAINS = ((1.0, 1.0), *(pair for gain in (1 / 32, 1 / 8, 8.0, 32.0) for pair in ((gain, 1.0), (1.0, gain))))
STEERED_GAINS = ((1.0, 1.0), (8.0, 1.0), (1.0, 8.0))
STEERED_ARMS = ("both", "guard", "low", "mlp")


class Results:
    """A file of finished work. It is replaced as a whole, so that an interrupted write leaves the old one.

    Args:
        path: The file, which need not exist.
        recipe: What its entries have in common.

    Raises:
        SystemExit: The file holds entries of another recipe.
    """

    def __init__(self, path: Path, recipe: dict[str, Any]) -> None:
        self.path, self.recipe, self.machine = path, recipe, describe()
        self.entries: dict[str, Any] = {}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["recipe"] != recipe:
                raise SystemExit(f"{path} holds {kept['recipe']}, this is {recipe}: choose another --out")
            self.machine, self.entries = kept["machine"], kept["entries"]

    def add(self, key: str, entry: Any) -> None:
        """Save one more entry, one line of the file."""
        self.entries[key] = rounded(entry)
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(self.entries.items())]
        head = f'{{"recipe": {json.dumps(self.recipe)},\n"machine": {json.dumps(self.machine)},\n"entries": {{\n'
        written = self.path.with_suffix(".part")
        written.write_text(head + ",\n".join(lines) + "\n}}\n")
        os.replace(written, self.path)  # noqa: PTH105


def rounded(value: Any) -> Any:
    """Round every float to six digits, which is more than any of them means."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def work(results: Results, jobs: Sequence[tuple[str, float, Callable[[], Any]]]) -> None:
    """Do the jobs that are not done yet: each has a key, a size that its time is proportional to, and a function."""
    missing = [job for job in jobs if job[0] not in results.entries]
    left, spent, done = sum(size for _, size, _ in missing), 0.0, 0.0
    print(f"{results.path.name}: {len(jobs) - len(missing)} of {len(jobs)} done", flush=True)
    for number, (key, size, action) in enumerate(missing, 1):
        began = time.perf_counter()
        results.add(key, action())
        spent, done, left = spent + time.perf_counter() - began, done + size, left - size
        print(f"{number:>4} of {len(missing)}, {left * spent / done / 60:5.1f} minutes left: {key}", flush=True)


def grid(*, quick: bool) -> list[Run]:
    """Return all runs, in the order in which they are done: a whole grid per seed."""
    layers, rates, seeds = ((2,), (3e-3,), (0, 1)) if quick else (LAYERS, RATES, SEEDS)
    runs = []
    for seed, rate, depth in product(seeds, rates, layers):
        runs += [Run(depth, *gains, rate, seed) for gains in (STEERED_GAINS if quick else GAINS)]
        runs += [Run(depth, *gains, rate, seed, arm) for gains in STEERED_GAINS for arm in STEERED_ARMS]
    return runs


def training(out: Path, *, quick: bool) -> None:
    """Train whatever is missing."""
    recipe = Recipe(16, 2, 16, 4, 12, 4, 3, 8, 2) if quick else Recipe()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    results = Results(out / "evidence_training.json", asdict(recipe) | versions)
    texts = read_texts(recipe)
    jobs = [(run.key, run.layers, lambda run=run: train(run, recipe, texts)) for run in grid(quick=quick)]
    work(results, jobs)


def simulation(out: Path, *, quick: bool) -> None:
    """Do whatever is missing of the synthetic experiment."""
    results = Results(out / "evidence_synthetic.json", {"width": 32 if quick else 512, "layers": DEPTH})
    jobs = [(case.key, 1.0, lambda case=case: least_rank(case, results.recipe["width"])) for case in cases(quick=quick)]
    work(results, jobs)


def report(out: Path, page: Path | None, draws: int) -> None:
    """Write every estimate, the figures and, into the page, the tables."""
    synthetic, training = (
        json.loads((out / f"evidence_{name}.json").read_text())["entries"] for name in ("synthetic", "training")
    )
    found, runs = grouped(synthetic), list(training.values())
    analysis = evidence_report.analyse(runs, draws)
    (out / "evidence_statistics.json").write_text(json.dumps(rounded(analysis), indent=1) + "\n")
    written = evidence_report.tables(analysis, found)
    images = out if page is None else page.parent / "images"
    for name, figure in (
        ("synthetic", figures.synthetic_figure(found)),
        ("prediction", figures.prediction_figure(runs)),
        ("steering", figures.steering_figure(runs, evidence_report.GAINS)),
    ):
        figure.savefig(images / f"evidence_{name}.png")
    if page is not None:
        evidence_report.fill(page, written)
    print("\n\n".join(f"{name}\n\n{table}" for name, table in written.items()))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["synthetic", "training"], help="one of the two experiments, no report")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report")
    parser.add_argument("--quick", action="store_true", help="a few tiny runs")
    parser.add_argument("--out", type=Path, help="folder of the results")
    return parser.parse_args()


def main() -> None:
    """Do what is missing, then report."""
    args = parse()
    torch.set_num_threads(1)
    out = args.out or ROOT / ("runs/evidence" if args.quick else "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    for name, experiment in (("synthetic", simulation), ("training", training)):
        if not args.report and args.only in (None, name):
            experiment(out, quick=args.quick)
    if args.only is None:
        page = None if args.quick or args.out else ROOT / "docs" / "evidence.md"
        report(out, page, draws=50 if args.quick else 1000)


if __name__ == "__main__":
    main()
