"""Measure the token geometry of a real forward pass, at the output of every residual block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_spectral.discovery.paths import module_at
from lightning_spectral.geometry import effective_rank, token_residual
from lightning_spectral.records import Measurement, ResidualBlock

__all__ = ["BlockOutputs", "Geometry", "as_sequences", "with_geometry"]

_MASSIVE = 100.0  # an activation is massive above this multiple of the median
# So many sequences, evenly spaced, speak for a batch. The effective rank needs the eigenvalues of a Gram matrix: of so
# many tokens, evenly spaced, of the first of them.
_SEQUENCES = 4
_RANK_TOKENS, _RANK_SEQUENCES = 256, 2


class Geometry(NamedTuple):
    """The tokens at the output of one block; a quantity that is not measurable is ``None``."""

    token_residual: float | None
    typical_token_residual: float | None
    effective_rank: float | None


class BlockOutputs:
    """Listens to the outputs of blocks for as long as it is told to; nothing that passes is changed or kept.

    Args:
        model: The model that the blocks were found in.
        blocks: The blocks. One that the model does not have is not heard.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
        shared = next((block.token_dims for block in blocks if block.token_dims), (1,))
        found = [(block, module_at(model, block.name)) for block in blocks]
        self._heard = [
            (block.index, block.token_dims or shared, module) for block, module in found if module is not None
        ]
        self._handles: list[RemovableHandle] = []
        self.measured: dict[int, Tensor] = {}
        self.error: Exception | None = None

    def start(self) -> None:
        """Begin to listen, unless it does already."""
        if self._handles:
            return
        self.measured = {}
        for index, token_dims, module in self._heard:
            self._handles.append(module.register_forward_hook(_Listener(self, index, token_dims)))

    def stop(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def values(self) -> dict[int, Geometry]:
        """Return what was measured in the last pass, by block index, once.

        A block that was not heard is absent.

        Raises:
            Exception: What went wrong while listening.
        """
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        measured, self.measured = self.measured, {}
        if not measured:
            return {}
        numbers = torch.stack([*measured.values()]).tolist()
        known = [tuple(None if math.isnan(number) else number for number in block) for block in numbers]
        return {index: Geometry(*block) for index, block in zip(measured, known, strict=True)}


class _Listener:
    """A forward hook of one block. What goes wrong in it must not go wrong in the user's forward pass."""

    def __init__(self, outputs: BlockOutputs, index: int, token_dims: tuple[int, ...]) -> None:
        self._outputs, self._index, self._token_dims = outputs, index, token_dims

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        try:
            for leaf in tree_leaves(output):
                if (
                    isinstance(leaf, Tensor)
                    and leaf.is_floating_point()
                    and _channel(leaf, self._token_dims) is not None
                ):
                    self._outputs.measured[self._index] = _geometry(leaf.detach(), self._token_dims)
                    return
        except Exception as error:
            self._outputs.error = error


def _geometry(stream: Tensor, token_dims: Sequence[int]) -> Tensor:
    with torch.autocast(stream.device.type, enabled=False):
        X = as_sequences(stream, token_dims)
        X = X[:: math.ceil(len(X) / _SEQUENCES)]
        stride = math.ceil(X.shape[1] / _RANK_TOKENS)
        rank = effective_rank(X[:_RANK_SEQUENCES, ::stride], power=2)
        residuals = (token_residual(X), token_residual(X, massive=_MASSIVE))
        return torch.stack([*(residual.nanmean() for residual in residuals), rank.nanmean()])


def _channel(stream: Tensor, token_dims: Sequence[int]) -> int | None:
    """Return the dimension of the channels, the last or, in feature maps, the second; ``None`` for no stream."""
    channel = 1 if stream.dim() - 1 in token_dims else stream.dim() - 1
    return None if channel in token_dims or max(token_dims) >= stream.dim() else channel


def with_geometry(measurement: Measurement, values: Mapping[int, Geometry]) -> Measurement:
    """Add what was measured of the tokens, by block index, to the layers of a measurement."""
    layers = (
        replace(layer, **values[layer.index]._asdict()) if layer.index in values else layer for layer in measurement
    )
    return replace(measurement, layers=tuple(layers))


def as_sequences(stream: Tensor, token_dims: Sequence[int]) -> Tensor:
    """Bring a stream into the layout ``(sequences, tokens, width)``.

    Args:
        stream: Any layout of tokens and channels. Channels stand last, or second where the last dimension holds tokens
            (feature maps).
        token_dims: The dimensions along which tokens stand.
    """
    channel = _channel(stream, token_dims)
    assert channel is not None
    sequences = [dim for dim in range(stream.dim()) if dim not in token_dims and dim != channel]
    X = stream.permute(*sequences, *token_dims, channel)
    return X.reshape(math.prod(X.shape[: len(sequences)]), math.prod(X.shape[len(sequences) : -1]), X.shape[-1])
