"""Run the linear part of a branch forwards, and compare it with the products of the found factors.

The linear part follows the steps of a branch (``steps``):

    product       multiplies without its bias
    activation    passes its input on
    gate          passes on the half that it gates
    attention     passes the values on
    norm          multiplies by its gain

It maps one vector u, the same at every position, to Σᵢ cᵢ Mᵢ u, where the Mᵢ are the products of the found factors and
the cᵢ are numbers. If the factors miss a permutation, a gain or a term, the two sides differ (``coefficients``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_spectral.discovery.chains.recipes import attribute_path
from lightning_spectral.discovery.chains.steps import Step, Steps
from lightning_spectral.discovery.trace.hankel import multiplied
from lightning_spectral.discovery.trace.noise import is_mute, made_up
from lightning_spectral.discovery.trace.operands import UnmeasurableError
from lightning_spectral.discovery.trace.operations import (
    Divisor,
    base_name,
    is_attention,
    is_fused_attention,
    is_norm,
    matrix_operands,
    norm_channels_second,
    norm_gain,
)
from lightning_spectral.discovery.trace.replay import execute
from lightning_spectral.discovery.trace.tape import Operation
from lightning_spectral.records import Factor
from lightning_spectral.records.layout import arranged

__all__ = ["LinearPart"]


class LinearPart:
    """The linear part of one branch.

    Args:
        steps: The steps of the branch.
        mixes_tokens: Whether products of data with data are attention, which passes the values on. Else such products
            add up experts, each with the weight 1.
    """

    def __init__(self, steps: Steps, *, mixes_tokens: bool) -> None:
        self.steps, self.tape, self.region, self.mixes_tokens = steps, steps.tape, steps.region, mixes_tokens
        self._outside: dict[int, Tensor] = {}

    def run(self, target: int, sources: Mapping[int, Tensor]) -> Tensor:
        """Compute a value by the linear part.

        Args:
            target: The value to compute.
            sources: Content for the values to begin with. The stream is zero unless it is a source.

        Raises:
            UnmeasurableError: An operation on the way is no step of a linear map.
        """
        made = {value: self._laid_out(value, content) for value, content in sources.items()}
        # Values are numbered in the order of execution, so sorting them is a topological order.
        for value in sorted(self._needed(target, sources)):
            if value not in made:
                moves = self._moves(value, sources)
                content = self._carried(value, self.steps.step(value), made) if moves else self.tape.filled(value)
                made[value] = self._laid_out(value, content)
        return made[target]

    def end_channel(self, channel: int) -> int:
        """Return the dimension of the channels at the end of the branch.

        Args:
            channel: The dimension of the channels in the stream.
        """
        alike = len(self.tape.shape(self.region.leaf)) == len(self.tape.shape(self.region.stream))
        return channel if alike else -1

    def _laid_out(self, value: int, content: Tensor) -> Tensor:
        """Return content in the memory layout that a value was recorded in: views of it must stay possible."""
        like = self.tape.tensors[value]
        if content.stride() == like.stride():
            return content
        return torch.empty_like(like, dtype=content.dtype, device=content.device, requires_grad=False).copy_(content)

    def channels(
        self, source: tuple[int, int], target: tuple[int, ...], held: Sequence[int] = ()
    ) -> tuple[int, ...] | None:
        """Find the channel of one value that each channel of another value comes from.

        The source is run three times: with 1, with j + 1 and with √(j + 1) in channel j. If target channel i is g times
        source channel j, the quotients of the second and third run by the first are j + 1 and √(j + 1), whatever g is.
        A mixture of channels can hit an integer by chance, but not its root as well.

        Args:
            source: Value and channel dimension.
            target: Value and channel dimension (several dimensions together form the channels).
            held: Values on other ways to the target, which are held at zero.

        Returns:
            The source channel of each target channel, −1 where no channel feeds it; ``None`` where channels are mixed.
        """
        # A hundred experts are added up one after the other: from each sum on, the way is the same for all before it.
        while (further := self._further(source, target[0], held)) is not None:
            source = further
        return self._fed_by(source, target, held)

    def _further(self, source: tuple[int, int], end: int, held: Sequence[int]) -> tuple[int, int] | None:
        """Return a value that every way to the end leads through, and that has the same channels in the same order."""
        (value, dimension), tape = source, self.tape
        further = self.region.exit_of(value)
        if further is None or further in (end, *held) or not tape.depends(end, further):
            return None
        have, want = tape.shape(value), tape.shape(further)
        place = dimension % len(have)
        if place == len(have) - 1:  # tokens may be laid out anew, and channels stay the last
            place = len(want) - 1
        if place >= len(want) or have[dimension] != want[place]:
            return None
        in_order = self._fed_by(source, (further, place), held) == tuple(range(want[place]))
        return (further, place) if in_order else None

    def _fed_by(self, source: tuple[int, int], target: tuple[int, ...], held: Sequence[int]) -> tuple[int, ...] | None:
        local = self.region.local
        question = ("fed by", self.mixes_tokens, local(source[0]), source[1], local(target[0]), *target[1:])
        question = (*question, "held", *map(local, held))
        return self.steps.prober.once(self.region, question, lambda: self._channels(source, target, held))

    def _channels(
        self, source: tuple[int, int], target: tuple[int, ...], held: Sequence[int]
    ) -> tuple[int, ...] | None:
        value, dimension = source
        ones = self.tape.filled(value, 1.0)
        if ones.is_complex():
            raise UnmeasurableError("its matrices multiply complex numbers")
        count = ones.shape[dimension]
        numbers = torch.arange(1, count + 1, dtype=ones.dtype, device=ones.device)
        shape = [1] * ones.dim()
        shape[dimension] = count
        contents = (ones, ones * numbers.view(shape), ones * numbers.sqrt().view(shape))
        silent = {item: self.tape.filled(item) for item in held}
        plain, numbered, rooted = (self._columns({**silent, value: content}, target) for content in contents)
        # Rows are positions. A channel may be fed at some positions only (a shifted token), but always from one source.
        fed = plain != 0
        quotients = torch.where(fed, numbered / plain, 0.0)
        roots = torch.where(fed, rooted / plain, 0.0)
        found = quotients.amax(0)
        whole = found.round()
        alike = (quotients - whole).abs().where(fed, torch.zeros_like(quotients)).amax() <= 1e-6
        apart = (roots - whole.sqrt()).abs().where(fed, torch.zeros_like(roots)).amax() <= 1e-6
        unfed = bool((~fed).all(0).logical_or(whole >= 1).all())
        if not (bool(alike) and bool(apart) and unfed and float(whole.max()) <= count):
            return None
        return tuple(int(number) - 1 for number in whole.tolist())

    def gain_channels(self, anchor: int, gain: int, target: tuple[int, ...]) -> tuple[int, ...] | None:
        """Find the entry of a gain that multiplies each channel of a value, by numbering the entries of the gain.

        Args:
            anchor: The value at which the way to the target begins.
            gain: The value of the gain. A value on the way is multiplied or divided by it.
            target: Value and channel dimensions.

        Returns:
            The entry of each channel, −1 for no entry; ``None`` where several entries multiply one channel.
        """
        places = self._multiplied_by(anchor, target[0], gain)
        if len(places) != 1:
            return None
        local = self.region.local
        question = ("gained", self.mixes_tokens, local(places[0]), local(target[0]), *target[1:], self.tape.shape(gain))
        return self.steps.prober.once(self.region, question, lambda: self._gain_channels(places[0], gain, target))

    def _gain_channels(self, place: int, gain: int, target: tuple[int, ...]) -> tuple[int, ...] | None:
        like = self._fixed(gain)
        shape = self.tape.shape(place)
        numbers = (
            torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device).view(like.shape).expand(shape)
        )
        contents = (torch.ones_like(numbers), numbers)
        plain, numbered = (self._columns({place: content}, target) for content in contents)
        fed = plain != 0
        quotients = torch.where(fed, numbered / plain, 0.0)
        found = quotients.amax(0)
        whole = found.round()
        spread = (quotients - whole).abs().where(fed, torch.zeros_like(quotients)).amax()
        return None if float(spread) > 1e-6 else tuple(int(number) - 1 for number in whole.tolist())

    def _multiplied_by(self, anchor: int, target: int, gain: int) -> list[int]:
        """Return the values between an anchor and a target that a gain directly multiplies."""
        operations = ((value, self.tape.producer(value)) for value in sorted(self._needed(target, {anchor})))
        return [value for value, operation in operations if operation is not None and gain in operation.inputs]

    def product(self, factors: Sequence[Factor], u: Tensor) -> Tensor:
        """Multiply a vector by the product of a chain of factors. A norm multiplies by its gain.

        Args:
            factors: The chain, the factor nearest the site first.
            u: ``(width,)``.

        Raises:
            RuntimeError, IndexError, KeyError: The chain does not fit together, or a parameter is not on the tape.
        """
        for factor in reversed(factors):
            u = self._times(factor, u) if factor.parameter is not None else u * factor.constant
        return u

    def _times(self, factor: Factor, u: Tensor) -> Tensor:
        """Multiply a vector by one factor, with its adapters and its picked rows."""
        assert factor.parameter is not None
        content = arranged(self._fixed(self._values[factor.parameter]), factor.layout)
        rows = None if factor.rows is None else [row for run in factor.rows for row in run]
        if factor.role == "scale" or factor.role.endswith("_norm"):
            gain = content.flatten() if rows is None else content.flatten()[rows]
            return u * gain.repeat(len(u) // len(gain))
        result = multiplied(content, u)
        for chain in factor.adapters:
            result = result + self.product(chain, u)
        return result if rows is None else result[rows]

    def knows(self, factors: Iterable[Factor]) -> bool:
        """Whether all parameters of a chain took part in the pass. The parameters of an idle expert did not."""
        return all(
            item.parameter is None or item.parameter in self._values for factor in factors for item in factor.flat()
        )

    @cached_property
    def _values(self) -> dict[str, int]:
        """The values of parameters and of parametrized weights by attribute path."""
        return {attribute_path(name): value for value, name in self.tape.names.items()} | self.tape.attributes

    def _columns(self, sources: Mapping[int, Tensor], target: tuple[int, ...]) -> Tensor:
        """Return a value as ``(positions, channels)``; several dimensions of the target together form the channels."""
        value, *dimensions = target
        result = self.run(value, sources)
        width = math.prod(result.shape[dimension] for dimension in dimensions)
        return result.movedim(dimensions, tuple(range(-len(dimensions), 0))).reshape(-1, width)

    def _moves(self, value: int, sources: Iterable[int]) -> bool:
        """Whether a value depends on a source. A value that does not is zero, as the stream is."""
        return any(self.tape.depends(value, source) for source in sources)

    def _needed(self, target: int, sources: Collection[int]) -> set[int]:
        """Return the values on the linear ways to a target. The search stops at the sources, and where all is zero."""
        seen, queue = {target}, [target]
        while queue:
            value = queue.pop()
            if value in sources or not self._moves(value, sources):
                continue
            further = [item for item in self._carriers(value) if item not in seen]
            seen.update(further)
            queue += further
        return seen

    def _carriers(self, value: int) -> Iterable[int]:
        """Return the inputs that carry a value in the linear part: the sources of its step, without patterns."""
        step = self.steps.step(value)
        return (self.steps.carrier(value),) if step.kind == "mixing" else step.sources

    def _carried(self, value: int, step: Step, made: Mapping[int, Tensor]) -> Tensor:
        """Compute one value by its step.

        Args:
            value: The value.
            step: Its step.
            made: The content of the sources of the step.
        """
        shape = self.tape.shape(value)
        if step.kind in ("stream", "none"):
            return self.tape.filled(value)
        operation = self.tape.producer(value)
        assert operation is not None
        if step.kind == "activation":
            assert isinstance(step.multiplier, float)
            return made[step.sources[0]] * step.multiplier
        if step.kind == "gate":
            passed = made[step.sources[0]]
            if base_name(operation) == "glu":
                return passed.chunk(2, operation.args[1] if len(operation.args) > 1 else -1)[0]
            return passed.expand(shape)
        if step.kind == "mixing":
            carrier = self.steps.carrier(value)
            if not self.mixes_tokens and not is_attention(operation):
                return self._routed(operation, value, carrier, made[carrier])
            return _spread(made[carrier], _token_dim(operation, carrier), shape)
        if step.kind == "norm":
            return self._normed(operation, step, made[step.sources[0]])
        return self._executed(operation, value, made)

    def _routed(self, operation: Operation, value: int, carrier: int, content: Tensor) -> Tensor:
        """Multiply by the weights of a router, each of which counts as 1 where it is not zero.

        combine weights (tokens, experts) @ outputs (experts, channels) add up experts. Where an expert has places for a
        few tokens, dispatch weights (places, tokens) @ tokens fill them; each place has one token or none.
        """

        def fetch(item: int) -> Tensor:
            if item == carrier:
                return content
            used = self._fixed(item) != 0
            return (used if used.any() else ~used).to(content)

        found = execute(self.tape, operation, fetch)[operation.outputs.index(value)]
        assert found is not None
        return found

    def _executed(self, operation: Operation, value: int, made: Mapping[int, Tensor]) -> Tensor:
        """Run an operation f that is affine in its carried inputs X, without its constant part: f(X) − f(0)."""
        carried = {item: made[item] for item in operation.inputs if item in made}
        silent = {item: torch.zeros_like(content) for item, content in carried.items()}
        place = operation.outputs.index(value)

        def end(part: Mapping[int, Tensor]) -> Tensor:
            made = execute(self.tape, operation, lambda item: part[item] if item in part else self._fixed(item))[place]
            assert made is not None
            return made

        return end(carried) - end(silent)

    def _normed(self, operation: Operation, step: Step, content: Tensor) -> Tensor:
        """Multiply by the gain of a norm, and divide by the number that scaled the stream before the norm."""
        content = content / self._scalar_before(step.sources[0])
        if not is_norm(operation):
            assert isinstance(step.multiplier, float)
            return content * step.multiplier
        gain = norm_gain(operation)
        if gain is None:
            return content
        factor = self._fixed(gain)
        return content.mul(factor.view(-1, *[1] * (content.dim() - 2)) if norm_channels_second(operation) else factor)

    def _scalar_before(self, value: int) -> float:
        """Return the number that multiplies the stream on its way to a value, 1 where the way has other steps."""
        product = 1.0
        while True:
            step = self.steps.step(value)
            if step.kind == "stream":
                return product
            if step.kind not in ("move", "multiply"):
                return 1.0
            multiplier = self._number(step)
            if multiplier is None:
                return 1.0
            product, value = product * multiplier, step.sources[0]

    def _number(self, step: Step) -> float | None:
        """Return the multiplier of a step as a number, ``None`` for zero and for more than one entry."""
        if isinstance(step.multiplier, float):
            return step.multiplier
        divides = isinstance(step.multiplier, Divisor)
        content = self._fixed(step.multiplier.value if isinstance(step.multiplier, Divisor) else step.multiplier)
        if content.numel() != 1 or not float(content):
            return None
        return 1 / float(content) if divides else float(content)

    def _fixed(self, value: int) -> Tensor:
        """Return the content of a value outside the linear part, made of made-up weights where weights are mute."""
        if value not in self._outside:
            self._outside[value] = self._computed(value)
        return self._outside[value]

    def _computed(self, value: int) -> Tensor:
        """Return the content of a value, computed again from made-up weights if it is made of mute parameters."""
        tape = self.tape
        if tape.contents is not None or not tape.made_of_parameters(value):
            return tape.wide(value)
        # Only parameters are replaced. A weight that is made of them is made again, so that both sides of the
        # comparison use the same made-up numbers.
        if value in tape.names:
            weight = tape.wide(value)
            mute = weight.is_floating_point() and (is_mute(weight) or self.steps.prober.makes_mute(value))
            return made_up(weight) if mute else weight
        operation = tape.producer(value)
        assert operation is not None
        found = execute(tape, operation, self._fixed)[operation.outputs.index(value)]
        assert found is not None
        return found


def _token_dim(operation: Operation, carrier: int) -> int:
    """Return the dimension of the carrier that an attention product sums over."""
    if is_fused_attention(operation):
        return -2
    return -2 if carrier == matrix_operands(operation)[1] else -1


def _spread(content: Tensor, dimension: int, shape: Sequence[int]) -> Tensor:
    """Copy the content of the positions that are not zero, which is the same at all of them, to every position.

    An attention pattern with rows that add up to 1 makes the same of equal values.
    """
    count = (content != 0).sum(dimension, keepdim=True).clamp(min=1)
    one = content.sum(dimension, keepdim=True) / count
    for place, (have, want) in enumerate(zip(one.shape, shape, strict=True)):
        if have != want and have != 1:  # heads that several query heads read
            one = one.repeat_interleave(want // have, place)
    return one.expand(tuple(shape))
