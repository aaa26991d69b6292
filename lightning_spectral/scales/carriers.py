"""Which branches can carry a residual scale, and which are trained."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from lightning_spectral.records import Branch
from lightning_spectral.weights.names import CHILD
from lightning_spectral.weights.paths import module_at
from lightning_spectral.weights.scaled import log_scale_tensor

__all__ = ["is_frozen", "parameters_of", "why_not", "why_taken"]


def why_not(model: nn.Module, branch: Branch) -> str | None:
    """Return why a branch cannot carry a scale, ``None`` if it can or already has one."""
    site = branch.site.removeprefix("param:")
    by_weight = site != branch.site
    owner, _, name = site.rpartition(".") if by_weight else (site, "", "")
    module = module_at(model, owner)
    parametrized = by_weight and module is not None and parametrize.is_parametrized(module, name)
    if module is None or (by_weight and not parametrized and name not in module._parameters):
        return f"the model has no {branch.site!r}: pass blocks that were found in this very model, find_blocks(model)"
    if not by_weight or log_scale_tensor(model, branch) is not None:
        return None
    others = [end.parameter for end in branch.ends if end.parameter != site]
    if others:
        return (
            f"no module carries the branch of {branch.site!r}, and its end is more than that parameter "
            f"({', '.join(others)}): compute the branch in a module of its own"
        )
    if parametrized:
        return f"{site} is parametrized, and no module carries its branch: compute the branch in a module of its own"
    return None


def why_taken(model: nn.Module, branch: Branch) -> str | None:
    """Return why the name of a scale is taken: the site has another attribute of this name; ``None`` if it is free."""
    if log_scale_tensor(model, branch) is None and hasattr(module_at(model, branch.site), CHILD):
        return f"{branch.site}.{CHILD} exists already and is no residual scale: rename it"
    return None


def is_frozen(model: nn.Module, branch: Branch) -> bool:
    """Whether no parameter of a branch is trained, adapters included."""
    parameters = parameters_of(model, branch)
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def parameters_of(model: nn.Module, branch: Branch) -> list[nn.Parameter]:
    """Return the parameters of a branch. A computed weight is replaced by the parameters it is computed from."""
    # Without the gain of the norm in front, which other branches may share.
    factors = (item.parameter for item in branch.factors if item.parameter is not None and item.role != "pre_norm")
    found: dict[nn.Parameter, None] = {}
    for path in dict.fromkeys([*(end.parameter for end in branch.ends), *factors]):
        owner, _, name = path.rpartition(".")
        module = module_at(model, owner)
        if module is not None and name != "log_scale":
            own = module._parameters.get(name)  # getattr would compute a weight, which may change it
            found |= dict.fromkeys(module.parameters() if own is None else [own])
    site = module_at(model, branch.site)
    return list(found or dict.fromkeys(() if site is None else site.parameters()))
