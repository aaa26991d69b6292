"""Group branches into residual blocks and verify each block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lightning_spectral.discovery.branches import FoundBranch, branches_of, finished
from lightning_spectral.discovery.ends import EndFinder
from lightning_spectral.discovery.operations import is_attention, is_product, weight_operand
from lightning_spectral.discovery.paths import common_parts
from lightning_spectral.discovery.probe import Prober, Region
from lightning_spectral.discovery.replay import replay
from lightning_spectral.discovery.residual import residual_adds
from lightning_spectral.discovery.sites import linked
from lightning_spectral.discovery.tape import Tape
from lightning_spectral.records import BranchKind, ResidualBlock

__all__ = ["blocks_of"]

# A block has few branches; an entry of a container with more of them is a stage of several blocks.
_MOST_BRANCHES = 6


def blocks_of(tape: Tape, model: nn.Module) -> tuple[list[ResidualBlock], list[str]]:
    """Find the residual blocks of a recorded forward pass.

    Args:
        tape: The recorded forward pass.
        model: The model that was recorded.

    Returns:
        The blocks in the order of execution, and what was refused on the way.
    """
    prober = Prober(tape)
    adds, refused = residual_adds(tape)
    found, homeless = branches_of(tape, adds, prober)
    modules = dict(model.named_modules())
    names = _names(model)
    outside = _weights_outside(tape, found)
    finder = EndFinder(tape, model, found, prober)
    blocks = []
    for index, (name, members) in enumerate(_named_groups(modules, found).items()):
        kinds = _settled_kinds(members)
        records = [
            finder.with_ends(finished(tape, modules, name, branch, kind, prober), branch, name)
            for branch, kind in zip(members, kinds, strict=True)
        ]
        branches = tuple(replace(record, aliases=names.get(record.site, ())) for record in records)
        problem = _problem(tape, name, members, outside, prober)
        evidence = "trace" if problem is None else f"trace; not verified: {problem}"
        blocks.append(
            ResidualBlock(index, name, branches, problem is None, evidence, _token_dims(tape, members, prober))
        )
    return blocks, [*refused, *homeless]


def _names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the further paths of every module that has several, by the path that it is known under."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(path)
    return {first: tuple(others) for first, *others in found.values() if others}


def _token_dims(tape: Tape, members: Sequence[FoundBranch], prober: Prober) -> tuple[int, ...]:
    """Return the dimensions of the stream along which a block mixes positions."""
    regions = [Region(tape, branch.add.skip.leaf, branch.added) for branch in members]
    return tuple(sorted({dim for region in regions for dim in prober.mixed_dims(region)}))


def _named_groups(modules: Mapping[str, nn.Module], branches: Sequence[FoundBranch]) -> dict[str, list[FoundBranch]]:
    """Group branches by the entry of a container (``ModuleList``, ``Sequential``) that holds a mixer and an MLP.

    An entry that holds another such entry is a stack of blocks. Where no entry holds both, a branch belongs to the
    innermost entry around its modules; where there is no container at all, to the module around them. A block that is
    called several times is listed once.
    """
    members: dict[str, dict[str, FoundBranch]] = {}
    entries = {id(branch): _entries(modules, branch.modules) for branch in branches}
    for branch in branches:
        for entry in entries[id(branch)]:
            members.setdefault(entry, {}).setdefault(branch.site.path, branch)
    complete = [entry for entry, held in members.items() if _is_complete(list(held.values()))]
    stacks = {entry for entry in complete if any(other.startswith(f"{entry}.") for other in complete)}
    groups: dict[str, list[FoundBranch]] = {}
    taken: set[tuple[str, str]] = set()
    for branch in branches:
        own = entries[id(branch)]
        whole = [entry for entry in own if entry in complete and entry not in stacks]
        name = (whole or own or [_enclosing(branch.modules)])[0]
        if (name, branch.site.path) not in taken:
            taken.add((name, branch.site.path))
            groups.setdefault(name, []).append(branch)
    return groups


def _entries(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> list[str]:
    """Return the container entries around some modules, the innermost first."""
    parts = common_parts(paths)
    prefixes = [(".".join(parts[:depth]), ".".join(parts[: depth - 1])) for depth in range(len(parts), 0, -1)]
    containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    return [entry for entry, parent in prefixes if isinstance(modules.get(parent), containers)]


def _enclosing(paths: Iterable[str]) -> str:
    return ".".join(common_parts(paths)[:-1])


def _is_complete(branches: Sequence[FoundBranch]) -> bool:
    kinds = [branch.kind for branch in branches]
    mixers = sum(kind in ("attention", "mixer") for kind in kinds)
    return (
        len(kinds) <= _MOST_BRANCHES
        and mixers > 0
        and (len(kinds) > mixers + kinds.count("cross_attention") or _token_shift(branches) is not None)
    )


def _token_shift(branches: Sequence[FoundBranch]) -> int | None:
    """Return the position of a mixer that reads one neighbouring token only, beside a real mixer: a channel mix."""
    mixers = [position for position, branch in enumerate(branches) if branch.kind in ("mixer", "attention")]
    shifts = [
        position for position in mixers if branches[position].kind == "mixer" and branches[position].neighbours == 1
    ]
    if len(mixers) == 2 and len(shifts) == 1 and all(branch.kind != "mlp" for branch in branches):
        return shifts[0]
    return None


def _settled_kinds(branches: Sequence[FoundBranch]) -> list[BranchKind]:
    kinds: list[BranchKind] = [branch.kind for branch in branches]
    shift = _token_shift(branches)
    if shift is not None:
        kinds[shift] = "mlp"
    return kinds


def _problem(
    tape: Tape, name: str, branches: Sequence[FoundBranch], outside: Sequence[tuple[int, str]], prober: Prober
) -> str | None:
    """Return what fails in the self-check of a block, ``None`` where nothing does.

    With every site at zero nothing of the block is left but the stream, its norms and constants (zero test), and what
    reaches the stream is proportional to the factor at each site (linear test).
    """
    adds = list({branch.add.output: branch.add for branch in branches}.values())
    for earlier, later in itertools.pairwise(adds):
        if not linked(tape, later, earlier):
            return "its residual adds do not lie on one stream"
    stream = branches[0].add.skip.leaf
    for value, weight in outside:
        if weight.startswith(f"{name}.") and value != stream and tape.depends(value, stream):
            return f"{weight} acts outside the branches that were found"
    for branch in branches:
        if branch.kind == "mlp" and math.prod(tape.shape(stream)[1:-1]) == 1 and _attends(tape, branch):
            return "one position cannot show whether a branch mixes positions: pass an example of two tokens or more"
        if not branch.site.path:
            return "no module or weight carries one of its branches"
        region = Region(tape, branch.add.skip.leaf, branch.add.output)
        if not prober.once(region, ("linear", region.local(branch.site.value)), partial(_is_linear, prober, branch)):
            return f"with {branch.site.path} at zero the stream is not passed on, or it is not linear in it"
    return None


def _attends(tape: Tape, branch: FoundBranch) -> bool:
    values = tape.between(branch.add.skip.leaf, branch.site.value)
    return any((operation := tape.producer(value)) is not None and is_attention(operation) for value in values)


def _is_linear(prober: Prober, branch: FoundBranch) -> bool:
    """Whether the sum is the stream alone with the site at 0, and proportional to the factor at the site."""
    tape = prober.tape
    content = 1 + tape.wide(branch.site.value)  # what was recorded may be zero
    held = prober.made_up_weights(Region(tape, branch.site.value, branch.add.output))
    rest = {
        term.start: torch.zeros_like(tape.wide(term.start)) for term in branch.add.branches if term not in branch.terms
    }
    zero, one, three = (
        replay(tape, {**rest, branch.site.value: content * factor}, branch.add.output, held=held)
        for factor in (0.0, 1.0, 3.0)
    )
    tolerance = 1e-9 * float(three.abs().max() + 1e-300)
    proportional = float((three - zero - 3 * (one - zero)).abs().max()) <= tolerance
    alive = float((one - zero).abs().max()) > tolerance
    stream = tape.wide(branch.add.skip.start).expand_as(zero)
    return proportional and alive and float((zero - stream).abs().max()) <= tolerance


def _weights_outside(tape: Tape, branches: Sequence[FoundBranch]) -> list[tuple[int, str]]:
    """Return the products that lie in no branch, each with the name of its weight."""
    inside = 0
    for branch in branches:
        inside |= branch.add.interior
    found = []
    for operation in tape.operations:
        if not is_product(tape, operation) or any(inside >> output & 1 for output in operation.outputs):
            continue
        weight = weight_operand(tape, operation)
        names = [tape.names[item] for item in tape.parents_with_names(weight)] if weight is not None else []
        found += [(operation.outputs[0], name) for name in names]
    return found
