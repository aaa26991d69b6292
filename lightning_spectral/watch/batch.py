"""What is seen of the training batch of a measured step: what a few of its samples become in evaluation mode.

Dropout hides a collapse: it sets equal tokens apart again. So the tokens of the training pass are not looked at. Before
a call of the model in a training step runs, a few samples of its arguments run through the same module, with the same
weights, in evaluation mode and without gradients, and everything that this pass has changed is put back::

    training_step ── model(x) ──┬── model(x[few])   in evaluation mode, aside: blocks, branches, logits, output
                                └── model(x)        the real call, which knows nothing of it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import nn

from lightning_spectral.errors import ExampleInputError
from lightning_spectral.linalg.sharding.presence import is_dtensor, is_wrapped_by_fsdp
from lightning_spectral.measuring.attention_logits import AttentionLogits
from lightning_spectral.measuring.block_outputs import BlockOutputs, Geometry
from lightning_spectral.measuring.jacobians import watch_updates
from lightning_spectral.measuring.readout import Readout
from lightning_spectral.measuring.updates import Update, UpdateWatch
from lightning_spectral.passes.aside import evaluated
from lightning_spectral.records import (
    FunctionalMeasurement,
    LayerMeasurement,
    Measurement,
    ResidualBlock,
)
from lightning_spectral.watch.options import Look
from lightning_spectral.watch.outermost import Call, OutermostCalls
from lightning_spectral.watch.outputs import Outputs
from lightning_spectral.weights.paths import module_at

__all__ = ["BatchWatch"]

# A quarter of the samples are looked at, but no fewer and no more than these.
_FEWEST, _MOST = 4, 8


class BatchWatch:
    """Looks at the batch of a training step between :meth:`start` and :meth:`stop`.

    Calls without grad mode (decoding, a target, a metric) show nothing. Of several calls in grad mode, the first that
    runs a block shows it, unless a later call of the same module has at least twice as many numbers in its arguments
    (decoding, token by token). A call whose output has no token beside another shows no tokens.

    Args:
        model: The model that the blocks were found in.
        blocks: The blocks.
        calls: The calls of modules of the model that show the blocks; a call of the model is guessed where there are
            none. They are traced once, to see which constants follow the branches.
        looks: What is looked at, among :data:`~lightning_spectral.watch.options.Look`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[ResidualBlock],
        calls: Sequence[Call] = (),
        *,
        looks: Collection[str] = get_args(Look),
    ) -> None:
        self._model, self._blocks = model, blocks
        self._sees_tokens = "tokens" in looks
        self._outputs = BlockOutputs(model, blocks if self._sees_tokens else ())
        self._updates = _update_watch(model, blocks, calls) if "updates" in looks else None
        self._logits = AttentionLogits(model, blocks) if "logits" in looks else None
        # In a stream of (tokens, batch, width) nobody knows which dimension of the arguments the samples are in.
        self._samples_first = not any(block.token_dims == (0,) for block in blocks)
        self._sees_output = self._sees_tokens and self._samples_first
        self._sharded = False
        self._outermost: OutermostCalls | None = None
        self._within: dict[nn.Module, frozenset[int]] = {}  # blocks in a module, by index
        self._unseen: set[int] = set()
        self._sizes: dict[nn.Module, int] = {}  # numbers in the arguments of the calls that were looked at
        self._output = Outputs(self._outputs.widths)
        self._unread: set[nn.Module] = set()  # modules whose pass shows nothing of what their output is made of
        self._error: Exception | None = None

    @property
    def complete(self) -> bool:
        """Whether a call of every block has been looked at."""
        return not self._unseen

    @property
    def heard(self) -> bool:
        """Whether any call has been looked at."""
        return bool(self._sizes)

    def start(self, batch: Any = None) -> None:
        """Begin to listen, unless it does already (gradient accumulation).

        Args:
            batch: What the training step is called with.
        """
        if self._outermost is not None:
            return
        self._unseen = {block.index for block in self._blocks}
        self._sharded = _is_sharded(self._model)
        self._within, self._sizes, self._error = _within(self._model, self._blocks), {}, None
        self._output.clear()
        for watch in (self._outputs, self._logits, self._updates):
            if watch is not None:
                watch.numbers.clear()
        self._outermost = OutermostCalls(self._model, self._within, batch, self._hear)

    def stop(self) -> None:
        """Leave the model as it was."""
        if self._outermost is not None:
            self._outermost.stop()
            self._outermost = None

    def add_to(self, measurement: Measurement) -> Measurement:
        """Stop, and add what was seen to a measurement.

        Raises:
            Exception: What went wrong while looking.
        """
        self.stop()
        error, self._error = self._error or (self._updates.error if self._updates else None), None
        geometry = self._outputs.values()
        updates = {} if self._updates is None else self._updates.updates
        logits = {} if self._logits is None else self._logits.values()
        output = self._output.measurement()
        self._output.clear()
        if error is not None:
            raise error
        layers = [
            _layer(layer, geometry.get(layer.index), updates.get(layer.index), logits.get(layer.index))
            for layer in measurement
        ]
        return replace(measurement, layers=tuple(layers), output=output)

    def _hear(self, call: Call, make: Callable[[], Any]) -> Any:
        looks = torch.is_grad_enabled() and self._shows_more(call)
        if looks:
            try:
                self._look(call)
            except Exception as error:
                self._error = error
            self._unseen -= self._within[call.module]
        result = make()
        if looks and self._error is None:
            try:
                if self._sees_output:
                    self._output.note_batch(result, call.samples, call.places(_few(call)))
            except Exception as error:
                self._error = error
        return result

    def _shows_more(self, call: Call) -> bool:
        size = sum(tensor.numel() for tensor in call.tensors)
        known = self._sizes.get(call.module)
        if known is None:
            shows = bool(self._unseen & self._within[call.module])
        else:  # sizes differ between processes, and a pass through sharded weights needs all of them
            shows = size >= 2 * known and not self._sharded
        if shows:
            self._sizes[call.module] = size
        return shows

    @torch.no_grad()  # also to take the samples: activation checkpointing counts what is saved for a backward pass
    def _look(self, call: Call) -> None:
        """Run a few samples of a call aside, or all of them where the model does not take fewer."""
        few = call if not self._samples_first else call.shortened(_few(call))
        reads = self._sees_output and not self._sharded and call.module not in self._unread
        try:
            self._run(few, reads=reads)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if self._sharded:  # another process may not fail, and would wait for a pass of this one
                raise
            if reads:  # a head that cannot be recorded
                self._unread.add(call.module)
                self._look(call)
            elif few is not call:
                self._run(call, reads=False)
            else:
                raise

    def _run(self, call: Call, *, reads: bool) -> None:
        with evaluated(self._model, call.args, call.kwargs), ExitStack() as stack:
            for watch in (self._outputs, self._updates):
                if watch is not None:
                    watch.start()
                    stack.callback(watch.stop)
            if self._logits is not None:
                stack.enter_context(self._logits)
            readout = stack.enter_context(self._readout(call)) if reads else None
            result = call.module(*call.args, **call.kwargs)
            if self._sees_output:
                self._output.note_few(result, call.samples, readout, sharded=self._sharded)
                if self._output.kind != "sample":
                    self._unread.add(call.module)

    def _readout(self, call: Call) -> Readout:
        """Return what listens to the last block of a call, and stands in front of all that listens there."""
        last = max(self._within[call.module])
        return Readout(self._model, next(block for block in self._blocks if block.index == last))


def _few(call: Call) -> int:
    """Return how many samples of a call are looked at."""
    return min(_MOST, max(_FEWEST, (call.samples or 0) // 4))


def _is_sharded(model: nn.Module) -> bool:
    return any(map(is_wrapped_by_fsdp, model.modules())) or any(map(is_dtensor, model.parameters()))


def _layer(
    layer: LayerMeasurement, seen: Geometry | None, update: Update | None, logit: float | None
) -> LayerMeasurement:
    """Add what was seen of a block."""
    if seen is not None:
        layer = replace(
            layer,
            token_residual=seen.token_residual,
            typical_token_residual=seen.typical_token_residual,
            effective_rank=seen.effective_rank,
            sample_residual=seen.sample_residual,
            stream_rms=seen.rms if math.isfinite(seen.rms) else None,
            stream_finite=math.isfinite(seen.rms),
        )
    if update is None and logit is None:
        return layer
    update, norm = update or Update(), 0.0 if seen is None else seen.norm
    shares = (
        part / norm if part is not None and 0 < norm < math.inf else None
        for part in (update.mlp_norm, update.attention_norm)
    )
    functional = FunctionalMeasurement(
        update_ratio=update.ratio,
        update_cosine=update.cosine,
        mlp_share=next(shares),
        attention_share=next(shares),
        attention_logit=logit,
    )
    return replace(layer, functional=functional)


def _within(model: nn.Module, blocks: Iterable[ResidualBlock]) -> dict[nn.Module, frozenset[int]]:
    """Return the indices of the blocks that lie in a module, for every module that is one or is around some."""
    found: dict[nn.Module, set[int]] = {}
    for block in blocks:
        for name in block.modules:
            parts = name.split(".") if name else []
            for depth in range(len(parts) + 1):
                if (module := module_at(model, ".".join(parts[:depth]))) is not None:
                    found.setdefault(module, set()).add(block.index)
    return {module: frozenset(indices) for module, indices in found.items()}


def _update_watch(model: nn.Module, blocks: Sequence[ResidualBlock], calls: Sequence[Call]) -> UpdateWatch | None:
    """Return what listens to the branches; ``None`` where the blocks were given, and no input is known."""
    try:
        if not calls:
            return watch_updates(model, blocks, (), {})
        watches = [watch_updates(model, blocks, call.args, call.kwargs, through=call.module) for call in calls]
    except ExampleInputError:
        return None
    return UpdateWatch(model, blocks, {branch: c for watch in watches for branch, c in watch.behind.items()})
