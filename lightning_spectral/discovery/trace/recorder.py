"""Record one forward pass, and leave the model as it was.

The recorder stands below autograd and sees every tensor operation. Python tensors are told apart by their place in
memory: the same place without a write in between is the same value. A write makes all values of its storage stale, and
a stale view becomes a new value, a "refresh", when it is read next (see :mod:`.tape`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_spectral.discovery.trace.contents import Contents
from lightning_spectral.discovery.trace.operations import is_allocation
from lightning_spectral.discovery.trace.replay import restored
from lightning_spectral.discovery.trace.symbols import Symbols, looks_at_data
from lightning_spectral.discovery.trace.tape import Call, Operation, Place, Ref, Tape
from lightning_spectral.errors import ExampleInputError
from lightning_spectral.linalg.sharding.presence import is_dtensor
from lightning_spectral.passes.arguments import map_leaves, tensors_in, written_tensors
from lightning_spectral.passes.aside import undisturbed
from lightning_spectral.passes.aside.writes import whole_storage

__all__ = ["LooksAtDataError", "record"]


# Fused operations that hide a sum are recorded as x · factor + added, with the (x, factor, added) that these return.
_SPELLED_OUT: dict[str, Callable[..., tuple[Tensor, Any, Tensor]]] = {
    "lerp": lambda x, y, weight: (x, 1 - weight, y * weight),
    "addcmul": lambda x, y, z, value=1: (x, 1, value * (y * z)),
    "addcdiv": lambda x, y, z, value=1: (x, 1, value * (y / z)),
}

_NESTED = (
    "the forward pass computes with nested tensors, which cannot be traced. Pass a padded batch as the example input, "
    "find_blocks(model, batch=x.to_padded_tensor(0.0)): it shows the same blocks"
)


class LooksAtDataError(Exception):
    """A symbolic pass cannot go on: the model needs numbers that are made of its weights."""


@dataclass(slots=True)
class _Storage:
    """What is known of one storage.

    Attributes:
        current: The values in it by their place.
        stale: The values that a write made stale, each with the number of writes before that write.
        writes: The written values, in order.
    """

    current: dict[Place, int] = field(default_factory=dict)
    stale: dict[Place, tuple[int, int]] = field(default_factory=dict)
    writes: list[int] = field(default_factory=list)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends every operation below autograd to a tape."""

    supports_higher_order_operators = True  # flex_attention

    def __init__(self, tape: Tape, names: Mapping[Place, str], symbols: Symbols | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape, self.symbols = tape, symbols
        self.storages: defaultdict[int, _Storage] = defaultdict(_Storage)
        self.names = names
        self.stack: list[int] = []
        self.keep: list[Tensor] = []  # a freed storage's address could be used again, and two values become one

    def lookup(self, tensor: Tensor, *, data: bool = False) -> int:
        """Return the value that a tensor holds now, and add it to the tape if it is new."""
        place = self._place(tensor)
        storage = self.storages[place.storage]
        if place in storage.current:
            return storage.current[place]
        if place in storage.stale:
            return self._refresh(tensor, place, storage)
        value = self.tape.add_value(self._recorded(tensor), place, -1, ())
        self.keep.append(tensor)
        origin = self._origin(tensor)
        name = None if origin is None else self.names.get(_place(origin))
        if name is not None:
            self.tape.names[value] = name
            self.tape.parameters |= 1 << value
        if self.symbols is not None:
            self._give_content(value, origin)
        if data:
            self.tape.data |= 1 << value
        storage.current[place] = value
        return value

    def _give_content(self, value: int, origin: Tensor | None) -> None:
        """Note the content of a value that no operation of a symbolic pass made, or note that it will be made up."""
        floats = origin is not None and (origin.is_floating_point() or origin.is_complex())
        if origin is None or origin.is_meta or is_dtensor(origin) or (floats and isinstance(origin, nn.Parameter)):
            self.tape.made_up |= 1 << value
        else:
            self.tape.tensors[value] = origin.detach().cpu()

    def _place(self, tensor: Tensor) -> Place:
        return _place(tensor if self.symbols is None else self.symbols.meta(self.symbols.of(tensor)))

    def _recorded(self, tensor: Tensor) -> Tensor:
        """Return what the tape keeps of a tensor: its content, or only its shape and strides in a symbolic pass."""
        return tensor.detach() if self.symbols is None else self.symbols.meta(self.symbols.of(tensor))

    def _origin(self, tensor: Tensor) -> Tensor | None:
        return tensor if self.symbols is None else self.symbols.origin(self.symbols.of(tensor))

    def _refresh(self, tensor: Tensor, place: Place, storage: _Storage) -> int:
        """Add the value of a stale view: its old value and all writes to its storage since then make it."""
        old, since = storage.stale.pop(place)
        inputs = (old, *storage.writes[since:])
        covered = self.tape.places[inputs[-1]].covers(place)
        operation = Operation(len(self.tape.operations), "refresh", None, (covered,), {}, inputs, call=self._call)
        value = self._append(operation, [self._recorded(tensor)], [place])
        storage.current[place] = value
        return value

    @property
    def _call(self) -> int:
        """The number of the innermost module call that runs, −1 for none."""
        return self.stack[-1] if self.stack else -1

    def _append(self, operation: Operation, tensors: Sequence[Tensor], places: Sequence[Place]) -> int:
        """Add an operation with its outputs, and return its first output."""
        tape = self.tape
        tape.operations.append(operation)
        parents = () if is_allocation(operation) else operation.inputs  # the shape of the data is no data
        operation.outputs = tuple(
            tape.add_value(tensor, place, operation.index, parents)
            for tensor, place in zip(tensors, places, strict=True)
        )
        for parent in parents:
            tape.readers[parent].append(operation.index)
        return operation.outputs[0] if operation.outputs else -1

    def _before_write(self, tensor: Tensor) -> None:
        """Give every value in a storage a copy of its content before the storage is written to."""
        place = self._place(tensor)
        storage = self.storages[place.storage]
        flat = whole_storage(tensor).clone() if self.symbols is None else None
        for known, value in storage.current.items():
            if known.dtype == place.dtype and flat is not None:
                self.tape.tensors[value] = flat.as_strided(known.shape, known.strides, known.offset)
            storage.stale[known] = (value, len(storage.writes))
        storage.current.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and record it."""
        if func is torch.ops.prim.device.default:  # a symbol is asked for its device
            return args[0].fake_device
        kwargs = kwargs or {}
        name = _name(func)
        spelled_out = _SPELLED_OUT.get(name.removesuffix("_")) if "out" not in kwargs else None
        if spelled_out is not None:
            with self:
                x, factor, added = spelled_out(*args, **kwargs)
                # Under this mode again: the two simple operations are recorded instead of the fused one.
                return x.mul_(factor).add_(added) if name.endswith("_") else x * factor + added
        if torch.is_inference_mode_enabled():
            with self:  # inference mode passes composite operations, such as einsum and linear, in one piece
                result = func.decompose(*args, **kwargs) if hasattr(func, "decompose") else NotImplemented
            if result is not NotImplemented:
                return result
        return self._recorded_run(func, args, kwargs)

    def _recorded_run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation that is no other ones in one, and record it."""
        if self.symbols is not None:
            args, kwargs = (map_leaves(self._symbol, part) for part in (tuple(args), dict(kwargs)))
        inputs: list[int] = []

        def note(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                # The content of a symbolic pass is made on the CPU.
                return torch.device("cpu") if isinstance(leaf, torch.device) and self.symbols is not None else leaf
            inputs.append(self.lookup(leaf))
            return Ref(inputs[-1])

        noted_args, noted_kwargs = map_leaves(note, tuple(args)), map_leaves(note, dict(kwargs))
        written = written_tensors(func, args, kwargs)
        for tensor in written:
            self._before_write(tensor)
        if self.symbols is None:
            result = func(*args, **kwargs)
        elif looks_at_data(func, args):
            result = self._looked(func, noted_args, noted_kwargs, inputs)
        else:
            result = self.symbols.run(func, args, kwargs)
        self._note_result(func, noted_args, noted_kwargs, tuple(dict.fromkeys(inputs)), written, result)
        return result

    def _symbol(self, leaf: Any) -> Any:
        return self.symbols.of(leaf) if isinstance(leaf, Tensor) and self.symbols is not None else leaf

    def _looked(self, func: Any, args: Any, kwargs: Any, inputs: Sequence[int]) -> Any:
        """Run an operation of a symbolic pass whose result depends on content that is not made of weights.

        Raises:
            LooksAtDataError: The content is made of weights.
        """
        if any(self.tape.ancestors[value] & self.tape.made_up for value in inputs):
            raise LooksAtDataError(f"the model looks at its data, by {_name(func)!r}")
        with torch.no_grad():
            result = func(*restored(args, self.tape.wide), **restored(kwargs, self.tape.wide))
        return map_leaves(self._symbol, result)

    def _note_result(
        self, func: Any, args: Any, kwargs: Any, inputs: tuple[int, ...], written: list[Tensor], result: Any
    ) -> None:
        """Add an operation to the tape, with its written tensors and its results as new values."""
        tensors = written + tensors_in(result)
        places = [self._place(tensor) for tensor in tensors]
        operation = Operation(len(self.tape.operations), _name(func), func, args, kwargs, inputs, call=self._call)
        if not written and len(places) == 1 and places[0] in self.storages[places[0].storage].current:
            return  # detach, alias or a view to the same shape: the value itself, at its own place
        self._append(operation, [self._recorded(tensor) for tensor in tensors], places)
        self.keep += tensors
        for number, (place, value) in enumerate(zip(places, operation.outputs, strict=True)):
            storage = self.storages[place.storage]
            if number < len(written):
                storage.writes.append(value)
            if number < len(written) or place not in storage.current:
                storage.current[place] = value
                storage.stale.pop(place, None)

    def computed_weights(self, model: nn.Module) -> dict[str, int]:
        """Return the weights that modules compute in every pass, by parametrizations or by hooks, by attribute path."""
        found = {}
        for call in self.tape.calls:
            owner, _, name = call.path.rpartition(".")
            if owner.endswith("parametrizations") and call.outputs:
                found[f"{owner.removesuffix('parametrizations')}{name}"] = call.outputs[0][1]
        for path, module in model.named_modules():
            for name, tensor in vars(module).items() if module._forward_pre_hooks else ():
                if isinstance(tensor, Tensor):
                    place = self._place(tensor)
                    value = self.storages[place.storage].current.get(place)
                    if value is not None and self.tape.made_of_parameters(value):
                        found[f"{path}.{name}" if path else name] = value
        return found


def _name(func: Any) -> str:
    """Return the name of an operation without namespace and overload."""
    schema = getattr(func, "_schema", None)
    name: str = func.name() if schema is None else schema.name.split("::")[-1]
    return name


def _place(tensor: Tensor) -> Place:
    """Return where a tensor lies; symbolic sizes become numbers.

    Raises:
        ExampleInputError: The tensor is nested.
    """
    if tensor.is_nested:
        raise ExampleInputError(_NESTED)
    shape = tuple(map(int, tensor.shape))
    try:
        storage = tensor.untyped_storage()._cdata
        return Place(storage, int(tensor.storage_offset()), shape, tuple(map(int, tensor.stride())), tensor.dtype)
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers have no storage of their own
        return Place(id(tensor), 0, shape, (), tensor.dtype)


def _watch_calls(model: nn.Module, recorder: _Recorder, stack: ExitStack) -> None:
    """Hook every module until the stack closes, so that the tape knows inside which call each value was made."""
    calls = recorder.tape.calls

    def enter(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            with _disable_current_modes():
                inputs = tuple(value for _, value in _values(recorder, [args, kwargs]))
            call = Call(len(calls), path, recorder.stack[-1] if recorder.stack else -1, inputs)
            calls.append(call)
            recorder.stack.append(call.index)

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        with _disable_current_modes():
            calls[recorder.stack.pop()].outputs = tuple(_values(recorder, output))

    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            stack.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)


def _leave_whole(model: nn.Module, stack: ExitStack) -> None:
    """Take away the hooks that gather and cut sharded weights and data, until the stack closes.

    Symbols of sharded weights are whole already.
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if any(map(_is_of_sharding, hooks.values())):
                stack.callback(hooks.update, dict(hooks))
                stack.callback(hooks.clear)
                for number in [number for number, hook in hooks.items() if _is_of_sharding(hook)]:
                    del hooks[number]


def _is_of_sharding(hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _values(recorder: _Recorder, output: Any) -> Iterator[tuple[int | str | None, int]]:
    """Yield the key in a returned structure and the value there, for every tensor; ``None`` for a bare tensor."""
    if isinstance(output, Tensor):
        yield None, recorder.lookup(output)
        return
    if not isinstance(output, Mapping | tuple | list):
        return
    for key, part in output.items() if isinstance(output, Mapping) else enumerate(output):
        for leaf in _tensors(part):
            yield key, recorder.lookup(leaf)


def _tensors(structure: Any, around: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Yield the tensors in a structure, data classes included. ``around`` has the ids of the data classes above."""
    for leaf in tree_leaves(structure):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, (type, nn.Module)) and id(leaf) not in around:
            for item in fields(leaf):
                yield from _tensors(getattr(leaf, item.name, None), (*around, id(leaf)))


def record(model: nn.Module, run: Callable[[], Any], inputs: Any, *, symbolic: bool = False, grad: bool = True) -> Tape:
    """Record one forward pass.

    The pass runs in evaluation mode and without autocast. Afterwards parameters, buffers, hooks, training flags and
    every random stream are as before.

    Args:
        model: The model whose modules are watched.
        run: Runs the forward pass.
        inputs: The arguments of that pass; every tensor in them counts as data.
        symbolic: Whether shapes alone are recorded. No arithmetic is done, and weights may be anywhere: on the meta
            device, or spread over processes.
        grad: Whether grad is enabled, which keeps the fused fast path of ``torch.nn`` transformer layers off.

    Returns:
        The recorded graph.

    Raises:
        LooksAtDataError: A symbolic pass has come to an operation that needs the content of weights.
    """
    tape = Tape()
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, inputs, gathers=not symbolic))
        stack.enter_context(torch.set_grad_enabled(grad))
        if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
            if symbolic:
                raise LooksAtDataError("the shapes of its lazy weights are not known yet")
            run()  # an unrecorded pass gives lazy layers their weights; leaving the context takes them away again
        tensors = [*model.named_parameters(), *model.named_buffers()]
        # Reversed, so that a shared parameter has its first name.
        names = {_place(tensor): name for name, tensor in reversed(tensors)}
        recorder = _Recorder(tape, names, Symbols() if symbolic else None)
        if symbolic:
            tape.contents = Contents(tape)
            _leave_whole(model, stack)
        for leaf in _tensors(inputs):
            recorder.lookup(leaf, data=True)
        _watch_calls(model, recorder, stack)
        with recorder:
            run()
        tape.attributes |= recorder.computed_weights(model)
    return tape
