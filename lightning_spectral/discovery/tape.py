"""Record one forward pass as a graph of values that can be replayed from any point.

A :class:`Tape` is static single assignment: an operation never changes a value, it makes new ones. In-place operations
and views are brought to that form while they are recorded, so that the graph says what depends on what and any slice of
it can be run again with other inputs, in float64, without touching the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_flatten_with_path

__all__ = ["Call", "Operation", "Ref", "Tape", "bits", "record", "wide_dtype"]


class Ref(NamedTuple):
    """Place of a value in the recorded arguments of an operation."""

    value: int


class _Place(NamedTuple):
    """Where a tensor lies in memory: two tensors with one place and one storage version are one value."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True)
class Operation:
    """One recorded operation; ``function`` is ``None`` for a view that was refreshed after a write to its storage."""

    index: int
    name: str
    function: Callable[..., Any] | None
    args: Any
    kwargs: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    call: int = -1


@dataclass(slots=True)
class Call:
    """One call of one module. ``outputs`` pairs the place in the returned structure with the value found there."""

    index: int
    path: str
    parent: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[tuple[int | str | None, int], ...] = ()


@dataclass(slots=True)
class _Storage:
    version: int = 0
    current: dict[_Place, int] = field(default_factory=dict)
    stale: dict[_Place, tuple[int, int]] = field(default_factory=dict)
    writes: list[int] = field(default_factory=list)


class Tape:
    """The recorded graph.

    Values are numbered in the order of their creation; ``tensors[v]`` is the recorded content, ``producers[v]`` the
    index of the operation that made it (−1 for inputs, parameters and constants), ``names[v]`` the attribute path of a
    parameter or buffer. ``ancestors[v]`` is a bit set over values and includes ``v``; ``data`` is the bit set of the
    values that depend on the model's inputs.
    """

    def __init__(self) -> None:
        """Create an empty tape."""
        self.operations: list[Operation] = []
        self.calls: list[Call] = []
        self.tensors: list[Tensor] = []
        self.producers: list[int] = []
        self.places: list[_Place] = []
        self.names: dict[int, str] = {}
        self.ancestors: list[int] = []
        self.readers: defaultdict[int, list[int]] = defaultdict(list)
        self.data = 0
        self.parameters = 0
        self.products: dict[int, bool] = {}  # which operations multiply with a weight, as far as that was asked
        self._returned: dict[int, list[Call]] | None = None
        self._wide: dict[int, Tensor] = {}

    def shape(self, value: int) -> tuple[int, ...]:
        """Return the shape of a value."""
        return self.places[value].shape

    def depends(self, value: int, on: int) -> bool:
        """Whether ``value`` is ``on`` or was computed from it."""
        return bool(self.ancestors[value] >> on & 1)

    def is_data(self, value: int) -> bool:
        """Whether the value depends on the inputs of the model, and not on parameters and constants alone."""
        return bool(self.data >> value & 1)

    def producer(self, value: int) -> Operation | None:
        """Return the operation that made a value, ``None`` for inputs, parameters and constants."""
        index = self.producers[value]
        return None if index < 0 else self.operations[index]

    def made_of_parameters(self, value: int) -> bool:
        """Whether the value was computed from parameters or buffers (and perhaps constants), not from the inputs."""
        return bool(self.ancestors[value] & self.parameters) and not self.is_data(value)

    def parents_with_names(self, value: int) -> list[int]:
        """Return the parameters and buffers that a value was computed from."""
        return list(bits(self.ancestors[value] & self.parameters))

    def calls_that_return(self, value: int) -> list[Call]:
        """Return the module calls whose output is, or contains, the value."""
        if self._returned is None:
            self._returned = {}
            for call in self.calls:
                for _, output in call.outputs:
                    self._returned.setdefault(output, []).append(call)
        return self._returned.get(value, [])

    def add_value(self, tensor: Tensor, place: _Place, producer: int, parents: Iterable[int]) -> int:
        """Append a value and return its number."""
        value = len(self.tensors)
        self.tensors.append(tensor)
        self.places.append(place)
        self.producers.append(producer)
        mask = 1 << value
        for parent in parents:
            mask |= self.ancestors[parent]
        self.ancestors.append(mask)
        if mask & self.data:
            self.data |= 1 << value
        return value

    def between(self, start: int, end: int) -> list[int]:
        """Return the values that depend on ``start`` and that ``end`` depends on, both ends included, in order."""
        mask = self.ancestors[end] & ~((1 << start) - 1)
        return [value for value in bits(mask) if self.depends(value, start)]

    def replay(
        self, sources: Mapping[int, Tensor], target: int, *, frozen: Iterable[int] = (), wide: bool = True
    ) -> Tensor:
        """Run the graph again from other values.

        Args:
            sources: New content for some values.
            target: The value to compute.
            frozen: Values that keep their recorded content even where they depend on a source.
            wide: Whether to compute in float64, so that a probe sees structure instead of rounding.

        Returns:
            The content that ``target`` has with the new sources.
        """
        environment: dict[int, Tensor] = dict(sources)
        frozen = set(frozen)
        wanted = self.ancestors[target]
        first = min(sources)

        def fetch(value: int) -> Tensor:
            if value in environment:
                return environment[value]
            return self._widened(value) if wide else self.tensors[value]

        seen: set[int] = set()
        with torch.no_grad():
            for value in bits(wanted & ~((1 << first) - 1)):
                operation = self.producer(value)
                if operation is None or operation.index in seen or value in frozen or value in sources:
                    continue
                if not any(parent in environment for parent in operation.inputs):
                    continue
                seen.add(operation.index)
                for output, tensor in zip(operation.outputs, _execute(self, operation, fetch, wide), strict=True):
                    if output not in sources and output not in frozen and tensor is not None:
                        environment[output] = tensor
        return fetch(target)

    def _widened(self, value: int) -> Tensor:
        tensor = self.tensors[value].detach()
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        if value in self._wide:
            return self._wide[value]
        result = tensor.to(wide_dtype(tensor))
        if value not in self.names:
            self._wide[value] = result
        return result


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which probes run on the tensor's device."""
    if tensor.is_complex():
        return torch.complex128
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def bits(mask: int) -> Iterator[int]:
    """Yield the positions of the set bits, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _execute(tape: Tape, operation: Operation, fetch: Callable[[int], Tensor], wide: bool) -> Sequence[Tensor | None]:
    """Run one operation functionally: what the original wrote in place is written to a copy."""
    if operation.function is None:
        return [_refresh(tape, operation, fetch)]

    def restore(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return fetch(leaf.value)
        if wide and isinstance(leaf, torch.dtype) and leaf.is_floating_point:
            return torch.float64
        return leaf

    args, kwargs = _map(restore, operation.args), _map(restore, operation.kwargs)
    written = _written(operation.function, args, kwargs)
    copies = {id(tensor): tensor.clone() for tensor in written}
    if copies:
        args, kwargs = (
            _map(lambda leaf: copies.get(id(leaf), leaf), part) if part else part for part in (args, kwargs)
        )
    result = _call(operation, args, kwargs, wide)
    found = [copies[id(tensor)] for tensor in written] + _tensors(result)
    return [*found, *[None] * len(operation.outputs)][: len(operation.outputs)]


def _call(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], wide: bool) -> Any:
    """Call the operation, or what stands in for a kernel that knows no float64."""
    assert operation.function is not None
    try:
        return operation.function(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        if not wide:
            raise
        if operation.name == "_grouped_mm":
            return _grouped_product(*args, **kwargs)
        single = [_map(_in_float32, part) for part in (tuple(args), dict(kwargs))]
        return _map(_in_float64, operation.function(*single[0], **single[1]))


def _grouped_product(rows: Tensor, weights: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    if offsets is None or rows.dim() != 2 or weights.dim() != 3:
        return rows @ weights
    ends = offsets.tolist()
    parts = [rows[start:end] @ weight for start, end, weight in zip([0, *ends], ends, weights, strict=False)]
    return torch.cat([*parts, rows.new_zeros(rows.shape[0] - ends[-1], weights.shape[-1])])


def _in_float32(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.dtype == torch.float64:
        return leaf.float()
    return torch.float32 if leaf == torch.float64 else leaf


def _in_float64(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf


def _refresh(tape: Tape, operation: Operation, fetch: Callable[[int], Tensor]) -> Tensor:
    """Recompute a view after writes to its storage: lay the old content out, write the changed parts, read the view."""
    old, *writes = operation.inputs
    place = tape.places[operation.outputs[0]]
    extents = [_extent(tape.places[value]) for value in operation.inputs]
    content = fetch(old)
    flat = content.new_zeros(max(extents))
    for value in (old, *writes):
        part = tape.places[value]
        flat.as_strided(part.shape, part.strides, part.offset).copy_(fetch(value))
    return flat.as_strided(place.shape, place.strides, place.offset).clone()


def _extent(place: _Place) -> int:
    if 0 in place.shape:
        return place.offset
    return place.offset + 1 + sum((size - 1) * stride for size, stride in zip(place.shape, place.strides, strict=True))


def _map(function: Callable[[Any], Any], structure: Any) -> Any:
    # Arguments of an operation are lists, tuples and dicts only; torch's general tree_map takes four times as long.
    if type(structure) in (list, tuple):
        return type(structure)([_map(function, item) for item in structure])
    if type(structure) is dict:
        return {key: _map(function, item) for key, item in structure.items()}
    return function(structure)


def _tensors(structure: Any) -> list[Tensor]:
    if isinstance(structure, Tensor):
        return [structure]
    if isinstance(structure, dict):
        structure = structure.values()
    elif not isinstance(structure, list | tuple):
        return []
    return [tensor for item in structure for tensor in _tensors(item)]


def _written(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes to, by its schema."""
    tensors: list[Tensor] = []
    for position, name in _write_positions(function):
        tensors += _tensors(args[position] if position < len(args) else kwargs.get(name))
    return tensors


@cache
def _write_positions(function: Any) -> tuple[tuple[int, str], ...]:
    return tuple(
        (len(function._schema.arguments) if argument.kwarg_only else position, argument.name)
        for position, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


class _Recorder(TorchDispatchMode):
    """Appends every operation below autograd to a tape."""

    def __init__(self, tape: Tape, names: Mapping[_Place, str]) -> None:
        super().__init__()
        self.tape = tape
        self.storages: defaultdict[int, _Storage] = defaultdict(_Storage)
        self.names = names
        self.owned = {place.storage for place in names}
        self.changed: dict[int, tuple[Tensor, Tensor]] = {}
        self.stack: list[int] = []
        self.keep: list[Tensor] = []

    def lookup(self, tensor: Tensor, *, data: bool = False) -> int:
        """Return the value that a tensor holds now, adding it where it is new."""
        place = _place(tensor)
        storage = self.storages[place.storage]
        if place in storage.current:
            return storage.current[place]
        if place in storage.stale:
            return self._refresh(tensor, place, storage)
        value = self.tape.add_value(tensor.detach(), place, -1, ())
        self.keep.append(tensor)
        if place in self.names:
            self.tape.names[value] = self.names[place]
            self.tape.parameters |= 1 << value
        if data:
            self.tape.data |= 1 << value
        storage.current[place] = value
        return value

    def _refresh(self, tensor: Tensor, place: _Place, storage: _Storage) -> int:
        old, since = storage.stale.pop(place)
        inputs = (old, *storage.writes[since:])
        operation = Operation(len(self.tape.operations), "refresh", None, (), {}, inputs, call=self._call)
        value = self._append(operation, [tensor.detach()], [place])
        storage.current[place] = value
        return value

    @property
    def _call(self) -> int:
        return self.stack[-1] if self.stack else -1

    def _append(self, operation: Operation, tensors: Sequence[Tensor], places: Sequence[_Place]) -> int:
        tape = self.tape
        tape.operations.append(operation)
        operation.outputs = tuple(
            tape.add_value(tensor, place, operation.index, operation.inputs)
            for tensor, place in zip(tensors, places, strict=True)
        )
        for parent in operation.inputs:
            tape.readers[parent].append(operation.index)
        return operation.outputs[0] if operation.outputs else -1

    def _before_write(self, tensor: Tensor) -> None:
        """Keep what a storage holds before it is written to, in every value that lives in it."""
        place = _place(tensor)
        storage = self.storages[place.storage]
        flat = tensor.detach().as_strided((_storage_length(tensor),), (1,), 0).clone()
        if place.storage in self.owned and place.storage not in self.changed:
            self.changed[place.storage] = (tensor.detach().as_strided(flat.shape, (1,), 0), flat)
        for known, value in storage.current.items():
            if known.dtype == place.dtype:
                self.tape.tensors[value] = flat.as_strided(known.shape, known.strides, known.offset)
            storage.stale[known] = (value, len(storage.writes))
        storage.current.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D105
        kwargs = kwargs or {}
        inputs: list[int] = []

        def note(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            inputs.append(self.lookup(leaf))
            return Ref(inputs[-1])

        noted_args, noted_kwargs = _map(note, tuple(args)), _map(note, dict(kwargs))
        written = _written(func, args, kwargs)
        for tensor in written:
            self._before_write(tensor)
        result = func(*args, **kwargs)
        self._note_result(func, noted_args, noted_kwargs, tuple(dict.fromkeys(inputs)), written, result)
        return result

    def _note_result(
        self, func: Any, args: Any, kwargs: Any, inputs: tuple[int, ...], written: list[Tensor], result: Any
    ) -> None:
        tensors = written + _tensors(result)
        places = [_place(tensor) for tensor in tensors]
        name = func._schema.name.split("::")[-1]
        operation = Operation(len(self.tape.operations), name, func, args, kwargs, inputs, call=self._call)
        if not written and len(places) == 1 and places[0] in self.storages[places[0].storage].current:
            return  # a view of the whole (detach, alias, view to the same shape) is the value itself
        self._append(operation, [tensor.detach() for tensor in tensors], places)
        self.keep += tensors
        for number, (place, value) in enumerate(zip(places, operation.outputs, strict=True)):
            storage = self.storages[place.storage]
            if number < len(written):
                storage.writes.append(value)
            if number < len(written) or place not in storage.current:
                storage.current[place] = value
                storage.stale.pop(place, None)

    def restore(self) -> None:
        """Undo what the forward pass wrote into parameters and buffers."""
        for live, before in self.changed.values():
            live.copy_(before)


def _place(tensor: Tensor) -> _Place:
    storage = tensor.untyped_storage()._cdata
    return _Place(storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _storage_length(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _watch_calls(model: nn.Module, recorder: _Recorder, stack: ExitStack) -> None:
    """Hook every module so that the tape knows which call made which value."""
    tape = recorder.tape

    def values(structure: Any) -> list[tuple[int | str | None, int]]:
        found: list[tuple[int | str | None, int]] = []
        if isinstance(structure, Tensor):
            return [(None, recorder.lookup(structure))]
        for path, leaf in tree_flatten_with_path(structure)[0]:
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                key = getattr(path[0], "idx", getattr(path[0], "key", getattr(path[0], "name", None))) if path else None
                found.append((key, recorder.lookup(leaf)))
        return found

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            parent = recorder.stack[-1] if recorder.stack else -1
            call = Call(len(tape.calls), path, parent)
            call.inputs = tuple(value for _, value in values((args, kwargs)))
            tape.calls.append(call)
            recorder.stack.append(call.index)

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tape.calls[recorder.stack.pop()].outputs = tuple(values(output))

    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        stack.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)


def record(model: nn.Module, run: Callable[[], Any], inputs: Any) -> Tape:
    """Record one forward pass and leave the model as it was.

    The pass runs in evaluation mode, without autocast and with grad enabled (which keeps the fused fast path of
    ``torch.nn`` transformer layers off). Parameters, buffers, hooks, training flags and every random stream are as
    before afterwards.

    Args:
        model: The model whose modules are watched.
        run: Runs the forward pass.
        inputs: The arguments of that pass; every tensor in them counts as data.

    Returns:
        The recorded graph.
    """
    tape = Tape()
    tensors = [*model.named_parameters(remove_duplicate=True), *model.named_buffers(remove_duplicate=True)]
    names = {_place(tensor): name for name, tensor in reversed(tensors)}
    recorder = _Recorder(tape, names)
    devices = sorted({tensor.device for _, tensor in tensors if tensor.device.type == "cuda"}, key=str)
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(tensor.device.type for _, tensor in tensors)} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(_set_modes, modes)
        for module, _ in modes:
            module.training = False
        for leaf in tree_flatten(inputs)[0]:
            if isinstance(leaf, Tensor):
                recorder.lookup(leaf, data=True)
        _watch_calls(model, recorder, stack)
        try:
            with recorder:
                run()
        finally:
            with torch.no_grad():
                recorder.restore()
    return tape


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
