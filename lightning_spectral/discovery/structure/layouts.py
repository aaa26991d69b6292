"""Which sums of a stream add branches that read tokens as if they were channels.

Some blocks turn the stream over, add a branch, and turn the stream back::

    x (B, T, D) ─ transpose ─ (B, D, T) + f(·) ─ transpose ─ (B, T, D) + g(·)

Both branches multiply the last dimension. For f it holds tokens: f mixes them, and its norm cannot be added to the
norm of g, which reads the channels of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_spectral.discovery.structure.adds import ResidualAdd
from lightning_spectral.discovery.structure.residual_stream import stream_values
from lightning_spectral.discovery.trace.operations import base_name, is_convolution
from lightning_spectral.discovery.trace.probe import Prober, Region
from lightning_spectral.discovery.trace.tape import Tape

__all__ = ["turned_over"]


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
        place: int | None = channels[add.output] % len(tape.shape(add.stream))
        value = add.stream
        for earlier in stream_values(tape, add.stream):
            if earlier != value and place is not None:
                place = _before(tape, earlier, value, place)
            value = earlier
            if value in channels:
                break
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
