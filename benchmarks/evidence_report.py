"""Tables and figures of docs/evidence.md from the results of `evidence.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import evidence_statistics as statistics
import numpy as np
from evidence_statistics import METRICS, TIMES, Array, Results

CONFIGURATION = ("layers", "mlp_gain", "attention_gain", "rate")
STRATUM = ("layers", "rate")
# Outcomes as they are, or relative to runs of the same depth and rate; all runs, or those whose attention did not start
# too strong.
KINDS = {"pooled": (False, False), "within": (True, False), "within, plain attention": (True, True)}
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
    comparisons = len(KINDS) * (len(scores) * len(METRICS) + len(signed) * len(SIDES))
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


def prediction(
    watched: Results, scores: Mapping[str, Array], signed: Mapping[str, Array], draws: int, comparisons: int
) -> dict[str, Any]:
    """Return what predicts what, for every kind of comparison."""
    matrix, signs = np.column_stack([*scores.values()]), np.column_stack([*signed.values()])
    found: dict[str, Any] = {}
    for kind, (relative, plain) in KINDS.items():
        chosen = np.array([not plain or result["attention_gain"] <= 1 for result in watched])
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
    """Compare runs that start from one ratio, reached by the one branch or by the other."""
    lines = []
    for gain in sorted({max(result["mlp_gain"], result["attention_gain"]) for result in watched} - {1.0}):
        for strong, weak in (((1.0, gain), (1 / gain, 1.0)), ((gain, 1.0), (1.0, 1 / gain))):
            line: dict[str, Any] = {"strong": strong, "weak": weak}
            for name in ("tokens", "loss"):
                differences, runs = statistics.matched(watched, strong, weak, name)
                if len(runs):
                    clusters = statistics.configurations(runs, STRATUM)
                    found = statistics.bootstrapped(statistics.mean_of(differences), clusters, draws)
                    line |= {name: [float(value) for value in found[:3]], "pairs": len(runs)}
            lines += [line] if "loss" in line else []
    return lines


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
    rows: list[dict[str, Any]] = []
    arms = [arm for arm in ("both", "guard", "low", "mlp") if any(result["arm"] == arm for result in training)]
    rates = sorted({result["rate"] for result in training})
    for arm in arms:
        treated = statistics.paired(training, arm, "validation")[1]
        seen = {(result["mlp_gain"], result["attention_gain"]) for result in treated}
        for gains in (None, *(pair for pair in GAINS if pair in seen)):
            rows += [compared(training, arm, gains, rate, draws) for rate in (*rates, None)]
    return rows


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
        clusters = statistics.configurations(treated, CONFIGURATION)
        found = statistics.bootstrapped(statistics.mean_of(differences), clusters, draws)
        line[name] = [float(value) for value in found[:3]]
        line[f"{name}_range"] = [float(differences.min()), float(differences.max())]
        line["pairs"], line["configurations"] = len(differences), len(np.unique(clusters))
    return line


def cell(value: float, low: float, high: float, *flags: bool, digits: int = 2) -> str:
    """Write an estimate and its interval; bold where it survives the correction."""
    if math.isnan(value):
        return "–"
    text = f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")
    return f"**{text}**" if flags and flags[0] else text


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


def same_ratio_table(analysis: Mapping[str, Any]) -> str:
    """Write the differences between a branch made strong and the other made weak."""
    rows = []
    for line in analysis["same ratio"]:
        (mlp, attention), (weak_mlp, weak_attention) = line["strong"], line["weak"]
        strong = f"attention × {attention:g}" if attention > 1 else f"MLPs × {mlp:g}"
        weak = f"MLPs / {1 / weak_mlp:g}" if weak_mlp < 1 else f"attention / {1 / weak_attention:g}"
        value, low, high = line["tokens"]
        tokens = cell(-value, -high, -low, digits=3)  # as token residuals
        rows.append([f"{strong} − {weak}", str(line["pairs"]), tokens, cell(*line["loss"], digits=3)])
    return markdown(["start", "pairs", "Δ final token residual", "Δ validation loss"], rows)


def steering_table(analysis: Mapping[str, Any], *, detailed: bool) -> str:
    """Write the differences, over all gains or for each."""
    rows = []
    for line in analysis["steering"]:
        if (line["gains"] != "all") != detailed or (detailed and line["rate"] is None):
            continue
        rate = "all" if line["rate"] is None else f"{line['rate']:g}"
        if detailed:
            values = [
                f"{line[name][0]:+.3f} ({line[f'{name}_range'][0]:+.3f} to {line[f'{name}_range'][1]:+.3f})"
                for name in ("validation", "spike")
            ]
            rows.append([line["gains"], rate, line["arm"], str(line["pairs"]), *values])
        else:
            values = [cell(*line[name], digits=3) for name in ("validation", "spike")]
            rows.append([rate, line["arm"], f"{line['pairs']} / {line['configurations']}", *values])
    rows.sort(key=lambda row: row[: 2 if detailed else 1])
    rows = [[value.replace("-", "−") for value in row] for row in rows]
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
        "sides": side_table(analysis, "early"),
        "same ratio": same_ratio_table(analysis),
        "steering": steering_table(analysis, detailed=False),
        "steering by gains": steering_table(analysis, detailed=True),
    }
