"""Copies of a model inside a model: momentum teachers, averages, copies that a callback keeps.

Code that updates a copy walks over the parameters of model and copy side by side, or looks them up by name:

    for average, weight in zip(teacher.parameters(), student.parameters()): average.lerp_(weight, 0.01)

If only the student had scales, the two lists would no longer match. So a copy gets scales at the places where the model
has scales. There are two kinds of copies: modules (``branches_of_copies``) and dicts of tensors
(``complete_averages``). Sets of names that say which parameters to average get the names of the scales.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_spectral.records import Branch, End, Factor, Path, ResidualBlock
from lightning_spectral.weights.names import common_parts, scale_keys
from lightning_spectral.weights.paths import module_at

__all__ = ["branches_of_copies", "complete_averages"]

_FOREIGN = {"torch", "lightning", "pytorch_lightning", "builtins"}
_FEW = 64  # entries of a list or dict that are searched; longer ones hold data


def branches_of_copies(
    model: nn.Module, blocks: Sequence[ResidualBlock], branches: Sequence[Branch], others: Iterable[object] = ()
) -> Iterator[tuple[nn.Module, Branch]]:
    """Yield ``(copy, branch)`` for every branch to scale in every copy of a part of the model.

    A copy is a module with the same classes, names and shapes as the part. In addition its weights have the same
    values, or it is frozen and does not run in the model's own pass (a teacher with other initial values).

    Only the model and the modules around whole blocks are compared with each other. A block of a list is not compared
    with its neighbours, which have the same classes and shapes too.

    Args:
        model: The model.
        blocks: All blocks that were found in the model.
        branches: The branches to scale.
        others: Objects that may hold copies of the model, such as callbacks.
    """
    # running: modules on the way to a site of the model's pass. scaled: modules on the way to a site to scale. A scaled
    # module is never a copy. A running one is a copy only of a part with whole blocks: model and teacher may both run.
    homes = _homes(blocks, branches)
    running = {path for block in blocks for branch in block.branches for path in _around(_place(branch))}
    scaled = {path for branch in branches for path in _around(_place(branch))}
    live = {id(module) for module in model.modules()}
    hidden = [item for item in _held(model, others) if isinstance(item, nn.Module) and id(item) not in live]
    seen: set[int] = set()  # modules inside of a copy that was found already
    for path, holds_blocks in homes.items():
        original = module_at(model, path)
        if original is None:
            continue
        inside = [branch for branch in branches if path in _around(_place(branch))]
        # Candidates have a path if they are in the model, and none if an attribute or a callback hides them.
        places: list[tuple[str | None, nn.Module]] = [*model.named_modules()]
        places += [(None, module) for root in hidden for module in root.modules() if id(module) not in live]
        for name, module in places:
            if id(module) in seen or name in scaled or (name in running and not holds_blocks):
                continue
            if not _alike(original, module) or not (_same_values(original, module) or _follows(name, module, running)):
                continue
            seen |= {id(part) for part in module.modules()}
            yield from ((module, moved) for branch in inside if (moved := _moved(branch, path)) is not None)


def complete_averages(
    model: nn.Module, blocks: Sequence[ResidualBlock], branches: Sequence[Branch], others: Iterable[object] = ()
) -> None:
    """Add the scales to dicts of tensors by parameter name, such as averages that began before the scales came.

    Sets of the names of all trained parameters get the names of the scales. A copy that is updated by such a set would
    otherwise keep the scales that it had, without an error.

    Args:
        model: The model, with scales.
        blocks: As in :func:`branches_of_copies`.
        branches: The branches that have scales.
        others: As in :func:`branches_of_copies`.
    """
    held = list(_held(model, others))
    averages = [item for item in held if isinstance(item, dict) and _is_by_name(item)]
    choices = [item for item in held if isinstance(item, set) and all(isinstance(name, str) for name in item)]
    for path in _homes(blocks, branches) if averages or choices else ():
        original = module_at(model, path)
        parameters = {} if original is None else dict(original.named_parameters())
        scales = scale_keys(parameters)
        plain = {name: item for name, item in parameters.items() if name not in scales}
        trained = {name for name, item in plain.items() if item.requires_grad}
        for names in choices:
            if trained and trained <= names <= plain.keys():
                names.update(scales)
        for values in averages:
            known = {name: plain[name] for name in values if name in plain}
            whole = len(known) == len(values) and trained <= known.keys()
            if whole and all(_shape(values[name]) == _shape(item) for name, item in known.items()):
                # Some averages hold only trained parameters. They get only trained scales, because the code that
                # updates them walks over the trained parameters of the model.
                frozen_too = any(not item.requires_grad for item in known.values())
                missing = [name for name in scales if frozen_too or parameters[name].requires_grad]
                values.update({name: parameters[name].detach().clone() for name in missing})


def _is_by_name(values: dict[Any, Any]) -> bool:
    return len(values) > 1 and all(isinstance(key, str) and type(item) is Tensor for key, item in values.items())


def _homes(blocks: Sequence[ResidualBlock], branches: Sequence[Branch]) -> dict[str, bool]:
    """Return the paths of the modules that may have copies, outermost first, and whether each contains whole blocks.

    For a block "h.3" these are "" (the model) and "h", with whole blocks. The block itself is left out, because a block
    of a list is no copy of its neighbour. A block outside of a list counts, without whole blocks: its copies are
    searched only among modules that do not run.
    """
    wanted = set(branches)
    found: dict[str, bool] = {}
    for block in blocks:
        if wanted & set(block.branches):
            root = ".".join(common_parts(_place(branch) for branch in block.branches))
            if not root.rpartition(".")[2].isdigit():
                found.setdefault(root, False)
            found |= dict.fromkeys(_around(root)[:-1], True)
    return dict(sorted(found.items(), key=lambda item: item[0].count(".") + bool(item[0])))


def _place(branch: Branch) -> str:
    """Return the path of the module that gets the scale of a branch."""
    path = branch.site.removeprefix("param:")
    return path if path == branch.site else path.rpartition(".")[0]


def _around(path: str) -> list[str]:
    """Return the paths of a module and of all modules around it, the model first: "", "h", "h.3"."""
    names = path.split(".") if path else []
    return [".".join(names[:depth]) for depth in range(len(names) + 1)]


def _held(model: nn.Module, others: Iterable[object]) -> Iterator[Any]:
    """Yield objects in attributes of modules and of other objects, which torch does not list as children."""
    for owner in [*model.modules(), *others]:
        for value in _attributes(owner):
            many = list(value.values()) if isinstance(value, dict) else value
            yield value
            for item in many[:_FEW] if isinstance(many, list | tuple) else [many]:
                if isinstance(item, nn.Module):
                    yield item
                elif type(item).__module__.partition(".")[0] not in _FOREIGN:  # an object of the user, with an average
                    yield from _attributes(item)


def _attributes(owner: object) -> list[Any]:
    values: Mapping[str, Any] = getattr(owner, "__dict__", {})
    return [value for name, value in values.items() if name not in ("_modules", "_parameters", "_buffers", "_trainer")]


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same classes, names and shapes. Scales do not count."""
    return type(one).__name__ == type(other).__name__ and one is not other and _signature(one) == _signature(other)


def _signature(module: nn.Module) -> list[Any]:
    parameters = dict(module.named_parameters())
    scales = set(scale_keys(parameters))
    rooms = {key.rpartition(".")[0] for key in scales}
    kinds = [(name, type(part).__name__) for name, part in module.named_modules() if name and name not in rooms]
    return [*kinds, *((name, _shape(item)) for name, item in parameters.items() if name not in scales)]


def _shape(parameter: Tensor) -> tuple[int, ...] | None:
    return None if is_lazy(parameter) else tuple(parameter.shape)


def _follows(name: str | None, module: nn.Module, running: Collection[str]) -> bool:
    """Whether a module is neither run nor trained: it may follow the model even if its values differ now."""
    return name not in running and not any(parameter.requires_grad for parameter in module.parameters())


def _same_values(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    shared = [(mine[name], theirs[name]) for name in mine.keys() & theirs.keys()]
    known = all(not (item.is_meta or is_lazy(item)) for pair in shared for item in pair)
    return known and all(a.device == b.device and torch.equal(a, b) for a, b in shared)


def _moved(branch: Branch, path: str) -> Branch | None:
    """Return a branch with names relative to a part of the model, ``None`` if a weight lies outside of the part."""
    start = f"{path}." if path else ""
    inside = [item.parameter for item in branch.ends] + [item.parameter or start for item in branch.factors]
    if not all(name.startswith(start) for name in inside):
        return None

    def own(factor: Factor) -> Factor:
        name = None if factor.parameter is None else factor.parameter.removeprefix(start)
        return replace(factor, parameter=name, adapters=tuple(tuple(map(own, chain)) for chain in factor.adapters))

    weight = "param:" if branch.site.startswith("param:") else ""
    site = branch.site.removeprefix("param:")
    return replace(
        branch,
        site=weight + (site.removeprefix(start) if site != path else ""),
        ends=tuple(End(end.parameter.removeprefix(start), end.offset) for end in branch.ends),
        paths=tuple(Path(tuple(map(own, chain.factors)), chain.expert) for chain in branch.paths),
        aliases=(),
    )
