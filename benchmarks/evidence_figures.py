"""Figures of docs/evidence.md, in the palette of Okabe and Ito, made for colour blindness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import evidence_statistics as statistics
import numpy as np
from evidence_statistics import RULES, Results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

INK, ZONE = "#222222", "#f0e442"
COLOURS = ("#0072b2", "#e69f00", "#d55e00")  # blue, orange, vermilion: rates in rising order
MARKERS = ("o", "^", "s", "D")
ARMS = {
    "both": ("#0072b2", "o", "both sides"),
    "guard": ("#009e73", "s", "both sides, guarded"),
    "low": ("#e69f00", "^", "low side only"),
    "mlp": ("#cc79a7", "D", "MLP's scale only"),
}
KINDS = {
    "shared qr bulk=0": ("#0072b2", "-", "o", "shared basis, as stated"),
    "own qr bulk=0": ("#d55e00", "--", "s", "own bases, as stated"),
    "own qr bulk=0.28": ("#009e73", "-.", "^", "own bases, bulk = 0.28 · spike"),
}
# 'The 1:1 Rule', App. C: effective rank at ρ = 0.10, 0.97 and 20 with a basis for each branch.
PUBLISHED_CONTROL = ((0.10, 48.15), (0.97, 14.44), (20.0, 90.66))


def plain(axes: Axes) -> None:
    """Leave out what carries nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color="#999999", labelcolor=INK, labelsize=9)


def synthetic_figure(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw the effective rank over the ratio, for each kind of bases."""
    figure = Figure(figsize=(7.0, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0.5, 2.0, color=ZONE, alpha=0.35, linewidth=0, label="safe zone of the paper")
    for kind, (colour, dashes, marker, label) in KINDS.items():
        ratios = sorted(found[kind], key=float)
        values = [found[kind][ratio] for ratio in ratios]
        middle, deviation = [np.mean(v) for v in values], [np.std(v, ddof=len(v) > 1) for v in values]
        x = [float(ratio) for ratio in ratios]
        axes.errorbar(
            x, middle, deviation, color=colour, linestyle=dashes, marker=marker, markersize=5, capsize=3, label=label
        )
    axes.plot(*zip(*PUBLISHED_CONTROL, strict=True), "x", color=INK, markersize=9, label="own bases, as published")
    axes.set_ylim(bottom=0)
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20], ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("ρ, spike of the MLP over spike of attention", color=INK)
    axes.set_ylabel("least effective rank of the covariance\nover 24 layers, of 512", color=INK)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0.02, 0.98))
    plain(axes)
    return figure


def prediction_figure(training: Results) -> Figure:
    """Draw the end of every run over its ratios at the early step: a column per rule, a row per outcome."""
    watched = [result for result in training if result["arm"] == "off"]
    rates, depths = (sorted({result[name] for result in watched}) for name in ("rate", "layers"))
    early = statistics.predictors(watched, "early")
    figure = Figure(figsize=(10.5, 6.2), dpi=110, layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    for column, rule in zip(grid.T, ("circuit", "paper", "frobenius"), strict=True):
        x = np.exp(early[f"{RULES[rule]}: ln ρ"])
        for axes, (outcome, sign) in zip(column, (("tokens", -1.0), ("loss", 1.0)), strict=True):
            y = sign * statistics.outcomes(watched)[outcome]
            if rule != "frobenius":  # no safe zone is known for Jacobians
                axes.axvspan(0.5, 2.0, color=ZONE, alpha=0.35, linewidth=0, label="safe zone")
            for rate, colour in zip(rates, COLOURS, strict=False):
                for depth, marker in zip(depths, MARKERS, strict=False):
                    here = [result["rate"] == rate and result["layers"] == depth for result in watched]
                    axes.scatter(
                        x[here],
                        y[here],
                        s=16,
                        color=colour,
                        marker=marker,
                        alpha=0.75,
                        linewidths=0,
                        label=f"rate {rate:g}, {depth} blocks",
                    )
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(-8, 9, 2)]))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
            plain(axes)
        column[0].set_title(RULES[rule], color=INK, fontsize=11)
        column[1].set_xlabel("ratio at step 50, geometric mean over blocks", color=INK, fontsize=9)
    grid[0, 0].set_ylabel("token residual of the last block\nat the end", color=INK)
    grid[1, 0].set_ylabel("validation loss at the end,\nnats per byte", color=INK)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    return figure


def steering_figure(training: Results, gains: Mapping[tuple[float, float], str]) -> Figure:
    """Draw every paired difference of the validation loss: a panel per initialization, a group per learning rate."""
    treated = [result for result in training if result["arm"] != "off"]
    rates = sorted({result["rate"] for result in treated})
    arms = [arm for arm in ARMS if any(result["arm"] == arm for result in treated)]
    shown = [pair for pair in gains if any((r["mlp_gain"], r["attention_gain"]) == pair for r in treated)]
    figure = Figure(figsize=(3.4 * len(shown), 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, pair in zip(panels, shown, strict=True):
        axes.axhline(0.0, color="#999999", linewidth=0.8)
        for place, arm in enumerate(arms):
            colour, marker, label = ARMS[arm]
            differences, runs = statistics.paired(training, arm, "validation")
            offset = (place - (len(arms) - 1) / 2) * 0.22
            for number, rate in enumerate(rates):
                values = [
                    difference
                    for difference, run in zip(differences, runs, strict=True)
                    if run["rate"] == rate and (run["mlp_gain"], run["attention_gain"]) == pair
                ]
                if not values:
                    continue
                spread = number + offset + np.linspace(-0.05, 0.05, len(values))
                named = {"label": label} if number == 0 else {}
                axes.scatter(spread, values, s=16, color=colour, marker=marker, alpha=0.75, linewidths=0, **named)
                axes.hlines(np.mean(values), number + offset - 0.09, number + offset + 0.09, color=colour, linewidth=2)
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_xlabel("largest learning rate", color=INK)
        axes.set_title(f"branches start: {gains[pair]}", color=INK, fontsize=10)
        plain(axes)
    panels[0].set_ylabel("validation loss, steered − left alone,\nnats per byte", color=INK)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False
    )
    return figure
