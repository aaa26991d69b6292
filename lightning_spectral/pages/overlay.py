"""The page of several runs, laid over each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.pages.differences import difference_table, differences, shared_steps, told_difference
from lightning_spectral.pages.facts import facts_of
from lightning_spectral.pages.findings import summary_of
from lightning_spectral.pages.overlay_charts import Run, overlay_charts
from lightning_spectral.pages.page import Section, write_page
from lightning_spectral.pages.sources import read_measured
from lightning_spectral.pages.summary import Advice, Finding, Summary
from lightning_spectral.pages.tables import MISSING, Table
from lightning_spectral.pages.words import clear, many, zone_of
from lightning_spectral.runs.logged import Curve, read_logged

if TYPE_CHECKING:
    from bokeh.plotting import figure

__all__ = ["write_overlay"]

LETTERS = "ABCDEF"
LAST_PART = 20  # the end of a loss is the mean of its last twentieth

_LOSS = "What the loggers of the runs have written."
_RATIO = "Median of the blocks (thick), smallest and largest (thin). Dashed: the edges of the safe zone."
_BLOCKS = "The ratio of every block at the last step at which all runs were measured."
_DIFFERENCE = (
    "ρ in the other run over ρ in {}, at the steps at which both were measured. Red: larger in the other run. Blue: "
    "smaller. Colours are faint up to a factor of 1.5."
)
_TOKENS = "Token residual behind the last block: distance of the tokens from being one vector (0: they are one)."


def write_overlay(sources: Sequence[Path], page: Path, *, reload: float | None = None) -> None:
    """Write the page of several runs.

    Args:
        sources: The files of the runs; the others are compared with the first.
        page: The page.
        reload: Seconds after which the page loads itself again, ``None`` for never.

    Raises:
        NothingMeasuredError: A run has no measurement yet.
        ConfigurationError: There are too many runs, or runs of several linearizations.
        OSError: A file cannot be read or written.
    """
    if len(sources) > len(LETTERS):
        raise ConfigurationError(f"expected at most {len(LETTERS)} runs to lay over each other; got {len(sources)}")
    runs = [_read(letter, source) for letter, source in zip(LETTERS, sources, strict=False)]
    kinds = sorted({run.history.measurements[-1].linearization for run in runs})
    if len(kinds) > 1:
        raise ConfigurationError(f"runs of different linearizations cannot be compared: found {', '.join(kinds)}")
    charts = overlay_charts(runs)
    about = "; ".join(f"{run.letter}: {run.path}" for run in runs)
    write_page(page, "Spectral comparison", about, _summary(runs), list(_sections(runs, charts)), charts, reload=reload)


def _read(letter: str, source: Path) -> Run:
    history = read_measured(source)
    return Run(letter, clear(str(source), 300), history, read_logged(source, history.steps))


def _summary(runs: Sequence[Run]) -> Summary:
    findings = [Finding(_verdict(run).level, f"{run.letter}: {_verdict(run).text} {_inside(run)}") for run in runs]
    findings += [Finding("information", _compared(runs[0], other)) for other in runs[1:]]
    findings += [Finding("information", text) for text in _losses(runs)]
    if len({tuple(layer.name for layer in run.history.measurements[-1]) for run in runs}) > 1:
        findings.append(Finding("warning", "The runs have different blocks. Blocks are compared by their index."))
    advice = Advice("lightning-spectral report RUN has the details of one run.", "docs/report.md")
    verdict = f"{many(len(runs), 'run')}, laid over each other."
    return Summary(Finding("information", verdict), tuple(findings), (advice,))


def _compared(one: Run, other: Run) -> str:
    steps = shared_steps(one.history, other.history)
    if not steps:
        return f"{one.letter} and {other.letter} were measured at no common step."
    found = differences(one.history, other.history, steps[-1])
    return told_difference(found, (one.letter, other.letter), steps[-1])


def _verdict(run: Run) -> Finding:
    return summary_of(run.history, run.logged).verdict


def _inside(run: Run) -> str:
    last = run.history.measurements[-1]
    zone, ratios = zone_of(last), [layer.ratio for layer in last if layer.ratio is not None]
    if zone is None or not ratios:
        return ""
    outside = sum(not zone[0] < ratio < zone[1] for ratio in ratios)
    return f"{outside} of {many(len(ratios), 'block')} outside the safe zone at step {last.step:,}."


def _losses(runs: Sequence[Run]) -> Iterator[str]:
    names = [{curve.name for curve in run.logged.losses} for run in runs]
    for name in sorted(set.intersection(*names)):
        ends = [(run.letter, _end(_curve(run, name))) for run in runs]
        yield f"{clear(name)} ends at {', '.join(f'{end:.4g} ({letter})' for letter, end in ends)}."


def _curve(run: Run, name: str) -> Curve:
    return next(curve for curve in run.logged.losses if curve.name == name)


def _end(curve: Curve) -> float:
    """Return the mean of the last part of a loss, which single batches make noisy."""
    return float(np.mean(curve.values[-max(len(curve.values) // LAST_PART, 1) :]))


def _sections(runs: Sequence[Run], charts: Mapping[str, figure]) -> Iterator[Section]:
    first = runs[0]
    wanted = (
        ("Loss", _LOSS, ["loss"]),
        ("Ratio over time", _RATIO, ["ratio"]),
        ("Ratio of every block", _BLOCKS, ["blocks"]),
        (
            "Differences over depth and time",
            _DIFFERENCE.format(first.letter),
            [name for name in charts if name.startswith("difference_")],
        ),
        ("Tokens", _TOKENS, ["tokens"]),
    )
    for title, caption, names in wanted:
        if shown := tuple(name for name in names if name in charts):
            yield Section(title, caption, shown)
    tables = []
    for other in runs[1:]:
        if steps := shared_steps(first.history, other.history):
            found = differences(first.history, other.history, steps[-1])
            tables.append(difference_table(found, (first.letter, other.letter), steps[-1]))
    if tables:
        told = "The numbers of the last common step."
        yield Section("Differences by block", told, tables=tuple(tables), unfolded=True)
    yield Section("About the runs", "When and what was measured.", tables=(_facts(runs),), unfolded=True)


def _facts(runs: Sequence[Run]) -> Table:
    known = [dict(facts_of(run.history)) for run in runs]
    names = dict.fromkeys(name for facts in known for name in facts)
    rows = [("file", *(run.path for run in runs))]
    rows += [(name, *(facts.get(name, MISSING) for facts in known)) for name in names]
    return Table("Every run", ("", *(run.letter for run in runs)), tuple(rows))
