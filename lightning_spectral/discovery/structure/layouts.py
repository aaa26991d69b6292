"""Which dimension of a stream holds channels, and which sums add branches that read tokens as if they were channels.

A branch with a norm, a convolution or attention shows where it reads channels. A branch of linear layers alone may
multiply channels or tokens: the other branches of its stream tell what it reads::

    x (B, C, H, W) + attention(x)                             channels in dimension 1
    x + mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)        in dimension 1 as well, so no position moves another

Some blocks turn the stream over, add a branch, and turn the stream back::

    x (B, T, D) ─ transpose ─ (B, D, T) + f(·) ─ transpose ─ (B, T, D) + g(·)

Both branches multiply the last dimension. For f it holds tokens: f mixes them, and its norm cannot be added to the
norm of g, which reads the channels of the stream.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from lightning_spectral.discovery.structure.adds import ResidualAdd
from lightning_spectral.discovery.structure.residual_stream import stream_values
from lightning_spectral.discovery.trace.operations import base_name, is_convolution
from lightning_spectral.discovery.trace.probe import Prober, Region
from lightning_spectral.discovery.trace.tape import Tape

__all__ = ["channels_of_neighbours", "turned_over"]


def channels_of_neighbours(tape: Tape, adds: Sequence[ResidualAdd], prober: Prober) -> dict[int, int]:
    """Return the dimension of the channels of every stream that another branch of the same stream knows.

    Args:
        tape: The recorded forward pass.
        adds: The residual adds, in the order of execution.
        prober: Knows where a branch shows its channels.

    Returns:
        1 or −1 by the value of the stream that a sum adds to, for sums whose own branches do not show it.
    """
    # A stream that is written in another layout than the one it is read in tells nothing: its dimensions are others.
    adds = [add for add in adds if add.stack is None and tape.shape(add.stream) == tape.shape(add.output)]
    outputs = {add.output: add for add in adds}
    own = {add.output: _shown(tape, add, prober) for add in adds}
    known = {output: place for output, place in own.items() if place is not None}
    pairs = [(outputs[value], add) for add in adds if (value := _sum_before(tape, add, outputs)) is not None]
    for earlier, later in pairs:  # down the stream
        if earlier.output in known and later.output not in known:
            for place in (1, len(tape.shape(later.stream)) - 1):
                if _place_before(tape, later, earlier.output, place) == known[earlier.output]:
                    known[later.output] = place
    for earlier, later in reversed(pairs):  # and up
        if later.output in known and earlier.output not in known:
            before = _place_before(tape, later, earlier.output, known[later.output])
            if before is not None and before in (1, len(tape.shape(earlier.stream)) - 1):
                known[earlier.output] = before
    return {
        add.stream: 1 if known[add.output] == 1 else -1
        for add in adds
        if add.output in known and own[add.output] is None and len(tape.shape(add.stream)) > 2
    }


def _shown(tape: Tape, add: ResidualAdd, prober: Prober) -> int | None:
    """Return the dimension of the channels that one of the branches of a sum shows, counted from the front."""
    dims = (prober.known_channel_dim(Region(tape, add.stream, term.start)) for term in add.branches)
    found = next((dim for dim in dims if dim is not None), None)
    return None if found is None else found % len(tape.shape(add.stream))


def _sum_before(tape: Tape, add: ResidualAdd, outputs: Container[int]) -> int | None:
    """Return the nearest sum up the stream of a sum, ``None`` for the first."""
    return next((value for value in stream_values(tape, add.stream) if value in outputs), None)


def _place_before(tape: Tape, add: ResidualAdd, begin: int, place: int | None) -> int | None:
    """Return the dimension of a value up the stream that becomes a dimension of the stream; ``None``: not known."""
    value = add.stream
    for earlier in stream_values(tape, add.stream):
        if earlier != value and place is not None:
            place = _before(tape, earlier, value, place)
        value = earlier
        if value == begin:
            break
    return place


def turned_over(tape: Tape, adds: Sequence[ResidualAdd], prober: Prober) -> set[int]:
    """Return the outputs of the sums whose branches take another dimension for channels than the stream begins with.

    Args:
        tape: The recorded forward pass.
        adds: The residual adds, in the order of execution.
        prober: Knows in which dimension a branch reads channels.
    """
    adds = [add for add in adds if add.stack is None]  # a stack has dimensions of its own
    channels = {add.output: _channel(tape, add, prober) for add in adds}
    streams: dict[int, int] = {}  # the first sum of the stream, by sum
    turned: dict[int, bool] = {}  # whether a sum is turned over against the first sum of its stream
    begins_turned: set[int] = set()
    for add in adds:
        value = _sum_before(tape, add, channels)
        if value is None:
            *_, value = stream_values(tape, add.stream)
        place = _place_before(tape, add, value, channels[add.output] % len(tape.shape(add.stream)))
        if value in turned:
            streams[add.output] = streams[value]
            turned[add.output] = turned[value] ^ (place not in (None, channels[value] % len(tape.shape(value))))
        else:
            streams[add.output], turned[add.output] = add.output, False
            if place not in (None, _begun(tape, value)):
                begins_turned.add(add.output)  # against what the stream begins with
    both = {streams[output] for output, other in turned.items() if other}
    return {
        output
        for output, other in turned.items()
        if streams[output] in both and other is not (streams[output] in begins_turned)
    }


def _begun(tape: Tape, value: int) -> int:
    """Return the dimension of the channels of the value that a stream begins with."""
    operation = tape.producer(value)
    return 1 if operation is not None and is_convolution(operation) else len(tape.shape(value)) - 1


def _channel(tape: Tape, add: ResidualAdd, prober: Prober) -> int:
    """Return the dimension in which the first branch of a sum reads channels: −1 or 1."""
    return prober.channel_dim(Region(tape, add.stream, add.branches[0].start))


def _before(tape: Tape, source: int, target: int, place: int) -> int | None:
    """Return the dimension of a value that becomes a dimension of the next value of the stream; ``None``: not known."""
    operation = tape.producer(target)
    assert operation is not None
    shape, moved = tape.shape(source), tape.shape(target)
    match base_name(operation):
        case "t":
            return 1 - place
        case "transpose":
            one, other = (int(dim) % len(shape) for dim in operation.args[1:3])
            return {one: other, other: one}.get(place, place)
        case "permute":
            return int(operation.args[1][place]) % len(shape)
    # A view splits or joins the dimensions on one side.
    if shape[: place + 1] == moved[: place + 1]:
        return place
    return len(shape) - 1 if place == len(moved) - 1 and shape[-1] == moved[-1] else None
