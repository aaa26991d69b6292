"""What a model makes its output of: the tokens behind its last block that the output depends on.

A class token, the last token, the mean of all tokens but padding: nobody has to say which, because the gradient of the
output says it. It is exactly zero at a token that is not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_spectral.linalg.operators import sum_dtype
from lightning_spectral.measuring.block_outputs import MASSIVE, as_sequences, place_of, stream_in
from lightning_spectral.passes.listen import Listener, listen, stop_listening
from lightning_spectral.records import ResidualBlock
from lightning_spectral.tokens import token_residual
from lightning_spectral.weights.paths import module_at

__all__ = ["Readout", "pooled_residual"]


@torch.no_grad()
def pooled_residual(X: Tensor, gradient: Tensor, *, of_one_vector: bool = False) -> Tensor:
    """Return ‖P − P̄‖_F / ‖P‖_F over samples; a row of P is the mean of the tokens of a sample that are read.

    The value is 0 where what is read is the same for every sample. A token is read if its gradient is not exactly 0. A
    sample of which no token is read does not count, and massive activations of P do not.

    Args:
        X: ``(samples, tokens, width)``, a stream.
        gradient: Of something that is made of X, along any direction; of the same shape.
        of_one_vector: Demand that the tokens of a sample which are read have one gradient. They have where one token or
            the mean of some is read, and hardly ever where a model says something of each token.

    Returns:
        A number from 0 to 1, in float64 (float32 on a device without float64). NaN where fewer than two samples are
        read, and where the demand is not met.
    """
    read = (gradient != 0).any(-1)
    counts = read.any(-1)
    tokens = torch.where(read[..., None], X.to(sum_dtype(X.device)), 0.0)
    pooled = tokens.sum(1) / read.sum(1, keepdim=True).clamp(min=1)
    known = counts.sum() > 1
    if of_one_vector:
        first = read.to(torch.uint8).argmax(1)[:, None, None].expand(-1, 1, gradient.shape[-1])
        known = known & ((gradient == gradient.gather(1, first)).all(-1) | ~read).all()
    return torch.where(known, token_residual(pooled, counts, massive=MASSIVE), math.nan)


class Readout:
    """Hears the stream behind the last block of one pass without gradients, and has the rest of the pass recorded.

    The rest, a norm and a head as a rule, is recorded for one backward pass. The stream goes on as a copy, so that what
    is changed in place later is no part of it.

    Args:
        model: The model.
        block: Its last block in the pass.
    """

    def __init__(self, model: nn.Module, block: ResidualBlock) -> None:
        self._place, self._token_dims = place_of(block), block.token_dims or (1,)
        module = None if self._place.module is None else module_at(model, self._place.module)
        self._modules = [] if module is None else [module]
        self._listeners: list[Listener] = []
        self._stream: Tensor | None = None

    def __enter__(self) -> Readout:
        """Begin to listen. Of several calls, the last counts."""
        self._listeners = listen(self._modules, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the model as it was."""
        stop_listening(self._listeners)
        self._stream = None

    def _hear(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._place.taken:
            return call(self._recorded((args, kwargs)))
        torch.set_grad_enabled(False)  # a module that is called again begins anew
        return self._recorded(call())

    def _recorded(self, values: Any) -> Any:
        """Return values with the stream among them as the beginning of what is recorded."""
        leaves, spec = tree_flatten(values)
        number = stream_in(leaves, self._place, self._token_dims)
        if number is None or torch.is_inference_mode_enabled():
            return values
        torch.set_grad_enabled(True)
        self._stream = leaves[number].detach().requires_grad_()
        leaves[number] = self._stream.clone()
        return tree_unflatten(leaves, spec)

    def pooled_residual(self, output: Tensor) -> Tensor | None:
        """Return :func:`pooled_residual` of the stream, ``None`` where the output does not depend on it.

        Args:
            output: ``(samples, ...)``, what the model has made of the stream.
        """
        stream = self._stream
        if stream is None or not output.requires_grad:
            return None
        # Along a random direction: a softmax has no gradient along ones. The caller puts the random stream back.
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            output, stream, torch.randn_like(output), allow_unused=True
        )
        gradient = gradients[0]
        if gradient is None:
            return None
        with _disable_current_modes():
            X, along = (as_sequences(item.detach(), self._token_dims) for item in (stream, gradient))
            return pooled_residual(X, along) if len(X) == len(output) else None
