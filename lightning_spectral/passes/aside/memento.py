"""What Python can reach from some objects, noted so that all of it can be put back after a pass."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cache
from types import CodeType, ModuleType
from typing import Any

from torch import Tensor

from lightning_spectral.passes.aside.stand_ins import LIGHTNING

__all__ = ["ABSENT", "Kind", "Memento", "Visit", "of_library"]

ABSENT: Any = object()

Visit = Callable[["Memento", Any], None]
# How the objects of a class are looked into, and what makes their stand-ins; None for those that need neither.
Kind = tuple[Visit | None, Callable[[Any], object | None] | None]

_LIBRARIES = {*sys.stdlib_module_names, *LIGHTNING, "lightning_spectral", "numpy", "scipy", "torch", "torchmetrics"}
# Bytes: of the largest array that is copied, and of all such copies.
_LARGEST, _ROOM = 2**24, 2**26
_CONTAINERS = {dict, OrderedDict, defaultdict, list, set, deque}


class Memento:
    """What some objects, and all that is reached from them, were at one time.

    What is kept is shallow: the contents of every container and of every instance, by identity; :meth:`restore` puts
    them back into the very objects that held them. The numbers in tensors are not copied.

    Args:
        kind_of: Returns how the objects of a class are kept.
        files: Python modules of installed packages whose code is looked into: where the classes of a model are from.
            Code that is not installed is the user's, and looked into as well.

    Attributes:
        tensors: The tensors that were reached.
        atoms: Classes whose objects have nothing to keep.
    """

    def __init__(self, kind_of: Callable[[type], Kind], files: Collection[str] = ()) -> None:
        self.tensors: list[Tensor] = []
        self._kept: list[tuple[Callable[[Any, Any], object], Any, Any]] = []
        self._empty: list[Any] = []
        self._kind_of, self._files = kind_of, files
        self._kinds: dict[type, Kind] = {}
        self.atoms: set[type] = set()
        self._seen: dict[int, object] = {}
        self._stand_ins: dict[int, tuple[object, object]] = {}
        self._named = {"forward"}
        self._unnamed: defaultdict[str, list[object]] = defaultdict(list)
        self._room = _ROOM
        self._slots: set[tuple[int, str]] = set()
        self._todo: list[tuple[Visit, object]] = []

    def look(self) -> None:
        """Note everything that is reached from what was seen."""
        while self._todo:
            visit, thing = self._todo.pop()
            if id(thing) not in self._seen:
                self._seen[id(thing)] = thing
                with suppress(Exception):  # an object that does not let itself be looked at stays as the pass leaves it
                    visit(self, thing)

    def restore(self) -> None:
        """Put everything back.

        Raises:
            Exception: Something could not be put back. All the rest was.
        """
        failure = None
        for container in self._empty:
            if container:
                container.clear()
        for put_back, thing, before in reversed(self._kept):
            try:
                put_back(thing, before)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def keep(self, put_back: Callable[[Any, Any], object], thing: Any, before: Any) -> None:
        """Note the function that makes a thing what it was before."""
        self._kept.append((put_back, thing, before))

    def see(self, thing: Any) -> Any:
        """Note a thing and what is reached from it; return what its place holds during the pass, as a rule itself."""
        kind = type(thing)
        if kind not in self._kinds:
            self._kinds[kind] = self._kind_of(kind)
            if self._kinds[kind] == (None, None):
                self.atoms.add(kind)
        visit, stand_in = self._kinds[kind]
        if visit is not None:
            if kind in _CONTAINERS and not thing:
                self._empty.append(thing)
            else:
                self._todo.append((visit, thing))
        return thing if stand_in is None else self._stand_in(thing, stand_in)

    def _stand_in(self, thing: object, make: Callable[[Any], object | None]) -> object:
        if id(thing) not in self._stand_ins:
            made = make(thing)
            self._stand_ins[id(thing)] = (thing, thing if made is None else made)
        return self._stand_ins[id(thing)][1]

    def affords(self, size: int) -> bool:
        """Whether a number of bytes may be copied, beside those copied before."""
        affordable = size <= min(_LARGEST, self._room)
        self._room -= size if affordable else 0
        return affordable

    def slot(self, namespace: dict[str, Any], name: str) -> None:
        """Keep one name of a namespace, whether it is there or not."""
        if (id(namespace), name) in self._slots:
            return
        self._slots.add((id(namespace), name))
        value = namespace.get(name, ABSENT)
        self.keep(_put_back_name, namespace, (name, value))
        if value is not ABSENT and (seen := self.see(value)) is not value:
            namespace[name] = seen

    def foreign(self, name: object) -> bool:
        """Whether the code of a module, by its name, is not looked into."""
        return of_library(name) or (name not in self._files and _installed(str(name).partition(".")[0]))

    def names(self, code: CodeType, namespace: dict[str, Any]) -> None:
        """Keep what code names: globals, what it names in the user's own modules, and methods of whatever is reached.

        Args:
            code: The code of a function.
            namespace: Its globals.
        """
        names = set(_names(code))
        for name in names:
            self.slot(namespace, name)
            for module in (namespace.get(name), sys.modules.get(name)):
                if isinstance(module, ModuleType) and not self.foreign(module.__name__):
                    for attribute in names & vars(module).keys():
                        self.slot(vars(module), attribute)
        for name in names - self._named:
            self._named.add(name)
            for method in self._unnamed.pop(name, ()):
                self.see(method)

    def method(self, name: str, function: object) -> None:
        """See a function of a class if some code names it, or as soon as some does."""
        if name in self._named or name.startswith("__"):
            self.see(function)
        else:
            self._unnamed[name].append(function)


def of_library(name: object) -> bool:
    """Whether a module, by its name, is of a library that keeps nothing of a model: Python's, torch's, Lightning's."""
    return not isinstance(name, str) or name.partition(".")[0] in _LIBRARIES


@cache
def _installed(package: str) -> bool:
    path = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names in a piece of code and in the functions inside it, and the strings that could be names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _put_back_name(namespace: dict[str, Any], before: tuple[str, Any]) -> None:
    name, value = before
    if value is ABSENT:
        namespace.pop(name, None)
    elif namespace.get(name, ABSENT) is not value:
        namespace[name] = value
