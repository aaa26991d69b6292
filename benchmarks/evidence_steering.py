"""Does steering help, and what would help as much? Many small runs; see docs/evidence.md.

    python benchmarks/evidence_steering.py                  # what is not in benchmarks/results yet, then the report
    python benchmarks/evidence_steering.py --report         # only the tables and the figure of docs/evidence.md
    python benchmarks/evidence_steering.py --quick          # a few tiny runs in runs/evidence, to see that it works

Every finished run is one line of `evidence_steering.jsonl`, and a second call goes on where the first was stopped.

The plan of the analysis, which was written before the runs:

* **Outcome.** Validation loss at the end, in nats per byte, on 512 held-out windows. A run whose loss is not finite or
  above ln 256, that of guessing, has diverged; it counts as ln 256 in means.
* **Pairs.** An arm is compared with "off" by the differences of runs with one start, depth, rate and seed: the same
  weights at the start and the same batches. Intervals are Student's, 95 %, over the pairs.
* **Best against best.** Each arm at its own best rate, by the mean over its seeds, against "off" at its best rate,
  paired by seed. All arms have the same rates to choose from, a quarter to four times the best rate of "off".
* **Plateau.** The largest over the smallest rate whose mean loss is within 0.02 nats of the arm's best.
* **Inside.** Share of all blocks at all measurements, every 10 steps from step 100 on, with a ratio inside (0.5, 2);
  and the share of runs in which that was all of them.
* **Spike.** The largest rise of the training loss above its smallest value so far, after step 10.
* **The bars** of the default law, at the healthy start: mean difference at the tuned rate of "off" at most 0.005 nats,
  and the upper end of its interval at most 0.02; at twice and four times that rate, an interval below 0. At wrong
  starts, not worse than "off" at its tuned rate. Every block inside from step 100 on.
* **Changes.** The plan was changed once, after the first seed of the grid and 32 runs of 1,000 steps. κ = 3 had been
  the default; κ = 1 did better and became it. The margin went from 0.2 to 0.35, because ratios left the safe zone
  between two measurements. All runs of the ceiling law were done again. κ = 0.3 and `balance_init_` were added.
  Learned scales with κ = 3 and 10 were dropped: they differed from scales that do not learn by a median of 0.006 and
  0.012 nats.
* **Regimes** in which others saw training fail: 12 blocks without norms, and Muon at rates up to 16 times the best of
  AdamW. Counted is how many runs diverge.
* **Placebo.** The scales of the default law, averaged over blocks and seeds, as a function of the step alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import evidence_steering_report as report
import torch
from evidence_runs import ARMS, DEFAULT, STARTS, Job, Recipe, read_texts, train
from evidence_steering_report import loss_of
from machine import describe

ROOT = Path(__file__).parents[1]
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)  # 4e-3 was the best of "off" in a trial of 2 seeds
SEEDS = (0, 1, 2)
MANY = tuple(range(10))
MATTER = ("off", "scales", DEFAULT, "placebo", "LayerScale 0.1")
LONG = ("off", "scales", "band", DEFAULT, "ceiling 3", "placebo", "start 1", "LayerScale 0.1", "depth-scaled rate")
DEEP = ("off", "scales", "band", DEFAULT, "ceiling 3", "ceiling 10", "placebo")
Done = Mapping[Job, Mapping[str, Any]]


class Results:
    """A file of finished runs, one line each, behind one line that says what they have in common.

    Args:
        path: The file, which need not exist.
        recipe: What its runs have in common.

    Raises:
        SystemExit: The file holds runs of another recipe.
    """

    def __init__(self, path: Path, recipe: dict[str, Any]) -> None:
        self.path, self.recipe = path, recipe
        self.entries: dict[Job, dict[str, Any]] = {}
        if not path.exists():
            path.write_text(json.dumps({"recipe": recipe, "machine": describe()}) + "\n")
        head, *lines = path.read_text().splitlines()
        if json.loads(head)["recipe"] != recipe:
            raise SystemExit(f"{path} holds {json.loads(head)['recipe']}, this is {recipe}: choose another --out")
        for line in lines:
            entry = json.loads(line)
            self.entries[job_of(entry)] = entry

    def add(self, entry: dict[str, Any]) -> None:
        """Append one run."""
        entry = rounded(entry)
        self.entries[job_of(entry)] = entry
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def job_of(entry: Mapping[str, Any]) -> Job:
    """Return the job that an entry is the result of."""
    return Job(**{name: entry[name] for name in Job.__slots__})


def rounded(value: Any) -> Any:
    """Round every float to six digits, which is more than any of them means."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def stages(done: Done, *, quick: bool) -> Iterator[list[Job]]:
    """Yield lists of jobs; each may look at the results of those before it. Placebos come after what they copy."""
    rates, seeds, steps = ((2e-3,), (0, 1), (12, 12)) if quick else (RATES, SEEDS, (300, 1000))
    layers, deep = (2, 3) if quick else (6, 24)
    many = seeds if quick else MANY
    yield [  # the bars, at the rate that was the best of "off" in the trial, and above
        Job(arm, "healthy", layers, steps[0], rate, seed)
        for seed, rate, arm in product(many, rates[-3:], ("off", DEFAULT))
    ]
    yield from placebo_last(
        [
            Job(arm, "healthy", layers, steps[1], rate, seed)
            for seed, rate, arm in product(seeds, rates[1:] or rates, MATTER)
        ]
    )
    if not quick:
        yield from placebo_last(
            [
                Job(arm, "healthy", layers, 3000, best_rate(done, arm, "healthy", layers, 1000), seed)
                for seed, arm in product(seeds, MATTER)
            ]
        )
    yield from placebo_last(
        [
            Job(arm, "healthy", deep, steps[0], rate, seed)
            for seed, rate, arm in product(seeds, rates[1::2] or rates, DEEP)
        ]
    )
    yield from placebo_last(
        [
            Job(arm, start, layers, steps[0], rate, seed)
            for seed, start, rate, arm in product(seeds, STARTS, rates, ARMS)
        ]
    )
    tuned = {start: best_rate(done, "off", start, layers, steps[0]) for start in STARTS}
    yield [
        Job(arm, start, layers, steps[0], tuned[start], seed)
        for seed, start, arm in product(many, STARTS, ("off", DEFAULT))
    ]
    regimes = (("no norms", 2 * layers, rates), ("Muon", layers, [4 * rate for rate in rates]))
    yield [
        Job(arm, start, depth, steps[0], rate, seed)
        for seed, (start, depth, chosen) in product(seeds, regimes)
        for rate, arm in product(chosen, ("off", DEFAULT))
    ]
    yield from placebo_last(
        [
            Job(arm, start, layers, steps[1], rate, seed)
            for seed, start, rate, arm in product(seeds, ("healthy", "MLP 8×"), rates[2:4] or rates, LONG)
        ]
    )


def placebo_last(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Split jobs: a placebo needs the runs of the default law of all seeds."""
    blind = [job for job in jobs if job.arm == "placebo"]
    copied = [Job(DEFAULT, job.start, job.layers, job.steps, job.rate, job.seed) for job in blind]
    yield list(dict.fromkeys([*(job for job in jobs if job.arm != "placebo"), *copied]))
    yield blind


def best_rate(done: Done, arm: str, start: str, layers: int, steps: int) -> float:
    """Return the rate with the smallest mean loss, over the first seeds."""
    found: dict[float, list[float]] = {}
    for job, entry in done.items():
        if (job.arm, job.start, job.layers, job.steps) == (arm, start, layers, steps) and job.seed in SEEDS:
            found.setdefault(job.rate, []).append(loss_of(entry))
    return min(found, key=lambda rate: fmean(found[rate]))


def schedule_for(job: Job, done: Done) -> dict[str, Any] | None:
    """Return the mean scales of the runs of the default law that a placebo is a copy of."""
    if job.arm != "placebo":
        return None
    twins = [
        entry
        for twin, entry in done.items()
        if twin.arm == DEFAULT
        and twin.seed in SEEDS
        and (twin.start, twin.layers, twin.steps, twin.rate) == (job.start, job.layers, job.steps, job.rate)
    ]
    mean = [
        [fmean(kind) for kind in zip(*moment, strict=True)]
        for moment in zip(*(twin["log_scales"] for twin in twins), strict=True)
    ]
    return {"measured": twins[0]["measured"], "log_scales": mean}


def begin(recipe: Recipe) -> None:
    """Prepare a worker."""
    global TEXTS  # read once per process
    torch.set_num_threads(1)
    TEXTS = read_texts(recipe)


def work(job: Job, recipe: Recipe, schedule: dict[str, Any] | None) -> dict[str, Any]:
    """Do one job in a worker."""
    return train(job, recipe, TEXTS, schedule)


def run(results: Results, recipe: Recipe, *, processes: int, quick: bool) -> None:
    """Do whatever is missing."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, begin, (recipe,)) as pool:
        for number, jobs in enumerate(stages(results.entries, quick=quick), 1):
            missing = [job for job in jobs if job not in results.entries]
            print(f"stage {number}: {len(jobs) - len(missing)} of {len(jobs)} done", flush=True)
            began = time.perf_counter()
            pending = [pool.submit(work, job, recipe, schedule_for(job, results.entries)) for job in missing]
            for count, future in enumerate(as_completed(pending), 1):
                results.add(future.result())
                left = (time.perf_counter() - began) / count * (len(missing) - count) / 60
                if count % 20 == 0:
                    print(f"{count:>4} of {len(missing)}, {left:5.1f} minutes left", flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only the tables and the figure")
    parser.add_argument("--quick", action="store_true", help="a few tiny runs")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, help="folder of the results")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then write the report."""
    args = parse()
    out = args.out or (ROOT / "runs" / "evidence" if args.quick else ROOT / "benchmarks" / "results")
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(16, 2, 16, 4, 3, 4, 8, 4) if args.quick else Recipe()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    results = Results(out / "evidence_steering.jsonl", asdict(recipe) | versions)
    if not args.report:
        run(results, recipe, processes=args.processes, quick=args.quick)
    page = None if args.quick else ROOT / "docs" / "evidence.md"
    report.write(list(results.entries.values()), out, page)


if __name__ == "__main__":
    main()
