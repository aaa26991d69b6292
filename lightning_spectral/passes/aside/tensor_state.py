"""Keep the state of a tensor except for the numbers in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["TensorState", "without_history"]


class TensorState:
    """The memory, the class, the gradient and the autograd flags of a tensor."""

    __slots__ = ("data", "grad", "hooks", "kind", "leaf", "place", "requires_grad")

    def __init__(self, tensor: Tensor) -> None:
        self.kind, self.leaf, self.requires_grad = type(tensor), tensor.is_leaf, tensor.requires_grad
        self.grad = tensor.grad if self.leaf else None
        self.hooks = tensor._backward_hooks
        self.data = tensor.data  # another view of the same memory
        self.place = _place(tensor)

    @staticmethod
    def put_back(tensor: Tensor, before: TensorState) -> None:
        """Give a tensor its state of before."""
        if _place(tensor) != before.place:
            tensor.data = before.data
        if type(tensor) is not before.kind:
            tensor.__class__ = before.kind
        if tensor._backward_hooks is not before.hooks:
            tensor._backward_hooks = before.hooks
        if before.leaf:
            if not tensor.is_leaf:
                tensor.detach_()
            if tensor.requires_grad != before.requires_grad:
                tensor.requires_grad_(before.requires_grad)
            if tensor.grad is not before.grad:
                tensor.grad = before.grad


def _place(tensor: Tensor) -> Any:
    """Return where a tensor lies in memory, ``None`` for a tensor without memory of its own."""
    try:
        storage = tensor.untyped_storage()._cdata
        return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, a wrapper, or not initialized yet
        return None


def without_history(tensor: Tensor) -> Tensor | None:
    """Return a detached stand-in for a tensor with a history, ``None`` for others.

    An in-place write in a pass would add a node to the history, and nothing could remove the node again.
    """
    bound = not tensor.is_leaf or (tensor._is_view() and not tensor.requires_grad)
    return tensor.detach() if bound and not vars(tensor) else None
