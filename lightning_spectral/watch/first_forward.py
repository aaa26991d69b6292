"""Catch the calls of a model's first real forward pass, for models that no example input can be guessed for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_spectral.errors import ExampleInputError
from lightning_spectral.passes.listen import Listener, listen, stop_listening
from lightning_spectral.records import Blocks, ResidualBlock
from lightning_spectral.weights.names import common_parts
from lightning_spectral.weights.paths import compiled_entries, module_at

__all__ = ["Call", "FirstForward", "holds_any", "trained_blocks"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one module."""

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
    """Listens to a module and everything in it until told to stop; nothing that passes is changed."""

    def __init__(self, root: nn.Module, batch: Any) -> None:
        """Begin to listen.

        Args:
            root: A module, usually a LightningModule, whose own forward need not be used at all.
            batch: What the training step is called with. A call of the root with it is the strategy's way into the
                training step and not a forward pass.
        """
        self._root, self._batch = root, batch
        self._calls: dict[nn.Module, Call] = {}
        self._depth = 0  # of calls that are noted or lie in one that is
        # Nothing is heard inside compiled code, and to listen to what `torch.compile` has wrapped compiles it anew.
        inside = {inner for entry in compiled_entries(root) for inner in entry.modules() if inner is not entry}
        outside = [module for module in root.modules() if module not in inside]
        self._listeners: list[Listener] = listen(outside, self._hear)

    def _hear(self, module: nn.Module, call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module is self._root and self._is_training_step(args):
            return call()
        if not self._depth:
            self._calls.setdefault(module, Call(module, args, kwargs))
        self._depth += 1
        try:
            return call()
        finally:
            self._depth -= 1

    def _is_training_step(self, args: tuple[Any, ...]) -> bool:
        # A strategy that wraps the module puts the training step into the place of its forward for one call.
        own = getattr(self._root.forward, "__func__", None) is type(self._root).forward
        return not own or (len(args) > 1 and args[0] is self._batch)

    @property
    def heard(self) -> bool:
        """Whether anything was called."""
        return bool(self._calls)

    def stop(self) -> None:
        """Leave the model as it was."""
        stop_listening(self._listeners)

    def calls(self, trained: Collection[Tensor] = ()) -> list[Call]:
        """Return the first call of every module that was called, and not by another one that was.

        Args:
            trained: The parameters that the run trains. Modules without any of them, such as a frozen teacher, are left
                out, unless nothing that was called has one.

        Raises:
            ExampleInputError: Nothing was called.
        """
        called = [call for call in self._calls.values() if next(call.module.parameters(), None) is not None]
        if not called:
            raise ExampleInputError(
                "no example input could be guessed, and the training step calls neither the module nor one inside it; "
                "set `example_input_array` on the LightningModule, or pass `blocks=find_blocks(model, batch=...)`"
            )
        held = set(map(id, trained))
        return [call for call in called if holds_any(call.module, held)] or called


def holds_any(module: nn.Module, parameters: Collection[int]) -> bool:
    """Whether a module has one of some parameters, given by their identities."""
    return any(id(parameter) in parameters for parameter in module.parameters())


def trained_blocks(model: nn.Module, blocks: Sequence[ResidualBlock], trained: Collection[Tensor]) -> Blocks:
    """Leave out the blocks of models in the model that are not trained at all, such as a teacher's.

    Where the paths of the blocks part by a name, and not by a number in a stack, there are several models. Frozen
    layers of a stack stay. Where nothing that has blocks is trained, all of them stay.
    """
    notes = getattr(blocks, "notes", ())
    names = [block.modules[0] for block in blocks]
    depth = len(common_parts(names))
    heads = {block: name.split(".")[: depth + 1] for block, name in zip(blocks, names, strict=True)}
    if any(len(head) <= depth or head[-1].isdigit() for head in heads.values()):
        return Blocks(blocks, notes)
    held = set(map(id, trained))
    alive = {name: _is_held(model, name, held) for name in map(".".join, heads.values())}
    kept = tuple(block for block in blocks if alive[".".join(heads[block])])
    if len(kept) in (0, len(blocks)):
        return Blocks(blocks, notes)
    left_out = ", ".join(name for name in alive if not alive[name])
    note = f"left out, because nothing in it is trained: {left_out} ({len(blocks) - len(kept)} blocks)"
    return Blocks((replace(block, index=index) for index, block in enumerate(kept)), (*notes, note))


def _is_held(model: nn.Module, name: str, parameters: Collection[int]) -> bool:
    module = module_at(model, name)
    return module is None or holds_any(module, parameters)
