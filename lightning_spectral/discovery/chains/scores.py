"""Read off a recorded pass how the logits of attention are made: the rows of W_q and W_k of every head.

The way from a product with a weight to the operand of ⟨q, k⟩ is a program of views, rotations, norms and multipliers.
It is not read but run, on made-up content X of the product that is the same at all tokens::

    |f(X)|² = c² · (sum of X² over d successive channels), for every X      a head of the matrix, turned or not
    f(X) = c · (d successive channels), for every X                         not turned
    f(2X) = f(X)                                                            a norm behind the matrix (QK-norm)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_spectral.discovery.chains.factors import Chain, chains_of
from lightning_spectral.discovery.chains.linear import LinearPart
from lightning_spectral.discovery.chains.multipliers import multiplier_factors
from lightning_spectral.discovery.chains.products import weight_product
from lightning_spectral.discovery.trace.operands import UnmeasurableError
from lightning_spectral.discovery.trace.operations import (
    Divisor,
    is_attention,
    is_contraction,
    is_fused_attention,
    is_norm,
    is_product,
    matrix_operands,
    multiplied_input,
    norm_gain,
    refs,
)
from lightning_spectral.discovery.trace.probe import Prober
from lightning_spectral.discovery.trace.replay import replay
from lightning_spectral.discovery.trace.surprises import SURPRISES
from lightning_spectral.discovery.trace.tape import Operation, Tape
from lightning_spectral.records import Projection, Scores

__all__ = ["scores_of"]

_TOLERANCE = 1e-6
_LARGE = 1e3  # X is so large that what a norm adds to a variance does not matter


_NOTHING: Mapping[int, Tensor] = MappingProxyType({})
_Run = Callable[[Tensor, Mapping[int, Tensor]], Tensor]


class _Heads(NamedTuple):
    """What one side of ⟨q, k⟩ is.

    Attributes:
        projection: How it is made of the stream.
        starts: The first row of every head, over batch and heads.
        factor: The number c that multiplies the rows.
        turned: Whether more than a pick of channels lies between the matrix and the product.
    """

    projection: Projection
    starts: list[int]
    factor: float
    turned: bool


def scores_of(linear: LinearPart, prober: Prober, modules: Mapping[str, nn.Module]) -> tuple[Scores, ...]:
    """Return how the logits of every attention product of a branch are made; none where one of them is not understood.

    Args:
        linear: The linear part of the branch.
        prober: Answers numerical questions.
        modules: The modules of the model by path: they tell buffers from parameters.
    """
    tape = linear.tape
    producers = {tape.producers[value]: tape.producer(value) for value in linear.region.values[1:]}
    attention = [operation for operation in producers.values() if operation is not None and is_attention(operation)]
    try:
        return tuple(_scores(linear, prober, modules, operation) for operation in attention)
    except (UnmeasurableError, *SURPRISES):
        return ()


def _scores(linear: LinearPart, prober: Prober, modules: Mapping[str, nn.Module], attention: Operation) -> Scores:
    query, key, scale, across = _operands(linear.tape, attention)
    width = linear.tape.shape(query)[-1]
    q = _heads(linear, prober, modules, query, across=False)
    k = _heads(linear, prober, modules, key, across=across)
    if is_fused_attention(attention):
        heads, groups = linear.tape.shape(query)[-3], linear.tape.shape(key)[-3]
        k = k._replace(starts=[start for start in k.starts for _ in range(heads // groups)])
    if len(q.starts) != len(k.starts):
        raise UnmeasurableError("queries and keys have different numbers of heads")
    pairs = tuple(dict.fromkeys(zip(q.starts, k.starts, strict=True)))
    return Scores(q.projection, k.projection, pairs, width, scale * q.factor * k.factor, q.turned or k.turned)


def _operands(tape: Tape, attention: Operation) -> tuple[int, int, float, bool]:
    """Return queries, keys, the number that multiplies their products, and whether the keys are columns."""
    if is_fused_attention(attention):
        (query,), (key,) = refs(attention, 0), refs(attention, 1)
        names = [argument.name for argument in attention.function._schema.arguments]  # type: ignore[union-attr]
        scale = {**dict(zip(names, attention.args, strict=False)), **attention.kwargs}.get("scale")
        return query, key, 1 / math.sqrt(tape.shape(query)[-1]) if scale is None else float(scale), False
    logits = attention.inputs[0]
    (product,) = _sources(tape, logits, contractions=True)
    operation = tape.producer(product)
    assert operation is not None
    query, key = matrix_operands(operation)
    return query, key, _factor_between(tape, product, logits), True


def _factor_between(tape: Tape, product: int, logits: int) -> float:
    """Return the number by which the logits grow with ⟨q, k⟩. Masks and position codes are added."""
    operation = tape.producer(product)
    assert operation is not None
    zero = tape.filled(product)
    one, two, none = (replay(tape, {product: zero + number}, logits) for number in (1.0, 2.0, 0.0))
    slopes = torch.stack([one - none, (two - none) / 2])
    slopes = slopes[:, (slopes.isfinite() & (slopes != 0)).all(0)]  # not where a mask hides them
    if not slopes.numel() or float(slopes.max() - slopes.min()) > _TOLERANCE * float(slopes.abs().max()):
        raise UnmeasurableError("the logits are no multiple of the products of queries and keys")
    return float(slopes.flatten()[0]) * float(operation.kwargs.get("alpha", 1))


def _sources(tape: Tape, value: int, *, contractions: bool) -> set[int]:
    """Return the products that a value is made of: with weights, or of queries and keys. The search stops at them."""
    found, seen, queue = set[int](), {value}, [value]
    while queue:
        item = queue.pop()
        operation = tape.producer(item)
        if operation is None or not tape.is_data(item):
            continue
        if is_contraction(operation) and is_product(tape, operation) is not contractions:
            found.add(item)
            continue
        if is_contraction(operation):
            raise UnmeasurableError("another product lies in between")
        queue += [parent for parent in operation.inputs if parent not in seen]
        seen.update(operation.inputs)
    return found


def _heads(
    linear: LinearPart, prober: Prober, modules: Mapping[str, nn.Module], target: int, *, across: bool
) -> _Heads:
    """Return what one side of ⟨q, k⟩ is made of.

    Args:
        linear: The linear part of the branch.
        prober: Answers numerical questions.
        modules: The modules of the model by path.
        target: The operand, ``(…, tokens, width)``.
        across: Whether it is ``(…, width, tokens)``.

    Raises:
        UnmeasurableError: It is not made of one matrix, or not head by head.
    """
    tape = linear.tape
    (product,) = _sources(tape, target, contractions=False)
    operation = tape.producer(product)
    assert operation is not None
    read = weight_product(tape, operation)
    question = ("heads", linear.region.local(product), linear.region.local(target), across)
    size, starts, factor, turned = prober.once(
        linear.region, question, lambda: _measured(tape, modules, product, target, read.channel, across=across)
    )
    if size is not None:  # a norm stands behind the matrix
        gains = list(dict.fromkeys(_gains(tape, modules, product, target)))
        factors = tuple(multiplier_factors(tape, gains, by_head=True))
        return _Heads(Projection(factors, size), starts, factor, turned)
    (chain,) = chains_of(linear, prober, product, read.channel)
    return _Heads(Projection(_in_front(chain)), starts, factor, turned)


def _measured(
    tape: Tape, modules: Mapping[str, nn.Module], product: int, target: int, channel: int, *, across: bool
) -> tuple[float | None, list[int], float, bool]:
    """Return the size that a norm gives to a head, ``None`` without a norm, and ``starts``, ``factor`` and ``turned``.

    Raises:
        UnmeasurableError: The operand is not made head by head.
    """
    like = tape.filled(product)
    channels, count = like.shape[channel], like.dim()
    shape = [channels if place == channel % count else 1 for place in range(count)]

    def run(row: Tensor, more: Mapping[int, Tensor] = _NOTHING) -> Tensor:
        content = row.view(shape).expand(like.shape).contiguous()
        result = replay(tape, {product: content, **more}, target)
        result = result.mT if across else result
        return result.reshape(-1, *result.shape[-2:])

    generator = torch.Generator().manual_seed(0)
    noise = _LARGE * torch.randn(3, channels, generator=generator, dtype=torch.float64, device=generator.device).to(
        like
    )
    nothing = run(noise[0] * 0)
    once, twice = run(noise[0]) - nothing, run(2 * noise[0]) - nothing
    if _close(once, twice, _TOLERANCE):
        gains = dict.fromkeys(_gains(tape, modules, product, target))
        return _normed(tape, list(gains), run, noise)
    rows = torch.arange(1, channels + 1, dtype=torch.float64, device=like.device)
    width = once.shape[-1]
    sizes = [(run(row) - nothing).square().sum(-1) for row in (rows**0, rows.sqrt(), noise[1])]
    square = float(sizes[0].flatten()[0]) / width
    starts = ((sizes[1] / square - width * (width + 1) / 2) / width).round()
    places = starts[:, 0].long().tolist()
    if min(places) < 0 or max(places) + width > channels:
        raise UnmeasurableError("a head is not made of successive rows")
    picked = torch.stack([noise[1][start : start + width] for start in places])
    if not _close(sizes[2], square * picked.square().sum(-1, keepdim=True).expand_as(sizes[2]), _TOLERANCE):
        raise UnmeasurableError("a head is not made of successive rows, or what is behind them changes its norm")
    number = math.sqrt(square)
    picked = torch.stack([noise[0][start : start + width] for start in places])
    turned = not _close(once, number * picked.unsqueeze(1).expand_as(once), _TOLERANCE)
    return None, places, number, turned


def _normed(tape: Tape, gains: list[int], run: _Run, noise: Tensor) -> tuple[float, list[int], float, bool]:
    """Return what :func:`_measured` does where a norm stands behind the matrix: a size that no matrix changes."""
    if len(gains) > 1:
        raise UnmeasurableError("several gains stand behind the matrix")
    ones = {gain: tape.filled(gain, 1.0) for gain in gains}
    nothing = run(noise[0] * 0, ones)
    made = torch.stack([run(row, ones) - nothing for row in noise])
    sizes = made.square().sum(-1)  # (contents, heads, tokens)
    if not _close(sizes, sizes.amax().expand_as(sizes), _TOLERANCE):  # one norm over all heads: one may have all of it
        sizes = sizes.mean(1) * (noise.shape[1] // made.shape[-1])
        if not _close(sizes, sizes.amax().expand_as(sizes), _TOLERANCE):
            raise UnmeasurableError("the norm behind the matrix is not understood")
    return math.sqrt(float(sizes.max())), [0] * made.shape[1], 1.0, True


def _gains(tape: Tape, modules: Mapping[str, nn.Module], product: int, target: int) -> Iterator[int]:
    """Yield the values made of parameters that multiply what lies between a product and a target."""
    for value in tape.between(product, target)[1:]:
        operation = tape.producer(value)
        assert operation is not None
        if is_norm(operation):
            gain = norm_gain(operation)
            if gain is not None:
                yield gain
            continue
        multiplied = multiplied_input(tape, operation)
        if multiplied is None or isinstance(multiplied[1], float):
            continue
        multiplier = multiplied[1].value if isinstance(multiplied[1], Divisor) else multiplied[1]
        # The cosines and sines of rotary position codes are made of a buffer, and stay as they are.
        if any(_is_learned(modules, tape.names[parent]) for parent in tape.parents_with_names(multiplier)):
            if isinstance(multiplied[1], Divisor):
                raise UnmeasurableError("it is divided by a gain")
            yield multiplier


def _is_learned(modules: Mapping[str, nn.Module], name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return owner not in modules or attribute not in modules[owner]._buffers


def _in_front(chain: Chain) -> Chain:
    """Return the matrix and what is in front of it up to the nearest norm, which forgets what is in front of it.

    Raises:
        UnmeasurableError: There is another matrix, or an adapter.
    """
    matrix, *others = chain
    front = []
    for factor in others:
        front.append(factor)
        if factor.role == "inner_norm":
            break
    if matrix.role != "latent" or matrix.adapters or any(factor.role == "latent" for factor in front):
        raise UnmeasurableError("queries or keys are made by several matrices")
    return (matrix, *front)


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max())
