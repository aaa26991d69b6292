"""Which signals tell that a training fails: tables and the figure of docs/evidence.md, from the runs of `collapses.py`.

    python benchmarks/collapses_report.py summarize  # every run folder becomes a line of results/collapses.jsonl
    python benchmarks/collapses_report.py report     # prints everything; works from that file alone
    python benchmarks/collapses_report.py report --paste
    python benchmarks/collapses_report.py report --for-rules

With `--for-rules` nothing of a held-out case or a held-out seed is read: for whoever chooses rules. `--paste` puts the
tables into docs/evidence.md and draws docs/images/collapses.png.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import collapses_statistics as statistics
import numpy as np
from collapses_signals import SIGNALS, Signal, condensed
from collapses_statistics import CASES, RULES, SEEDS, Run, Split, event_step, label_of
from evidence_figures import COLOURS, INK, plain
from evidence_report import cell, fill, markdown
from evidence_statistics import Array, configurations
from matplotlib.figure import Figure

from lightning_spectral.alarms import rules

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, IMAGE = ROOT / "docs" / "evidence.md", "images/collapses.png"
UNTIL = {"step 20": 20.0, "step 50": 50.0, "whole run": math.inf}
WITHIN = "whole run, within a case"
PARTS = {"for rules": (RULES,), "held out": (SEEDS, CASES), "held-out cases": (CASES,)}
WAYS = {
    "not_finite": "weights",
    "tokens_collapsed": "tokens",
    "tokens_collapsing": "tokens",
    "samples_collapsed": "samples",
    "nothing_moves": "still",
    "logits_exploding": "logits",
}
"""The way of failing that a rule is about."""

Areas = tuple[Array, Array, Array]
StepOf = Callable[[Run], int | None]
Steps = Sequence[tuple[Run, int | None]]


@dataclass(frozen=True, slots=True)
class Told:
    """When something tells of some runs: each run with a step, ``None`` for a run that it says nothing of.

    Attributes:
        fails: The runs that fail.
        healthy: The healthy runs.
        controls: The sick runs that only their loss tells of.
    """

    fails: Steps
    healthy: Steps
    controls: Steps


def of_label(runs: Iterable[Run], label: str) -> list[Run]:
    """Return the runs with a label."""
    return [run for run in runs if label_of(run) == label]


def in_part(runs: Iterable[Run], split: Split, part: str) -> list[Run]:
    """Return the runs of a part of the tables."""
    return [run for run in runs if split.part(run) in PARTS[part]]


def telling(runs: Sequence[Run], step_of: StepOf, way: str | None = None) -> Told:
    """Return when something tells of runs, those that fail in one way if there is one."""
    fails = [run for run in of_label(runs, "fails") if way is None or way in run["verdict"].split()]
    groups = (fails, of_label(runs, "healthy"), of_label(runs, "control"))
    return Told(*([(run, step_of(run)) for run in group] for group in groups))


def shown(run: Run) -> int | None:
    """Return the step at which the loss shows a failure."""
    step: int | None = run["shown"]
    return step


def signal_step(run: Run, signal: Signal, limit: float) -> int | None:
    """Return the first measurement of a run in which a signal is beyond its threshold."""
    values = run["signals"].get(signal.name)
    return None if values is None else statistics.told(run["measured"], values, limit, low=signal.bad == "low")


def limit_of(runs: Sequence[Run], split: Split, signal: Signal) -> float | None:
    """Return the threshold of a signal: the most extreme value of the healthy runs for rules, with a margin."""
    if signal.latest:
        return None
    healthy = of_label(in_part(runs, split, "for rules"), "healthy")
    values = [value for run in healthy for value in run["signals"].get(signal.name, ()) if value is not None]
    return statistics.threshold(values, low=signal.bad == "low")


def scores_of(runs: Sequence[Run], until: float) -> Array:
    """Return the score of every run by every signal, ``(runs, signals)``, larger where worse, NaN where unknown."""

    def of(run: Run, signal: Signal) -> float:
        values = run["signals"].get(signal.name)
        if values is None:
            return math.nan
        return statistics.score(run["measured"], values, until, low=signal.bad == "low", latest=signal.latest)

    return np.array([[of(run, signal) for signal in SIGNALS] for run in runs])


def areas_of(runs: Sequence[Run], label: str, draws: int) -> dict[str, Areas]:
    """Return the area of every signal, and its interval, for runs of a label against the healthy ones.

    One for each time, and one for the whole run of pairs of runs of one case.
    """
    chosen = [*of_label(runs, label), *of_label(runs, "healthy")]
    if not chosen:
        missing = np.full(len(SIGNALS), math.nan)
        return dict.fromkeys((*UNTIL, WITHIN), (missing, missing, missing))
    is_bad = np.array([label_of(run) == label for run in chosen])
    clusters = configurations(chosen, ("case",))
    found = {time: statistics.areas(scores_of(chosen, until), is_bad, clusters, draws) for time, until in UNTIL.items()}
    return found | {WITHIN: statistics.areas_within(scores_of(chosen, math.inf), is_bad, clusters, draws)}


# Tables.


def count(steps: Steps) -> int:
    """Count the runs that are told of."""
    return sum(step is not None for _, step in steps)


def share(steps: Steps) -> str:
    """Write how many runs are told of, of how many."""
    return f"{count(steps)} of {len(steps)}" if steps else "–"


def lead(found: Told, draws: int) -> str:
    """Write the median lead on the loss, its interval, and the number of runs that both tell of."""
    both = [(run, late - step) for run, step in found.fails if step is not None and (late := shown(run)) is not None]
    if not both:
        return "–"
    runs, leads = zip(*both, strict=True)
    return f"{cell(*statistics.median_of(leads, runs, draws), digits=0)}; {len(both)}"


def escaped(name: str) -> str:
    """Write a name in a table."""
    return name.replace("|", r"\|")


def name_of(run: Run) -> str:
    """Name a run."""
    return f"{run['case']} {run['twin']} {run['seed']}"


def runs_table(runs: Sequence[Run], split: Split) -> str:
    """Count the runs by part and label, and name those that are left out."""
    labels = ("fails", "control", "healthy", "left out")
    counts = Counter((split.part(run), label_of(run)) for run in runs)
    rows = [[part, *(str(counts[part, label]) for label in labels)] for part in (RULES, SEEDS, CASES)]
    table = markdown(["runs", "fail", "fail by the loss alone", "healthy", "left out"], rows)
    out = [f"{name_of(run)} ({run['verdict'] or 'no failure'})" for run in of_label(runs, "left out")]
    return f"{table}\n\nLeft out: {', '.join(out) or 'none'}."


def areas_table(runs: Sequence[Run], fails: Mapping[str, Areas]) -> str:
    """Write the area of every signal at every time, and that of the controls against their twins."""
    cases = {run["case"] for run in of_label(runs, "control")}
    controls = areas_of([run for run in runs if run["case"] in cases], "control", 2)["whole run"][0]
    judged = [*of_label(runs, "fails"), *of_label(runs, "healthy")]
    rows = []
    for column, signal in enumerate(SIGNALS):
        known = sum(signal.name in run["signals"] for run in judged)
        cells = [cell(value[column], low[column], high[column]) for value, low, high in fails.values()]
        control = "–" if math.isnan(controls[column]) else f"{controls[column]:.2f}"
        rows.append([escaped(signal.name), signal.bad, str(known), *cells, control])
    return markdown(["signal", "bad", "runs", *(f"AUC, {time}" for time in fails), "controls, whole run"], rows)


def tellers(runs: Sequence[Run], split: Split) -> dict[str, tuple[str, StepOf]]:
    """Return by name, for every signal with a threshold, the threshold and a function of a run: when it tells."""

    def teller(signal: Signal, limit: float) -> tuple[str, StepOf]:
        return f"{'<' if signal.bad == 'low' else '>'} {limit:.3g}", lambda run: signal_step(run, signal, limit)

    limits = {signal: limit_of(runs, split, signal) for signal in SIGNALS}
    return {signal.name: teller(signal, limit) for signal, limit in limits.items() if limit is not None}


def thresholds_table(runs: Sequence[Run], split: Split, draws: int) -> str:
    """Write what every signal tells of held-out runs by the threshold of the runs for rules."""
    asked = {"the loss's own rule": ("", shown), **tellers(runs, split)}
    controls, rows = of_label(runs, "control"), []
    for name, (beyond, step_of) in asked.items():
        chosen, held, cases = (telling(in_part(runs, split, part), step_of) for part in PARTS)
        columns = [share(chosen.fails), share(held.fails), share(held.healthy), lead(held, draws)]
        columns += [share(cases.fails), share(cases.healthy), share(telling(controls, step_of).controls)]
        rows.append([escaped(name), beyond, *columns])
    head = ["signal", "tells when", "failures told, for rules", "failures told, held out", "false alarms, held out"]
    head += ["lead in steps, held out; runs", "failures told, held-out cases", "false alarms, held-out cases"]
    return markdown([*head, "controls told"], rows)


def by(*names: str) -> StepOf:
    """Return a function of a run: the first event of some rules."""
    return lambda run: event_step(run, names)


def covered(rule: rules.Rule) -> StepOf:
    """Return a function of a run: the first event that makes a rule no miss.

    A failure is told by a rule that says more, too, which silences this one. A warning has to come by itself.
    """
    return by(rule.name, *rule.behind) if rule.level == "failure" else by(rule.name)


def delays(found: Told, way: str | None) -> list[int]:
    """Return the steps from happening to telling, of runs that are told of and in which the truth shows it."""
    pairs = [(step, statistics.happening(run["truth"], way)) for run, step in found.fails]
    return [step - happened for step, happened in pairs if step is not None and happened is not None]


def rules_table(runs: Sequence[Run], split: Split, draws: int) -> str:
    """Write what every rule of the package tells, by part."""
    asked: dict[str, tuple[StepOf, StepOf, str | None]] = {
        rule.name: (by(rule.name), by(rule.name, *rule.behind), WAYS[rule.name]) for rule in rules.RULES
    }
    asked["any failure"] = (by(*rules.FAILURES), by(*rules.FAILURES), None)
    rows = []
    for name, (own, more, way) in asked.items():
        for part in PARTS:
            found, with_more = (telling(in_part(runs, split, part), step_of, way) for step_of in (own, more))
            after = delays(found, way)
            happened = f"{median(after):.0f} ({min(after)} to {max(after)}); {len(after)}" if after else "–"
            columns = [share(found.fails), share(with_more.fails), share(found.healthy), share(found.controls)]
            rows.append([name, part, *columns, happened.replace("-", "−"), lead(found, draws)])
    head = ["rule", "runs", "told", "told by it or a rule that says more", "false alarms", "controls told"]
    return markdown([*head, "steps after it happens; runs", "lead on the loss in steps; runs"], rows)


def errors(runs: Sequence[Run], split: Split) -> str:
    """Name every miss and every false alarm of every rule."""
    lines = []
    for rule in rules.RULES:
        way = WAYS[rule.name]
        missed = [run for run, step in telling(runs, covered(rule), way).fails if step is None]
        found = telling(runs, by(rule.name))
        wrong = [(run, step) for run, step in (*found.healthy, *found.controls) if step is not None]
        misses = ", ".join(f"{name_of(run)} ({split.part(run)})" for run in missed)
        alarms = ", ".join(f"{name_of(run)} at step {step} ({split.part(run)})" for run, step in wrong)
        lines.append(f"* `{rule.name}` missed: {misses or 'none'}. False: {alarms or 'none'}.")
    return "\n".join(lines)


def negative(runs: Sequence[Run], split: Split, fails: Mapping[str, Areas]) -> str:
    """Write what did not hold: signals that tell no failure from health, that tell of few, that cry wolf."""
    value, low, high = fails["whole run"]
    sides = {"Worse than luck": high < 0.5, "Not distinguishable from luck": (low <= 0.5) & (high >= 0.5)}
    lines = []
    for words, chosen in sides.items():
        named = [f"{s.name} ({v:.2f})" for s, v, here in zip(SIGNALS, value, chosen, strict=True) if here]
        lines.append(f"* {words} over the whole run, by AUC: {', '.join(named) or 'none'}.")
    few, wolves = [], []
    for name, (_, step_of) in tellers(runs, split).items():
        found = telling(in_part(runs, split, "held out"), step_of)
        if 2 * count(found.fails) < len(found.fails):
            few.append(f"{name} ({share(found.fails)})")
        if count(found.healthy):
            wolves.append(f"{name} ({share(found.healthy)})")
    lines.append(f"* Told of fewer than half of the held-out failures by its threshold: {', '.join(few) or 'none'}.")
    lines.append(f"* Gave false alarms in held-out healthy runs: {', '.join(wolves) or 'none'}.")
    return "\n".join(lines)


def quality(runs: Sequence[Run], split: Split) -> str:
    """Return the lines of `lightning_spectral/alarms/quality.py`, on held-out runs."""
    held, lines = in_part(runs, split, "held out"), []
    for rule in rules.RULES:
        found, more = (telling(held, step_of, WAYS[rule.name]) for step_of in (by(rule.name), covered(rule)))
        counts = (count(more.fails), len(found.fails), count(found.healthy), len(found.healthy))
        lines.append(f'    "{rule.name}": Quality({", ".join(map(str, counts))}),')
    return "\n".join(["QUALITY: Mapping[str, Quality] = {", *lines, "}"])


def picture(runs: Sequence[Run]) -> Figure:
    """Draw the token residual and the loss of every run over its steps."""
    looks = {"healthy": (COLOURS[0], "-"), "fails": (COLOURS[2], "-"), "control": (COLOURS[1], "--")}
    words = {"healthy": "healthy", "fails": "fails", "control": "fails by the loss alone"}
    figure = Figure(figsize=(10.0, 4.2), dpi=110, layout="constrained")
    tokens, losses = figure.subplots(1, 2)
    for label, (colour, dashes) in looks.items():
        for number, run in enumerate(of_label(runs, label)):
            named = {"label": words[label]} if number == 0 else {}
            style = {"color": colour, "linestyle": dashes, "linewidth": 0.6, "alpha": 0.6}
            values = [(step, math.nan if r is None else max(r, 1e-7)) for step, r, *_ in run["truth"]]
            tokens.plot(*zip(*values, strict=True), **style, **named)
            relative = [math.nan if x is None else x / (run["losses"][0] or math.nan) for x in run["losses"]]
            losses.plot([5 * place for place in range(len(relative))], relative, **style)
    for axes, title in ((tokens, "token residual of the last block,\nheld-out batch"), (losses, "loss / first loss")):
        axes.set_yscale("log")
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel(title, color=INK)
        plain(axes)
    losses.set_ylim(top=10.0)  # a loss on its way to infinity leaves the picture
    figure.legend(*tokens.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def tables(runs: Sequence[Run], split: Split, draws: int) -> dict[str, str]:
    """Return everything that is written, by the name of its markers."""
    fails = areas_of(runs, "fails", draws)
    return {
        "collapses, negative": negative(runs, split, fails),
        "collapses, runs": runs_table(runs, split),
        "collapses, areas": areas_table(runs, fails),
        "collapses, thresholds": thresholds_table(runs, split, draws),
        "collapses, rules": rules_table(runs, split, draws),
        "collapses, errors": errors(runs, split),
        "collapses, figure": f"![Token residual and loss of every run]({IMAGE})",
    }


# The command line.


def summarize(folders: Path, results: Path, chosen: Callable[[Run], bool]) -> None:
    """Write a line for every run folder, in the order of the names."""
    lines = []
    for path in sorted(folders.glob("*/training.json")):
        name, _, seed = path.parent.name.rpartition("-")
        if chosen({"case": name.rpartition("-")[0], "seed": int(seed)}):
            lines.append(json.dumps(condensed(path.parent), separators=(",", ":"), ensure_ascii=False))
    results.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{results}: {len(lines)} runs, {results.stat().st_size / 1e6:.2f} MB")


def read(results: Path, chosen: Callable[[Run], bool]) -> list[dict[str, Any]]:
    """Return the condensed runs."""
    return [run for line in results.read_text(encoding="utf-8").splitlines() if chosen(run := json.loads(line))]


def read_split(path: Path) -> Split:
    """Return what may be looked at to choose rules."""
    values: Mapping[str, Any] = json.loads(path.read_text())
    return Split(frozenset(values["cases_for_rules"]), frozenset(values["seeds_for_rules"]))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["summarize", "report"])
    parser.add_argument("--for-rules", action="store_true", help="leave out what is held out")
    parser.add_argument("--paste", action="store_true", help="write the tables and the figure of docs/evidence.md")
    parser.add_argument("--runs", type=Path, default=RESULTS / "failures", help="where `collapses.py` left its runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "collapses.jsonl", help="the file of condensed runs")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    return parser.parse_args()


def main() -> None:
    """Summarize, or report."""
    args = parse()
    split = read_split(RESULTS / "failures_split.json")

    def chosen(run: Run) -> bool:
        return not args.for_rules or split.part(run) == RULES

    if args.action == "summarize":
        summarize(args.runs, args.out, chosen)
        return
    runs = read(args.out, chosen)
    written = tables(runs, split, args.draws)
    print("\n\n".join(f"{name}\n\n{table}" for name, table in written.items()))
    print(f"\n{quality(runs, split)}")
    if args.paste:
        fill(PAGE, written)
        picture(runs).savefig(PAGE.parent / IMAGE)


if __name__ == "__main__":
    main()
