"""A picture of an object and of all that it holds, by value and identity, to compare what was with what is."""

from __future__ import annotations

import functools
import random
import types
import weakref
from array import array
from collections import deque
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
    return id(thing), type(thing).__name__, _content(thing, seen)


def _content(thing: Any, seen: dict[int, Any]) -> Any:
    def inside(*things: Any) -> list[Any]:
        return [_picture(item, seen) for item in things]

    match thing:
        case Tensor() if is_lazy(thing):
            return inside(thing.grad, thing._backward_hooks, vars(thing))
        case Tensor():
            known = thing.is_leaf, thing.requires_grad, None if thing.is_inference() else thing._version
            values = tuple(thing.shape), thing.dtype, thing.data_ptr(), repr(thing.tolist())
            return *known, *values, inside(thing.grad if thing.is_leaf else None, thing._backward_hooks, vars(thing))
        case torch.Generator():
            return thing.get_state().tolist()
        case np.ndarray() | bytearray() | array():
            return repr(thing)
        case np.random.Generator() | np.random.RandomState() | random.Random():
            return repr(thing.__reduce__())
        case set() | frozenset():
            return sorted(map(repr, thing))
        case types.MethodType():
            return inside(thing.__self__, thing.__func__)
        case functools.partial():
            return inside(thing.func, thing.args, thing.keywords)
        case types.FunctionType():
            cells = [cell.cell_contents for cell in thing.__closure__ or ()]
            return inside(thing.__defaults__, thing.__kwdefaults__, vars(thing), *cells)
        case weakref.ReferenceType():
            return inside(thing())
        case _ if type(thing).__name__ in ITERATORS:
            return repr(thing.__reduce__())
    items = [*thing.keys(), *thing.values()] if isinstance(thing, dict) else ()
    items = thing if isinstance(thing, (list, tuple, deque)) else items
    slots = [getattr(thing, name, None) for kind in type(thing).__mro__ for name in vars(kind).get("__slots__", ())]
    own = getattr(thing, "__dict__", None)
    return inside(*items), inside(*slots), inside(own) if type(own) is dict else None


def assert_same_pictures(before: Any, after: Any, path: str = "") -> None:
    """Fail at the innermost difference."""
    parts = isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)) and len(before) == len(after)
    if before != after and parts:
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            assert_same_pictures(one, other, f"{path}/{number}")
    assert before == after, f"{path}: {str(before)[:300]} … {str(after)[:300]}"
