"""Extend the chains of the experts that ran on the example batch to all experts of a mixture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lightning_spectral.discovery.factors import Chain
from lightning_spectral.discovery.operands import UnmeasurableError
from lightning_spectral.discovery.paths import common_parts, resolve
from lightning_spectral.discovery.products import MATRICES, STACK
from lightning_spectral.records import BranchKind, Factor, Path

__all__ = ["with_all_experts"]


def with_all_experts(
    modules: Mapping[str, nn.Module], block: str, chains: tuple[Chain, ...], kind: BranchKind, ran: Collection[str]
) -> tuple[Path, ...]:
    """Return one path per chain, and per expert where the chains are those of a mixture of experts.

    Experts lie in one of three ways: stacked along dimension 0 of a parameter and multiplied in one batched product,
    stacked and picked one by one, or in a ``ModuleList``. Which experts run depends on the batch; all are measured.

    Args:
        modules: The modules of the model by path.
        block: Module path of the block; containers above it hold blocks, not experts.
        chains: The chains that were found on the tape.
        kind: The kind of the branch.
        ran: The names of the parameters that took part in the recorded pass.

    Raises:
        UnmeasurableError: Not all experts can be known.
    """
    if kind != "mlp":
        return tuple(Path(chain) for chain in chains)
    found: dict[Path, None] = {}
    dense = []
    entries: defaultdict[str, set[str]] = defaultdict(set)  # of the containers that hold experts
    for chain in chains:
        family = _stacked(modules, chain)
        if not family:
            container, listed = _listed(modules, block, chain, chains)
            entries[container].update(listed)
            family = list(listed.values())
        found.update(dict.fromkeys(family))
        if not family:
            dense.append(Path(chain, "shared" if len(chains) > 1 else None))
    _check_complete(modules, entries, ran)
    if not found:
        dense = [replace(path, expert=None) for path in dense]
    elif len(dense) > 0:
        dense = [replace(path, expert="shared") for path in dense]
    return (*found, *dense)


def _stacked(modules: Mapping[str, nn.Module], chain: Chain) -> list[Path]:
    """Experts along dimension 0 of a parameter, in a batched product or picked by index."""
    matrices = [factor for factor in chain if factor.role in MATRICES]
    stacks = [factor for factor in matrices if STACK in factor.layout]
    if stacks:
        count = _count(modules, stacks[0], stacks[0].layout.index(STACK))
        return [Path(_map_layout(chain, STACK, number, count), number) for number in range(count)]
    picked = [[step for step in factor.layout if step[:2] == ("select", 0)] for factor in matrices]
    if len(matrices) > 1 and all(steps and steps[0] == picked[0][0] for steps in picked):
        step = picked[0][0]
        count = _count(modules, matrices[0], matrices[0].layout.index(step))
        return [Path(_map_layout(chain, step, number, count), number) for number in range(count)] if count > 1 else []
    return []


def _map_layout(chain: Chain, step: tuple[object, ...], number: int, count: int) -> Chain:
    """Return the chain of one expert: its entry of the stack, or its share of rows that hold all experts."""
    result = []
    for factor in chain:
        adapters = tuple(_map_layout(adapter, step, number, count) for adapter in factor.adapters)
        factor = replace(factor, adapters=adapters)
        if step in factor.layout:
            layout = tuple(("select", 0, number) if item == step else item for item in factor.layout)
            factor = replace(factor, layout=layout)
        elif step == STACK and factor.rows is not None and factor.role in MATRICES:
            share = len(factor.rows) // count
            factor = replace(factor, rows=factor.rows[number * share : (number + 1) * share])
        result.append(factor)
    return tuple(result)


def _count(modules: Mapping[str, nn.Module], factor: Factor, position: int) -> int:
    """Return the size of dimension 0 before the step that picks from it."""
    assert factor.parameter is not None
    tensor = resolve(modules[""], factor.parameter)
    for name, *arguments in factor.layout[:position]:
        tensor = getattr(tensor, name)(*arguments)
    return int(tensor.shape[0])  # type: ignore[attr-defined]


def _listed(
    modules: Mapping[str, nn.Module], block: str, chain: Chain, chains: Sequence[Chain]
) -> tuple[str, dict[str, Path]]:
    """Experts in a ``ModuleList`` inside the block: its path, and the entries that are built as the chain's is."""
    names = [factor.parameter for factor in chain if factor.role in MATRICES and factor.parameter]
    common = common_parts(names)
    for depth in range(len(common), len(block.split(".")) if block else 0, -1):
        head = ".".join(common[: depth - 1])
        container = modules.get(head)
        if not isinstance(container, nn.ModuleList | nn.ModuleDict) or len(container) < 2:
            continue
        family = {}
        for key in (name for name, _ in container.named_children()):
            sibling = tuple(_moved(factor, f"{head}.{common[depth - 1]}.", f"{head}.{key}.") for factor in chain)
            if all(_exists(modules[""], item) for factor in sibling for item in factor.flat()):
                family[key] = Path(sibling, int(key) if key.isdigit() else key)
        others = (factor.parameter or "" for other in chains if other != chain for factor in other)
        if len(family) > 1 or any(name.startswith(f"{head}.") for name in others):
            return head, family
    return "", {}


def _check_complete(modules: Mapping[str, nn.Module], entries: Mapping[str, set[str]], ran: Collection[str]) -> None:
    """Refuse a mixture with an expert that did not run and is built otherwise than those that did.

    Raises:
        UnmeasurableError: There is one, so that the largest norm is not known.
    """
    for head, known in entries.items():
        for key, expert in modules[head].named_children():
            names = [f"{head}.{key}.{name}" for name, _ in expert.named_parameters()]
            if known and key not in known and names and not any(name in ran for name in names):
                raise UnmeasurableError(
                    f"its expert {head}.{key} is built otherwise than those that ran on the example input, and did not "
                    "run itself"
                )


def _moved(factor: Factor, old: str, new: str) -> Factor:
    adapters = tuple(tuple(_moved(item, old, new) for item in chain) for chain in factor.adapters)
    factor = replace(factor, adapters=adapters)
    if factor.parameter is None or not factor.parameter.startswith(old):
        return factor
    return replace(factor, parameter=new + factor.parameter[len(old) :])


def _exists(model: nn.Module, factor: Factor) -> bool:
    try:
        return factor.parameter is None or resolve(model, factor.parameter) is not None
    except AttributeError:
        return False
