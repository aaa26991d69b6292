"""Tables and figures of docs/evidence.md from the results of `evidence.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import evidence_statistics as statistics
import numpy as np
from evidence_statistics import METRICS, TIMES, Array, Results
from numpy.typing import NDArray

CONFIGURATION = ("layers", "mlp_gain", "attention_gain", "rate")
STRATUM = ("layers", "rate")
SIGNED = ": ln ρ"
SIDES = ("ρ < 1: tokens", "ρ < 1: loss", "ρ > 1: tokens", "ρ > 1: loss")
GAINS = {(1.0, 1.0): "as they are", (8.0, 1.0): "MLPs 8×", (1.0, 8.0): "attention 8×"}
GAINS |= {(32.0, 1.0): "MLPs 32×", (1.0, 32.0): "attention 32×"}


def analyse(training: Results, draws: int = 1000) -> dict[str, Any]:
    """Return every estimate with its interval, as plain values; a thousand draws take two minutes."""
    watched = [result for result in training if result["arm"] == "off"]
    tables = {time: statistics.predictors(watched, time) for time in TIMES}
    scores = {f"{time}: {name}": column for time in TIMES for name, column in tables[time].items()}
    for name, column in scores.items():
        if not np.isfinite(column).all():
            raise SystemExit(f"{name} could not be measured in every block of every run")
    signed = {name.removesuffix(SIGNED): column for name, column in scores.items() if name.endswith(SIGNED)}
    comparisons = len(kinds(watched)) * (len(scores) * len(METRICS) + len(signed) * len(SIDES))
    return {
        "runs": len(training),
        "watched": len(watched),
        "configurations": len(np.unique(statistics.configurations(watched, CONFIGURATION))),
        "minutes": sum(result["seconds"] for result in training) / 60,
        "draws": draws,
        "comparisons": comparisons,
        "sides": {rule: [int((column < 0).sum()), int((column > 0).sum())] for rule, column in signed.items()},
        **prediction(watched, scores, signed, draws, comparisons),
        "same ratio": same_ratio(watched, 10 * draws),
        "steering": steering(training, 10 * draws),
    }


def kinds(watched: Results) -> dict[str, tuple[bool, NDArray[np.bool_]]]:
    """Return the kinds of comparison: whether outcomes are relative to depth and rate, and which runs are compared.

    These are all runs, those whose attention did not start too strong, and those of each rate.
    """
    every = np.ones(len(watched), dtype=bool)
    plain = np.array([result["attention_gain"] <= 1 for result in watched])
    rates = np.array([result["rate"] for result in watched])
    found = {"pooled": (False, every), "within": (True, every), "within, plain attention": (True, plain)}
    return found | {f"rate {rate:g}": (True, rates == rate) for rate in np.unique(rates)}


def prediction(
    watched: Results, scores: Mapping[str, Array], signed: Mapping[str, Array], draws: int, comparisons: int
) -> dict[str, Any]:
    """Return what predicts what, for every kind of comparison."""
    matrix, signs = np.column_stack([*scores.values()]), np.column_stack([*signed.values()])
    found: dict[str, Any] = {}
    for kind, (relative, chosen) in kinds(watched).items():
        runs = [result for result, here in zip(watched, chosen, strict=True) if here]
        clusters, strata = (statistics.configurations(runs, names) for names in (CONFIGURATION, STRATUM))
        bad = statistics.outcomes(runs)
        if relative:
            bad = {name: statistics.within(values, strata) for name, values in bad.items()}
        of_outcomes = statistics.associations(bad["tokens"][:, None], bad)
        for name, statistic, rows, columns, null in (
            (kind, statistics.associations(matrix[chosen], bad), scores, METRICS, statistics.NULL),
            (f"{kind}, by side", statistics.sided(signs[chosen], bad), signed, SIDES, np.zeros(4)),
            (f"{kind}, outcomes", of_outcomes, ["tokens"], METRICS, statistics.NULL),
        ):
            values = statistics.bootstrapped(statistic, clusters, draws)
            found[name] = described(values, [*rows], columns, null, comparisons)
    return found


def same_ratio(watched: Results, draws: int) -> list[dict[str, Any]]:
    """Compare runs that start from one ratio, reached by the one branch or by the other, of all rates and of each."""
    lines: list[dict[str, Any]] = []
    rates = sorted({result["rate"] for result in watched})
    for gain in sorted({max(result["mlp_gain"], result["attention_gain"]) for result in watched} - {1.0}):
        for strong, weak in (((1.0, gain), (1 / gain, 1.0)), ((gain, 1.0), (1.0, 1 / gain))):
            for rate in (None, *rates):
                part = [result for result in watched if rate in (None, result["rate"])]
                line: dict[str, Any] = {"strong": strong, "weak": weak, "rate": rate}
                for name in ("tokens", "loss"):
                    differences, runs = statistics.matched(part, strong, weak, name)
                    if len(runs):
                        line |= {"pairs": len(runs), name: interval_of(differences, runs, STRATUM, draws)}
                lines += [line] if "loss" in line else []
    return lines


def interval_of(differences: Array, runs: Results, names: Sequence[str], draws: int) -> list[float]:
    """Return the mean of differences, the ends of its interval, which resamples whole clusters, and their range."""
    clusters = statistics.configurations(runs, names)
    value, low, high, _ = statistics.bootstrapped(statistics.mean_of(differences), clusters, draws)
    return [float(number) for number in (value, low, high, differences.min(), differences.max())]


def described(
    found: tuple[Array, Array, Array, Array], rows: Sequence[str], columns: Sequence[str], null: Array, comparisons: int
) -> dict[str, dict[str, list[float | bool]]]:
    """Name a table of estimates: each becomes value, both ends of its interval, and whether it survives Bonferroni."""
    value, low, high, error = found
    sure = statistics.survives(value, error, null, comparisons)
    return {
        row: {
            column: [float(value[i, j]), float(low[i, j]), float(high[i, j]), bool(sure[i, j])]
            for j, column in enumerate(columns)
        }
        for i, row in enumerate(rows)
    }


def steering(training: Results, draws: int) -> list[dict[str, Any]]:
    """Return the differences between each arm and the same runs left alone, by rate, and by rate and gains."""
    lines: list[dict[str, Any]] = []
    for arm in ("both", "guard", "low", "mlp"):
        treated = [result for result in training if result["arm"] == arm]
        for gains in (None, *GAINS):
            part = [r for r in treated if gains is None or (r["mlp_gain"], r["attention_gain"]) == gains]
            rates = sorted({result["rate"] for result in part})
            lines += [compared(training, arm, gains, rate, draws) for rate in (*rates, *([None] if rates else []))]
    return lines


def compared(
    training: Results, arm: str, gains: tuple[float, float] | None, rate: float | None, draws: int
) -> dict[str, Any]:
    """Return one line: mean paired differences, with intervals that resample configurations."""
    part = [
        result
        for result in training
        if (gains is None or (result["mlp_gain"], result["attention_gain"]) == gains)
        and (rate is None or result["rate"] == rate)
    ]
    line: dict[str, Any] = {"arm": arm, "gains": "all" if gains is None else GAINS[gains], "rate": rate}
    for name in ("validation", "spike"):
        differences, treated = statistics.paired(part, arm, name)
        line[name] = interval_of(differences, treated, CONFIGURATION, draws)
        line["pairs"] = len(differences)
        line["configurations"] = len(np.unique(statistics.configurations(treated, CONFIGURATION)))
    return line


def cell(value: float, low: float, high: float, *flags: bool, digits: int = 2) -> str:
    """Write an estimate and its interval; bold where it survives the correction."""
    if math.isnan(value):
        return "–"
    text = f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")
    return f"**{text}**" if flags and flags[0] else text


def ranged(value: float, low: float, high: float, least: float, most: float) -> str:
    """Write the mean of a few differences and their range, where an interval would claim too much."""
    return f"{value:+.3f} ({least:+.3f} to {most:+.3f})".replace("-", "−")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def prediction_table(analysis: Mapping[str, Any], kind: str, time: str, *, short: bool = False) -> str:
    """Write all predictors of one time, or only ln ρ and the token residual."""
    rows = [
        [name.removeprefix(f"{time}: ").replace("|", r"\|"), *(cell(*columns[metric]) for metric in METRICS)]
        for name, columns in analysis[kind].items()
        if name.startswith(time) and (not short or name.endswith((SIGNED, "last block")))
    ]
    return markdown(["predictor", *METRICS], rows)


def side_table(analysis: Mapping[str, Any], time: str) -> str:
    """Write how distance from 1 goes with the outcomes on each side, outcomes within depth and rate."""
    rows = []
    for name, columns in analysis["within, by side"].items():
        if name.startswith(time):
            below, above = analysis["sides"][name]
            rows.append([name.removeprefix(f"{time}: "), f"{below} / {above}", *(cell(*columns[s]) for s in SIDES)])
    return markdown(["rule", "runs with ρ < 1 / > 1", *SIDES], rows)


def rate_table(analysis: Mapping[str, Any], time: str) -> str:
    """Write how ln ρ and the token residual go with both outcomes at each rate."""
    rates = [kind for kind in analysis if kind.startswith("rate ") and "," not in kind]
    names = [name for name in analysis["within"] if name.startswith(time) and name.endswith((SIGNED, "last block"))]
    rows = [
        [
            name.removeprefix(f"{time}: "),
            *(cell(*analysis[rate][name][metric]) for metric in METRICS[:2] for rate in rates),
        ]
        for name in names
    ]
    outcomes = [metric.removeprefix("Spearman, ") for metric in METRICS[:2]]
    return markdown(["predictor", *(f"{outcome}, {rate}" for outcome in outcomes for rate in rates)], rows)


def same_ratio_table(analysis: Mapping[str, Any]) -> str:
    """Write the differences between a branch made strong and the other made weak."""
    rows = []
    for line in analysis["same ratio"]:
        (mlp, attention), (weak_mlp, weak_attention) = line["strong"], line["weak"]
        strong = f"attention × {attention:g}" if attention > 1 else f"MLPs × {mlp:g}"
        weak = f"MLPs / {1 / weak_mlp:g}" if weak_mlp < 1 else f"attention / {1 / weak_attention:g}"
        value, low, high, least, most = line["tokens"]
        residual = (-value, -high, -low, -most, -least)  # from minus a residual to a residual
        every = line["rate"] is None
        values = [cell(*v[:3], digits=3) if every else ranged(*v) for v in (residual, line["loss"])]
        rows.append([f"{strong} − {weak}", "all" if every else f"{line['rate']:g}", str(line["pairs"]), *values])
    return markdown(["start", "rate", "pairs", "Δ final token residual", "Δ validation loss"], rows)


def steering_table(analysis: Mapping[str, Any], *, detailed: bool) -> str:
    """Write the differences, over all gains or for each."""
    rows = []
    for line in analysis["steering"]:
        if (line["gains"] != "all") != detailed or (detailed and line["rate"] is None):
            continue
        rate = "all" if line["rate"] is None else f"{line['rate']:g}"
        measured = (line["validation"], line["spike"])
        if detailed:
            rows.append([line["gains"], rate, line["arm"], str(line["pairs"]), *(ranged(*m) for m in measured)])
        else:
            pairs = f"{line['pairs']} / {line['configurations']}"
            rows.append([rate, line["arm"], pairs, *(cell(*m[:3], digits=3) for m in measured)])
    rows.sort(key=lambda row: row[: 2 if detailed else 1])
    if detailed:
        return markdown(["branches start", "rate", "arm", "pairs", "Δ validation loss", "Δ spike"], rows)
    return markdown(["rate", "arm", "pairs / configurations", "Δ validation loss", "Δ spike"], rows)


def synthetic_table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Write mean ± standard deviation over the seeds: a row per ratio, a column per kind of bases."""
    ratios = sorted({ratio for column in found.values() for ratio in column}, key=float)
    rows = [[ratio, *(spread(column.get(ratio, ())) for column in found.values())] for ratio in ratios]
    return markdown(["ρ", *(kind.replace("bulk=0.", "bulk 0.").replace(" bulk=0", "") for kind in found)], rows)


def spread(values: Sequence[float]) -> str:
    """Write mean ± standard deviation."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=len(values) > 1):.1f}" if values else ""


def fill(path: Path, tables: Mapping[str, str]) -> None:
    """Put each table between its markers, `<!-- begin: name -->` and `<!-- end: name -->`.

    Raises:
        SystemExit: The page has no such markers.
    """
    page = path.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if begin not in page or end not in page:
            raise SystemExit(f"{path} has no place for the table {name!r}: expected {begin} … {end}")
        before, rest = page.split(begin, 1)
        page = f"{before}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}"
    path.write_text(page)


def tables(analysis: Mapping[str, Any], synthetic: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, str]:
    """Return every table of the page, by the name of its markers."""
    return {
        "synthetic": synthetic_table(synthetic),
        "step 50, pooled": prediction_table(analysis, "pooled", "early"),
        "step 50, within": prediction_table(analysis, "within", "early"),
        "step 50, plain attention": prediction_table(analysis, "within, plain attention", "early", short=True),
        "step 0, within": prediction_table(analysis, "within", "initial"),
        "rates": rate_table(analysis, "early"),
        "sides": side_table(analysis, "early"),
        "same ratio": same_ratio_table(analysis),
        "steering": steering_table(analysis, detailed=False),
        "steering by gains": steering_table(analysis, detailed=True),
    }
