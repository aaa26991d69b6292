"""Numerical questions to a recorded graph: does a branch mix tokens, is it affine here, which channel feeds which.

Every probe replays a slice of the tape in float64 on made-up content, so that its answer is a property of the program
and not of the weights. Blocks that run the same program share their answers: a probe runs once per distinct program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_spectral.discovery.operations import base_name, is_product, matrix_operands
from lightning_spectral.discovery.replay import replay
from lightning_spectral.discovery.tape import Tape, probe_device, probe_dtype

__all__ = ["Prober", "Region"]

_Answer = TypeVar("_Answer")
_TOLERANCE = 1e-8


class Region:
    """The part of a tape between the stream and the output of one branch."""

    def __init__(self, tape: Tape, stream: int, leaf: int) -> None:
        """Collect the values between ``stream`` and ``leaf``."""
        self.tape = tape
        self.stream = stream
        self.leaf = leaf
        self.values = tape.between(stream, leaf)
        self._local = {value: position for position, value in enumerate(self.values)}

    def local(self, value: int) -> int:
        """Return the position of a value in the region, which is the same in every region of one program."""
        return self._local.get(value, -1)

    @cached_property
    def program(self) -> int:
        """Hash of the operations, their wiring and shapes: equal for blocks that run the same program."""
        tape, lines = self.tape, []
        for value in self.values[1:]:
            operation = tape.producer(value)
            assert operation is not None
            inputs = tuple(
                (self._local[parent], ()) if parent in self._local else (-1, tape.shape(parent))
                for parent in operation.inputs
            )
            numbers = tuple(item for item in operation.args if isinstance(item, int | float | bool))
            lines.append((operation.name, inputs, tape.shape(value), numbers))
        return hash(tuple(lines))


class Prober:
    """Asks the questions and remembers the answers per program."""

    def __init__(self, tape: Tape) -> None:
        """Start without answers."""
        self.tape = tape
        self._answers: dict[Hashable, Any] = {}

    def once(self, region: Region, question: Hashable, ask: Callable[[], _Answer]) -> _Answer:
        """Return the answer to a question about a region, asking only once per program."""
        key = (region.program, question)
        if key not in self._answers:
            self._answers[key] = ask()
        answer: _Answer = self._answers[key]
        return answer

    def moved_positions(self, region: Region) -> int:
        """Return how many other positions of the branch output move when one position of the stream is perturbed.

        A random direction is used, because a constant shift is invisible behind a LayerNorm; it is small, so that no
        router changes its choice.
        """
        return self._moved(region)[0]

    def mixed_dims(self, region: Region) -> tuple[int, ...]:
        """Return the dimensions of the stream along which a branch mixes positions: where its tokens stand."""
        return self._moved(region)[1]

    def _moved(self, region: Region) -> tuple[int, tuple[int, ...]]:
        return self.once(region, "moved", lambda: self._moved_positions(region))

    def _moved_positions(self, region: Region) -> tuple[int, tuple[int, ...]]:
        # A branch that starts at zero moves nothing; with made-up weights in place of zeros it shows what it is.
        try:
            return self._moved_with(region, self.made_up_weights(region))
        except (RuntimeError, IndexError):  # a router chose otherwise, and shapes depend on its choice
            return self._moved_with(region, {})

    def _moved_with(self, region: Region, held: Mapping[int, Tensor]) -> tuple[int, tuple[int, ...]]:
        stream = self.tape.wide(region.stream).clone()
        channel = self._channel_dim(region)
        before = replay(self.tape, {region.stream: stream}, region.leaf, held=held)
        rows = stream.movedim(channel, -1)
        index = (0,) * (rows.dim() - 1)
        scale = float(rows.abs().mean()) or 1.0
        rows[index] += 1e-3 * scale * _noise(rows[index])
        after = replay(self.tape, {region.stream: stream}, region.leaf, held=held)
        change = (after - before).movedim(channel, -1).abs().amax(-1)
        largest = float(change.max())
        if not 0 < largest < math.inf:
            return 0, ()
        moved = change > 1e-9 * largest
        places = [dim for dim in range(after.dim()) if dim != channel % after.dim()]
        dims = tuple(place for place, found in zip(places, moved.nonzero().amax(0).tolist(), strict=True) if found)
        return int(moved.sum()) - 1, dims

    def made_up_weights(self, region: Region) -> dict[int, Tensor]:
        """Return content for the weights and gains of a region that are zero: matrices of noise, gains around 1."""
        content = {}
        for value in region.values[1:]:
            operation = self.tape.producer(value)
            if operation is None or base_name(operation) in ("add", "sub"):
                continue
            for item in matrix_operands(operation) if is_product(self.tape, operation) else operation.inputs:
                like = self.tape.tensors[item]
                if self.tape.made_of_parameters(item) and like.is_floating_point() and not bool(like.any()):
                    noise = _noise(like, seed=8)
                    matrix = sum(size > 1 for size in like.shape) > 1
                    content[item] = noise / math.sqrt(max(like.shape[-2:])) if matrix else 1 + 0.1 * noise
        return content

    def _channel_dim(self, region: Region) -> int:
        # Feature maps of convolutions are (batch, channels, height, width); everything else keeps channels last.
        operations = [self.tape.producer(value) for value in region.values[1:]]
        convolved = any(operation is not None and "convolution" in operation.name for operation in operations)
        return 1 if convolved and len(self.tape.shape(region.stream)) == 4 else -1

    def is_affine(self, region: Region, sources: Iterable[int], target: int) -> bool:
        """Whether ``target`` is an affine function of all the sources together (midpoint test)."""
        sources = sorted(sources)
        question = ("affine", *map(region.local, sources), region.local(target))
        return self.once(region, question, lambda: self._is_affine(sources, target))

    def _is_affine(self, sources: Iterable[int], target: int) -> bool:
        first = {value: _noise(self.tape.tensors[value], seed=1) for value in sources}
        second = {value: _noise(self.tape.tensors[value], seed=2) for value in sources}
        middle = {value: (first[value] + second[value]) / 2 for value in first}
        try:
            ends = [replay(self.tape, content, target) for content in (first, second, middle)]
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False  # content-dependent shapes: certainly not affine
        if not ends[0].is_floating_point():
            return False
        chord = (ends[0] + ends[1]) / 2
        return bool((ends[2] - chord).abs().max() <= _TOLERANCE * (chord.abs().max() + 1e-30))

    def same_support(self, region: Region, source: int, first: int, second: int) -> bool:
        """Whether two values of one shape depend, entry by entry, on the same channels of their common source."""
        question = ("support", region.local(source), region.local(first), region.local(second))
        return self.once(region, question, lambda: self._same_support(source, first, second))

    def _same_support(self, source: int, first: int, second: int) -> bool:
        content = _noise(self.tape.tensors[source], seed=5)
        coin = torch.rand(content.shape[-1], generator=torch.Generator().manual_seed(6), device="cpu") < 0.5
        other = torch.where(coin.to(content.device), content, _noise(content, seed=7))
        try:
            moved = [
                replay(self.tape, {source: content}, value) != replay(self.tape, {source: other}, value)
                for value in (first, second)
            ]
        except (RuntimeError, IndexError, ValueError, TypeError):
            return True
        return moved[0].shape == moved[1].shape and float((moved[0] ^ moved[1]).double().mean()) < 0.1

    def same_rows(self, region: Region, source: int, first: tuple[int, int], second: tuple[int, int]) -> bool:
        """Whether two values, each given with its channel dimension, hold the same channels at the same positions.

        Args:
            region: The branch.
            source: What both were made of by data movement.
            first: A value and its channel dimension.
            second: Another one.
        """
        question = ("same", region.local(source), region.local(first[0]), first[1], region.local(second[0]), second[1])
        return self.once(region, question, lambda: self._same_rows(source, first, second))

    def _same_rows(self, source: int, first: tuple[int, int], second: tuple[int, int]) -> bool:
        content = {source: _noise(self.tape.tensors[source], seed=10)}
        try:
            one, other = (self._columns(content, target, {}) for target in (first, second))
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        return torch.equal(one, other)

    def keeps_positions(self, region: Region, source: tuple[int, int], target: tuple[int, int]) -> bool:
        """Whether what a value holds at a position reaches another value there, and nowhere else.

        Args:
            region: The branch.
            source: A value and its channel dimension.
            target: A value that is affine in it, and its channel dimension.
        """
        question = ("positions", region.local(source[0]), source[1], region.local(target[0]), target[1])
        return self.once(region, question, lambda: self._keeps_positions(region, source, target))

    def _keeps_positions(self, region: Region, source: tuple[int, int], target: tuple[int, int]) -> bool:
        value, dimension = source
        held = self.made_up_weights(region)
        rows = _noise(self.tape.tensors[value], seed=11).movedim(dimension, -1)
        coin = torch.rand(rows.shape[:-1], generator=torch.Generator().manual_seed(12), device="cpu")
        signs = coin.to(rows.device).round() * 2 - 1
        contents = (torch.zeros_like(rows), rows, rows * signs.unsqueeze(-1))
        try:
            silent, once, signed = (
                self._columns({value: content.movedim(-1, dimension)}, target, held) for content in contents
            )
            error = (signed - silent) - (once - silent) * signs.reshape(-1, 1)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        return bool(error.abs().max() <= _TOLERANCE * (once - silent).abs().max())

    def channel_map(
        self, region: Region, source: tuple[int, int], target: tuple[int, ...], frozen: Iterable[int] = ()
    ) -> tuple[int, ...] | None:
        """Find which channel of ``source`` feeds each channel of ``target``.

        The sign of every channel whose number has bit b set is flipped, for b = 0, 1, …; a channel of the target that
        follows has bit b in the number of its source. Flipping signs leaves every root-mean-square norm on the way
        alone, and the elementwise activations of an MLP show it as well.

        Args:
            region: The branch.
            source: Value and channel dimension.
            target: Value and channel dimension (several dimensions together form the channels).
            frozen: Values that are held fixed (the other operand of a gate, queries and keys).

        Returns:
            For each target channel the number of its source channel; ``None`` where channels are mixed on the way.
        """
        frozen = sorted(frozen)
        question = ("channels", region.local(source[0]), region.local(target[0]), target[1:])
        return self.once(region, question, lambda: self._channel_map(region, source, target, frozen))

    def _channel_map(
        self, region: Region, source: tuple[int, int], target: tuple[int, ...], frozen: Iterable[int]
    ) -> tuple[int, ...] | None:
        value, dimension = source
        # Gates and patterns are held at noise, gains away from zero: what was recorded may be zero.
        held = self.made_up_weights(region) | {item: self._noise_like(item) for item in frozen}
        content = _noise(self.tape.tensors[value], seed=3)
        count = content.shape[dimension]
        numbers = torch.arange(count, device=content.device)

        def follows(flipped: Tensor) -> Tensor:
            shape = [1] * content.dim()
            shape[dimension] = count
            signs = (1 - 2 * flipped.to(content.dtype)).view(shape)
            result = self._columns({value: content * signs}, target, held) - silent
            return (result * reference).sum(0) < 0.5 * (reference * reference).sum(0)

        try:
            silent = self._columns({value: torch.zeros_like(content)}, target, held)  # biases alone
            reference = self._columns({value: content}, target, held) - silent
            if not bool(follows(torch.ones_like(numbers, dtype=torch.bool)).all()):
                return None
            found = torch.zeros(reference.shape[1], dtype=torch.long, device=content.device)
            for bit in range(max(1, (count - 1).bit_length())):
                found |= follows((numbers >> bit) & 1 == 1).long() << bit
            if int(found.max()) >= count:
                return None
            coin = torch.rand(count, generator=torch.Generator().manual_seed(4), device="cpu").to(content.device) < 0.5
            if not torch.equal(follows(coin), coin[found]):
                return None
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None
        return tuple(found.tolist())

    def _columns(self, sources: Mapping[int, Tensor], target: tuple[int, ...], held: Mapping[int, Tensor]) -> Tensor:
        value, *dimensions = target
        result = replay(self.tape, sources, value, held=held)
        channels = math.prod(result.shape[dimension] for dimension in dimensions)
        return result.movedim(dimensions, tuple(range(-len(dimensions), 0))).reshape(-1, channels)

    def _noise_like(self, value: int) -> Tensor:
        recorded = self.tape.wide(value)
        if not recorded.is_floating_point() or not self.tape.is_data(value):
            return recorded
        return 1 + _noise(recorded, seed=9)


def _noise(like: Tensor, seed: int = 0) -> Tensor:
    """Return normal noise with the shape and the strides of a tensor: views of it must stay possible."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    device = probe_device(like.device)
    return torch.empty_like(like, dtype=probe_dtype(like), device=device, requires_grad=False).copy_(noise)
