"""The place of a scale: a child of its site that torch sees and the user's code does not.

torch has to see a scale as a child, because moving, casting, sharding and saving a model walk over the children. The
user's code must not see it, because it may count the children, index them, or take the last one for the last layer. So
``children()``, ``named_children()`` and, in a container, length, iteration, indices and slices leave the scale out,
except in calls from torch.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from types import FrameType
from typing import Any

import torch
from torch import nn

from lightning_spectral.weights.names import CHILD

__all__ = ["place", "remove"]


def place(site: nn.Module, scale: nn.Module) -> None:
    """Make a scale a child of its site that only torch sees."""
    site.add_module(CHILD, scale)
    hiding = next((hiding for kind, hiding in _HIDING.items() if isinstance(site, kind)), None)
    if hiding is not None and not isinstance(site, hiding):
        site.__class__ = _hiding_class(type(site), hiding)
    # In the instance, not in a subclass, which would break code with `type(module) is nn.Linear`.
    for name, seen in (("children", _children), ("named_children", _named_children)):
        vars(site)[name] = functools.partial(seen, site)


def remove(site: nn.Module) -> None:
    """Undo :func:`place`."""
    delattr(site, CHILD)
    site.__class__ = _plain_class(type(site))
    for name in ("children", "named_children"):
        vars(site).pop(name, None)


def _children(site: nn.Module) -> Iterator[nn.Module]:
    by_torch = not torch.compiler.is_compiling() and _is_of_torch(sys._getframe(1))
    return (module for name, module in type(site).named_children(site) if by_torch or name != CHILD)


def _named_children(site: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    by_torch = not torch.compiler.is_compiling() and _is_of_torch(sys._getframe(1))
    return ((name, module) for name, module in type(site).named_children(site) if by_torch or name != CHILD)


def _is_of_torch(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == "torch"


def _own(container: nn.Module) -> OrderedDict[str, Any]:
    return OrderedDict((name, module) for name, module in container._modules.items() if name != CHILD)


class _Sequential(nn.Sequential):
    def __len__(self) -> int:
        return len(_own(self))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(_own(self).values())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _plain_class(type(self))(OrderedDict(list(_own(self).items())[index]))
        return self._get_item_by_idx(_own(self).values(), index)


class _ModuleList(nn.ModuleList):
    def __len__(self) -> int:
        return len(_own(self))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(_own(self).values())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _plain_class(type(self))(list(_own(self).values())[index])
        return super().__getitem__(index)


class _ModuleDict(nn.ModuleDict):
    def __len__(self) -> int:
        return len(_own(self))

    def __iter__(self) -> Iterator[str]:
        return iter(_own(self))

    def __contains__(self, key: object) -> bool:
        return key in _own(self)

    def keys(self) -> KeysView[str]:
        return _own(self).keys()

    def items(self) -> ItemsView[str, nn.Module]:
        return _own(self).items()

    def values(self) -> ValuesView[nn.Module]:
        return _own(self).values()


_HIDING = {nn.Sequential: _Sequential, nn.ModuleList: _ModuleList, nn.ModuleDict: _ModuleDict}


def _set_aside(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of a container, so that it works on the container without its scale."""

    @functools.wraps(method)
    def without_scale(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scale = self._modules.pop(CHILD, None)
        try:
            return method(self, *args, **kwargs)
        finally:
            if scale is not None:
                self._modules[CHILD] = scale

    return without_scale


for _kind, _hiding in _HIDING.items():
    _hiding.__name__ = _kind.__name__  # the qualified name, which pickle uses, is unchanged
    for _name, _method in vars(_kind).items():
        if inspect.isfunction(_method) and _name not in {"__init__", "forward", *vars(_hiding)}:
            setattr(_hiding, _name, _set_aside(_method))


_MADE: dict[type[Any], type[Any]] = {}


def _hiding_class(plain: type[Any], hiding: type[Any]) -> type[Any]:
    """Return a subclass of a container class that hides scales. Methods of the user's class keep precedence."""
    if plain in _HIDING:
        return hiding
    if plain not in _MADE:
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        _MADE[plain] = type(plain.__name__, (plain, hiding), {**names, "__reduce_ex__": _reduced, "plain": plain})
    return _MADE[plain]


def _reduced(self: nn.Module, protocol: Any) -> Any:
    """Reduce for pickling and copying, by the user's class, because the generated class cannot be imported."""
    made: Any = next(kind for kind in type(self).__mro__ if "plain" in vars(kind))  # sharding may have made a subclass
    reduced: Any = super(made, self).__reduce_ex__(protocol)
    _, arguments, *rest = reduced
    if made not in arguments:
        return reduced
    return _remade, (_plain_class(made), made.__bases__[1], *arguments[1:]), *rest


def _remade(plain: type[Any], hiding: type[Any], *arguments: Any) -> nn.Module:
    made = _hiding_class(plain, hiding)
    found: nn.Module = made.__new__(made, *arguments)
    return found


def _plain_class(kind: type[nn.Module]) -> type[Any]:
    """Return the class that a container had before it hid a scale."""
    for plain, hiding in _HIDING.items():
        if kind is hiding:
            return plain
    found: type[Any] = vars(kind).get("plain", kind)
    return found
