"""Hear what modules are called with and what they return, without a hook in them.

A hook belongs to its module. It is copied and pickled with it, it switches the fused kernels of
``nn.TransformerEncoder`` off, and code is compiled anew for it. ``nn.Module.__call__`` has another door: what stands in
the attribute ``_compiled_call_impl`` of a module is called in its place. Only ``nn.Module.compile`` uses it, modules
leave it behind when they are copied or pickled, and compiled code never goes through the one of a module inside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["Hear", "Listener", "compiled_call", "listen", "stop_listening"]

_DOOR = "_compiled_call_impl"

Hear = Callable[[nn.Module, Callable[[], Any], tuple[Any, ...], dict[str, Any]], Any]
"""Gets a module, its call, and the arguments; makes the call and returns what the call returned."""


class Listener:
    """Stands in front of a module. A copy of it is ``None``: what hears a module does not hear its copies.

    Args:
        module: The module.
        hear: What is called in its place.
    """

    def __init__(self, module: nn.Module, hear: Hear) -> None:
        self._module, self._hear = module, hear
        self.behind: Any = vars(module).get(_DOOR)  # compiled code, or another listener
        self.stopped = False
        setattr(module, _DOOR, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        # A shallow copy, such as the replicas of nn.DataParallel, has the attributes of the module. It is no part of
        # the model, and has to run its own code.
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, nn.Module) and caller is not self._module:
            return caller._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        call = self.behind or self._module._call_impl
        if self.stopped or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return call(*args, **kwargs)
        return self._hear(self._module, lambda: call(*args, **kwargs), args, kwargs)

    def stop(self) -> None:
        """Step aside, wherever in a row of listeners this one stands."""
        self.stopped = True
        front = vars(self._module).get(_DOOR)
        while isinstance(front, Listener) and front.stopped:
            front = front.behind
            setattr(self._module, _DOOR, front)
        if front is None and _DOOR in vars(self._module):
            delattr(self._module, _DOOR)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return nothing, which is what stands in front of a module by default."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Become nothing in a pickle."""
        return _nobody, ()


def _nobody() -> None:
    return None


def listen(modules: Iterable[nn.Module], hear: Hear) -> list[Listener]:
    """Listen to modules, except where that is impossible or would be compiled: then nothing is heard of them."""
    return [Listener(module, hear) for module in modules if not isinstance(module, torch.jit.ScriptModule)]


def stop_listening(listeners: list[Listener]) -> None:
    """Leave the modules as they were, and the list empty."""
    while listeners:
        listeners.pop().stop()


def compiled_call(module: nn.Module) -> Any:
    """Return the compiled code of a module that was compiled in place, whether or not it is listened to."""
    door = getattr(module, _DOOR, None)
    while isinstance(door, Listener):
        door = door.behind
    return door
