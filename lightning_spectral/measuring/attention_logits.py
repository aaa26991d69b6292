"""The largest attention logits of a pass, read off the operations that every attention ends in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_spectral.linalg.sharding.presence import is_dtensor
from lightning_spectral.passes.listen import Listener, listen, stop_listening
from lightning_spectral.records import ResidualBlock
from lightning_spectral.weights.paths import module_at

__all__ = ["AttentionLogits", "largest_logit"]

_SOFTMAX = {"aten::_softmax", "aten::_safe_softmax"}
_ATTENTION = "aten::_scaled_dot_product"  # first part of the names of all fused kernels
_QUERIES, _SAMPLES = 256, 2  # of longer sequences, and of larger batches, so many evenly spaced ones are looked at


class AttentionLogits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, notes the largest logit of every attention; of several passes, the largest counts.

    It looks at the arguments of the kernels behind ``scaled_dot_product_attention`` and of ``softmax``. Logits belong
    to the next attention site that returns: a site may be the whole attention, or its output projection alone. Kernels
    of other libraries show nothing.

    Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (arXiv:2303.06296), and
    Kimi Team, "Kimi K2" (arXiv:2507.20534, QK-Clip), watch this number.

    Args:
        model: The model that the blocks were found in.
        blocks: Its blocks.

    Attributes:
        numbers: The largest logit of a block, by its index.
    """

    supports_higher_order_operators = True  # flex_attention, which shows nothing

    def __init__(self, model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._blocks = model, blocks
        self._pending: list[Tensor] = []
        self._listeners: list[Listener] = []
        self.numbers: dict[int, Tensor] = {}

    def __enter__(self) -> AttentionLogits:
        """Begin to look."""
        for block in self._blocks:
            for branch in block.branches:
                if (site := module_at(self._model, branch.site)) is not None:
                    attends = branch.kind in ("attention", "cross_attention")
                    self._listeners += listen([site], self._ends(block.index if attends else None))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        """Look no more."""
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        stop_listening(self._listeners)
        self._pending.clear()

    def values(self) -> dict[int, float]:
        """Return the largest logit of every block that has shown one, by its index. One transfer from the device."""
        if not self.numbers:
            return {}
        logits = torch.stack([*self.numbers.values()]).tolist()
        return dict(zip(self.numbers, logits, strict=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments of an attention, then run the operation."""
        kwargs = kwargs or {}
        shown = _shown_by(func)
        if shown is not None:
            with _disable_current_modes():
                self._pending += shown(func, args, kwargs)
        return func(*args, **kwargs)

    def _ends(self, index: int | None) -> Callable[..., Any]:
        def hear(module: nn.Module, call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = call()
            if index is not None and self._pending:
                known = [self.numbers[index]] if index in self.numbers else []
                self.numbers[index] = torch.stack([*known, *self._pending]).amax()
            self._pending.clear()  # of an MLP: a router's
            return result

        return hear


@cache
def _shown_by(func: Any) -> Callable[..., list[Tensor]] | None:
    """Return what reads the largest logit off the arguments of an operation, ``None`` where it is no attention."""
    name = func._schema.name if hasattr(func, "_schema") else ""
    if name in _SOFTMAX:
        return _of_softmax
    return _of_kernel if name.startswith(_ATTENTION) else None


def _of_softmax(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [_largest(_local(args[0]))] if args[0].dim() >= 3 else []


def _of_kernel(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    given = dict(zip((item.name for item in func._schema.arguments), args, strict=False)) | dict(kwargs)
    mask = next((given[word] for word in ("attn_mask", "attn_bias") if given.get(word) is not None), None)
    query, key = _local(given["query"]), _local(given["key"])
    causal, scale = bool(given.get("is_causal")), given.get("scale")
    return [largest_logit(query, key, _local(mask), is_causal=causal, scale=scale)]


def largest_logit(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return the largest logit q·k/√d over pairs of tokens that are not masked.

    Args:
        query: ``(..., heads, queries, d)``.
        key: ``(..., key heads, keys, d)``; a key head serves as many heads as it takes.
        mask: Boolean, true where a pair counts, or what is added to the logits.
        is_causal: Whether a query sees no later key.
        scale: The factor of the logits, 1/√d by default.

    Returns:
        A scalar in float32, of at most 2 samples and 256 queries; −∞ if every pair is masked.
    """
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    stride = math.ceil(query.shape[-2] / _QUERIES)
    query, key = query.detach()[..., ::stride, :], key.detach()
    if query.dim() > 3:
        step = math.ceil(len(query) / _SAMPLES)
        query, key = query[::step], key[::step]
        mask = mask[::step] if mask is not None and mask.dim() == query.dim() and len(mask) > 1 else mask
    # The heads that a key head serves are neighbours: as more queries of this head, they need no copies of the key.
    heads = (key.shape[-3], query.shape[-3] // key.shape[-3])
    grouped = (query.float() * factor).unflatten(-3, heads).flatten(-3, -2)  # type: ignore[no-untyped-call]
    with torch.autocast(query.device.type, enabled=False):
        logits = (grouped @ key.float().mT).unflatten(-2, (heads[1], -1)).flatten(-4, -3)
    if mask is not None:
        rows = mask[..., ::stride, :] if mask.shape[-2] > 1 else mask
        logits = logits.masked_fill_(~rows, -math.inf) if rows.dtype == torch.bool else logits.add_(rows)
    if is_causal:
        places = torch.arange(0, query.shape[-2] * stride, stride, device=query.device)
        later = torch.arange(logits.shape[-1], device=query.device) > places[:, None]
        # The same as a masked fill, which takes seven times as long.
        torch.minimum(logits, torch.where(later, -math.inf, math.inf), out=logits)
    return _largest(logits)


def _largest(logits: Tensor) -> Tensor:
    return logits.amax().float() if logits.numel() else torch.full((), -math.inf, device=logits.device)


def _local(tensor: Any) -> Any:
    """Return the part of a distributed tensor that this process has: its heads."""
    return tensor.to_local() if is_dtensor(tensor) else tensor
