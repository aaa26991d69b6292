"""Group branches into residual blocks: by the containers around them, then lone branches with their neighbours.

==================================  =========================================================
``h.0.attn``, ``h.0.mlp``           one entry with a mixer and an MLP: the block ``h.0``
``0`` attention, ``1`` MLP          neighbours on one stream: the block ``0 + 1``
``0`` MLP, ``1`` mixer, ``2`` MLP   half an MLP on each side: the block ``0 + 1 + 2``
==================================  =========================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from torch import nn

from lightning_spectral.discovery.structure.branches import FoundBranch
from lightning_spectral.discovery.structure.sites import linked
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.records import BranchKind
from lightning_spectral.weights.names import common_parts

__all__ = ["Groups", "calls_in_a_run", "named_groups", "settled_kinds"]

# An entry of a container with more branches is a stage of several blocks.
_MOST_BRANCHES = 6
_MIXERS = ("attention", "mixer")

Groups = dict[str, list[FoundBranch]]


def named_groups(tape: Tape, modules: Mapping[str, nn.Module], branches: Sequence[FoundBranch]) -> Groups:
    """Group branches by the entry of a container (``ModuleList``, ``Sequential``) that holds a mixer and an MLP.

    Such an entry is complete. A complete entry that contains another complete entry is a stack of blocks, not a block.
    A branch without a complete entry belongs to the innermost entry around its modules. If its modules lie in several
    lists, it belongs to the innermost entry around its site. Without any container, every module around its modules is
    an entry; if none of them is complete, the branch belongs to the module around its own.
    A block that is called several times is listed once.

    Then three corrections follow. A group on several streams is split into one block per stream, named by its first and
    its last branch, if it does the same to all, has a block on each, or the streams differ in width. A group with
    attention alone and a group with an MLP alone, neighbours on one stream, are joined. If every block that begins with
    an MLP has another MLP behind it, that MLP joins the block: half an MLP on each side.

    Args:
        tape: The recorded forward pass.
        modules: The modules of the model by path.
        branches: The branches in the order of execution.

    Returns:
        The branches of each block by its name, in the order of execution.
    """
    return _paired(tape, _stream_by_stream(tape, branches, _by_container(modules, branches)))


def _stream_by_stream(tape: Tape, branches: Sequence[FoundBranch], groups: Groups) -> Groups:
    """Split a group with branches on several streams: text and a picture, a sequence and its pairs.

    Each stream has to be a block, complete or with the same kinds of branches as the others, or to differ in width.
    Else something between two branches may only look like the end of a stream.
    """
    result: Groups = {}
    for name, members in groups.items():
        streams: list[list[FoundBranch]] = []
        for branch in members:
            own = next((stream for stream in streams if _follows(tape, stream, [branch])), None)
            if own is None:
                streams.append([branch])
            else:
                own.append(branch)
        alike = len({frozenset(branch.kind for branch in stream) for stream in streams}) == 1
        widths = {tape.shape(stream[0].add.output)[-1] for stream in streams}
        if len(streams) > 1 and (alike or len(widths) > 1 or all(map(_is_complete, streams))):
            result |= {_name_on_stream(stream): stream for stream in streams}
        else:
            result[name] = members
    order = {id(branch): place for place, branch in enumerate(branches)}
    return dict(sorted(result.items(), key=lambda item: order[id(item[1][0])]))


def _name_on_stream(branches: Sequence[FoundBranch]) -> str:
    return " + ".join(dict.fromkeys(branch.site.path for branch in (branches[0], branches[-1])))


def _by_container(modules: Mapping[str, nn.Module], branches: Sequence[FoundBranch]) -> Groups:
    """Group branches by container entries, as :func:`named_groups` says."""
    members: dict[str, dict[str, FoundBranch]] = {}
    entries = {id(branch): _entries(modules, branch) for branch in branches}
    for branch in branches:
        for entry in entries[id(branch)] or _prefixes(branch.modules):
            members.setdefault(entry, {}).setdefault(branch.site.path, branch)
    complete = [entry for entry, held in members.items() if _is_complete(list(held.values()))]
    stacks = {entry for entry in complete if any(_is_inside(other, entry) for other in complete)}
    groups: Groups = {}
    taken: set[tuple[str, str]] = set()
    for branch in branches:
        own = entries[id(branch)]
        around = own or _prefixes(branch.modules)
        whole = [entry for entry in around if entry in complete and entry not in stacks]
        name = (whole or own or [".".join(common_parts(branch.modules)[:-1])])[0]
        if (name, branch.site.path) not in taken:
            taken.add((name, branch.site.path))
            groups.setdefault(name, []).append(branch)
    return groups


def _entries(modules: Mapping[str, nn.Module], branch: FoundBranch) -> list[str]:
    """Return the container entries around a branch, the innermost first."""
    return _around(modules, branch.modules) or _around(modules, [branch.site.path.removeprefix("param:")])


def _around(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> list[str]:
    """Return the container entries around all of some paths, the innermost first."""
    containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    return [entry for entry, parent in pairwise(_prefixes(paths)) if isinstance(modules.get(parent), containers)]


def _prefixes(paths: Iterable[str]) -> list[str]:
    """Return the modules around all of some paths, the innermost first and the whole model last."""
    parts = common_parts(paths)
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _is_inside(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(f"{outer}."))


def _paired(tape: Tape, groups: Groups) -> Groups:
    """Join groups of one kind with neighbours of the other kind, so that the fewest groups are left alone.

    Blocks begin with a mixer or with an MLP; the order that leaves fewer groups alone wins. Blocks begin with an MLP
    only if all of them do. Else one sum that was not understood would shift the pairing of all blocks behind it.
    """
    ways = [_joined(tape, groups, mlp_first=False), _with_second_halves(tape, _joined(tape, groups, mlp_first=True))]
    if any(members[0].kind != "mlp" for names, members in ways[1] if len(names) > 1):
        ways.pop()
    best = min(ways, key=lambda way: sum(len(names) == 1 for names, _ in way))
    return {" + ".join(names): members for names, members in best}


def _joined(tape: Tape, groups: Groups, *, mlp_first: bool) -> list[tuple[list[str], list[FoundBranch]]]:
    """Join each group with the group in front of it, if the two complement each other on one stream."""
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
    """Join a lone MLP with the pair in front of it, if every pair that begins with an MLP has a lone MLP behind it."""
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
    """Whether the second of two groups is an MLP that follows the first on its stream."""
    if len(groups) < 2:
        return False
    (_, members), (_, second) = groups
    return {branch.kind for branch in second} == {"mlp"} and _follows(tape, members, second)


def _complement(first: Sequence[FoundBranch], second: Sequence[FoundBranch]) -> bool:
    """Whether two groups make a block: a mixer and an MLP in either order, or no MLP and then cross-attention."""
    kinds = [{branch.kind for branch in group} for group in (first, second)]
    if "cross_attention" in kinds[1] and len(kinds[1]) == 1:
        return "mlp" not in kinds[0]
    mixes = [bool(kind.intersection(_MIXERS)) for kind in kinds]
    return mixes[0] != mixes[1] and all(("mlp" in kind) != mix for kind, mix in zip(kinds, mixes, strict=True))


def _follows(tape: Tape, first: Sequence[FoundBranch], second: Sequence[FoundBranch]) -> bool:
    """Whether the second group reads the stream right behind the first group, or enters the same sum."""
    last, add = first[-1].add, second[0].add
    return last.output == add.output or linked(tape, add, last)


def _is_complete(branches: Sequence[FoundBranch]) -> bool:
    """Whether branches make a whole block: a mixer, an MLP, and not too many."""
    kinds = [branch.kind for branch in branches]
    mixers = sum(kind in _MIXERS for kind in kinds)
    return (
        len(kinds) <= _MOST_BRANCHES
        and mixers > 0
        and (len(kinds) > mixers + kinds.count("cross_attention") or _token_shift(branches) is not None)
    )


def _token_shift(branches: Sequence[FoundBranch]) -> int | None:
    """Return the position of a channel mix: an MLP that also reads the previous token. ``None`` for none.

    It looks like a mixer that moves 1 other position. It counts as a channel mix beside exactly one real mixer, in a
    block without an MLP.
    """
    mixers = [position for position, branch in enumerate(branches) if branch.kind in _MIXERS]
    shifts = [
        position for position in mixers if branches[position].kind == "mixer" and branches[position].neighbours == 1
    ]
    if len(mixers) == 2 and len(shifts) == 1 and all(branch.kind != "mlp" for branch in branches):
        return shifts[0]
    return None


def calls_in_a_run(tape: Tape, branches: Sequence[FoundBranch], groups: Groups, name: str) -> Counter[str]:
    """Return how often one run of a block calls each of its sites.

    A module that attends along rows and then along columns is called twice, and so is half an MLP that stands on both
    sides of attention. A shared block runs several times: its run is what is common to all. A call on a second stream,
    such as the text beside a picture, adds nothing to the first::

        m a m │ m' a' m'       m twice
        a m a m a m │          each once: the block runs three times
        a m │ a m' │ a m''     each once: a is shared, and all that is left of the next block is m'

    Args:
        tape: The recorded forward pass.
        branches: All branches in the order of execution, each call by itself.
        groups: The branches of all blocks, each once.
        name: The name of the block.
    """
    sites = {branch.site.path for branch in groups[name]}
    calls: list[FoundBranch] = []
    for branch in branches[branches.index(groups[name][0]) :]:
        if branch.site.path in sites:
            if not calls or branch.add is calls[-1].add or linked(tape, branch.add, calls[-1].add):
                calls.append(branch)
        elif any(tape.depends(branch.add.stream, call.add.output) for call in calls):
            # Another block reads what this block wrote.
            others = [group for group in groups.values() if branch.site.path in {one.site.path for one in group}]
            if not any(map(_is_complete, others)):
                last = groups[name][-1].terms[0].start
                calls = [call for call in calls if call.terms[0].start <= last]
            break
    counts = Counter(branch.site.path for branch in calls)
    runs = min(counts.values())
    return Counter({site: max(1, counts[site] // runs) for site in sites})


def settled_kinds(branches: Sequence[FoundBranch]) -> list[BranchKind]:
    """Return the kinds of the branches of one block. A channel mix with a token shift counts as an MLP."""
    kinds: list[BranchKind] = [branch.kind for branch in branches]
    shift = _token_shift(branches)
    if shift is not None:
        kinds[shift] = "mlp"
    return kinds
