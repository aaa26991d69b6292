"""Note everything that Python can reach from some objects, so that all of it can be put back after a pass.

A forward pass of the user may change anything: an attribute, a list that a closure holds, a global counter. A deep copy
would be another object, so references to the original would miss the changes that must not happen. Instead, the walk
keeps the content of each container by identity, and :meth:`Memento.restore` puts it back into the same container::

    before        model.cache = [a, b]         kept: (put_back_list, the list, [a, b])
    the pass      model.cache.append(c)
    restore       the same list is [a, b] again; a and b have entries of their own

The walk visits each object once. Two limits keep it small: code of libraries is not looked into, and of a namespace
only the names that the user's code mentions are kept.
"""

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
# The visit that looks into the objects of a class, and the function that makes their stand-ins; None if not needed.
Kind = tuple[Visit | None, Callable[[Any], object | None] | None]

_LIBRARIES = {*sys.stdlib_module_names, *LIGHTNING, "lightning_spectral", "numpy", "scipy", "torch", "torchmetrics"}
# Bytes of the largest array that is copied, and of all copied arrays together.
_LARGEST, _ROOM = 2**24, 2**26
_CONTAINERS = {dict, OrderedDict, defaultdict, list, set, deque}


class Memento:
    """The state of some objects, and of everything that is reached from them, at one time.

    Every entry is shallow: the contents of one container or instance, by identity. :meth:`restore` puts the contents
    back into the same object. The numbers in tensors are not copied.

    Args:
        kind_of: Returns how the objects of a class are kept.
        files: Names of installed Python modules whose code is looked into: the modules that define classes of the
            model. Code that is not installed is the user's, and is always looked into.

    Attributes:
        tensors: The tensors that were reached.
        atoms: Classes whose objects have nothing to keep.
    """

    def __init__(self, kind_of: Callable[[type], Kind], files: Collection[str] = ()) -> None:
        self.tensors: list[Tensor] = []
        self._kept: list[tuple[Callable[[Any, Any], object], Any, Any]] = []  # put_back, thing, before
        self._empty: list[Any] = []  # containers that were empty
        self._kind_of, self._files = kind_of, files
        self._kinds: dict[type, Kind] = {}
        self.atoms: set[type] = set()
        # By id; the reference keeps the id from being used again. An import in the pass cannot be undone: a module that
        # is taken out of `sys.modules` would be imported a second time, beside the first.
        self._seen: dict[int, object] = {id(sys.modules): sys.modules}
        self._stand_ins: dict[int, tuple[object, object]] = {}
        self._named = {"forward"}  # names that code has mentioned
        self._unnamed: defaultdict[str, list[object]] = defaultdict(list)  # methods that no code has mentioned yet
        self._room = _ROOM
        self._slots: set[tuple[int, str]] = set()
        self._todo: list[tuple[Visit, object]] = []

    def look(self) -> None:
        """Visit everything that was seen, and everything that is reached from it."""
        # An explicit stack: linked objects can be deeper than Python's recursion limit.
        while self._todo:
            visit, thing = self._todo.pop()
            if id(thing) not in self._seen:
                self._seen[id(thing)] = thing
                with suppress(Exception):  # an object that raises when it is looked at is not put back
                    visit(self, thing)

    def restore(self) -> None:
        """Put everything back.

        Raises:
            Exception: Something could not be put back. Everything else was put back before.
        """
        failure = None
        for container in self._empty:
            if container:
                container.clear()
        # Backwards: the contents first, then the objects that hold them.
        for put_back, thing, before in reversed(self._kept):
            try:
                put_back(thing, before)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def keep(self, put_back: Callable[[Any, Any], object], thing: Any, before: Any) -> None:
        """Note a function that restores a thing, and the state that it restores."""
        self._kept.append((put_back, thing, before))

    def see(self, thing: Any) -> Any:
        """Note a thing for a visit, and return the object that holds its place during the pass.

        That is the thing itself, or its stand-in (see :mod:`.stand_ins`), which the caller writes into the place.
        """
        kind = type(thing)
        if kind not in self._kinds:
            self._kinds[kind] = self._kind_of(kind)
            if self._kinds[kind] == (None, None):
                self.atoms.add(kind)
        visit, stand_in = self._kinds[kind]
        if visit is not None:
            if kind in _CONTAINERS and not thing:
                self._empty.append(thing)  # a module has many empty dicts of hooks: clearing them is cheaper
            else:
                self._todo.append((visit, thing))
        return thing if stand_in is None else self._stand_in(thing, stand_in)

    def _stand_in(self, thing: object, make: Callable[[Any], object | None]) -> object:
        """Return the one stand-in of a thing, or the thing where it has none."""
        if id(thing) not in self._stand_ins:
            made = make(thing)
            self._stand_ins[id(thing)] = (thing, thing if made is None else made)
        return self._stand_ins[id(thing)][1]

    def affords(self, size: int) -> bool:
        """Whether a number of bytes may be copied, in addition to the bytes copied before."""
        affordable = size <= min(_LARGEST, self._room)
        self._room -= size if affordable else 0
        return affordable

    def slot(self, namespace: dict[str, Any], name: str) -> None:
        """Keep one name of a namespace. A missing name is kept, too: the pass may define it."""
        if (id(namespace), name) in self._slots:
            return
        self._slots.add((id(namespace), name))
        value = namespace.get(name, ABSENT)
        self.keep(_put_back_name, namespace, (name, value))
        if value is not ABSENT and (seen := self.see(value)) is not value:
            namespace[name] = seen

    def foreign(self, name: object) -> bool:
        """Whether the code of a module, given by name, belongs to a library and is not looked into."""
        return of_library(name) or (name not in self._files and _installed(str(name).partition(".")[0]))

    def names(self, code: CodeType, namespace: dict[str, Any]) -> None:
        """Keep everything that code can name: globals, attributes of the user's modules, and methods.

        A method call names the method but not the class. So all reached methods of a mentioned name are looked into.

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
        """See a function of a class now if some code has mentioned its name, else as soon as some code does."""
        if name in self._named or name.startswith("__"):
            self.see(function)
        else:
            self._unnamed[name].append(function)


def of_library(name: object) -> bool:
    """Whether a module, given by name, belongs to a library that holds no state of a model, such as torch."""
    return not isinstance(name, str) or name.partition(".")[0] in _LIBRARIES


@cache
def _installed(package: str) -> bool:
    """Whether a package is installed, and so not the user's own code."""
    path = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names in code and in the functions inside it, and strings that could be names (for ``getattr``)."""
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
