"""Undo in-place writes: the content of a tensor is copied before its first write, and copied back at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_spectral.passes.arguments import tensors_in, written_tensors

__all__ = ["Writes", "whole_storage"]


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, keeps the content of every tensor that existed before and is written to.

    A tensor that is never written to is never copied. A tensor that an operation in the pass has made is not kept.
    Storages are told apart by address, and an address can be used again; so a known tensor always counts as old.

    Args:
        known: Tensors that existed before.
    """

    supports_higher_order_operators = True  # flex_attention

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {_key(tensor) for tensor in known}
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._versions = ExitStack()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the tensors that an operation writes to, then run it."""
        kwargs = kwargs or {}
        for tensor in (*written_tensors(func, args, kwargs), *_running_statistics(func, args, kwargs)):
            self._keep(tensor)
        result = func(*args, **kwargs)
        if _makes_new(func):
            self._made.update(map(_key, tensors_in(result)))
        return result

    def _keep(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._before or (key in self._made and key not in self._known):
            return
        whole = whole_storage(tensor)
        self._before[key] = (whole, whole.clone())
        self._versions.enter_context(_version_kept(tensor))

    def undo(self) -> None:
        """Copy back what was kept. The version counters are preserved, so autograd does not notice the writes."""
        with torch.no_grad(), self._versions:
            for whole, before in self._before.values():
                whole.copy_(before)
        self._before.clear()


def whole_storage(tensor: Tensor) -> Tensor:
    """Return the whole storage of a tensor as one vector; the tensor itself if it has no storage."""
    try:
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers
        return tensor.detach()
    return tensor.detach().as_strided((length,), (1,), 0)


def _key(tensor: Tensor) -> int:
    """Return the identity of the storage of a tensor, or of the tensor itself if it has no storage."""
    try:
        storage: int = tensor.untyped_storage()._cdata
        return storage
    except (NotImplementedError, RuntimeError, ValueError):  # ValueError: the parameter of a lazy layer
        return id(tensor)


def _running_statistics(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the running statistics that a batch norm writes to. Some of its schemas do not mark them as written."""
    given = [args[place] if place < len(args) else kwargs.get(name) for place, name in _running(function)]
    return tensors_in(given)


@cache
def _running(function: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(function, "_schema", None)
    if schema is None or "batch_norm" not in schema.name:
        return ()
    names = [argument.name for argument in schema.arguments]
    return tuple((place, name) for place, name in enumerate(names) if name.startswith("running_"))


@cache
def _makes_new(function: Any) -> bool:
    """Whether, by its schema, an operation returns new tensors and no views of its arguments."""
    schema = getattr(function, "_schema", None)
    return schema is not None and all(item.alias_info is None for item in schema.returns)


def _version_kept(tensor: Tensor) -> AbstractContextManager[Any]:
    if tensor.is_inference():  # has no version
        return nullcontext()
    return _unsafe_preserve_version_counter(tensor)
