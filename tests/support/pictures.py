"""A picture of objects and of all that they hold, by value and identity, to compare what was with what is."""

from __future__ import annotations

import functools
import random
import types
import warnings
import weakref
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

ITERATORS = ("count", "cycle", "str_iterator", "str_ascii_iterator", "list_iterator", "enumerate")
PLAIN = (int, float, complex, str, bytes, type, types.ModuleType, types.BuiltinFunctionType, types.MemberDescriptorType)


def pictures(*things: Any) -> list[Any]:
    """Describe some things. What is met twice is described once."""
    seen: dict[int, Any] = {}
    return [_picture(thing, seen) for thing in things]


def _picture(thing: Any, seen: dict[int, Any]) -> Any:
    if thing is None or isinstance(thing, (*PLAIN, torch.dtype, torch.device)):
        return repr(thing)
    if id(thing) in seen:
        return "seen", id(thing)
    seen[id(thing)] = thing
    number, name = id(thing), type(thing).__name__
    if name in ITERATORS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on: that 3.14 copies no itertools
            return number, name, repr(thing.__reduce__())
    for kind, state in STATES.items():
        if isinstance(thing, kind):
            return number, name, state(thing)
    held = next((held for kind, held in HELD.items() if isinstance(thing, kind)), _held)(thing)
    return number, name, [_picture(item, seen) for item in held]


STATES: dict[Any, Callable[[Any], Any]] = {
    torch.Generator: lambda thing: thing.get_state().tolist(),
    (np.ndarray, bytearray, array): repr,
    (np.random.Generator, np.random.RandomState, random.Random): lambda thing: repr(thing.__reduce__()),
    (set, frozenset): lambda thing: sorted(map(repr, thing)),
}


def _of_tensor(thing: Tensor) -> list[Any]:
    if is_lazy(thing):
        return [thing.grad, thing._backward_hooks, vars(thing)]
    known = [thing.is_leaf, thing.requires_grad, "inference" if thing.is_inference() else thing._version]
    values = [*thing.shape, thing.dtype, thing.untyped_storage()._cdata, thing.storage_offset(), repr(thing.tolist())]
    return [*known, *values, thing.grad if thing.is_leaf else None, thing._backward_hooks, vars(thing)]


def _of_function(thing: types.FunctionType) -> list[Any]:
    cells = [cell.cell_contents for cell in thing.__closure__ or ()]
    return [thing.__defaults__, thing.__kwdefaults__, vars(thing), *cells]


def _held(thing: Any) -> list[Any]:
    items = [*thing.keys(), *thing.values()] if isinstance(thing, dict) else []
    items = [*thing] if isinstance(thing, (list, tuple, deque)) else items
    slots = [getattr(thing, name, None) for kind in type(thing).__mro__ for name in vars(kind).get("__slots__", ())]
    own = getattr(thing, "__dict__", None)
    return [*items, *slots, own if type(own) is dict else None]


HELD: dict[type, Callable[[Any], list[Any]]] = {
    Tensor: _of_tensor,
    types.MethodType: lambda thing: [thing.__self__, thing.__func__],
    types.FunctionType: _of_function,
    functools.partial: lambda thing: [thing.func, thing.args, thing.keywords],
    weakref.ReferenceType: lambda thing: [thing()],
}


def assert_same_pictures(before: Any, after: Any, path: str = "") -> None:
    """Fail at the innermost difference."""
    parts = isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)) and len(before) == len(after)
    if before != after and parts:
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            assert_same_pictures(one, other, f"{path}/{number}")
    assert before == after, f"{path}: {str(before)[:300]} … {str(after)[:300]}"
