"""Muon and scales. Muon makes the step of a matrix orthogonal; a scale is a vector of one element.

Implementations differ. Some refuse a vector in the constructor, some fail in the first step. Some train it wrongly:
they stack the scales of all blocks into a matrix, or view a scale as a 1 × 1 matrix, whose orthogonal step is ± the
rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_spectral.errors import ConfigurationError

__all__ = ["check_muon", "muon_groups"]

# Keys of a parameter group that name its rule, in public optimizers that combine Muon with another rule.
_RULES = ("algorithm", "algo", "kind", "optim", "optimizer", "type")


def check_muon(optimizers: Iterable[Optimizer], scales: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Check that no Muon trains a scale.

    Args:
        optimizers: The optimizers.
        scales: The sites and the parameters of the scales.

    Returns:
        A message if a group of Muon holds scales together with other vectors, since this Muon may have another rule
        for vectors. ``None`` if no group of Muon holds a scale.

    Raises:
        ConfigurationError: A group of Muon holds a trained scale, and otherwise only matrices.
    """
    trained = {id(scale): site for site, scale in scales if scale.requires_grad}
    doubtful = 0
    for optimizer in optimizers:
        for kind, group in muon_groups(optimizer):
            found = [trained[id(item)] for item in group if id(item) in trained]
            if found and all(item.ndim >= 2 or id(item) in trained for item in group):
                raise ConfigurationError(
                    f"{kind} would train {len(found)} residual scale(s) of shape (1,) as if they were matrices (the "
                    f"first is at {found[0]!r}). Give it matrices only, [p for p in parameters if p.ndim >= 2], and "
                    "the others to AdamW; or let the law alone move the scales, learnable=False"
                )
            doubtful += len(found)
    if not doubtful:
        return None
    return (
        f"residual scales: {doubtful} of them are in a group of Muon, with other vectors. If it has no rule of its own "
        "for vectors, give it matrices only, [p for p in parameters if p.ndim >= 2]"
    )


def muon_groups(optimizer: object) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Yield the groups that Muon trains: the name of the optimizer's class, and the parameters of the group.

    Args:
        optimizer: An optimizer, or an object with optimizers in its attributes.
    """
    yield from _muon_groups(optimizer, set())


def _muon_groups(optimizer: object, seen: set[int]) -> Iterator[tuple[str, list[nn.Parameter]]]:
    if id(optimizer) in seen:
        return
    seen.add(id(optimizer))
    values = [
        item
        for value in getattr(optimizer, "__dict__", {}).values()
        for item in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        )
    ]
    inner = [item for item in values if isinstance(item, Optimizer)]
    delegated = {id(item) for part in inner for group in part.param_groups for item in group["params"]}
    named = any("muon" in kind.__name__.lower() for kind in type(optimizer).__mro__)
    states: Mapping[Any, Any] = getattr(optimizer, "state", {})
    for group in getattr(optimizer, "param_groups", ()):
        rule = _is_muon(group)
        if named if rule is None else rule:
            own = [item for item in group["params"] if id(item) not in delegated]
            yield type(optimizer).__name__, [item for item in own if states.get(item, {}).get("use_muon") is not False]
    for part in inner:
        yield from _muon_groups(part, seen)


def _is_muon(group: Mapping[str, Any]) -> bool | None:
    """Whether a parameter group says that its rule is Muon, ``None`` if it names no rule."""
    flags = [value for key, value in group.items() if "muon" in key and isinstance(value, bool)]
    named = [group[key].lower() for key in _RULES if isinstance(group.get(key), str)]
    if flags or named:
        return any(flags) or any("muon" in name for name in named)
    return None
