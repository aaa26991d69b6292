"""Decide, by its class, how an object is kept and put back."""

from __future__ import annotations

import array
import contextvars
import functools
import random
import threading
import types
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_spectral.passes.aside.containers import (
    see_array,
    see_deque,
    see_dict,
    see_items,
    see_list,
    see_numbers,
    see_random,
    see_set,
    set_bits,
    state_of,
)
from lightning_spectral.passes.aside.memento import ABSENT, Kind, Memento, Visit, of_library
from lightning_spectral.passes.aside.stand_ins import LIGHTNING, mute, replacement
from lightning_spectral.passes.aside.tensor_state import TensorState, without_history

__all__ = ["kind_of"]

_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis), type(NotImplemented)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, np.generic, np.dtype, np.memmap),
    *(types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.FrameType, types.GeneratorType),
)
# Objects from these packages run threads, hold files, or are not used in a forward pass.
_LEFT_ALONE = {
    *LIGHTNING,
    *(
        "lightning_spectral",
        "asyncio",
        "concurrent",
        "io",
        "logging",
        "multiprocessing",
        "queue",
        "socket",
        "ssl",
        "_io",
    ),
}
_OF_TORCH = ("torch.nn.", "torch.optim.", "torch.utils.hooks")
_METHODS = (
    *(types.FunctionType, staticmethod, classmethod, property, functools.cached_property, functools.partialmethod),
)


def kind_of(kind: type) -> Kind:
    """Return the visit that looks into objects of a class, and the function that makes their stand-ins."""
    return _visit_of(kind), without_history if kind is Tensor else replacement(kind)


def _visit_of(kind: type) -> Visit | None:
    """Return the visit of a class, ``None`` for a class whose objects have nothing to keep."""
    if issubclass(kind, _ATOMS):
        return None
    module = kind.__module__
    for known, visit in _VISITS.items():
        if issubclass(kind, known):
            return visit if of_library(module) or issubclass(kind, type) else _both(visit)
    if str(module).partition(".")[0] in _LEFT_ALONE and not issubclass(kind, nn.Module):
        return None
    if str(module).startswith("torch.") and not (module.startswith(_OF_TORCH) or issubclass(kind, nn.Module)):
        return None
    return _see_instance


def _both(visit: Visit) -> Visit:
    """Return a visit for a user's subclass of a builtin: its content, and its attributes."""

    def visit_both(memento: Memento, thing: Any) -> None:
        visit(memento, thing)
        _see_instance(memento, thing)

    return visit_both


# Instances and classes.


def _see_instance(memento: Memento, thing: object) -> None:
    """Keep the class, the attributes and the slots of an instance."""
    kind = type(thing)
    try:
        own = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        own = None
    memento.keep(_put_back_instance, thing, (kind, own))
    if type(own) is dict:
        see_dict(memento, own)
        mute(kind, own)
    for base in kind.__mro__:
        if "__slots__" in vars(base):
            for member in vars(base).values():
                if isinstance(member, types.MemberDescriptorType):
                    _see_member(memento, thing, member)
    memento.see(kind)


def _put_back_instance(thing: object, before: tuple[type, Any]) -> None:
    kind, own = before
    if type(thing) is not kind:
        object.__setattr__(thing, "__class__", kind)
    if own is not None and object.__getattribute__(thing, "__dict__") is not own:
        object.__setattr__(thing, "__dict__", own)


def _see_member(memento: Memento, thing: object, member: types.MemberDescriptorType) -> None:
    try:
        value = member.__get__(thing)
    except AttributeError:
        value = ABSENT
    memento.keep(_put_back_member, thing, (member, value))
    if value is not ABSENT and (seen := memento.see(value)) is not value:
        member.__set__(thing, seen)


def _put_back_member(thing: object, before: tuple[types.MemberDescriptorType, Any]) -> None:
    member, value = before
    try:
        now = member.__get__(thing)
    except AttributeError:
        now = ABSENT
    if now is not value:
        member.__delete__(thing) if value is ABSENT else member.__set__(thing, value)


def _see_class(memento: Memento, kind: type) -> None:
    """Keep the attributes of a user's class and look into its methods. Of a library's class, look into its bases."""
    for base in kind.__mro__:
        if base is not kind:
            memento.see(base)
    if memento.foreign(kind.__module__):
        for value in vars(kind).values() if issubclass(kind, nn.Module) else ():
            if isinstance(value, types.FunctionType) and not memento.foreign(value.__globals__.get("__name__")):
                memento.see(value)  # the user has put a forward of their own into a layer of torch
        return
    memento.see(type(kind))
    before = dict(vars(kind))
    memento.keep(_put_back_class, kind, before)
    for name, value in before.items():
        if isinstance(value, _METHODS):
            memento.method(name, value)
        elif not name.startswith("__") and (seen := memento.see(value)) is not value:
            type.__setattr__(kind, name, seen)


def _put_back_class(kind: type, before: dict[str, Any]) -> None:
    now = dict(vars(kind))
    for name in now.keys() - before.keys():
        type.__delattr__(kind, name)
    for name, value in before.items():
        if now.get(name, ABSENT) is not value:
            type.__setattr__(kind, name, value)


# Functions, and things that hold a single object.


def _see_function(memento: Memento, thing: types.FunctionType) -> None:
    """Keep the defaults of a function, its closure, and the globals that its code names."""
    memento.keep(_put_back_function, thing, (thing.__defaults__, thing.__kwdefaults__))
    for held in (thing.__defaults__, thing.__kwdefaults__, vars(thing), thing.__closure__):
        memento.see(held)
    namespace = thing.__globals__
    if not memento.foreign(namespace.get("__name__")):
        memento.names(thing.__code__, namespace)


def _put_back_function(thing: types.FunctionType, before: tuple[Any, Any]) -> None:
    if thing.__defaults__ is not before[0]:
        thing.__defaults__ = before[0]
    if thing.__kwdefaults__ is not before[1]:
        thing.__kwdefaults__ = before[1]


def _see_cell(memento: Memento, cell: types.CellType) -> None:
    try:
        value = cell.cell_contents
    except ValueError:
        value = ABSENT
    memento.keep(_put_back_cell, cell, value)
    if value is not ABSENT and (seen := memento.see(value)) is not value:
        cell.cell_contents = seen


def _put_back_cell(cell: types.CellType, value: Any) -> None:
    if value is ABSENT:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def _held_in(*attributes: str) -> Visit:
    """Return a visit that looks into some attributes of a thing. The attributes themselves cannot be set."""

    def visit(memento: Memento, thing: Any) -> None:
        for attribute in attributes:
            memento.see(getattr(thing, attribute, None))

    return visit


def _see_variable(memento: Memento, thing: contextvars.ContextVar[Any]) -> None:
    value = thing.get(ABSENT)
    if value is not ABSENT:  # a variable without a value cannot be made so again
        memento.keep(contextvars.ContextVar.set, thing, value)
        memento.see(value)


def _see_tensor(memento: Memento, thing: Tensor) -> None:
    """Keep a tensor without its numbers, which are copied on the first write (see :mod:`.writes`)."""
    memento.tensors.append(thing)
    memento.keep(TensorState.put_back, thing, TensorState(thing))
    for held in (thing.grad if thing.is_leaf else None, thing._backward_hooks, vars(thing)):
        memento.see(held)


_VISITS: dict[type, Visit] = {
    Tensor: _see_tensor,
    dict: see_dict,
    list: see_list,
    set: see_set,
    deque: see_deque,
    tuple: see_items,
    frozenset: see_items,
    types.MethodType: _held_in("__self__", "__func__"),
    types.FunctionType: _see_function,
    types.CellType: _see_cell,
    functools.partial: _held_in("func", "args", "keywords", "__dict__"),
    functools._lru_cache_wrapper: _held_in("__wrapped__", "__dict__"),
    functools.partialmethod: _held_in("func", "args", "keywords"),
    functools.cached_property: _held_in("func"),
    staticmethod: _held_in("__func__"),
    classmethod: _held_in("__func__"),
    property: _held_in("fget", "fset", "fdel"),
    weakref.ref: lambda memento, thing: memento.see(thing()),
    type: _see_class,
    bytearray: see_numbers,
    array.array: see_numbers,
    np.ndarray: see_array,
    torch.Generator: state_of(torch.Generator.get_state, torch.Generator.set_state),
    np.random.Generator: _held_in("bit_generator"),
    np.random.BitGenerator: state_of(lambda thing: thing.state, set_bits),
    np.random.RandomState: state_of(lambda thing: thing.get_state(legacy=False), np.random.RandomState.set_state),
    random.Random: see_random,
    contextvars.ContextVar: _see_variable,
    threading.local: _held_in("__dict__"),  # of this thread
}
