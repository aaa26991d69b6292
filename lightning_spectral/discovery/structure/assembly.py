"""From a recorded forward pass to the residual blocks of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from lightning_spectral.discovery.structure.branches import FoundBranch, alike, branches_of, finished
from lightning_spectral.discovery.structure.ends import EndFinder
from lightning_spectral.discovery.structure.groups import named_groups, settled_kinds
from lightning_spectral.discovery.structure.residual import residual_adds
from lightning_spectral.discovery.structure.selfcheck import SelfCheck
from lightning_spectral.discovery.trace.probe import Prober, Region
from lightning_spectral.discovery.trace.surprises import SURPRISES
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.records import Branch, ResidualBlock

__all__ = ["Found", "blocks_of"]


class Found(NamedTuple):
    """The blocks in the order of execution, what was refused on the way, and what is left out of the norms."""

    blocks: list[ResidualBlock]
    refused: list[str]
    notes: list[str]


def blocks_of(tape: Tape, model: nn.Module) -> Found:
    """Find the residual blocks of a recorded forward pass.

    Args:
        tape: The recorded forward pass.
        model: The model that was recorded.
    """
    prober = Prober(tape)
    adds, refused = residual_adds(tape, prober)
    found, homeless = branches_of(tape, adds, prober)
    refusals = [*refused, *homeless]
    modules = dict(model.named_modules())
    names = _names(model)
    check = SelfCheck(tape, prober, found, refusals)
    finder = EndFinder(tape, model, found, prober)
    blocks = []
    for index, (name, members) in enumerate(named_groups(tape, modules, found).items()):
        kinds = settled_kinds(members)
        records: list[Branch] = []
        for branch, kind in zip(members, kinds, strict=True):
            calls = [item for item in found if item.site.path == branch.site.path]
            ways = [finished(tape, modules, name, call, kind, prober) for call in calls]
            for place in range(max(map(len, ways))):
                record = alike([way[min(place, len(way) - 1)] for way in ways])
                records.append(finder.with_ends(record, branch, name))
        branches = tuple(replace(record, aliases=names.get(record.site, ())) for record in records)
        problem = check.problem(name, members)
        if problem is None and len(branches) > len(members):
            problem = "attention and an MLP share one site, so neither can be scaled by itself"
        evidence = "trace" if problem is None else f"trace; not verified: {problem}"
        blocks.append(
            ResidualBlock(index, name, branches, problem is None, evidence, _token_dims(tape, members, prober))
        )
    return Found(blocks, [refusal.reason for refusal in refusals], list(dict.fromkeys(_notes(found))))


def _notes(found: Sequence[FoundBranch]) -> Iterator[str]:
    for branch in found:
        stack = branch.add.stack
        if stack is not None and stack.depends:
            yield (
                f"the model keeps {stack.count} streams side by side, and maps that depend on its data read, mix or "
                "write them: those maps are left out of the norms"
            )


def _names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the further paths of every module that has several, by the path that it is known under."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(path)
    return {first: tuple(others) for first, *others in found.values() if others}


def _token_dims(tape: Tape, members: Sequence[FoundBranch], prober: Prober) -> tuple[int, ...]:
    """Return the dimensions of the stream along which a block mixes positions."""
    ends = [branch.added if branch.add.stack is None else branch.add.stack.written for branch in members]
    regions = [Region(tape, branch.add.stream, end) for branch, end in zip(members, ends, strict=True)]
    try:
        return tuple(sorted({dim for region in regions for dim in prober.mixed_dims(region)}))
    except SURPRISES:
        return ()
