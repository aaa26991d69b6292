"""Catch the calls of a model's first real forward pass, for models that no example input can be guessed for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_spectral.errors import ExampleInputError
from lightning_spectral.records import Blocks, ResidualBlock
from lightning_spectral.watch.outermost import Call, OutermostCalls
from lightning_spectral.weights.names import common_parts
from lightning_spectral.weights.paths import module_at

__all__ = ["FirstForward", "holds_any", "trained_blocks"]


class FirstForward:
    """Notes the calls of a module and of everything in it until told to stop; nothing that passes is changed.

    Args:
        root: A module, usually a LightningModule, whose own forward need not be used at all.
        batch: What the training step is called with.
    """

    def __init__(self, root: nn.Module, batch: Any) -> None:
        self._calls: dict[nn.Module, Call] = {}
        self._outermost = OutermostCalls(root, root.modules(), batch, self._hear)

    def _hear(self, call: Call, make: Callable[[], Any]) -> Any:
        self._calls.setdefault(call.module, call)
        return make()

    @property
    def heard(self) -> bool:
        """Whether anything was called."""
        return bool(self._calls)

    def stop(self) -> None:
        """Leave the model as it was."""
        self._outermost.stop()

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
