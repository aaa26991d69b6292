"""Read a pickle without unpickling it: nothing is imported and nothing is called.

A pickle is a program for a stack machine. The dangerous instructions import a name (STACK_GLOBAL, GLOBAL), call it
(REDUCE, NEWOBJ) or fill an object (BUILD). Here each of them makes or fills an :class:`Inert`, a record of the name,
the arguments and the state. All names have to be on a list, and every unknown instruction is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

__all__ = ["Inert", "read_pickle"]

_VALUES = {
    *("BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_WITHOUT_EFFECT = {"PROTO", "FRAME", "STOP"}


@dataclass(slots=True, eq=False)
class Inert:
    """A class, function or object in a pickle, as a record.

    Attributes:
        name: Qualified name of the class or function.
        arguments: Arguments of the call, ``None`` for a name that is not called.
        state: State of the object that the call would make.
    """

    name: str
    arguments: Any = None
    state: Any = None


def read_pickle(content: bytes, names: Collection[str]) -> Any:
    """Return the content of a pickle, with an :class:`Inert` for everything that is no plain value.

    Known instructions are the ones that ``pickle.dump`` writes for plain values and data classes (protocols 2 to 5).

    Args:
        content: The pickle.
        names: Qualified names that may occur in the pickle.

    Raises:
        ValueError: The pickle is damaged, contains another name, or contains an unknown instruction.
    """
    machine = _Machine(names)
    for opcode, argument, _ in pickletools.genops(content):
        machine.step(opcode.name, argument)
    if machine.marks or len(machine.stack) != 1:
        raise ValueError("the pickle does not end with one value")
    return machine.stack[0]


class _Machine:
    """The stack machine of the pickle format, without instructions that run code."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _SHORT_TUPLES:
            self.stack.append(tuple(self._popped(_SHORT_TUPLES[name])))
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in _WITHOUT_EFFECT:
            raise ValueError(f"the pickle has the instruction {name}, which the index of a checkpoint never has")

    def _popped(self, count: int) -> list[Any]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise ValueError("the pickle takes more values than it has")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _popped_to_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("the pickle takes more values than it has")
        taken = self.stack[self.marks[-1] :]
        del self.stack[self.marks.pop() :]
        return taken

    def _top(self, kind: type) -> Any:
        (value,) = self._popped(1)
        if not isinstance(value, kind):
            raise ValueError(f"the pickle fills a {type(value).__name__} as if it were a {kind.__name__}")
        self.stack.append(value)
        return value

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def make_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._popped_to_mark()))

    def append(self, _: Any) -> None:
        items = self._popped(1)
        self._top(list).extend(items)

    def appends(self, _: Any) -> None:
        items = self._popped_to_mark()
        self._top(list).extend(items)

    def setitem(self, _: Any) -> None:
        self._fill(self._popped(2))

    def setitems(self, _: Any) -> None:
        self._fill(self._popped_to_mark())

    def _fill(self, items: list[Any]) -> None:
        keys = items[::2]
        # No tuples: hashing deeply nested shared tuples takes exponential time. An Inert is hashed by identity.
        if len(items) % 2 or not all(isinstance(key, str | int | Inert) for key in keys):
            raise ValueError("the pickle has a dict with a key that is neither text nor a number nor an object")
        self._top(dict).update(zip(keys, items[1::2], strict=True))

    def stack_global(self, _: Any) -> None:
        parts = self._popped(2)
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("the pickle imports a name that is not text")
        self._name(".".join(parts))

    def name_in_line(self, argument: str) -> None:
        self._name(argument.replace(" ", "."))

    def _name(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"the pickle names {name}, which the index of a checkpoint never does")
        self.stack.append(Inert(name))

    def call(self, _: Any) -> None:
        made, arguments = self._popped(2)
        if not isinstance(made, Inert) or made.arguments is not None or not isinstance(arguments, tuple):
            raise ValueError("the pickle calls something other than a class or function")
        self.stack.append(Inert(made.name, arguments))

    def build(self, _: Any) -> None:
        (state,) = self._popped(1)
        self._top(Inert).state = state

    def memoize(self, _: Any) -> None:
        self.put(len(self.memo))

    def put(self, place: int) -> None:
        (self.memo[place],) = value = self._popped(1)
        self.stack += value

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise ValueError("the pickle takes more values than it has")
        self.stack.append(self.memo[place])


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.make_tuple,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "STACK_GLOBAL": _Machine.stack_global,
    "GLOBAL": _Machine.name_in_line,
    "NEWOBJ": _Machine.call,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "MEMOIZE": _Machine.memoize,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
}
