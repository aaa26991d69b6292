"""Group branches into residual blocks: by the containers that hold them, and what stands alone by its neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_spectral.discovery.structure.branches import FoundBranch
from lightning_spectral.discovery.structure.sites import linked
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.records import BranchKind
from lightning_spectral.weights.names import common_parts

__all__ = ["named_groups", "settled_kinds"]

# A block has few branches; an entry of a container with more of them is a stage of several blocks.
_MOST_BRANCHES = 6
_MIXERS = ("attention", "mixer")

Groups = dict[str, list[FoundBranch]]


def named_groups(tape: Tape, modules: Mapping[str, nn.Module], branches: Sequence[FoundBranch]) -> Groups:
    """Group branches by the entry of a container (``ModuleList``, ``Sequential``) that holds a mixer and an MLP.

    An entry that holds another such entry is a stack of blocks. Where no entry holds both, a branch belongs to the
    innermost entry around its modules, or around its site where the modules lie in several lists; where there is no
    container at all, to the module around them. A block that is called several times is listed once.

    A group that does the same to several streams is a block for each of them.

    A group with attention alone and one with an MLP alone, one behind the other on one stream, are one block. Where
    all blocks that begin with an MLP have one more MLP behind them, it is theirs: half an MLP on each side.

    Args:
        tape: The recorded forward pass.
        modules: The modules of the model by path.
        branches: The branches in the order of execution.

    Returns:
        The branches of each block by its name, in the order of execution.
    """
    return _paired(tape, _stream_by_stream(tape, _by_container(modules, branches)))


def _stream_by_stream(tape: Tape, groups: Groups) -> Groups:
    """Split a group that does the same to several streams, each by branches of its own: those of text and picture."""
    result: Groups = {}
    for name, members in groups.items():
        streams: list[list[FoundBranch]] = []
        for branch in members:
            own = next((stream for stream in streams if _follows(tape, stream, [branch])), None)
            if own is None:
                streams.append([branch])
            else:
                own.append(branch)
        alike = len({tuple(sorted(branch.kind for branch in stream)) for stream in streams}) == 1
        if len(streams) > 1 and alike and len(streams[0]) > 1:
            result |= {" + ".join(branch.site.path for branch in stream): stream for stream in streams}
        else:
            result[name] = members
    return result


def _by_container(modules: Mapping[str, nn.Module], branches: Sequence[FoundBranch]) -> Groups:
    members: dict[str, dict[str, FoundBranch]] = {}
    entries = {id(branch): _entries(modules, branch) for branch in branches}
    for branch in branches:
        for entry in entries[id(branch)]:
            members.setdefault(entry, {}).setdefault(branch.site.path, branch)
    complete = [entry for entry, held in members.items() if _is_complete(list(held.values()))]
    stacks = {entry for entry in complete if any(other.startswith(f"{entry}.") for other in complete)}
    groups: Groups = {}
    taken: set[tuple[str, str]] = set()
    for branch in branches:
        own = entries[id(branch)]
        whole = [entry for entry in own if entry in complete and entry not in stacks]
        name = (whole or own or [".".join(common_parts(branch.modules)[:-1])])[0]
        if (name, branch.site.path) not in taken:
            taken.add((name, branch.site.path))
            groups.setdefault(name, []).append(branch)
    return groups


def _entries(modules: Mapping[str, nn.Module], branch: FoundBranch) -> list[str]:
    """Return the container entries around a branch, the innermost first."""
    return _around(modules, branch.modules) or _around(modules, [branch.site.path.removeprefix("param:")])


def _around(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> list[str]:
    parts = common_parts(paths)
    prefixes = [(".".join(parts[:depth]), ".".join(parts[: depth - 1])) for depth in range(len(parts), 0, -1)]
    containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    return [entry for entry, parent in prefixes if isinstance(modules.get(parent), containers)]


def _paired(tape: Tape, groups: Groups) -> Groups:
    """Join groups of one kind with their neighbours of the other kind, so that the fewest are left alone.

    Blocks begin with an MLP only where all do: one behind a sum that was not understood would begin a chain of them.
    """
    ways = [_joined(tape, groups, mlp_first=False), _with_second_halves(tape, _joined(tape, groups, mlp_first=True))]
    if any(members[0].kind != "mlp" for names, members in ways[1] if len(names) > 1):
        ways.pop()
    best = min(ways, key=lambda way: sum(len(names) == 1 for names, _ in way))
    return {" + ".join(names): members for names, members in best}


def _joined(tape: Tape, groups: Groups, *, mlp_first: bool) -> list[tuple[list[str], list[FoundBranch]]]:
    """Join each group with the one in front of it, where that lacks what it has."""
    result: list[tuple[list[str], list[FoundBranch]]] = []
    for name, members in groups.items():
        begins = bool(result) and (mlp_first or result[-1][1][0].kind != "mlp")
        if begins and _complement(result[-1][1], members) and _follows(tape, result[-1][1], members):
            result[-1][0].append(name)
            result[-1][1].extend(members)
        else:
            result.append(([name], list(members)))
    return result


def _with_second_halves(
    tape: Tape, groups: list[tuple[list[str], list[FoundBranch]]]
) -> list[tuple[list[str], list[FoundBranch]]]:
    """Join an MLP alone with the pair in front of it, if all pairs that begin with an MLP have such a neighbour."""
    firsts = [place for place, (names, members) in enumerate(groups) if len(names) > 1 and members[0].kind == "mlp"]
    if not all(_has_second_half(tape, groups[place : place + 2]) for place in firsts):
        return groups
    seconds = {place + 1 for place in firsts}
    for place in seconds:
        names, members = groups[place - 1]
        names.extend(groups[place][0])
        members.extend(groups[place][1])
    return [group for place, group in enumerate(groups) if place not in seconds]


def _has_second_half(tape: Tape, groups: Sequence[tuple[list[str], list[FoundBranch]]]) -> bool:
    if len(groups) < 2:
        return False
    (_, members), (_, second) = groups
    return {branch.kind for branch in second} == {"mlp"} and _follows(tape, members, second)


def _complement(first: Sequence[FoundBranch], second: Sequence[FoundBranch]) -> bool:
    """Whether one group has a mixer and no MLP, and the other an MLP and no mixer, or reads another sequence."""
    kinds = [{branch.kind for branch in group} for group in (first, second)]
    if "cross_attention" in kinds[1] and len(kinds[1]) == 1:
        return "mlp" not in kinds[0]
    mixes = [bool(kind.intersection(_MIXERS)) for kind in kinds]
    return mixes[0] != mixes[1] and all(("mlp" in kind) != mix for kind, mix in zip(kinds, mixes, strict=True))


def _follows(tape: Tape, first: Sequence[FoundBranch], second: Sequence[FoundBranch]) -> bool:
    last, add = first[-1].add, second[0].add
    return last.output == add.output or linked(tape, add, last)


def _is_complete(branches: Sequence[FoundBranch]) -> bool:
    kinds = [branch.kind for branch in branches]
    mixers = sum(kind in _MIXERS for kind in kinds)
    return (
        len(kinds) <= _MOST_BRANCHES
        and mixers > 0
        and (len(kinds) > mixers + kinds.count("cross_attention") or _token_shift(branches) is not None)
    )


def _token_shift(branches: Sequence[FoundBranch]) -> int | None:
    """Return the position of a mixer that reads one neighbouring token only, beside a real mixer: a channel mix."""
    mixers = [position for position, branch in enumerate(branches) if branch.kind in _MIXERS]
    shifts = [
        position for position in mixers if branches[position].kind == "mixer" and branches[position].neighbours == 1
    ]
    if len(mixers) == 2 and len(shifts) == 1 and all(branch.kind != "mlp" for branch in branches):
        return shifts[0]
    return None


def settled_kinds(branches: Sequence[FoundBranch]) -> list[BranchKind]:
    """Return the kinds of the branches of one block, in which a channel mix with a token shift is an MLP."""
    kinds: list[BranchKind] = [branch.kind for branch in branches]
    shift = _token_shift(branches)
    if shift is not None:
        kinds[shift] = "mlp"
    return kinds
