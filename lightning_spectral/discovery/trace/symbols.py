"""Tensors without content: shape, strides, dtype and device are known, and no arithmetic is done.

A symbol is a tensor on the meta device that tells another device, so that the code of a model does what it does on that
device. Equal operations on equal shapes are looked up: a model of 80 equal blocks asks torch for the shapes of one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_spectral.linalg.sharding.presence import is_dtensor
from lightning_spectral.passes.arguments import map_leaves, tensors_in

__all__ = ["Symbols", "looks_at_data"]

_META = torch.device("meta")
_HOME = torch.device("cpu")  # what a symbol for a tensor on the meta device tells


class _Form(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Symbols:
    """Makes symbols of tensors, and runs operations on symbols."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._symbols: dict[int, tuple[Tensor, FakeTensor]] = {}  # the tensor keeps its id from being used again
        self._metas: dict[int, tuple[FakeTensor, Tensor]] = {}  # the symbol keeps its id, too
        self._origins: dict[int, Tensor] = {}
        self._storages: dict[int, Tensor] = {}
        self._results: dict[Hashable, list[_Form]] = {}

    def of(self, tensor: Tensor) -> FakeTensor:
        """Return the symbol of a tensor: always the same one. Tensors that share memory have symbols that do."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._symbols:
            device = _HOME if tensor.is_meta else tensor.device
            symbol = self._wrapped(self._without_content(tensor), device)
            self._symbols[id(tensor)], self._origins[id(symbol)] = (tensor, symbol), tensor
        return self._symbols[id(tensor)][1]

    def origin(self, symbol: Tensor) -> Tensor | None:
        """Return the tensor that a symbol was made of, ``None`` for the result of an operation."""
        return self._origins.get(id(symbol))

    def meta(self, symbol: Tensor) -> Tensor:
        """Return a symbol as a tensor on the meta device, which shares its memory."""
        if id(symbol) not in self._metas:  # autograd has made another object of it
            empty = torch.empty(0, dtype=symbol.dtype, device=_META)
            shape, strides = tuple(symbol.shape), symbol.stride()
            meta = empty.set_(symbol.untyped_storage(), symbol.storage_offset(), shape, strides)
            self._metas[id(symbol)] = symbol, meta  # type: ignore[assignment]
        return self._metas[id(symbol)][1]

    def run(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation on symbols.

        Args:
            function: The operation.
            args: Its arguments; every tensor is a symbol.
            kwargs: Its keyword arguments.

        Returns:
            Its result; every tensor is a symbol. What the operation has written to is the argument itself.
        """
        symbols = [*tensors_in(args), *tensors_in(kwargs)]
        device = _device(symbols, args, kwargs)
        args, kwargs = [map_leaves(self._inside, part) for part in (tuple(args), dict(kwargs))]
        key = (function, _key(args), _key(kwargs)) if _makes_new(function) else None
        if key is not None and key in self._results:
            metas = [torch.empty_strided(*form[:2], dtype=form.dtype, device=_META) for form in self._results[key]]
            wrapped = [self._wrapped(meta, device) for meta in metas]
            return wrapped[0] if len(wrapped) == 1 else tuple(wrapped)
        result = _shaped(function, args, kwargs)
        if key is not None and (isinstance(result, Tensor) or _is_flat(result)):
            self._results[key] = [_Form(tuple(i.shape), i.stride(), i.dtype) for i in tensors_in(result)]
        known = {id(self.meta(symbol)): symbol for symbol in symbols}

        def outside(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return known[id(leaf)] if id(leaf) in known else self._wrapped(leaf, device)

        return map_leaves(outside, result)

    def _wrapped(self, meta: Tensor, device: torch.device) -> FakeTensor:
        symbol = FakeTensor(self._mode, meta, device)
        self._metas[id(symbol)] = symbol, meta
        return symbol

    def _inside(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self.meta(leaf)
        return _META if isinstance(leaf, torch.device) else leaf

    def _without_content(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the meta device in place of a tensor. A sharded tensor is whole there."""
        if is_dtensor(tensor):
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)
        if tensor.is_meta:
            return tensor.detach()
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = torch.empty(storage.nbytes(), dtype=torch.uint8, device=_META)
        whole = self._storages[storage._cdata].untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype, device=_META)
        return empty.set_(whole, tensor.storage_offset(), tensor.shape, tensor.stride())


def looks_at_data(function: Any, args: Sequence[Any]) -> bool:
    """Whether the result of an operation, or its shape, depends on the content of tensors."""
    if not _may_look(function):
        return False
    picks = function._schema.name == "aten::index"  # by numbers, or by a mask, which has to be counted
    return not picks or any(item.dtype in (torch.bool, torch.uint8) for item in tensors_in(args[1:]))


@cache
def _may_look(function: Any) -> bool:
    tags = getattr(function, "tags", ())
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


@cache
def _makes_new(function: Any) -> bool:
    """Whether an operation returns new tensors: no views, and nothing that it writes to."""
    schema = getattr(function, "_schema", None)
    if schema is None:
        return False
    return all(item.alias_info is None for item in (*schema.arguments, *schema.returns))


def _shaped(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the meta device."""
    name = getattr(function, "_opname", "")
    if name == "mkldnn_rnn_layer":  # with batch_first, its meta kernel swaps what its CPU kernel keeps
        args = (*args[:14], False, *args[15:])
    if name == "_grouped_mm":  # its meta kernel takes bfloat16 only, its others do not
        halves = [item.bfloat16() if isinstance(item, Tensor) and item.is_floating_point() else item for item in args]
        return function(*halves, **kwargs).to(kwargs.get("out_dtype") or args[0].dtype)
    return function(*args, **kwargs)


def _is_flat(result: Any) -> bool:
    return isinstance(result, tuple) and len(result) > 1 and all(isinstance(item, Tensor) for item in result)


def _key(item: Any) -> Hashable:
    """Return an argument in hashable form; only the form of a tensor counts. 1, 1.0 and True hash alike."""
    if isinstance(item, Tensor):
        return _Form(tuple(item.shape), item.stride(), item.dtype)
    if isinstance(item, list | tuple):
        return tuple(map(_key, item))
    if isinstance(item, dict):
        return tuple((name, _key(value)) for name, value in item.items())
    return type(item), item


def _device(symbols: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    """Return the device of the result of an operation."""
    leaves = [*args, *kwargs.values()]
    named = next((item for item in leaves if isinstance(item, torch.device)), None)
    if named is None:
        ranked = sorted(symbols, key=lambda item: item.dim() == 0)
        named = ranked[0].device if ranked else _HOME
    return _HOME if named == _META else named
