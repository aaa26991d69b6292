"""Pure statistics of `evidence.py`: what predicts what, how far apart the arms are, and how sure that is.

A predictor and an outcome are oriented alike: larger is worse. Spearman correlations are then positive, and areas under
the ROC curve above 1/2, where the predictor warns of the outcome.

Runs that differ only by their seed are not independent draws of a configuration. The bootstrap therefore resamples
whole configurations.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, norm, spearmanr

Array = NDArray[np.float64]
Results = Sequence[Mapping[str, Any]]

RULES = {
    "circuit": "circuit ρ",
    "paper": "paper ρ",
    "jacobian": "Jacobian ρ, spectral",
    "frobenius": "Jacobian ρ, Frobenius",
    "update": "update ratio",
}
FORMS: dict[str, Callable[[Array], Array]] = {
    "ln ρ": lambda x: x,
    "|ln ρ|": np.abs,
    "max(0, ln ρ)": lambda x: np.maximum(x, 0.0),
    "max(0, −ln ρ)": lambda x: np.maximum(-x, 0.0),
}
TIMES = ("initial", "early")
EVENTS = {
    "tokens, lowest third": ("tokens", 2 / 3),
    "tokens, lowest quarter": ("tokens", 3 / 4),
    "loss, highest quarter": ("loss", 3 / 4),
}
METRICS = ("Spearman, tokens", "Spearman, loss", *(f"AUC, {name}" for name in EVENTS))
NULL = np.array([0.0, 0.0, 0.5, 0.5, 0.5])


def predictors(results: Results, time: str) -> dict[str, Array]:
    """Return the predictors of one time, by name, ``(runs,)`` each.

    A ratio is a number per block. A form of it is taken block by block and then averaged, so that blocks on both sides
    do not cancel in ``|ln ρ|``. Token residuals have a minus, because small ones are the warning.
    """
    table: dict[str, Array] = {}
    for rule, title in RULES.items():
        per_block = [np.asarray(result[time][rule], dtype=float) for result in results]
        table |= {
            f"{title}: {form}": np.array([function(x).mean() for x in per_block]) for form, function in FORMS.items()
        }
    residuals = [result[time]["token_residual"] for result in results]
    table["−token residual, last block"] = -np.array([values[-1] for values in residuals], dtype=float)
    table["−token residual, smallest"] = -np.array([min(values) for values in residuals], dtype=float)
    return table


def outcomes(results: Results) -> dict[str, Array]:
    """Return what is bad about the end of each run: ``"tokens"``, minus the last token residual, and ``"loss"``."""
    return {
        "tokens": -np.array([result["token_residual"][-1] for result in results], dtype=float),
        "loss": np.array([result["validation"] for result in results], dtype=float),
    }


def configurations(results: Results, names: Sequence[str]) -> NDArray[np.int64]:
    """Number the runs by what they share under these names, ``(runs,)``."""
    keys = [tuple(result[name] for name in names) for result in results]
    numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
    return np.array([numbers[key] for key in keys])


def within(values: Array, strata: NDArray[np.int64]) -> Array:
    """Subtract from every value the median of its stratum."""
    medians = {stratum: np.median(values[strata == stratum]) for stratum in np.unique(strata)}
    return np.asarray(values - np.array([medians[stratum] for stratum in strata]))


def roc_areas(label: NDArray[np.bool_], scores: Array) -> Array:
    """Return the area under the ROC curve of every column of ``scores``, NaN where there is only one class.

    It is the statistic of Mann and Whitney over the number of pairs. scikit-learn's function, which tests compare with,
    takes one column at a time and a hundred times as long.
    """
    if label.all() or not label.any():
        return np.full(scores.shape[1], math.nan)
    statistic = mannwhitneyu(scores[label], scores[~label], axis=0, method="asymptotic").statistic
    return np.asarray(statistic / (label.sum() * (~label).sum()))


def associations(scores: Array, bad: Mapping[str, Array]) -> Callable[[NDArray[np.int64]], Array]:
    """Return a function of the drawn runs that gives every metric of every predictor.

    Args:
        scores: ``(runs, predictors)``.
        bad: The outcomes. What counts as their worst part is decided once, on all runs.

    Returns:
        The function; its values are ``(predictors, metrics)``, NaN where a draw is constant.
    """
    # The outcomes first: where one of the first two columns is constant, scipy gives up on all of them.
    matrix = np.column_stack([bad["tokens"], bad["loss"], scores])
    labels = [bad[outcome] > np.quantile(bad[outcome], share) for outcome, share in EVENTS.values()]

    def at(drawn: NDArray[np.int64]) -> Array:
        with np.errstate(invalid="ignore"):
            correlations = spearmanr(matrix[drawn]).statistic[2:, :2]
        return np.column_stack([correlations, *(roc_areas(label[drawn], scores[drawn]) for label in labels)])

    return at


def sided(ratios: Array, bad: Mapping[str, Array]) -> Callable[[NDArray[np.int64]], Array]:
    """Return a function of the drawn runs: how distance from 1 goes with the outcomes, on each side by itself.

    Args:
        ratios: ``(runs, rules)``, ln ρ.
        bad: The outcomes.

    Returns:
        The function; its values are ``(rules, 4)``: Spearman of −ln ρ among runs with ρ < 1 with tokens and loss, and
        of ln ρ among runs with ρ > 1 with the same. NaN where a side has fewer than three different runs.
    """

    def at(drawn: NDArray[np.int64]) -> Array:
        rows = []
        for x in ratios[drawn].T:
            row = []
            for distance in (-x, x):
                side = distance > 0
                row += [_spearman(distance[side], bad[outcome][drawn][side]) for outcome in ("tokens", "loss")]
            rows.append(row)
        return np.array(rows)

    return at


def _spearman(x: Array, y: Array) -> float:
    return math.nan if min(len(np.unique(x)), len(np.unique(y))) < 3 else float(spearmanr(x, y).statistic)


def mean_of(values: Array) -> Callable[[NDArray[np.int64]], Array]:
    """Return a function of the drawn runs: the mean of their values."""
    return lambda drawn: np.asarray(values[drawn].mean())


def resamples(clusters: NDArray[np.int64], draws: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """Draw whole clusters with replacement, as many as there are; yield the places of their runs."""
    members = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.concatenate([members[cluster] for cluster in generator.integers(len(members), size=len(members))])


def bootstrapped(
    statistic: Callable[[NDArray[np.int64]], Array], clusters: NDArray[np.int64], draws: int
) -> tuple[Array, Array, Array, Array]:
    """Return a statistic of all runs, the ends of its 95 % percentile interval, and its bootstrap standard error."""
    sample = np.array([statistic(drawn) for drawn in resamples(clusters, draws)])
    with warnings.catch_warnings():  # where no draw has a value, neither has the interval
        warnings.filterwarnings("ignore", "All-NaN slice|Degrees of freedom", RuntimeWarning)
        low, high = np.nanpercentile(sample, [2.5, 97.5], axis=0)
        error = np.nanstd(sample, axis=0, ddof=1)
    return statistic(np.arange(len(clusters))), low, high, error


def survives(estimate: Array, error: Array, null: Array, comparisons: int) -> NDArray[np.bool_]:
    """Tell which estimates differ from their null value at 5 % after Bonferroni, by their bootstrap standard error."""
    return np.asarray(np.abs(estimate - null) > norm.ppf(1 - 0.025 / comparisons) * error)


def paired(results: Results, arm: str, name: str) -> tuple[Array, Results]:
    """Return value in an arm minus value of the same run left alone, ``(pairs,)``, and the runs of the arm."""
    same = ("layers", "mlp_gain", "attention_gain", "rate", "seed")
    alone = {tuple(result[key] for key in same): result for result in results if result["arm"] == "off"}
    treated = [result for result in results if result["arm"] == arm]
    return np.array([result[name] - alone[tuple(result[key] for key in same)][name] for result in treated]), treated


def matched(
    watched: Results, gains: tuple[float, float], others: tuple[float, float], name: str
) -> tuple[Array, Results]:
    """Return an outcome with some gains minus that with others, ``(pairs,)``, and the runs with the former.

    Pairs have depth, rate and seed in common, as far as both are there.
    """
    one, other = (
        {
            (result["layers"], result["rate"], result["seed"]): (value, result)
            for value, result in zip(outcomes(watched)[name], watched, strict=True)
            if (result["mlp_gain"], result["attention_gain"]) == pair
        }
        for pair in (gains, others)
    )
    common = sorted(one.keys() & other.keys())
    return np.array([one[key][0] - other[key][0] for key in common]), [one[key][1] for key in common]
