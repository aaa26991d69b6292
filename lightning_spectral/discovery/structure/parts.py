"""The parts of a model: which parts ran in a pass, and which parts can be run by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from lightning_spectral.discovery.trace.operations import attended, is_attention
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.records import ResidualBlock

__all__ = ["attends_to_one", "has_lists", "idle_parts", "parts", "unseen"]


def parts(module: nn.Module) -> list[nn.Module]:
    """Return the parts of a module that can be called and may hold residual blocks.

    Single layers hold no blocks, and lists cannot be called. Frozen parts, such as a teacher or a loss network, are
    left out unless all parts are frozen.
    """
    return _trained(child for child in module.children() if not isinstance(child, nn.ModuleList | nn.ModuleDict))


def has_lists(module: nn.Module) -> bool:
    """Whether a module holds a list, usually of its layers, whose entries only its own forward calls."""
    return any(isinstance(child, nn.ModuleList | nn.ModuleDict) for child in module.children())


def _trained(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the composed modules with parameters that train, or all composed ones if none trains."""
    composed = [module for module in modules if any(True for _ in module.children()) and _has_parameters(module)]
    trained = [module for module in composed if any(parameter.requires_grad for parameter in module.parameters())]
    return trained or composed


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def idle_parts(model: nn.Module, tapes: Iterable[Tape]) -> list[nn.Module]:
    """Return the largest parts of a model that ran in no pass. Frozen parts only count if the model is frozen."""
    idle = [module for _, module in _idle(model, "", _taken(tapes))]
    trains = any(parameter.requires_grad for parameter in model.parameters())
    found = _trained(idle)
    return [part for part in found if not trains or any(parameter.requires_grad for parameter in part.parameters())]


def unseen(model: nn.Module, tapes: Iterable[Tape], blocks: Iterable[ResidualBlock]) -> tuple[str, ...]:
    """Return a note that names the parts that ran in no pass, where blocks may be hidden; no note if there is no part.

    Experts that did not run are not named: the experts that ran made them known.
    """
    factors = (factor for block in blocks for branch in block.branches for factor in branch.factors)
    known = {item.parameter for factor in factors for item in factor.flat()}
    idle = (
        (name, module)
        for name, module in _idle(model, "", _taken(tapes))
        if known.isdisjoint(f"{name}.{parameter}" for parameter, _ in module.named_parameters())
    )
    names = [name for name, module in idle if any(True for _ in module.children())]
    if not names:
        return ()
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (f"took no part in the forward pass, so nobody looked for blocks there: {listed}",)


def attends_to_one(tape: Tape) -> bool:
    """Whether some attention attends to a single position, which hides that it mixes positions."""
    return any(is_attention(operation) and attended(tape, operation) == 1 for operation in tape.operations)


def _taken(tapes: Iterable[Tape]) -> set[str]:
    """Return the names of the parameters and buffers that some passes used."""
    return {name for tape in tapes for name in tape.names.values()}


def _idle(module: nn.Module, path: str, taken: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules inside a module that have no parameter among ``taken``."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        names = [f"{inner}.{parameter}" for parameter, _ in child.named_parameters()]
        if not names:
            continue
        if taken.isdisjoint(names):
            yield inner, child
        elif not taken.issuperset(names):
            yield from _idle(child, inner, taken)
