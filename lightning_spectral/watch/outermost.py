"""Hear the calls of a model in a training step that no other heard call is around."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_spectral.passes.aside.stand_ins import LIGHTNING
from lightning_spectral.passes.listen import Listener, listen, stop_listening
from lightning_spectral.weights.paths import compiled_entries

__all__ = ["Call", "OutermostCalls"]

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one module."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def samples(self) -> int | None:
        """The length of the first tensor, which is taken for the number of samples; ``None`` without tensors."""
        return next((len(tensor) for tensor in self.tensors if tensor.dim()), None)

    def places(self, samples: int) -> list[int] | None:
        """Return the places of some samples from all over the batch, ``None`` where all of them are needed.

        All are needed where the call has integers of another length: edges of a graph and bounds of packed sequences
        point at samples. On a GPU, an index that points at none breaks off the whole run.

        The places are multiples of the golden ratio: evenly spaced ones would all be of one class in a batch that goes
        through the classes in turn.

        Args:
            samples: How many to keep.
        """
        whole = self.samples
        if whole is None or whole <= samples or self._may_point_at_samples(whole):
            return None
        return sorted(nsmallest(samples, range(whole), key=lambda place: place * _GOLDEN % 1))

    def shortened(self, samples: int) -> Call:
        """Return the call on the samples at :meth:`places`, as copies. Tensors of another length stay whole."""
        whole, kept = self.samples, self.places(samples)
        if kept is None:
            return self

        def some(tensor: Tensor) -> Tensor:
            return tensor[kept] if tensor.dim() and len(tensor) == whole else tensor

        args, kwargs = tree_map_only(Tensor, some, (self.args, self.kwargs))
        return Call(self.module, args, kwargs)

    def _may_point_at_samples(self, whole: int) -> bool:
        integers = (item for item in self.tensors if item.dim() and item.dtype in (torch.int32, torch.int64))
        return any(len(item) not in (1, whole) for item in integers)


class OutermostCalls:
    """Listens to some modules of a model until told to stop. Nothing that passes is changed.

    Args:
        root: The model, usually a LightningModule, whose own forward need not be used at all.
        modules: Those of its modules to listen to. What is compiled is left out, and its entry is not.
        batch: What the training step is called with. A call of the root with it is the strategy's way into the
            training step and not a forward pass.
        hear: Is called with every outermost call and with what makes it, and returns its result.
    """

    def __init__(
        self,
        root: nn.Module,
        modules: Iterable[nn.Module],
        batch: Any,
        hear: Callable[[Call, Callable[[], Any]], Any],
    ) -> None:
        self._root, self._batch, self._hear = root, batch, hear
        self._depth = 0  # of calls that are heard or lie in one that is
        # Nothing is heard inside compiled code, and to listen to what `torch.compile` has wrapped compiles it anew.
        inside = {inner for entry in compiled_entries(root) for inner in entry.modules() if inner is not entry}
        self._listeners: list[Listener] = listen([item for item in modules if item not in inside], self._notice)

    def _notice(self, module: nn.Module, call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module is self._root and self._is_training_step(args):
            return call()
        self._depth += 1
        try:
            return call() if self._depth > 1 else self._hear(Call(module, args, kwargs), call)
        finally:
            self._depth -= 1

    def _is_training_step(self, args: tuple[Any, ...]) -> bool:
        # A strategy that wraps the module puts the training step into the place of its forward for one call. Others,
        # accelerate and torch.compile, put a wrapper around the forward itself there.
        forward = self._root.forward
        own = getattr(forward, "__func__", None) is type(self._root).forward
        redirected = not own and str(getattr(forward, "__module__", None)).partition(".")[0] in LIGHTNING
        return redirected or (len(args) > 1 and args[0] is self._batch)

    def stop(self) -> None:
        """Leave the model as it was."""
        stop_listening(self._listeners)
