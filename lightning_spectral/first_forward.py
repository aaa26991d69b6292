"""Catch the arguments of a model's first real forward pass, for models that no example input can be guessed for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from lightning_spectral.errors import ExampleInputError

__all__ = ["Call", "FirstForward"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def shortened(self) -> Call:
        """Return the call on the first two samples, where every tensor agrees on how many there are.

        A traced pass keeps every intermediate value, and two samples show all of the structure.
        """
        tensors = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        if len({tensor.shape[:1] for tensor in tensors}) != 1 or not tensors[0].ndim:
            return self
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor[:2], (self.args, self.kwargs))
        return Call(self.module, args, kwargs)


class FirstForward:
    """Listens to a module and its children until told to stop; nothing that passes is changed."""

    def __init__(self, root: nn.Module, batch: Any) -> None:
        """Begin to listen.

        Args:
            root: A module, usually a LightningModule, whose own forward need not be used at all.
            batch: What the training step is called with. A call of the root with it is the strategy's way into the
                training step and not a forward pass.
        """
        self._root, self._batch = root, batch
        self._calls: dict[nn.Module, Call] = {}
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._note, with_kwargs=True) for module in (root, *root.children())
        ]

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_training_step = module is self._root and len(args) > 1 and args[0] is self._batch
        if not is_training_step:
            self._calls.setdefault(module, Call(module, args, kwargs))

    def stop(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def call(self) -> Call:
        """Return the first call of the root or, where it was not called, of its child with the most parameters.

        Raises:
            ExampleInputError: Neither was called.
        """
        if not self._calls:
            raise ExampleInputError(
                "no example input could be guessed, and the training step calls neither the module nor one of its "
                "children; set `example_input_array` on the LightningModule, or pass `blocks=` to SpectralMonitor"
            )
        return self._calls.get(self._root) or max(self._calls.values(), key=_size)


def _size(call: Call) -> int:
    return sum(parameter.numel() for parameter in call.module.parameters())
