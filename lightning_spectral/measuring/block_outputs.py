"""The token geometry of a real forward pass, measured at the output of every residual block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_spectral.linalg.operators import sum_dtype
from lightning_spectral.passes.listen import Listener, listen, stop_listening
from lightning_spectral.records import ResidualBlock, StreamAt
from lightning_spectral.tokens import token_residual
from lightning_spectral.tokens.collapse import relative_residual
from lightning_spectral.tokens.ranks import shares_effective_rank
from lightning_spectral.tokens.selection import select
from lightning_spectral.tokens.spectrum import gram, moment_shares
from lightning_spectral.weights.paths import module_at

__all__ = ["BlockOutputs", "Geometry", "as_sequences", "channel_of", "place_of", "stream_in"]

MASSIVE = 100.0  # an activation is massive above this multiple of the median
# The effective rank needs the eigenvalues of a Gram matrix, so it is computed from 1 sequence, with at most 64 evenly
# spaced tokens. It foretold no failure (docs/evidence.md), and eigenvalues for 256 tokens cost more than all the rest.
# The residuals are of at most 8 evenly spaced sequences.
_SEQUENCES = 8
_RANK_TOKENS = 64


class Geometry(NamedTuple):
    """The token geometry at the output of one block. A quantity that cannot be measured is ``None``.

    Attributes:
        token_residual: Mean over sequences.
        typical_token_residual: The same without massive activations.
        effective_rank: Mean over sequences.
        sample_residual: Without massive activations.
        norm: ‖X‖_F; not finite where a value is not.
        rms: Root mean square of the entries of X.
    """

    token_residual: float | None
    typical_token_residual: float | None
    effective_rank: float | None
    sample_residual: float | None
    norm: float
    rms: float


class BlockOutputs:
    """Listens to the outputs of blocks between :meth:`start` and :meth:`stop`; of several, the last counts.

    No output is changed or kept.

    Args:
        model: The model that the blocks were found in.
        blocks: The blocks. A block that is missing in the model is skipped.

    Attributes:
        widths: Widths of the streams that were heard.
        error: The exception that occurred while listening, ``None`` for none.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
        shared = next((block.token_dims for block in blocks if block.token_dims), (1,))
        self._model = model
        self._blocks = [(block.index, place_of(block), block.token_dims or shared) for block in blocks]
        self._listeners: list[Listener] = []
        self.numbers: dict[int, _Seen] = {}
        self.widths: set[int] = set()
        self.error: Exception | None = None

    def start(self) -> None:
        """Begin to listen; nothing happens if it listens already. What was heard before stays."""
        if self._listeners:
            return
        for index, place, token_dims in self._blocks:
            module = None if place.module is None else module_at(self._model, place.module)
            if module is not None:
                self._listeners += listen([module], _Outputs(self, index, place, token_dims))

    def stop(self) -> None:
        """Remove the listeners from the model."""
        stop_listening(self._listeners)

    def values(self) -> dict[int, Geometry]:
        """Return what was measured, by block index, and forget it. One transfer from the device.

        A block that gave no output is absent.

        Raises:
            Exception: The exception that occurred while listening, if any.
        """
        measured, self.numbers = self.numbers, {}
        error, self.error = self.error, None
        if error is not None:
            raise error
        if not measured:
            return {}
        numbers = torch.stack([seen.numbers for seen in measured.values()])
        rows = torch.cat([_ranks([*measured.values()])[:, None], numbers], 1).tolist()
        return {index: _read(*row) for index, row in zip(measured, rows, strict=True)}


def _read(*numbers: float) -> Geometry:
    rank, tokens, typical, samples = (None if math.isnan(number) else number for number in numbers[:4])
    return Geometry(tokens, typical, rank, samples, *numbers[4:])


class _Seen(NamedTuple):
    """What was heard of one block: its residuals and sizes, and the Gram matrix that its effective rank is made of."""

    numbers: Tensor
    gram: Tensor | None
    size: int = 0


def _ranks(seen: Sequence[_Seen]) -> Tensor:
    """Return the effective ranks. Matrices of one shape have one call: on CUDA each call waits for the device."""
    ranks = seen[0].numbers.new_full((len(seen),), math.nan)
    alike: dict[tuple[int, int], list[int]] = {}
    for place, (_, G, size) in enumerate(seen):
        if G is not None:
            alike.setdefault((len(G), size), []).append(place)
    for (_, size), places in alike.items():
        G = torch.stack([G for place in places if (G := seen[place].gram) is not None])
        ranks[places] = shares_effective_rank(moment_shares(G, size=size), power=2).to(ranks)
    return ranks


def place_of(block: ResidualBlock) -> StreamAt:
    """Return where the stream behind a block is heard.

    Where no pass says it, a block of several modules ends with the last of them, unless this module is itself the site
    of a branch: the output of a site is the branch, not the stream.
    """
    if block.stream is not None:
        return block.stream
    *first, last = block.modules
    return StreamAt(None if first and any(branch.site == last for branch in block.branches) else last)


def stream_in(leaves: Sequence[Any], place: StreamAt, token_dims: tuple[int, ...]) -> int | None:
    """Return the position of the stream among the leaves of the arguments, or of the result; ``None`` for none."""
    tensors = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    likely = tensors[:1] if place.taken else tensors
    return next((number for number in likely if channel_of(leaves[number], token_dims) is not None), None)


class _Outputs:
    """Listener of one block. Its exceptions are kept and never reach the user's forward pass."""

    def __init__(self, outputs: BlockOutputs, index: int, place: StreamAt, token_dims: tuple[int, ...]) -> None:
        self._outputs, self._index, self._place, self._token_dims = outputs, index, place, token_dims

    def __call__(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._place.taken:
            self._note((args, kwargs))  # before the module can change it in place
            return call()
        output = call()
        self._note(output)
        return output

    def _note(self, values: Any) -> None:
        try:
            leaves = tree_leaves(values)
            number = stream_in(leaves, self._place, self._token_dims)
            if number is not None:
                leaf = leaves[number]
                with _disable_current_modes():  # nothing of it concerns them, and each costs time at every step
                    self._outputs.numbers[self._index] = _geometry(leaf.detach(), self._token_dims)
                self._outputs.widths.add(leaf.shape[_channel(leaf, self._token_dims) or 0])
        except Exception as error:
            self._outputs.error = error


def channel_of(leaf: Any, token_dims: tuple[int, ...]) -> int | None:
    """Return the dimension of the channels of a stream, ``None`` for all else."""
    return _channel(leaf, token_dims) if isinstance(leaf, Tensor) and leaf.is_floating_point() else None


@torch.no_grad()
def _geometry(stream: Tensor, token_dims: Sequence[int]) -> _Seen:
    if stream.is_nested:
        raise TypeError("the stream is a nested tensor, whose tokens have no regular layout")
    with torch.autocast(stream.device.type, enabled=False):
        whole = as_sequences(stream, token_dims)
        # Once for all that follows.
        X = whole[:: math.ceil(len(whole) / _SEQUENCES)].to(sum_dtype(whole.device))
        narrow = whole.dtype.itemsize < X.dtype.itemsize
        norm = torch.linalg.vector_norm(X if len(X) == len(whole) else whole, dtype=X.dtype)
        sizes = [norm, norm / math.sqrt(whole.numel())]
        residual = relative_residual if narrow else token_residual
        nan = torch.full((), math.nan, device=X.device)
        typical, valid = select(X, massive=MASSIVE)
        between = residual(typical.flatten(1)) if len(X) > 1 else nan  # the sample residual without massive ones
        if X.shape[1] < 2:  # a single token is always one vector
            return _Seen(torch.stack([nan, nan, between, *sizes]), None)
        few = X[0, :: math.ceil(X.shape[1] / _RANK_TOKENS)]
        G, measurable = gram(few)
        typical = residual(typical, valid)
        if X.shape[1] < 4:  # without its massive tokens, a sequence this short may have one token left
            typical = torch.where(valid.sum(-1) > 1, typical, math.nan)
        numbers = torch.stack([residual(X).nanmean(), typical.nanmean(), between, *sizes])
        return _Seen(numbers, torch.where(measurable, G, math.nan), max(few.shape))


def _channel(stream: Tensor, token_dims: Sequence[int]) -> int | None:
    """Return the dimension of the channels: the last, or the second in feature maps. ``None`` if x is no stream."""
    channel = 1 if stream.dim() - 1 in token_dims else stream.dim() - 1
    return None if channel in token_dims or max(token_dims) >= stream.dim() else channel


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
