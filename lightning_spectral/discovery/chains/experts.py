"""Extend the chains of the experts that ran on the example batch to all experts of a mixture.

Which experts run depends on the batch, but all have to be measured. Experts are stored in one of three ways::

    batched    w1: (experts, d, h)      one product for all: ("stack",) in the layout stands for the expert
    picked     w1: (experts, d, h)      w1[3] for each expert that runs: ("select", 0, 3) in the layout
    listed     experts.3.w1             an entry of a list for a whole expert, or a list for each matrix (w1.3, w2.3)
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from torch import nn

from lightning_spectral.discovery.chains.factors import Chain, FoundChain
from lightning_spectral.discovery.chains.products import MATRICES, STACK, as_ranges
from lightning_spectral.discovery.chains.recipes import NoRecipeError, recipe
from lightning_spectral.discovery.trace.operands import UnmeasurableError
from lightning_spectral.discovery.trace.operations import is_product, weight_operand
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.records import Factor, Path
from lightning_spectral.weights.names import common_parts
from lightning_spectral.weights.paths import resolve

__all__ = ["with_all_experts"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# For each matrix of a chain, the index of the path component that numbers the expert; −1 for a shared matrix.
# In "layers.0.experts.3.w1" that is 3.
Level = tuple[int, ...]
_Entry = tuple[str | None, object]


def with_all_experts(
    tape: Tape, modules: Mapping[str, nn.Module], block: str, chains: Sequence[FoundChain]
) -> tuple[Path, ...]:
    """Return one path per chain, and per expert where the data chooses between chains.

    Chains that every token takes are added up. A chain that the data chooses belongs to an expert, and stands for all
    experts that are stored beside it.

    Args:
        tape: The recorded forward pass.
        modules: The modules of the model by path.
        block: Module path of the block; containers above it hold blocks, not experts.
        chains: The chains that were found on the tape.

    Raises:
        UnmeasurableError: Not all experts can be known.
    """
    chains = _uncrossed(chains)
    chosen = [chain.factors for chain in chains if chain.selective]
    classes: dict[tuple[int, ...], list[Chain]] = {}
    for factors in chosen:
        classes.setdefault(_make(factors), []).append(factors)
    levels = {make: _levels(modules, block, members) for make, members in classes.items()}
    found: dict[Path, None] = {}
    known: set[Chain] = set()
    shared: list[Path] = []
    for chain in chains:
        if chain.factors in known:  # an expert that another expert's family already has
            continue
        family = _batched(modules, chain.factors)
        if chain.selective and not family:
            family = _picked(tape, modules, chain.factors, chosen) or _listed(
                modules, chain.factors, levels[_make(chain.factors)]
            )
        if chain.selective and family:
            found.update(dict.fromkeys(family))
            known.update(path.factors for path in family)
        else:  # not chosen: all entries of a stack are added up
            shared += [replace(path, expert=None) for path in family] or [Path(chain.factors)]
    if not found:
        return tuple(shared)
    experts = _as_they_ran(found, chosen)
    _check_complete(modules, [path.factors for path in (*experts, *shared)], chosen, set(tape.names.values()))
    return (*experts, *(replace(path, expert="shared") for path in shared))


def _as_they_ran(found: Iterable[Path], chosen: Sequence[Chain]) -> list[Path]:
    """Drop chains that were copied from another expert's chain, for experts that ran with a different chain.

    Raises:
        UnmeasurableError: Experts are built differently, and some did not run: their chains are unknown.
    """
    ran, seen = set(chosen), {_matrices(chain) for chain in chosen}
    made = [path for path in found if path.factors not in ran]
    if not any(_matrices(path.factors) in seen for path in made):
        return list(found)
    if any(_matrices(path.factors) not in seen for path in made):
        raise UnmeasurableError("its experts are not built alike, and some of them did not run on the example input")
    return [path for path in found if path.factors in ran]


def _matrices(chain: Chain) -> tuple[Factor, ...]:
    """Return the matrices of a chain, without gains and numbers: they identify the expert."""
    return tuple(factor for factor in chain if factor.role in MATRICES)


def _make(chain: Chain) -> tuple[int, ...]:
    """Return the depth of each matrix in the model: equal for experts of one list."""
    return tuple(name.count(".") for name in _matrix_names(chain))


def _batched(modules: Mapping[str, nn.Module], chain: Chain) -> list[Path]:
    """Return one path per expert for experts along dimension 0 of a parameter, in one product; else none."""
    stacks = [factor for factor in chain if factor.role in MATRICES and STACK in factor.layout]
    return _one_each(chain, STACK, _count(modules, stacks[0], STACK)) if stacks else []


def _uncrossed(chains: Sequence[FoundChain]) -> Sequence[FoundChain]:
    """Drop chains from one expert's first matrix to another's second one.

    Where the tokens of all experts lie in one tensor between the two, the walk follows every expert to every other. No
    token does: the comparison with the branch shows it.
    """
    straight = [chain for chain in chains if not chain.selective or len(_entries(chain.factors)) < 2]
    return straight if any(chain.selective for chain in straight) else chains


def _entries(chain: Chain) -> set[object]:
    return {_entry(None, factor.layout)[1] for factor in chain if factor.role in MATRICES} - {None}


def _picked(tape: Tape, modules: Mapping[str, nn.Module], chain: Chain, chosen: Sequence[Chain]) -> list[Path]:
    """Return one path per expert for experts along dimension 0 of parameters, picked one by one; else none.

    A matrix that is not picked is one for all experts: the values of attention whose output projections are experts.
    Then an entry that runs and is no expert shows that the stack holds something else, such as queries and keys.
    """
    matrices = [factor for factor in chain if factor.role in MATRICES]
    steps = {next((step for step in factor.layout if step[:2] == ("select", 0)), None) for factor in matrices}
    picked = steps - {None}
    if len(matrices) < 2 or len(picked) != 1:
        return []
    (step,) = picked
    assert step is not None
    counts = {_count(modules, factor, step) for factor in matrices if step in factor.layout}
    if len(counts) != 1 or counts == {1}:
        return []
    known = {_entry(factor.parameter, factor.layout) for other in chosen for factor in other}
    if None in steps and not known.issuperset(_running_entries(tape, {factor.parameter for factor in matrices})):
        return []
    return _one_each(chain, step, counts.pop())


def _running_entries(tape: Tape, parameters: Collection[str | None]) -> Iterator[_Entry]:
    """Yield every entry of some stacks that is multiplied with at least one token."""
    for operation in tape.operations:
        if is_product(tape, operation) and tape.tensors[operation.outputs[0]].numel():
            weight = weight_operand(tape, operation)
            with suppress(NoRecipeError):
                parameter, steps = recipe(tape, weight) if weight is not None else (None, ())
                entry = _entry(parameter, steps)
                if parameter in parameters and entry[1] is not None:
                    yield entry


def _entry(parameter: str | None, layout: Iterable[tuple[object, ...]]) -> _Entry:
    """Return a parameter and the entry of its dimension 0 that a layout picks, ``None`` for no entry."""
    return parameter, next((step[2] for step in layout if step[:2] == ("select", 0)), None)


def _one_each(chain: Chain, step: tuple[object, ...], count: int) -> list[Path]:
    return [Path(_map_layout(chain, step, number, count), number) for number in range(count)]


def _map_layout(chain: Chain, step: tuple[object, ...], number: int, count: int) -> Chain:
    """Return the chain of one expert: its entry of each stack, or its share of the rows that hold all experts.

    Args:
        chain: The chain.
        step: The step of a layout that picks the expert.
        number: The number of the expert.
        count: The number of experts.
    """
    result = []
    for factor in chain:
        if factor.adapters:
            adapters = tuple(_map_layout(adapter, step, number, count) for adapter in factor.adapters)
            factor = replace(factor, adapters=adapters)
        if step in factor.layout:
            layout = tuple(("select", 0, number) if item == step else item for item in factor.layout)
            factor = replace(factor, layout=layout)
        elif step == STACK and factor.rows is not None and factor.role in MATRICES:
            rows = [row for run in factor.rows for row in run]
            share = len(rows) // count
            factor = replace(factor, rows=as_ranges(tuple(rows[number * share : (number + 1) * share])))
        result.append(factor)
    return tuple(result)


def _count(modules: Mapping[str, nn.Module], factor: Factor, step: tuple[object, ...]) -> int:
    """Return the size of dimension 0 before the step of a layout that picks from it."""
    assert factor.parameter is not None
    tensor = resolve(modules[""], factor.parameter)
    for name, *arguments in factor.layout[: factor.layout.index(step)]:
        tensor = getattr(tensor, name)(*arguments)
    return int(tensor.shape[0])  # type: ignore[attr-defined]


def _matrix_names(chain: Chain) -> list[str]:
    return [factor.parameter for factor in chain if factor.role in MATRICES and factor.parameter]


def _levels(modules: Mapping[str, nn.Module], block: str, chosen: Sequence[Chain]) -> list[Level]:
    """Return the components of the matrices' paths that number the experts; several levels for nested lists.

    Several experts that ran differ in exactly these components. A single expert that ran is numbered by the outermost
    list inside the block that has all of its matrices under one key.

    Args:
        modules: The modules of the model by path.
        block: Module path of the block.
        chosen: The chains of experts that ran. Their matrices lie at equal depths.
    """
    split = [[name.split(".") for name in _matrix_names(chain)] for chain in chosen]
    if not split:
        return []
    first = split[0]
    differ = [
        [depth for depth in range(len(path)) if len({parts[place][depth] for parts in split}) > 1]
        for place, path in enumerate(first)
    ]
    # Every matrix differs in the same number of components, or in none (a shared matrix): one level per component.
    count = max(map(len, differ))
    if count and all(len(depths) in (0, count) for depths in differ):
        return list(zip(*(depths or [-1] * count for depths in differ), strict=True))
    # One expert ran: nothing differs. Look for lists between the block and each matrix.
    start = len(block.split(".")) if block else 0
    entries = [
        [depth for depth in range(start, len(path)) if isinstance(modules.get(".".join(path[:depth])), _CONTAINERS)]
        for path in first
    ]
    for level in itertools.product(*(depths or [-1] for depths in entries)):
        if len({path[depth] for path, depth in zip(first, level, strict=True) if depth >= 0}) == 1:
            return [level]
    return []


def _listed(modules: Mapping[str, nn.Module], chain: Chain, levels: Sequence[Level]) -> list[Path]:
    """Return one path per expert for experts in lists: every combination of keys under which all matrices exist."""
    if not levels:
        return []
    chains: list[tuple[tuple[str, ...], Chain]] = [((), chain)]
    for level in levels:
        chains = [((*keys, key), moved) for keys, known in chains for key, moved in _siblings(modules, known, level)]
    return [
        Path(moved, int(keys[0]) if len(keys) == 1 and keys[0].isdigit() else ".".join(keys))
        for keys, moved in chains
        if all(_exists(modules[""], item) for factor in moved for item in factor.flat())
    ]


def _siblings(modules: Mapping[str, nn.Module], chain: Chain, level: Level) -> Iterator[tuple[str, Chain]]:
    """Yield each key that all lists of one level have, and the chain with this key."""
    split = [name.split(".") for name in _matrix_names(chain)]
    heads = {".".join(path[:depth]): path[depth] for path, depth in zip(split, level, strict=True) if depth >= 0}
    keys = [_keys(modules.get(head)) for head in heads]
    for key in keys[0]:
        if all(key in others for others in keys):
            yield key, tuple(_moved(factor, heads, key) for factor in chain)


def _keys(container: nn.Module | None) -> list[str]:
    if container is None:
        return []
    return [name for name, _ in (*container.named_children(), *container.named_parameters(recurse=False))]


def _moved(factor: Factor, heads: Mapping[str, str], key: str) -> Factor:
    """Return a factor of another expert: with another key in the lists ``heads``, given with their present keys."""
    adapters = tuple(tuple(_moved(item, heads, key) for item in chain) for chain in factor.adapters)
    factor = replace(factor, adapters=adapters)
    for head, old in heads.items():
        start = f"{head}.{old}" if head else old
        if factor.parameter == start or (factor.parameter or "").startswith(f"{start}."):
            assert factor.parameter is not None
            new = f"{head}.{key}" if head else key
            return replace(factor, parameter=new + factor.parameter[len(start) :])
    return factor


def _check_complete(
    modules: Mapping[str, nn.Module], known: Iterable[Chain], chosen: Iterable[Chain], ran: Collection[str]
) -> None:
    """Refuse a mixture with a weight that did not run and belongs to no known expert.

    Raises:
        UnmeasurableError: There is such a weight, so the largest norm is not known.
    """
    head = ".".join(common_parts(name.rpartition(".")[0] for chain in chosen for name in _matrix_names(chain)))
    owner = modules.get(head)
    if owner is None:
        return
    covered = {item.parameter for chain in known for factor in chain for item in factor.flat() if item.parameter}
    inside = {tuple(name.split(".")[:depth]) for name in covered for depth in range(1, name.count(".") + 2)}
    for name, weight in owner.named_parameters(head):
        if weight.ndim > 1 and name not in ran and name not in covered and not _is_beside(modules, head, name, inside):
            raise UnmeasurableError(
                f"its weight {name} did not take part in the forward pass on the example input, and belongs to no "
                "expert that is built as those that did"
            )


def _is_beside(modules: Mapping[str, nn.Module], head: str, name: str, known: Collection[tuple[str, ...]]) -> bool:
    """Whether a weight beside known weights is no expert, such as the gate inside an expert that did not run."""
    parts, start = name.split("."), len(head.split(".")) if head else 0
    depth = next(depth for depth in range(start, len(parts)) if tuple(parts[: depth + 1]) not in known)
    single = depth == len(parts) - 2  # a layer
    listed = isinstance(modules.get(".".join(parts[:depth])), _CONTAINERS)
    return not listed and (depth > start or single)


def _exists(model: nn.Module, factor: Factor) -> bool:
    try:
        return factor.parameter is None or resolve(model, factor.parameter) is not None
    except AttributeError:
        return False
