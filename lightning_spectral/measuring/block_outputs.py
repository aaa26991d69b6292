"""The token geometry of a real forward pass, measured at the output of every residual block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_spectral.passes.chosen import Passes
from lightning_spectral.passes.listen import Listener, listen, stop_listening
from lightning_spectral.records import Measurement, ResidualBlock
from lightning_spectral.tokens import effective_rank, massive_activations, token_residual
from lightning_spectral.weights.paths import module_at

__all__ = ["BlockOutputs", "Geometry", "as_sequences", "with_geometry"]

_MASSIVE = 100.0  # an activation is massive above this multiple of the median
# At most 4 evenly spaced sequences stand for a batch. The effective rank needs the eigenvalues of a Gram matrix, so it
# is computed from the first 2 of these sequences, with at most 256 evenly spaced tokens each.
_SEQUENCES = 4
_RANK_TOKENS, _RANK_SEQUENCES = 256, 2


class Geometry(NamedTuple):
    """The token geometry at the output of one block. A quantity that cannot be measured is ``None``."""

    token_residual: float | None
    typical_token_residual: float | None
    effective_rank: float | None


class BlockOutputs:
    """Listens to the outputs of blocks between :meth:`start` and :meth:`stop`. No output is changed or kept.

    Args:
        model: The model that the blocks were found in.
        blocks: The blocks. A block that is missing in the model is skipped.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
        shared = next((block.token_dims for block in blocks if block.token_dims), (1,))
        self._model = model
        self._blocks = [(block.index, _end(block), block.token_dims or shared) for block in blocks]
        self._listeners: list[Listener] = []
        self.passes = Passes()
        self.error: Exception | None = None

    def start(self, passes: Passes | None = None, *, leave_out: Callable[[nn.Module], bool] | None = None) -> None:
        """Begin to listen; nothing happens if it listens already.

        Args:
            passes: The store for the measurements; a new one by default, in which the last pass counts.
            leave_out: Returns true for a module that must not be listened to.
        """
        if self._listeners:
            return
        self.passes, self.error = Passes() if passes is None else passes, None
        for index, name, token_dims in self._blocks:
            module = None if name is None else module_at(self._model, name)
            if module is not None and not (leave_out is not None and leave_out(module)):
                self._listeners += listen([module], _Outputs(self, index, token_dims))

    def stop(self) -> None:
        """Remove the listeners from the model."""
        stop_listening(self._listeners)

    def values(self) -> dict[int, Geometry]:
        """Return the measurements of the pass that counts, by block index, and forget them.

        A block without an output in that pass is absent.

        Raises:
            Exception: The exception that occurred while listening, if any.
        """
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        measured, self.passes = self.passes.numbers, Passes()
        if not measured:
            return {}
        numbers = torch.stack([*measured.values()]).tolist()
        known = [tuple(None if math.isnan(number) else number for number in block) for block in numbers]
        return {index: Geometry(*block) for index, block in zip(measured, known, strict=True)}


def _end(block: ResidualBlock) -> str | None:
    """Return the path of the module that returns the stream behind a block, ``None`` if no module does.

    A block may be several modules instead of one. It then ends with the last of them, unless this module is itself the
    site of a branch: the output of a site is the branch, not the stream.
    """
    *first, last = block.modules
    return None if first and any(branch.site == last for branch in block.branches) else last


class _Outputs:
    """Listener of one block. Its exceptions are kept and never reach the user's forward pass."""

    def __init__(self, outputs: BlockOutputs, index: int, token_dims: tuple[int, ...]) -> None:
        self._outputs, self._index, self._token_dims = outputs, index, token_dims

    def __call__(
        self, module: nn.Module, call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        output = call()
        passes = self._outputs.passes
        if passes.listens:
            try:
                for leaf in tree_leaves(output):
                    if _is_stream(leaf, self._token_dims):
                        passes.note(self._index, leaf, _geometry(leaf.detach(), self._token_dims))
                        break
            except Exception as error:
                self._outputs.error = error
        return output


def _is_stream(leaf: Any, token_dims: tuple[int, ...]) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and _channel(leaf, token_dims) is not None


@torch.no_grad()
def _geometry(stream: Tensor, token_dims: Sequence[int]) -> Tensor:
    if stream.is_nested:
        raise TypeError("the stream is a nested tensor, whose tokens have no regular layout")
    with torch.autocast(stream.device.type, enabled=False):
        X = as_sequences(stream, token_dims)
        if X.shape[1] < 2:  # a single token is always one vector
            return torch.full((3,), math.nan, device=stream.device)
        X = X[:: math.ceil(len(X) / _SEQUENCES)]
        stride = math.ceil(X.shape[1] / _RANK_TOKENS)
        rank = effective_rank(X[:_RANK_SEQUENCES, ::stride], power=2)
        typical = token_residual(X, massive=_MASSIVE)
        if X.shape[1] < 4:  # without its massive tokens, a sequence this short may have one token left
            left = X.shape[1] - massive_activations(X, multiple=_MASSIVE)[0].sum(-1)
            typical = torch.where(left > 1, typical, math.nan)
        return torch.stack([token_residual(X).nanmean(), typical.nanmean(), rank.nanmean()])


def _channel(stream: Tensor, token_dims: Sequence[int]) -> int | None:
    """Return the dimension of the channels: the last, or the second in feature maps. ``None`` if x is no stream."""
    channel = 1 if stream.dim() - 1 in token_dims else stream.dim() - 1
    return None if channel in token_dims or max(token_dims) >= stream.dim() else channel


def with_geometry(measurement: Measurement, values: Mapping[int, Geometry]) -> Measurement:
    """Add the token geometry, by block index, to the layers of a measurement."""
    layers = (
        replace(layer, **values[layer.index]._asdict()) if layer.index in values else layer for layer in measurement
    )
    return replace(measurement, layers=tuple(layers))


def as_sequences(stream: Tensor, token_dims: Sequence[int]) -> Tensor:
    """Bring a stream into the layout ``(sequences, tokens, width)``.

    Args:
        stream: Any layout of tokens and channels. The channels are the last dimension, or the second if the last
            dimension holds tokens (feature maps).
        token_dims: The dimensions of the tokens.
    """
    channel = _channel(stream, token_dims)
    assert channel is not None
    sequences = [dim for dim in range(stream.dim()) if dim not in token_dims and dim != channel]
    X = stream.permute(*sequences, *token_dims, channel)
    return X.reshape(math.prod(X.shape[: len(sequences)]), math.prod(X.shape[len(sequences) : -1]), X.shape[-1])
