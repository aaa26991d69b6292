"""Hear the arguments and results of module calls, without hooks.

A hook belongs to its module: it is copied and pickled with the module, it switches off the fused kernels of
``nn.TransformerEncoder``, and compiled code is compiled again because of it. ``nn.Module.__call__`` has another door.
If a module has the attribute ``_compiled_call_impl``, that is called instead of the module. Only ``nn.Module.compile``
uses this attribute. Copies and pickles of a module do not have it, and compiled code does not look at the attribute of
a module inside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["Hear", "Listener", "compiled_call", "listen", "stop_listening"]

_DOOR = "_compiled_call_impl"

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Hear = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Takes a module, its call and the arguments; makes the call, with other arguments if given, and returns its result."""


class Listener:
    """Stands in front of a module. Copies of a listener are ``None``, so a listener does not hear copies of its module.

    Args:
        module: The module.
        hear: Is called in place of the module.
    """

    def __init__(self, module: nn.Module, hear: Hear) -> None:
        self._module, self._hear = module, hear
        self.behind: Any = vars(module).get(_DOOR)  # compiled code, or another listener
        self.stopped = False
        # Not by setattr: what `torch.compile` makes of a module passes attributes on to the module inside.
        vars(module)[_DOOR] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        if torch.compiler.is_compiling():  # by a wrapper around the module, whose code whatever hears would be part of
            return (self.behind or self._module._call_impl)(*args, **kwargs)
        # A shallow copy of the module, such as a replica of nn.DataParallel, has this listener, too. The copy is not
        # part of the model and has to run its own code.
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, nn.Module) and caller is not self._module:
            return caller._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        call = self.behind or self._module._call_impl
        if self.stopped or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return call(*args, **kwargs)

        def make(new: Arguments | None = None) -> Any:
            positional, named = new or (args, kwargs)
            return call(*positional, **named)

        return self._hear(self._module, make, args, kwargs)

    def stop(self) -> None:
        """Stop listening. Several listeners may stand in a row; stopped ones leave it from the front."""
        self.stopped = True
        front = vars(self._module).get(_DOOR)
        while isinstance(front, Listener) and front.stopped:
            front = front.behind
            vars(self._module)[_DOOR] = front
        if front is None:
            vars(self._module).pop(_DOOR, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return ``None``: no listener stands in front of a copy."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Become ``None`` in a pickle."""
        return _nobody, ()


def _nobody() -> None:
    return None


def listen(modules: Iterable[nn.Module], hear: Hear) -> list[Listener]:
    """Listen to modules. Script modules cannot be listened to and are left out."""
    return [Listener(module, hear) for module in modules if not isinstance(module, torch.jit.ScriptModule)]


def stop_listening(listeners: list[Listener]) -> None:
    """Stop all listeners, and empty the list."""
    while listeners:
        listeners.pop().stop()


def compiled_call(module: nn.Module) -> Any:
    """Return the compiled code of a module that was compiled in place, also behind listeners; else ``None``."""
    door = getattr(module, _DOOR, None)
    while isinstance(door, Listener):
        door = door.behind
    return door
