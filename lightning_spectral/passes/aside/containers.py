"""Keep and put back containers, arrays and generators of random numbers.

Each ``see_…`` notes the content of a thing in a memento and looks into the items; its ``_put_back_…`` restores it. A
container keeps its identity: it is written to only if its content has changed, and then in place.
"""

from __future__ import annotations

import array
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from operator import is_
from typing import Any

import numpy as np

from lightning_spectral.passes.aside.memento import Memento, Visit

__all__ = [
    "see_array",
    "see_deque",
    "see_dict",
    "see_items",
    "see_list",
    "see_numbers",
    "see_random",
    "see_set",
    "set_bits",
    "state_of",
]

_MANY = 10_000  # items of a longer container are data: the container is put back, its items are not looked into


# Containers. Methods are called on the builtin class, because a subclass may have replaced its own.


def see_dict(memento: Memento, thing: dict[Any, Any]) -> None:
    """Keep the items of a dict, in their order."""
    base: Any = OrderedDict if isinstance(thing, OrderedDict) else dict
    keys, values = list(base.keys(thing)), list(base.values(thing))
    memento.keep(_put_back_dict, thing, (keys, values))
    if len(keys) > _MANY:
        return
    atoms = memento.atoms  # most of the very many attributes of a model have nothing to keep
    for key, value in zip(keys, values, strict=True):
        if type(key) not in atoms:
            memento.see(key)
        if type(value) not in atoms and (seen := memento.see(value)) is not value:
            base.__setitem__(thing, key, seen)


def _put_back_dict(thing: dict[Any, Any], before: tuple[list[Any], list[Any]]) -> None:
    base: Any = OrderedDict if isinstance(thing, OrderedDict) else dict
    keys, values = before
    same = dict.__len__(thing) == len(keys) and all(map(is_, base.keys(thing), keys))
    if same and all(map(is_, base.values(thing), values)):
        return
    base.clear(thing)
    for key, value in zip(keys, values, strict=True):
        base.__setitem__(thing, key, value)


def see_list(memento: Memento, thing: list[Any]) -> None:
    """Keep the items of a list."""
    before = list.copy(thing)
    memento.keep(_put_back_list, thing, before)
    if len(before) <= _MANY:
        for place, value in enumerate(before):
            if (seen := memento.see(value)) is not value:
                list.__setitem__(thing, place, seen)


def _put_back_list(thing: list[Any], before: list[Any]) -> None:
    if list.__len__(thing) != len(before) or not all(map(is_, list.__iter__(thing), before)):
        list.__setitem__(thing, slice(None), before)


def see_set(memento: Memento, thing: set[Any]) -> None:
    """Keep the items of a set."""
    before = tuple(set.__iter__(thing))
    memento.keep(_put_back_set, thing, before)
    see_items(memento, before)


def _put_back_set(thing: set[Any], before: tuple[Any, ...]) -> None:
    if set.__len__(thing) != len(before) or not all(map(is_, set.__iter__(thing), before)):
        set.clear(thing)
        set.update(thing, before)


def see_deque(memento: Memento, thing: deque[Any]) -> None:
    """Keep the items of a deque."""
    before = tuple(deque.__iter__(thing))
    memento.keep(_put_back_deque, thing, before)
    if len(before) <= _MANY:
        for place, value in enumerate(before):
            if (seen := memento.see(value)) is not value:
                deque.__setitem__(thing, place, seen)


def _put_back_deque(thing: deque[Any], before: tuple[Any, ...]) -> None:
    if deque.__len__(thing) != len(before) or not all(map(is_, deque.__iter__(thing), before)):
        deque.clear(thing)
        deque.extend(thing, before)


def see_items(memento: Memento, things: tuple[Any, ...] | frozenset[Any]) -> None:
    """Look into the items of a container that cannot change itself."""
    if len(things) <= _MANY:
        for thing in things:
            memento.see(thing)


def see_numbers(memento: Memento, thing: bytearray | array.array[Any]) -> None:
    """Keep a copy of bytes or numbers, if there is room for it."""
    if memento.affords(memoryview(thing).nbytes):
        memento.keep(_put_back_numbers, thing, thing[:])


def _put_back_numbers(thing: Any, before: Any) -> None:
    if thing != before:
        thing[:] = before


def see_array(memento: Memento, thing: np.ndarray[Any, Any]) -> None:
    """Keep a copy of a numpy array, if there is room for it."""
    if thing.flags.writeable and memento.affords(thing.nbytes):
        memento.keep(np.copyto, thing, thing.copy())
    if thing.dtype.hasobject:
        see_items(memento, tuple(thing.flat))


# Generators of random numbers, each with the functions that read and write its state.


def state_of(read: Callable[[Any], Any], write: Callable[[Any, Any], object]) -> Visit:
    """Return a visit that keeps the state of a generator: one function reads it, the other puts it back."""
    return lambda memento, thing: memento.keep(write, thing, read(thing))


def set_bits(thing: np.random.BitGenerator, state: Any) -> None:
    """Set the state of a bit generator of numpy."""
    thing.state = state


def see_random(memento: Memento, thing: random.Random) -> None:
    """Keep the state of a generator of Python."""
    if not isinstance(thing, random.SystemRandom):
        memento.keep(random.Random.setstate, thing, random.Random.getstate(thing))
