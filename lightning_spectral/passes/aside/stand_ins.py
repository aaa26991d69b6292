"""Stand-ins: what a traced pass gets in place of an object that it must not change, or that cannot be put back.

A pass can read a Trainer's step and a logger's folder, but it logs nothing. It advances a copy of an iterator, not the
iterator. Frameworks are recognized by the names of their classes, because none of them is imported here.
"""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

__all__ = ["LIGHTNING", "mute", "replacement"]

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}

_RUNS = {"Trainer", "Fabric"}
_WRITERS = {"torch": "SummaryWriter", "tensorboardX": "SummaryWriter", "wandb": "Run"}
_SWALLOWED = {"log", "log_dict", "print", "save", "save_checkpoint"}
_EXAMPLES: tuple[Any, ...] = ([], (), "", "é", b"", range(0), range(2**70), {}, {}.values(), {}.items(), set())
_ITERATORS = {
    itertools.count,
    itertools.cycle,
    enumerate,
    zip,
    map,
    filter,
    reversed,
    *(type(iter(items)) for items in _EXAMPLES),
    type(reversed([])),
}


def replacement(kind: type) -> Callable[[Any], object | None] | None:
    """Return the function that makes stand-ins of objects of a class, ``None`` for a class that needs none.

    The function returns ``None`` for an object that a pass may have itself.
    """
    if kind in weakref.ProxyTypes:
        return _proxy
    if kind is functools._lru_cache_wrapper:
        return _empty_cache
    if kind in _ITERATORS:
        return _copied
    return _of_framework(kind)


def _of_framework(kind: type) -> Callable[[Any], object] | None:
    """Return the stand-in class of a Trainer, a Fabric, a logger or a writer; ``None`` for other classes."""
    for base in kind.__mro__:
        root = base.__module__.partition(".")[0]
        if root in LIGHTNING and base.__name__ in _RUNS:
            return _Onlooker
        if (root in LIGHTNING and base.__name__ == "Logger") or _WRITERS.get(root) == base.__name__:
            return _Quiet
    return None


def mute(kind: type, attributes: dict[str, Any]) -> None:
    """Replace ``log``, ``log_dict`` and ``print`` of a LightningModule by functions that do nothing.

    Args:
        kind: The class of the instance. Other classes are left alone.
        attributes: The attributes of the instance.
    """
    if any(
        base.__name__ == "LightningModule" and base.__module__.partition(".")[0] in LIGHTNING for base in kind.__mro__
    ):
        attributes.update(log=_swallow, log_dict=_swallow, print=_swallow)


def _swallow(*_: object, **__: object) -> None:
    return None


def _proxy(proxy: Any) -> object | None:
    """Return a stand-in of the object behind a weak proxy: LightningModules hold their Trainer so."""
    try:
        make = _of_framework(proxy.__class__)
    except ReferenceError:
        return None
    return None if make is None else make(proxy)


def _copied(iterator: Any) -> object | None:
    """Return a copy of an iterator, ``None`` where it cannot be copied."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on: that 3.14 copies no itertools
            copy: object = _copy(iterator)
            return copy
    except TypeError:  # a generator in it, or a Python that no longer copies iterators
        return None


def _copy(iterator: Any) -> Any:
    """Copy an iterator together with the iterators that it draws from. The underlying containers are not copied."""
    if type(iterator) not in _ITERATORS:
        if isinstance(iterator, Iterator):
            raise TypeError(f"{type(iterator).__name__} cannot be copied")
        return iterator
    make, arguments, *state = iterator.__reduce__()
    copy = make(*map(_copy, arguments))
    if state and isinstance(state[0], tuple):  # a cycle: the items so far, in a list that it appends to
        copy.__setstate__(tuple(list(part) if isinstance(part, list) else part for part in state[0]))
    elif state:
        copy.__setstate__(state[0])
    return copy


def _empty_cache(cached: Any) -> object | None:
    """Copy an empty cache. A filled cache stays: it may hold an object that all its callers have to share."""
    if cached.cache_info().currsize or not isinstance(cached.__wrapped__, FunctionType):
        return None
    return functools.update_wrapper(functools.lru_cache(**cached.cache_parameters())(cached.__wrapped__), cached)


class _StandIn:
    """Stands for an object. Attributes that are set on the stand-in do not reach the object."""

    def __init__(self, real: Any) -> None:
        self._real = real

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        kind: type = self._real.__class__
        return kind


class _Onlooker(_StandIn):
    """Stands for a Trainer or a Fabric. Its loggers are quiet, and its dicts are copies."""

    barebones = True  # LightningModule.log of the class, called past the muted instance, does nothing in this mode

    def __getattr__(self, name: str) -> Any:
        if name in _SWALLOWED:
            return _swallow
        value = getattr(self._real, name)
        if isinstance(value, list):
            return [_stand_in(item) for item in value]
        return dict(value) if type(value) is dict else _stand_in(value)


def _stand_in(value: Any) -> Any:
    """Return the stand-in of a framework's object, other values unchanged."""
    make = _of_framework(type(value))
    return value if make is None else make(value)


class _Quiet(_StandIn):
    """Stands for a logger: it has the name and the folder, and its calls do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name == "experiment":  # some loggers open their experiment on the first access
            return _Nothing()
        value = getattr(self._real, name)
        return _swallow if callable(value) else value


class _Nothing:
    """Has every attribute and takes every call; each returns the same empty object."""

    def __getattr__(self, name: str) -> _Nothing:
        return self

    def __setattr__(self, name: str, value: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> _Nothing:
        return self

    def __getitem__(self, key: object) -> _Nothing:
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[object]:
        return iter(())
