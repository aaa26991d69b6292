"""Is a run healthy; if not, where, since when, by which branch, does it still move, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_spectral.alarms.advice import ADVICE, WORDS
from lightning_spectral.alarms.signs import COLLAPSED
from lightning_spectral.pages.facts import facts_of
from lightning_spectral.pages.stays import Stay, returned, stays
from lightning_spectral.pages.summary import Advice, Finding, Level, Summary
from lightning_spectral.pages.timeline import is_ceiling, since_stopped, timeline
from lightning_spectral.pages.words import block_list, clear, damaged_lines, many, zone_of
from lightning_spectral.records import Event
from lightning_spectral.runs.history import History
from lightning_spectral.runs.logged import Logged

__all__ = ["summary_of"]

LISTED = 12  # blocks outside with a sentence of their own
MONITOR, STEERING, RATIO = "docs/monitor.md", "docs/steering.md", "docs/ratio.md"
_FAILED = {
    "not_finite": "the network computes with numbers that are not finite",
    "tokens_collapsed": "all tokens of a sample have become one vector",
    "samples_collapsed": "all samples of a batch have become one",
    "nothing_moves": "the weights of the blocks do not move",
}
_LEVELS: dict[str, Level] = {"failure": "failure", "warning": "warning"}


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the sentences are made from.

    Attributes:
        active: Failures and warnings that are not over at the end, failures first.
        over: Those that are, with the step at which they were over.
        broken: Name of the first logged loss that ends without being finite, and since when.
        lost: Blocks that had a ratio and have none at the end, and the step since which they have none.
        bound: Blocks that are outside at the end with their scales at the bounds, and since when: the band law.
        left: Blocks that are outside at the end and that the ceiling law leaves there, and since when.
        outside: Blocks outside at the end, the farthest first.
    """

    active: tuple[Event, ...]
    over: tuple[tuple[Event, int], ...]
    broken: tuple[str, int] | None
    lost: tuple[tuple[int, ...], int] | None
    bound: tuple[tuple[int, ...], int] | None
    left: tuple[tuple[int, ...], int] | None
    outside: tuple[Stay, ...]

    @property
    def failures(self) -> tuple[Event, ...]:
        return tuple(event for event in self.active if event.level == "failure")

    @property
    def warnings(self) -> tuple[Event, ...]:
        return tuple(event for event in self.active if event.level == "warning")


def summary_of(history: History, logged: Logged) -> Summary:
    """Return the summary of a run with at least one measurement.

    Args:
        history: The run.
        logged: Its loss, if the loggers have left it beside the run.
    """
    seen = _seen(history, logged)
    findings = (*_alarming(seen), *_steered(history, seen), *_informing(history, seen), *_unknown(history, logged))
    return Summary(_verdict(history, seen), findings, tuple(_advice(history, seen)), facts_of(history))


def _seen(history: History, logged: Logged) -> _Seen:
    active: dict[str, Event] = {}
    over: list[tuple[Event, int]] = []
    for number, event in enumerate(timeline(history)):
        if event.level in _LEVELS:
            active[event.name or str(number)] = event  # events of early releases have no name
        elif event.name.endswith("_over") and (ended := active.pop(event.name.removesuffix("_over"), None)) is not None:
            over.append((ended, event.step))
    standing = sorted(active.values(), key=lambda event: (event.level != "failure", event.step))
    broken = ((curve.name, at) for curve in logged.losses if (at := curve.broke_at) is not None)
    since = since_stopped(history)
    at_an_end = (tuple(since), max(since.values())) if since else None
    zone = zone_of(history.measurements[-1])
    return _Seen(
        tuple(standing),
        tuple(over),
        next(broken, None),
        _lost(history),
        None if is_ceiling(history) else at_an_end,
        at_an_end if is_ceiling(history) else None,
        () if zone is None else stays(history, zone),
    )


def _lost(history: History) -> tuple[tuple[int, ...], int] | None:
    there = np.isfinite(history.values("log_ratio"))
    blocks = np.flatnonzero(there.any(axis=1) & ~there[:, -1])
    if blocks.size == 0:
        return None
    last = [int(np.flatnonzero(there[block])[-1]) for block in blocks]
    return tuple(map(int, blocks)), history.steps[min(last) + 1]


def _verdict(history: History, seen: _Seen) -> Finding:
    if seen.failures:
        first = seen.failures[0]
        what = _FAILED.get(first.name, clear(first.message, 200))
        return Finding("failure", f"The run has failed: since step {first.since:,}, {what}.")
    if seen.broken is not None:
        return Finding("failure", f"The run has failed: the loss is not finite since step {seen.broken[1]:,}.")
    if seen.lost is not None:
        return Finding("warning", f"Something broke: {many(len(seen.lost[0]), 'block')} cannot be measured any more.")
    if seen.bound is not None:
        return Finding("warning", "No failure was seen, but the controller has reached its bounds.")
    if seen.warnings:
        return Finding("warning", f"No failure was seen, but {many(len(seen.warnings), 'warning')} stands.")
    if seen.over:
        return Finding("information", "Nothing is wrong at the end. What went wrong before is over.")
    if not np.isfinite(history.values("token_residual")).any():
        return Finding("information", "No failure was seen. Tokens were not measured, so a collapse would not show.")
    return Finding("good", "Healthy: no failure and no warning.")


def _alarming(seen: _Seen) -> Iterator[Finding]:
    for event in seen.failures:
        yield Finding("failure", f"Failure at step {event.step:,}: {clear(event.message, 2000).rstrip('.')}.")
    if seen.broken is not None:
        name, step = seen.broken
        yield Finding("failure", f"The logged {clear(name)} is not finite since step {step:,}.")
    if seen.lost is not None:
        blocks, step = seen.lost
        yield Finding("warning", f"No ratio since step {step:,}: {block_list(blocks)}. The table of blocks says why.")
    for event in seen.warnings:
        yield Finding("warning", f"Warning at step {event.step:,}: {clear(event.message, 2000).rstrip('.')}.")


def _steered(history: History, seen: _Seen) -> Iterator[Finding]:
    rescaler = history.header.get("rescaler")
    if not rescaler and not history.actions:
        return
    if seen.bound is not None:
        blocks, step = seen.bound
        bounds = "" if not isinstance(rescaler, dict) else f" {tuple(rescaler['bounds'])}"
        how = f"outside, with scales at the bounds{bounds} since step {step:,}"
        yield Finding("warning", f"{_staying(history, blocks)} {how}: {block_list(blocks)}.")
    yield Finding("information", _moves(history))
    if seen.left is not None:
        blocks, step = seen.left
        yield Finding(
            "information",
            f"{_staying(history, blocks)} outside, and the controller leaves that so since step {step:,}: "
            f"{block_list(blocks)}. GainCeiling raises no branch. It lowers none below its floor and, in a trained "
            "model, none below its norm at the start.",
        )


def _staying(history: History, blocks: Sequence[int]) -> str:
    measured = sum(layer.ratio is not None for layer in history.measurements[-1])
    return f"{len(blocks)} of {many(measured, 'block')} {'stays' if len(blocks) == 1 else 'stay'}"


def _moves(history: History) -> str:
    moves = [action for action in history.actions if action["action"] == "rescale"]
    rescaler = history.header.get("rescaler")
    if not moves:
        return "The controller was on and moved no scale."
    dry = " would have" if isinstance(rescaler, dict) and rescaler.get("dry_run") else ""
    steps = [action["step"] for action in moves]
    first, last = min(steps), max(steps)
    when = f"at step {first:,}" if first == last else f"from step {first:,} to step {last:,}"
    scales = [scale for layer in history.measurements[-1] for scale in (layer.mlp_scale, layer.attention_scale)]
    ends = "" if dry else f" Scales end between {min(scales):.3g} and {max(scales):.3g}."
    blocks = many(len({action["block"] for action in moves}), "block")
    return f"The controller{dry} moved scales of {blocks} in {many(len(moves), 'action')}, {when}.{ends}"


def _informing(history: History, seen: _Seen) -> Iterator[Finding]:
    for event, step in seen.over:
        what = _FAILED.get(event.name, event.name.replace("_", " "))
        yield Finding("information", f"A {event.level} at step {event.step:,} ({what}) is over since step {step:,}.")
    last = history.measurements[-1]
    zone = zone_of(last)
    if zone is None:
        yield Finding("information", "No safe zone is known for ratios of Jacobians.")
        return
    measured = sum(layer.ratio is not None for layer in last)
    edges = f"({zone[0]:g}, {zone[1]:g})"
    if measured and not seen.outside:
        end = f"All {measured:,} blocks end" if measured > 1 else "The block ends"
        yield Finding("good", f"{end} inside the safe zone {edges}.")
    elif measured:
        count = f"{len(seen.outside)} of {many(measured, 'block')}"
        end = f"{'ends' if len(seen.outside) == 1 else 'end'} outside the safe zone {edges}"
        yield Finding("information", f"{count} {end}. That is information, not a fault.")
    yield from (Finding("information", str(stay)) for stay in seen.outside[:LISTED])
    if len(seen.outside) > LISTED:
        rest = block_list(stay.index for stay in seen.outside[LISTED:])
        yield Finding("information", f"Nearer to the safe zone, and outside too: {rest}. The table of blocks has them.")
    if back := sorted(returned(history, zone)):
        when = ", ".join(f"block {block} since step {step:,}" for block, step in back[:LISTED])
        more = f" and {len(back) - LISTED} more" if len(back) > LISTED else ""
        yield Finding("information", f"Outside before, and back inside: {when}{more}.")
    yield from _tokens(history)


def _tokens(history: History) -> Iterator[Finding]:
    residuals = history.values("typical_token_residual")
    measured = np.flatnonzero(np.isfinite(residuals).any(axis=1))
    if measured.size == 0:
        return
    row = int(measured[-1])
    there = np.flatnonzero(np.isfinite(residuals[row]))
    series, steps = residuals[row][there], np.asarray(history.steps)[there]
    lowest = int(np.argmin(series))
    verdict = "below" if series[lowest] < COLLAPSED else "never below"
    seen = f"{series[0]:.2g} at step {steps[0]:,}"
    if len(series) > 1:
        seen += f", {series[-1]:.2g} at step {steps[-1]:,}, smallest {series[lowest]:.2g} at step {steps[lowest]:,}"
    told = f"Token residual behind block {row}: {seen}; {verdict} {COLLAPSED:g}, where tokens count as one vector."
    yield Finding("information", told)


def _unknown(history: History, logged: Logged) -> Iterator[Finding]:
    """Yield what could not be seen."""
    last = history.measurements[-1]
    never = [layer.index for layer in last if layer.ratio is None]
    if never and _lost(history) is None:
        yield Finding("information", f"Without a ratio: {block_list(never)}. The table of blocks says why.")
    if not np.isfinite(history.values("token_residual")).any():
        yield Finding("information", "Tokens were not measured (geometry=True), so no collapse could be seen.")
    if history.torn:
        text = "The last line of the file is incomplete: the run writes it, or was stopped. All other lines are shown."
        yield Finding("information", text)
    if history.damaged:
        yield Finding("warning", f"{damaged_lines(history)}. All other lines are shown.")
    if logged.missing is not None:
        yield Finding("information", f"{logged.missing}.")


def _advice(history: History, seen: _Seen) -> Iterator[Advice]:
    names = list(dict.fromkeys(event.name for event in seen.active if event.name in ADVICE))
    if not names and (seen.broken is not None or seen.lost is not None):
        names = ["not_finite"]
    for name in names:
        tried = "ceiling" if is_ceiling(history) else None  # the controller of this very run
        yield Advice(_in_order([WORDS[item] for item in ADVICE[name] if item != tried]), f"{MONITOR}#{name}")
    if seen.bound is not None:
        text = f"Leave {block_list(seen.bound[0])} alone, or let the controller go further: ResidualRescaler(bounds=…)."
        yield Advice(text, f"{STEERING}#the-band-law")
    if seen.left is not None:
        text = (
            f"Leave {block_list(seen.left[0])} alone. In a model that starts untrained, a lower floor lets the "
            "controller go further: GainCeiling(floor=…)."
        )
        yield Advice(text, f"{STEERING}#the-ceiling-law")
    if moving := [stay.index for stay in seen.outside if stay.moves]:
        yield Advice(f"Watch {block_list(moving)}: outside, and still moving.", f"{MONITOR}#ratios")
    if seen.outside and not seen.active:
        text = "A ratio outside asks for nothing by itself. Look at a block that stands apart from its neighbours."
        yield Advice(text, f"{RATIO}#what-it-is-good-for")
    if not np.isfinite(history.values("token_residual")).any():
        yield Advice("Measure tokens too: geometry=True, the default.", f"{MONITOR}#tokens")
    if not (seen.active or seen.outside or names):
        yield Advice("Nothing has to be done.", f"{MONITOR}#what-you-are-told")


def _in_order(clauses: Sequence[str]) -> str:
    first, *others = clauses
    return f"Try this first: {first}." + (f" If it does not help: {'; '.join(others)}." if others else "")
