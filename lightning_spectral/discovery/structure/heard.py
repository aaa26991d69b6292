"""Where the stream behind a block is heard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lightning_spectral.discovery.structure.branches import FoundBranch
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.records import StreamAt

__all__ = ["stream_behind"]


def stream_behind(tape: Tape, name: str, members: Sequence[FoundBranch]) -> StreamAt:
    """Return where the stream behind a block is heard: in the result of its last module, as a rule.

    Many models keep the branches of a block in a list instead, and add them up around it::

        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x        # no module returns this x; the next attention takes it
        return x                  # what is around all blocks returns the last one, or a norm takes it

    There it is the first module that runs once and takes the stream as its first tensor, or that returns it first.

    Args:
        tape: The recorded forward pass.
        name: Name of the block.
        members: Its branches in the order of execution.
    """
    last, add = name.split(" + ")[-1], members[-1].add
    runs = Counter(call.path for call in tape.calls)
    results = (value for call in tape.calls if call.path == last for _, value in call.outputs)
    # What a module of a branch returns is not made of the sum: the sum is made of it.
    if any(tape.depends(value, add.output) for value in results):
        return StreamAt(last)
    if add.stack is None:  # of streams side by side, no module has the one of this block
        once = [call for call in tape.calls if runs[call.path] == 1]
        for call in once:
            if call.inputs[:1] == (add.output,):
                return StreamAt(call.path, taken=True)
        for call in once:
            if [value for _, value in call.outputs[:1]] == [add.output]:
                return StreamAt(call.path)
    return StreamAt(None)
