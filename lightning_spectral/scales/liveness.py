"""Check that residual scales multiply their branches: a hook must run whenever its branch runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import Branch, ResidualBlock
from lightning_spectral.scales.attach import ResidualScale
from lightning_spectral.weights.names import CHILD
from lightning_spectral.weights.paths import is_compiled, module_at
from lightning_spectral.weights.scaled import scale_module

__all__ = ["Liveness"]

_MATRICES = {"output", "value", "latent", "down", "up"}


class Liveness:
    """Watches the first passes of a run until every scale has multiplied its branch.

    A scale is alive if its hook has run. In compiled code, no hook can be seen; there a scale is alive if it has a
    gradient. A scale is dead if the weights of its branch have gradients and the branch ran without the scale. A
    gradient of the weights alone does not show that the branch ran, because a penalty on the weights gives one too. So
    there has to be a sign that the branch ran:

    * a module that holds one of its weights was called;
    * if all these modules are compiled: some other scale is alive;
    * if the user named the site, instead of a pass finding it: a scale of the same block is alive.

    Args:
        model: The model.
        blocks: The blocks of the model.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
        self._model = model
        self._unseen = {
            branch: scale
            for block in blocks
            for branch in block.branches
            if isinstance(scale := scale_module(model, branch), ResidualScale) and not scale.on_weight
        }
        self._sites = {id(module._modules.get(CHILD)): module for module in model.modules()}
        self._blocks = {branch: block for block in blocks for branch in block.branches}
        self._alive: set[ResidualBlock] = set()
        self._ran: set[str] = set()
        self._handles: dict[str, RemovableHandle] = {}
        self._owners = self._watched()

    def _watched(self) -> dict[Branch, list[str]]:
        """Hook the modules that hold weights of exactly one branch, except sites and compiled modules."""
        owners = {branch: {path.rpartition(".")[0] for path in _weights(branch)} for branch in self._unseen}
        users = Counter(path for paths in owners.values() for path in paths)
        watched = {
            branch: [
                path
                for path in paths
                if users[path] == 1 and path != branch.site and not is_compiled(self._model, path)
            ]
            for branch, paths in owners.items()
        }
        for path in dict.fromkeys(path for paths in watched.values() for path in paths):
            module = module_at(self._model, path)
            if module is not None:
                self._handles[path] = module.register_forward_hook(partial(_note, self._ran, path))
        return watched

    def check(self) -> None:
        """Check the scales after a backward pass.

        Raises:
            ConfigurationError: A scale is dead. The message names its site and the cause.
        """
        if not self._unseen:
            return
        alive = [branch for branch, scale in self._unseen.items() if self._is_alive(branch, scale)]
        for branch in alive:
            self._alive.add(self._blocks[branch])
            del self._unseen[branch]
        dead = [branch for branch in self._unseen if self._is_dead(branch)]
        if dead:
            told = "; ".join(f"{branch.site} ({self._cause(branch)})" for branch in dead)
            raise ConfigurationError(
                f"{len(dead)} residual scale(s) received no gradient although the weights of their branches did, so "
                f"they multiply nothing: {told}"
            )
        if not self._unseen:  # hooks in compiled modules stay: removing one would trigger a compilation
            self.release([path for path in self._handles if not is_compiled(self._model, path)])

    def release(self, paths: Iterable[str] | None = None) -> None:
        """Remove the hooks, all of them by default."""
        for path in list(self._handles) if paths is None else paths:
            self._handles.pop(path).remove()

    def _is_alive(self, branch: Branch, scale: ResidualScale) -> bool:
        if not scale.log_scale.numel():  # another process holds the scale and checks it
            return True
        if is_compiled(self._model, branch.site):  # its hook runs only in passes outside of compiled code
            return scale.log_scale.grad is not None or not scale.log_scale.requires_grad
        return scale.fired or scale.log_scale.grad is not None

    def _is_dead(self, branch: Branch) -> bool:
        if not any(_has_gradient(self._model, path) for path in _weights(branch)):
            return False
        if not self._is_hooked(branch):
            return True
        watched = [path for path in self._owners[branch] if not is_compiled(self._model, path)]
        if not watched:
            return bool(self._alive)
        named = not self._blocks[branch].verified and self._blocks[branch] in self._alive
        return named or any(path in self._ran for path in watched)

    def _is_hooked(self, branch: Branch) -> bool:
        site = self._sites.get(id(self._unseen[branch]))  # by id: the site may be wrapped by now
        return site is None or any(hook.__module__ == ResidualScale.__module__ for hook in site._forward_hooks.values())

    def _cause(self, branch: Branch) -> str:
        if not self._is_hooked(branch):
            return "its forward hook was removed; attach_scales puts it back only on a fresh model"
        if is_compiled(self._model, branch.site):
            return (
                "the model was compiled and run before the scale was attached, and compiled code ignores later hooks; "
                "attach first, or call torch._dynamo.reset()"
            )
        return (
            "its forward is never called, because something reads its weights directly; name another site in the hints "
            "for find_blocks"
        )


def _note(ran: set[str], path: str, *_: Any) -> None:
    """Forward hook. A module-level function, so that a copy of the model can be pickled."""
    if not torch.compiler.is_compiling():
        ran.add(path)


def _has_gradient(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    module = module_at(model, owner)
    if module is None:
        return False
    own = module._parameters.get(name)  # getattr would compute a weight, which may change it
    return any(parameter.grad is not None for parameter in (module.parameters() if own is None else [own]))


def _weights(branch: Branch) -> list[str]:
    """Return the matrices of a branch. Gains are left out, because branches may share one."""
    return [factor.parameter for factor in branch.factors if factor.role in _MATRICES and factor.parameter]
