"""In-place writes that are undone: what a tensor held before the first write is kept, and copied back."""

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
    """Keeps, for as long as it is entered, what every tensor that existed before held before it was written to.

    Nothing is copied before it is written to.

    Args:
        known: Tensors that are certain to have existed before.
    """

    supports_higher_order_operators = True  # flex_attention

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {_key(tensor) for tensor in known}
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._versions = ExitStack()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, after a look at what it writes to."""
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
        """Copy back what was kept; autograd does not see that anything was written."""
        with torch.no_grad(), self._versions:
            for whole, before in self._before.values():
                whole.copy_(before)
        self._before.clear()


def whole_storage(tensor: Tensor) -> Tensor:
    """Return all that lies in the storage of a tensor as one vector; the tensor itself where it has no storage."""
    try:
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers
        return tensor.detach()
    return tensor.detach().as_strided((length,), (1,), 0)


def _key(tensor: Tensor) -> int:
    try:
        storage: int = tensor.untyped_storage()._cdata
        return storage
    except (NotImplementedError, RuntimeError, ValueError):  # the last of a lazy layer
        return id(tensor)


def _running_statistics(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return what a batch norm writes to. The schemas of some of them do not say it."""
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
    """Whether the tensors that an operation returns are no views of its arguments, by its schema."""
    schema = getattr(function, "_schema", None)
    return schema is not None and all(item.alias_info is None for item in schema.returns)


def _version_kept(tensor: Tensor) -> AbstractContextManager[Any]:
    if tensor.is_inference():  # has no version
        return nullcontext()
    return _unsafe_preserve_version_counter(tensor)
