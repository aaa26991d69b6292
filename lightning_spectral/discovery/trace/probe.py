"""Numerical questions to a recorded graph: does a branch mix tokens, is it affine here, which channel feeds which.

Every probe replays a slice of the tape in float64 on made-up content. So its answer is a property of the program, not
of the weights. Blocks that run the same program share their answers: a probe runs once per distinct program.

Made-up content can change a router's choice, and with it shapes further on. A replay that fails for that reason raises
one of four errors, which the probes answer with the safe answer (not affine, not elementwise, not the same).

Seeds differ from probe to probe, so that the noise of one probe never equals the content that another one held fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_spectral.discovery.trace.noise import is_mute, made_up, noise
from lightning_spectral.discovery.trace.operands import before_broadcast, norm_channel, normalized_operand
from lightning_spectral.discovery.trace.operations import (
    base_name,
    is_attention,
    is_convolution,
    is_multiplication,
    is_norm,
    is_product,
    is_softmax,
    matrix_operands,
    norm_gain,
    refs,
    weight_operand,
)
from lightning_spectral.discovery.trace.positions import moved_by_half, moved_by_one
from lightning_spectral.discovery.trace.programs import program_hash
from lightning_spectral.discovery.trace.replay import replay
from lightning_spectral.discovery.trace.tape import Operation, Tape

__all__ = ["Prober", "Region"]

_Answer = TypeVar("_Answer")
_TOLERANCE = 1e-8


class Region:
    """The part of a tape between the stream and the output of one branch: all values on ways from one to the other."""

    def __init__(self, tape: Tape, stream: int, leaf: int) -> None:
        """Collect the values between ``stream`` and ``leaf``."""
        self.tape = tape
        self.stream = stream
        self.leaf = leaf
        self.values = tape.between(stream, leaf)
        self._local = {value: position for position, value in enumerate(self.values)}

    def local(self, value: int) -> int:
        """Return the position of a value in the region, −1 for a value outside. Regions of one program agree on it."""
        return self._local.get(value, -1)

    @cached_property
    def program(self) -> int:
        """Hash of the program; equal for regions that compute the same function with other weights."""
        return program_hash(self.tape, self.values)

    def common_source(self, values: Iterable[int]) -> int:
        """Return the last value that every way from the stream to any of the values leads through.

        That is the lowest common ancestor in the tree of dominators::

            stream ── norm ─┬─ up ─── mul ── down          common_source(up, gate) = norm
                            └─ gate ──┘
        """
        found, *others = values
        for value in others:
            # A value has a higher number than its dominators. So the later one of two values is replaced by its
            # immediate dominator until both are the same.
            while found != value:
                found, value = (self._gateways[found], value) if found > value else (found, self._gateways[value])
        return found

    def gateways(self) -> list[int]:
        """Return the values that every way from the stream to the output leads through, both included, in order."""
        found = [self.leaf]
        while found[-1] != self.stream:
            found.append(self._gateways[found[-1]])
        return found[::-1]

    @cached_property
    def _gateways(self) -> dict[int, int]:
        """The immediate dominator of each value: the last value that every way from the stream to it leads through.

        Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm" (2001). One pass is enough, because values are
        in topological order and a tape has no loops.
        """
        self_map: dict[int, int] = {self.stream: self.stream}
        # `common_source` reads the map while it is being filled: a cached property must be in place before.
        self.__dict__["_gateways"] = self_map
        for value in self.values[1:]:
            operation = self.tape.producer(value)
            assert operation is not None
            parents = [parent for parent in operation.inputs if self.tape.depends(parent, self.stream)]
            self_map[value] = self.common_source(parents)
        return self_map

    def exit_of(self, value: int) -> int | None:
        """Return the first value behind another that every way to the output leads through.

        ``None`` for the output, and outside of the region.
        """
        return self._exits.get(value)

    @cached_property
    def _exits(self) -> dict[int, int]:
        """The immediate dominator of each value in the reversed graph, found as in ``_gateways``."""
        exits: dict[int, int] = {}
        for value in self.values[-2::-1]:
            readers = (self.tape.operations[reader] for reader in self.tape.readers[value])
            found, *others = sorted({item for reader in readers for item in reader.outputs if item in self._local})
            for other in others:
                while found != other:
                    found, other = sorted((exits[min(found, other)], max(found, other)))
            exits[value] = found
        return exits


class Prober:
    """Asks numerical questions about regions, and remembers each answer for all regions of the same program.

    A public question builds a key of local numbers and calls :meth:`once`; the private method of the same name
    computes the answer.
    """

    def __init__(self, tape: Tape) -> None:
        """Start without answers."""
        self.tape = tape
        self.told: dict[int, int] = {}  # channels of streams whose own branches do not know them
        self._answers: dict[Hashable, Any] = {}

    def once(self, region: Region, question: Hashable, ask: Callable[[], _Answer]) -> _Answer:
        """Return the answer to a question about a region. Each question is asked once per program.

        Args:
            region: The region.
            question: A key of the question. Values in it are local numbers, which all regions of a program share.
            ask: Computes the answer.
        """
        key = (region.program, question)
        if key not in self._answers:
            self._answers[key] = ask()
        answer: _Answer = self._answers[key]
        return answer

    def moved_positions(self, region: Region) -> int:
        """Return how many positions of the branch output move when other positions of the stream are perturbed.

        The first position is perturbed; if no other position moves, every second position is. The perturbation is
        random, because a LayerNorm hides a constant shift, and small, so that no router changes its choice.
        """
        return self._moved(region)[0]

    def mixed_dims(self, region: Region) -> tuple[int, ...]:
        """Return the dimensions of the stream along which a branch mixes positions: the dimensions of tokens.

        The stream and the end of the branch can have different shapes: a linear layer of (batch, tokens, channels)
        reads (batch · tokens, channels). The dimensions are those of the shape that keeps them apart.
        """
        return self._moved(region)[1]

    def _moved(self, region: Region) -> tuple[int, tuple[int, ...]]:
        question = ("moved", self.channel_dim(region))
        return self.once(region, question, lambda: self._moved_positions(region))

    def _moved_positions(self, region: Region) -> tuple[int, tuple[int, ...]]:
        # A branch whose last matrix is zero moves nothing. With made-up weights in place of zeros, it moves positions.
        try:
            return self._moved_with(region, self.made_up_weights(region))
        except (RuntimeError, IndexError):  # a router changed its choice, and shapes depend on the choice
            return self._moved_with(region, {})

    def _moved_with(self, region: Region, held: Mapping[int, Tensor]) -> tuple[int, tuple[int, ...]]:
        """Return how many other positions move, and along which dimensions, with some content held fixed."""
        held = {**self.finite_around(region), **held}
        channel = self.channel_dim(region)
        rows = self.finite(region.stream).movedim(channel, -1)
        shape = self.tape.shape(region.leaf)
        if rows.dim() == 2 < len(shape) and shape[-1] == rows.shape[-1] and math.prod(shape) == rows.numel():
            rows, channel = rows.view(shape), -1
        count, dims = moved_by_one(self._change(region, channel, held), rows)
        # The first position may be padding that no other position attends to. Or a sharp softmax lets every position
        # attend to itself alone: flat patterns undo that.
        for patterns in (self._flat_patterns(region), {}) if not count else ():
            try:
                count, dims = moved_by_half(self._change(region, channel, {**held, **patterns}), rows)
            except (RuntimeError, IndexError):  # a flat softmax can also be a router's, and break its choice
                continue
            if count or not patterns:
                break
        # The dimensions were counted with the channels last; the stream may have them elsewhere.
        places = [dim for dim in range(rows.dim()) if dim != channel % rows.dim()]
        return count, tuple(places[dim] for dim in dims)

    def _change(self, region: Region, channel: int, held: Mapping[int, Tensor]) -> Callable[[Tensor, float], Tensor]:
        """Return a function that perturbs the stream at some positions, and returns how far each position moves."""
        stream = self.finite(region.stream)
        rows = stream.movedim(channel, -1)
        sizes = noise(rows) * (float(rows.abs().mean()) or 1.0)

        def output(content: Tensor) -> Tensor:
            return replay(self.tape, {region.stream: content}, region.leaf, held=held).movedim(channel, -1)

        before = output(stream)

        def change(places: Tensor, size: float) -> Tensor:
            content = stream.clone()
            places = places.view(rows.shape[:-1])
            content.movedim(channel, -1)[places] += size * sizes[places]
            moved = (output(content) - before).abs().amax(-1)
            return torch.where(moved.isfinite(), moved, 0.0)  # a token that attends to nothing is NaN

        return change

    def _flat_patterns(self, region: Region) -> dict[int, Tensor]:
        """Return content that makes attention uniform: equal weights after a softmax, zero queries of a kernel."""
        content = {}
        for value in region.values[1:]:
            operation = self.tape.producer(value)
            if operation is None or not is_attention(operation):
                continue
            if is_softmax(operation):
                content[value] = self.tape.filled(value, 1 / self.tape.shape(value)[operation.args[1]])
            else:
                content |= {query: self.tape.filled(query) for query in refs(operation, 0)}
        return content

    def made_up_weights(self, region: Region) -> dict[int, Tensor]:
        """Return content for weights, gains and gates that hide the branch: zeros, or numbers that are not finite."""
        content: dict[int, Tensor] = {}
        if self.tape.contents is not None:
            return content  # every weight is made up already
        for value in region.values[1:]:
            operation = self.tape.producer(value)
            if operation is None or base_name(operation) in ("add", "sub"):
                continue  # a bias of zero hides nothing
            for item in matrix_operands(operation) if is_product(self.tape, operation) else operation.inputs:
                if self._is_mute_operand(operation, item) or self._is_gate_at_zero(region, operation, item):
                    content[item] = made_up(self.tape.tensors[item])
        return content

    def _is_mute_operand(self, operation: Operation, value: int) -> bool:
        """Whether a value is made of parameters and hides the branch."""
        like = self.tape.tensors[value]
        if not like.is_floating_point() or not self.tape.made_of_parameters(value):
            return False
        if is_norm(operation) and value != norm_gain(operation):
            return not bool(like.isfinite().all())  # a mean or a bias of zero hides nothing
        return is_mute(like)

    def makes_mute(self, parameter: int) -> bool:
        """Whether a gain that is made of this parameter alone hides what it multiplies, such as 1 + g for g = −1."""
        return parameter in self._makers

    @cached_property
    def _makers(self) -> set[int]:
        tape = self.tape
        values = (value for value in range(len(tape.tensors)) if tape.made_of_parameters(value))
        made = (value for value in values if value not in tape.names and tape.tensors[value].is_floating_point())
        gains = (value for value in made if sum(size > 1 for size in tape.shape(value)) < 2)
        parents = ((value, tape.parents_with_names(value)) for value in gains)
        return {names[0] for value, names in parents if len(names) == 1 and is_mute(tape.tensors[value])}

    def _is_gate_at_zero(self, region: Region, operation: Operation, value: int) -> bool:
        """Whether a value is a gate that is zero and does not come from the stream, such as adaLN-Zero's."""
        gate = is_multiplication(operation) and not self.tape.depends(value, region.stream)
        return gate and self.tape.is_data(value) and not bool(self.tape.tensors[value].any())

    def finite(self, value: int) -> Tensor:
        """Return the recorded content of a value, or noise if it contains NaN. A diverged run has the same program."""
        content = self.tape.wide(value)
        return noise(content, seed=13) if content.is_floating_point() and bool(content.isnan().any()) else content

    def finite_around(self, region: Region) -> dict[int, Tensor]:
        """Return noise for the values that a region reads from outside and that contain NaN."""
        producers = (self.tape.producer(value) for value in region.values[1:])
        read = {item for operation in producers if operation is not None for item in operation.inputs}
        outside = (item for item in read if region.local(item) < 0 and self.tape.tensors[item].is_floating_point())
        if self.tape.contents is not None:  # what is made of made-up weights is finite
            outside = (item for item in outside if self.tape.is_data(item))
        return {item: self.finite(item) for item in outside if bool(self.tape.content(item).isnan().any())}

    def channel_dim(self, region: Region) -> int:
        """Return the dimension of the channels of the stream: −1, or 1 for feature maps."""
        known = self.known_channel_dim(region)
        return self.told.get(region.stream, -1) if known is None else known

    def known_channel_dim(self, region: Region) -> int | None:
        """Return the dimension that the branch itself takes for channels; ``None`` where it does not show it.

        A product with a weight does not: it may multiply tokens.
        """
        return self.once(region, "channels", lambda: self._known_channel_dim(region))

    def _known_channel_dim(self, region: Region) -> int | None:
        """Ask what knows its channels up to the first products of the branch, in the order of execution."""
        shape = self.tape.shape(region.stream)
        if len(shape) < 3:
            return -1
        operations = {value: item for value in region.values[1:] if (item := self.tape.producer(value)) is not None}
        attends = any(map(is_attention, operations.values()))
        behind: set[int] = set()  # what a product has made has channels of the branch, not of the stream
        for value, operation in operations.items():
            if not behind.isdisjoint(operation.inputs):
                behind.add(value)
                continue
            read = _channels_read(self.tape, operation, attends)
            if read is not None and region.local(read[0]) >= 0:
                for dim in (1, -1):
                    # Two channels are asked, because one of them can have a gain of nearly zero.
                    if any(self._keeps_channel(region, dim, read, place) for place in {0, shape[dim] // 2}):
                        return dim
            if is_product(self.tape, operation):
                behind.add(value)
        return None

    def _keeps_channel(self, region: Region, dim: int, target: tuple[int, int], place: int) -> bool:
        """Whether entry ``place`` of a dimension of the stream reaches the same entry of a later value's dimension."""
        stream = noise(self.tape.tensors[region.stream], seed=14)
        other = stream.clone()
        other.select(dim, place).add_(1.0)
        value, channel = target
        try:
            ends = [replay(self.tape, {region.stream: part}, value) for part in (stream, other)]
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        change = (ends[1] - ends[0]).abs().movedim(channel, 0).flatten(1).sum(1)
        # A norm over channels spreads a change of one channel, but only thinly. So the changed channel must move more
        # than twice as far as any other, and not be the only one that moves.
        others = torch.cat([change[:place], change[place + 1 :]])
        return place < len(change) and len(others) > 0 and float(change[place]) > 2 * float(others.amax())

    def is_affine(self, region: Region, sources: Iterable[int], target: int) -> bool:
        """Whether ``target`` is an affine function of all the sources together.

        The midpoint test: f((a + b) / 2) = (f(a) + f(b)) / 2 for random a and b. An affine f passes for all a and b; a
        smooth function that is not affine fails with probability 1.
        """
        sources = sorted(sources)
        question = ("affine", *map(region.local, sources), region.local(target))
        return self.once(region, question, lambda: self._is_affine(sources, target))

    def _is_affine(self, sources: Iterable[int], target: int) -> bool:
        first = {value: noise(self.tape.tensors[value], seed=1) for value in sources}
        second = {value: noise(self.tape.tensors[value], seed=2) for value in sources}
        middle = {value: (first[value] + second[value]) / 2 for value in first}
        try:
            ends = [replay(self.tape, content, target) for content in (first, second, middle)]
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False  # shapes depend on the content: certainly not affine
        if not ends[0].is_floating_point():
            return False
        chord = (ends[0] + ends[1]) / 2
        return bool((ends[2] - chord).abs().max() <= _TOLERANCE * (chord.abs().max() + 1e-30))

    def is_bounded(self, region: Region, sources: Iterable[int], target: int) -> bool:
        """Whether a value stays the same while its sources grow from 1e3 to 1e6: a sigmoid or tanh, so a gate."""
        sources = sorted(sources)
        question = ("bounded", *map(region.local, sources), region.local(target))
        return self.once(region, question, lambda: self._is_bounded(sources, target))

    def _is_bounded(self, sources: Iterable[int], target: int) -> bool:
        contents = {value: 1e3 * noise(self.tape.tensors[value], seed=18) for value in sources}
        larger = {value: 1e3 * content for value, content in contents.items()}
        try:
            once, grown = (replay(self.tape, part, target).abs().max() for part in (contents, larger))
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        return bool((grown - once).abs() <= 1e-2 * grown)

    def is_elementwise(self, region: Region, source: int, target: int) -> bool:
        """Whether every entry of ``target`` is a function of the same entry of ``source``.

        About half of the entries of the source change. If the function is elementwise, the target is bitwise the same
        at all other entries.
        """
        question = ("elementwise", region.local(source), region.local(target))
        return self.once(region, question, lambda: self._is_elementwise(source, target))

    def _is_elementwise(self, source: int, target: int) -> bool:
        if self.tape.shape(source) != self.tape.shape(target):
            return False
        content = noise(self.tape.tensors[source], seed=5)
        coin = torch.rand(content.shape, generator=torch.Generator().manual_seed(6), device="cpu") < 0.5
        stays = coin.to(content.device)
        other = torch.where(stays, content, noise(content, seed=7))
        try:
            one, two = (replay(self.tape, {source: part}, target) for part in (content, other))
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        return one.is_floating_point() and torch.equal(one[stays], two[stays])

    def size_of_norm(self, region: Region, source: int, target: int) -> float | None:
        """Return the root mean square of the output of a norm, ``None`` where it depends on the input.

        RMSNorm and LayerNorm return 1; a norm that divides by the length returns 1/√d.
        """
        question = ("size", region.local(source), region.local(target))
        return self.once(region, question, lambda: self._size_of_norm(source, target))

    def _size_of_norm(self, source: int, target: int) -> float | None:
        sizes = []
        for seed in (16, 17):
            content = 1e3 * noise(self.tape.tensors[source], seed=seed)  # large beside the norm's epsilon
            try:
                sizes.append(float(replay(self.tape, {source: content}, target).square().mean().sqrt()))
            except (RuntimeError, IndexError, ValueError, TypeError):
                return None
        alike = abs(sizes[0] - sizes[1]) <= 1e-6 * sizes[0] and sizes[0] > 0
        return (1.0 if abs(sizes[0] - 1) < 1e-6 else sizes[0]) if alike else None

    def slope(self, region: Region, source: int, target: int) -> float:
        """Return the slope of an elementwise function f far from zero, 1 where f is not a straight line there.

        For t = ±1e6 the difference quotient (f(2t) − f(t)) / t is the slope, in which a wave such as sin²t is no more
        than rounding. f counts as a straight line through zero on that side if the slope is the same at all entries
        and |f(2t) − 2f(t)| ≤ 10. Of both sides the steeper one counts: GELU, SiLU and ReLU have slope 0 on the left
        and 1 on the right.
        """
        return self.once(
            region, ("slope", region.local(source), region.local(target)), lambda: self._slope(source, target)
        )

    def _slope(self, source: int, target: int) -> float:
        found = []
        for far in (-1e6, 1e6):
            content = torch.full_like(noise(self.tape.tensors[source]), far)
            once, twice = (replay(self.tape, {source: c * content}, target) for c in (1, 2))
            slopes = (twice - once) / far
            straight = bool((twice - 2 * once).abs().max() <= 10)
            if straight and bool((slopes - slopes.flatten()[0]).abs().max() <= 1e-6):
                found.append(float(slopes.flatten()[0]))
        slope = max(found, key=abs, default=0.0)
        return slope if abs(slope) > 2e-6 and abs(slope - 1) > 2e-6 else 1.0

    def same_rows(self, region: Region, source: int, first: tuple[int, int], second: tuple[int, int]) -> bool:
        """Whether two values hold the same channels at the same positions, once each is written as rows of channels.

        Args:
            region: The branch.
            source: A value from which both were made by data movement.
            first: A value and its channel dimension.
            second: Another value and its channel dimension.
        """
        question = ("same", region.local(source), region.local(first[0]), first[1], region.local(second[0]), second[1])
        return self.once(region, question, lambda: self._same_rows(source, first, second))

    def _same_rows(self, source: int, first: tuple[int, int], second: tuple[int, int]) -> bool:
        content = {source: noise(self.tape.tensors[source], seed=10)}
        try:
            one, other = (self._columns(content, target, {}) for target in (first, second))
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        return torch.equal(one, other)

    def keeps_positions(self, region: Region, source: tuple[int, int], target: tuple[int, int]) -> bool:
        """Whether each position of the source reaches the same position of the target, and no other.

        The target is f(X) = L(X) + c with a linear L and rows X, one row per position. Multiply each row by a random
        sign, S = diag(±1). If L acts row by row, f(SX) − f(0) = S(f(X) − f(0)); if L mixes rows, the equation fails
        for random S.

        Args:
            region: The branch.
            source: A value and its channel dimension.
            target: A value that is affine in the source, and its channel dimension.
        """
        question = ("positions", region.local(source[0]), source[1], region.local(target[0]), target[1])
        return self.once(region, question, lambda: self._keeps_positions(region, source, target))

    def _keeps_positions(self, region: Region, source: tuple[int, int], target: tuple[int, int]) -> bool:
        value, dimension = source
        held = self.made_up_weights(region)
        rows = noise(self.tape.tensors[value], seed=11).movedim(dimension, -1)
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

    def _columns(self, sources: Mapping[int, Tensor], target: tuple[int, ...], held: Mapping[int, Tensor]) -> Tensor:
        """Return a value as ``(positions, channels)``; several dimensions of the target together form the channels."""
        value, *dimensions = target
        result = replay(self.tape, sources, value, held=held)
        channels = math.prod(result.shape[dimension] for dimension in dimensions)
        return result.movedim(dimensions, tuple(range(-len(dimensions), 0))).reshape(-1, channels)


def _channels_read(tape: Tape, operation: Operation, attends: bool) -> tuple[int, int] | None:
    """Return the value whose channels an operation knows, and their dimension; ``None`` where it does not know them.

    Args:
        tape: The recorded forward pass.
        operation: A convolution or a norm, which know their channels, or a product with a weight. A product knows them
            in attention only: elsewhere it may multiply tokens, as in MLP-Mixer.
        attends: Whether the operation belongs to attention.
    """
    if is_convolution(operation):
        return operation.inputs[0], 1
    normalized = operation.inputs[0] if is_norm(operation) else normalized_operand(tape, operation)
    if normalized is not None:
        channel = norm_channel(tape, operation)
        # A norm over more dimensions than one does not know which of them are channels.
        return (normalized, channel) if _is_over_one(tape, operation, normalized, channel) else None
    weight = weight_operand(tape, operation) if attends and is_product(tape, operation) else None
    if weight is None:
        return None
    left, right = matrix_operands(operation)
    return (left, -1) if weight == right else (right, -1 if base_name(operation) == "linear" else -2)


def _is_over_one(tape: Tape, operation: Operation, normalized: int, channel: int) -> bool:
    """Whether a norm has its gain, or one that is written out its statistic, along one dimension only."""
    if is_norm(operation):
        return channel == 1 or len(operation.args[1]) == 1
    data = (before_broadcast(tape, value) for value in operation.inputs if tape.is_data(value))
    statistic = min(tape.tensors[value].numel() for value in data)
    return statistic * tape.shape(normalized)[channel] == tape.tensors[normalized].numel()
