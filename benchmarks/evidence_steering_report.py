"""Tables and the figure of docs/evidence.md from the results of `evidence_steering.py`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from evidence_report import fill
from evidence_runs import ARMS, DEFAULT, STARTS, WORST
from matplotlib.figure import Figure
from scipy.stats import t as student

__all__ = ["interval", "loss_of", "paired", "plateau", "tables", "write"]

Entries = Sequence[Mapping[str, Any]]
SHALLOW, SHORT = 6, 300
SEEDS = (0, 1, 2)
NEAR = 0.02  # nats
COLOURS = {"off": "#7f7f7f", "scales": "#e69f00", "band": "#d55e00", DEFAULT: "#0072b2", "placebo": "#009e73"}


def loss_of(entry: Mapping[str, Any]) -> float:
    """Return the validation loss in nats per byte; a run that diverged counts as one that guesses."""
    loss = entry["validation"]
    return WORST if loss is None else min(loss, WORST)


def diverged(entry: Mapping[str, Any]) -> bool:
    """Whether a run ended worse than guessing, or in no number at all."""
    return entry["validation"] is None or entry["validation"] > WORST


def chosen(entries: Entries, **values: Any) -> list[Mapping[str, Any]]:
    """Return the entries that have these values."""
    return [entry for entry in entries if all(entry[name] == value for name, value in values.items())]


def by_rate(entries: Iterable[Mapping[str, Any]]) -> dict[float, dict[int, float]]:
    """Return losses by rate and seed."""
    found: dict[float, dict[int, float]] = defaultdict(dict)
    for entry in entries:
        found[entry["rate"]][entry["seed"]] = loss_of(entry)
    return dict(sorted(found.items()))


def best(losses: Mapping[float, Mapping[int, float]]) -> float:
    """Return the rate with the smallest mean loss, over the seeds that all rates have."""
    common = set.intersection(*(set(seeds) for seeds in losses.values()))
    return min(losses, key=lambda rate: fmean(losses[rate][seed] for seed in common))


def plateau(losses: Mapping[float, Mapping[int, float]]) -> float:
    """Return the largest over the smallest of the neighbouring rates whose mean loss is within 0.02 of the best."""
    means = {rate: fmean(seeds.values()) for rate, seeds in sorted(losses.items())}
    rates, top = [*means], min(means, key=lambda rate: means[rate])
    low = high = rates.index(top)
    while low > 0 and means[rates[low - 1]] <= means[top] + NEAR:
        low -= 1
    while high < len(rates) - 1 and means[rates[high + 1]] <= means[top] + NEAR:
        high += 1
    return rates[high] / rates[low]


def paired(ones: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Return the differences of two arms, by seed."""
    return [ones[seed] - others[seed] for seed in sorted(set(ones) & set(others))]


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and both ends of Student's 95 % interval."""
    mean, count = fmean(differences), len(differences)
    if count < 2:
        return mean, -math.inf, math.inf
    half = float(student.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half


def signed(value: float) -> str:
    """Return three digits and a sign."""
    return f"{value:+.3f}".replace("-", "−")


def difference(ones: Mapping[int, float], others: Mapping[int, float]) -> str:
    """Return a cell: mean, interval, and how many of the pairs are better."""
    pairs = paired(ones, others)
    if not pairs:
        return "–"
    mean, low, high = interval(pairs)
    better = f"{sum(value < 0 for value in pairs)} of {len(pairs)}"
    ends = f" [{signed(low)}, {signed(high)}]" if len(pairs) > 3 else ""
    return f"{signed(mean)}{ends}, {better}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bars_table(entries: Entries) -> str:
    """Compare the default law with "off" at fixed rates, over all seeds there are."""
    rows = []
    for start in STARTS:
        here = chosen(entries, start=start, layers=SHALLOW, steps=SHORT)
        off, on = (by_rate(chosen(here, arm=arm)) for arm in ("off", DEFAULT))
        for rate in sorted(set(off) & set(on)):
            runs = chosen(here, arm=DEFAULT, rate=rate)
            inside = sum(run["inside"] == 1 for run in runs)
            cells = (f"{fmean(off[rate].values()):.3f}", difference(on[rate], off[rate]))
            rows.append([start, f"{rate:g}", *cells, f"{inside} of {len(runs)}"])
    return table(["start", "rate", "off", f"{DEFAULT} − off, pairs better", "runs with every block inside"], rows)


def grid_table(entries: Entries, start: str, *, layers: int, steps: int) -> str:
    """Compare every arm at its best rate with "off" at its best."""
    here = [run for run in chosen(entries, start=start, layers=layers, steps=steps) if run["seed"] in SEEDS]
    off, rows = by_rate(chosen(here, arm="off")), []
    if not off:
        return ""
    for arm in ARMS:
        runs = chosen(here, arm=arm)
        losses = by_rate(runs)
        if not losses:
            continue
        rate = best(losses)
        inside = fmean(run["inside"] or 0.0 for run in runs)
        spikes = [run["spike"] for run in runs if run["spike"] is not None]
        rows.append(
            [
                arm,
                f"{rate:g}",
                f"{fmean(losses[rate].values()):.3f}",
                difference(losses[rate], off[best(off)]),
                f"{plateau(losses):g}×",
                f"{inside:.0%}",
                f"{median(spikes):.2f}",
                f"{sum(map(diverged, runs))} of {len(runs)}",
            ]
        )
    head = ["arm", "best rate", "loss", "− off at its best", "plateau", "blocks inside", "median spike", "diverged"]
    return table(head, rows)


def regime_table(entries: Entries, start: str, layers: int) -> str:
    """Compare the default law with "off" at every rate, and count the runs that diverged."""
    here, rows = chosen(entries, start=start, layers=layers, steps=SHORT), []
    for rate in sorted({run["rate"] for run in here}):
        off, on = (chosen(here, arm=arm, rate=rate) for arm in ("off", DEFAULT))
        losses = [{run["seed"]: loss_of(run) for run in runs} for runs in (off, on)]
        if all(losses):
            failed = [f"{sum(map(diverged, runs))} of {len(runs)}" for runs in (off, on)]
            rows.append(
                [f"{rate:g}", *(f"{fmean(one.values()):.3f}" for one in losses), difference(*losses[::-1]), *failed]
            )
    head = ["rate", "off", DEFAULT, f"{DEFAULT} − off, pairs better", "diverged, off", f"diverged, {DEFAULT}"]
    return table(head, rows) if rows else ""


def tables(entries: Entries) -> dict[str, str]:
    """Return the tables of the page, by the names of their places."""
    found = {"steering bars": bars_table(entries)}
    for start in STARTS:
        found[f"steering grid, {start}"] = grid_table(entries, start, layers=SHALLOW, steps=SHORT)
    for steps in (1000, 3000):
        for start in ("healthy", "MLP 8×"):
            found[f"steering {steps}, {start}"] = grid_table(entries, start, layers=SHALLOW, steps=steps)
    for regime, layers in (("no norms", 2 * SHALLOW), ("Muon", SHALLOW)):
        found[f"steering {regime}"] = regime_table(entries, regime, layers)
    found["steering deep"] = grid_table(entries, "healthy", layers=24, steps=SHORT)
    return {name: text for name, text in found.items() if text}


def draw(entries: Entries) -> Figure:
    """Draw the loss over the rate, a panel per start, a line per arm: mean and range of the seeds."""
    figure = Figure(figsize=(10.0, 3.4), dpi=100, layout="constrained")
    grid = figure.subplots(1, len(STARTS), sharey=True)
    for axes, start in zip(grid, STARTS, strict=True):
        here = [run for run in chosen(entries, start=start, layers=SHALLOW, steps=SHORT) if run["seed"] in SEEDS]
        for arm, colour in COLOURS.items():
            losses = by_rate(chosen(here, arm=arm))
            if losses:
                middle = [fmean(seeds.values()) for seeds in losses.values()]
                low, high = ([end(seeds.values()) for seeds in losses.values()] for end in (min, max))
                axes.plot([*losses], middle, color=colour, marker="o", markersize=3, label=arm)
                axes.fill_between([*losses], low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(start, fontsize=10)
        rates = sorted({run["rate"] for run in here})
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate * 1e3:g}" for rate in rates])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("learning rate · 1000")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    grid[0].set_ylabel("validation loss, nats per byte")
    grid[0].legend(fontsize=8, frameon=False)
    return figure


def write(entries: Entries, out: Path, page: Path | None) -> None:
    """Print the tables, or write them into the page, and draw the figure beside its pictures."""
    found = tables(entries)
    for name, text in found.items():
        print(f"\n{name}\n{text}")
    figure = draw(entries)
    if page is None:
        figure.savefig(out / "evidence_rates.png")
    else:
        fill(page, found)
        figure.savefig(page.parent / "images" / "evidence_rates.png")
