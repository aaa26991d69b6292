"""Check a residual block numerically and along its stream.

* Zero test: with every site at zero the block passes on the stream, up to norms, constant factors and addends that do
  not come from this stream.
* Linear test: with the factors c = 0, 1 and 3 at one site, the sum f(c) satisfies f(3) − f(0) = 3 (f(1) − f(0)).
* No weight outside of the branches acts on the stream inside of the block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

from lightning_spectral.discovery.structure.adds import Refusal, ResidualAdd
from lightning_spectral.discovery.structure.branches import FoundBranch
from lightning_spectral.discovery.structure.residual_stream import stream_step, stream_values
from lightning_spectral.discovery.structure.sites import linked
from lightning_spectral.discovery.trace.operands import norm_channel
from lightning_spectral.discovery.trace.operations import (
    addends,
    attended,
    is_attention,
    is_contraction,
    is_fused_attention,
    is_norm,
    is_product,
    is_wide_convolution,
    matrix_operands,
    weight_operand,
)
from lightning_spectral.discovery.trace.probe import Prober, Region
from lightning_spectral.discovery.trace.replay import replay
from lightning_spectral.discovery.trace.surprises import SURPRISES, surprise
from lightning_spectral.discovery.trace.tape import Call, Operation, Tape

__all__ = ["SelfCheck"]


class SelfCheck:
    """Checks the blocks of one recorded forward pass."""

    def __init__(self, tape: Tape, prober: Prober, found: Sequence[FoundBranch], refusals: Sequence[Refusal]) -> None:
        """Remember all branches, all refused sums, and all weights outside of branches.

        Args:
            tape: The recorded forward pass.
            prober: Remembers answers.
            found: All branches of the pass.
            refusals: The sums that look like residual adds and were refused.
        """
        self.tape, self.prober, self.found, self.refusals = tape, prober, found, refusals
        self._adds = {branch.add.output: branch.add for branch in found}
        self._outside = list(_weights_outside(tape, found))

    def problem(self, name: str, branches: Sequence[FoundBranch]) -> str | None:
        """Return the first failure of the self-check of a block, ``None`` for a block that passes.

        Args:
            name: Name of the block.
            branches: Its branches in the order of execution.
        """
        try:
            return self._problem(name, branches)
        except SURPRISES as error:
            return surprise("the self-check could not be made", error)

    def _problem(self, name: str, branches: Sequence[FoundBranch]) -> str | None:
        """Return the first failure: of the stream, of a branch, then of the block with every site at zero."""
        # Between two of its branches, the block may run one of them once more.
        sites, last = {branch.site.path for branch in branches}, branches[-1].add.output
        own = (branch.add for branch in self.found if branch.site.path in sites and branch.add.output <= last)
        adds = list({add.output: add for add in own}.values())
        for earlier, later in itertools.pairwise(adds):
            if not linked(self.tape, later, earlier):
                return "its residual adds do not lie on one stream"
        checks = (self._branch_problem(branch, branches[0].add.skip.leaf) for branch in branches)
        return next(filter(None, checks), None) or self._left_at_zero(name, adds)

    def _branch_problem(self, branch: FoundBranch, stream: int) -> str | None:
        """Return what is wrong with one branch."""
        tape = self.tape
        if branch.kind == "mlp" and self._hides_mixing(branch):
            return "one position cannot show whether a branch mixes positions: pass an example of two tokens or more"
        if branch.kind == "mlp" and not self._is_finite(branch):
            return f"{branch.site.path} is NaN on the example input, which cannot show whether it mixes positions"
        if not branch.site.path or not branch.site.carries:
            return "no module or weight carries one of its branches"
        region = Region(tape, branch.add.skip.leaf, branch.add.output)
        question = ("linear", region.local(branch.site.value))
        if not self.prober.once(region, question, partial(self._is_linear, branch)):
            return f"with {branch.site.path} at zero the stream is not passed on, or it is not linear in it"
        return None

    def _is_finite(self, branch: FoundBranch) -> bool:
        """Whether what a branch adds is a number anywhere. It always is where the content is made up."""
        return self.tape.contents is not None or bool(self.tape.wide(branch.site.value).isfinite().any())

    def _positions(self, branch: FoundBranch) -> int:
        """Return the number of positions of one sequence, or of one picture, in the stream that a branch reads."""
        shape = self.tape.shape(branch.add.stream)
        channel = self.prober.channel_dim(Region(self.tape, branch.add.stream, branch.terms[0].start))
        return math.prod(size for dim, size in enumerate(shape) if dim not in (0, channel % len(shape)))

    def _hides_mixing(self, branch: FoundBranch) -> bool:
        """Whether a branch could mix positions, but has a single one here: attention, or a padded convolution."""
        tape, one = self.tape, self._positions(branch) == 1
        values = tape.between(branch.add.stream, branch.site.value)
        operations = [item for value in values if (item := tape.producer(value)) is not None]
        return any(
            (is_attention(item) and (one or self._attends_to_one(branch, item)))
            or (one and (is_wide_convolution(tape, item) or (is_contraction(item) and not is_product(tape, item))))
            for item in operations
        )

    def _attends_to_one(self, branch: FoundBranch, operation: Operation) -> bool:
        """Whether attention has a single key, as in a window of one position. A router's softmax does not count."""
        tape = self.tape
        compares = is_fused_attention(operation) or any(
            (item := tape.producer(value)) is not None and is_contraction(item) and not is_product(tape, item)
            for value in tape.between(branch.add.stream, operation.inputs[0])
        )
        return compares and attended(tape, operation) == 1

    def _is_linear(self, branch: FoundBranch) -> bool:
        """Whether the sum is the stream with the site at 0, and grows in proportion to the factor at the site."""
        tape = self.tape
        region = Region(tape, branch.site.value, branch.add.output)
        content = 1 + self.prober.finite(branch.site.value)  # a site may be recorded as zero
        held = self.prober.made_up_weights(region) | self.prober.finite_around(region)
        # The other branches are silenced, and so are addends that do not come from the stream, such as positions.
        others = [term for term in branch.add.others if not tape.depends(term.leaf, branch.add.skip.leaf)]
        silent = [term for term in (*branch.add.branches, *others) if term not in branch.terms]
        rest = {term.start: tape.filled(term.start) for term in silent}
        zero, one, three = (
            replay(tape, {**rest, branch.site.value: content * factor}, branch.add.output, held=held)
            for factor in (0.0, 1.0, 3.0)
        )
        tolerance = 1e-9 * float(three.abs().max() + 1e-300)
        proportional = float((three - zero - 3 * (one - zero)).abs().max()) <= tolerance
        alive = float((one - zero).abs().max()) > tolerance
        stream = held.get(branch.add.skip.start, tape.wide(branch.add.skip.start)).expand_as(zero)
        return proportional and alive and float((zero - stream).abs().max()) <= tolerance

    def _left_at_zero(self, name: str, adds: Sequence[ResidualAdd]) -> str | None:
        """Return what a block adds to the stream with every site at zero, ``None`` for nothing."""
        call = self._call_around(name, adds)
        if call is None:
            return self._weight_outside(name, adds[0].skip.leaf)
        entry, output = self._ends(call, adds)
        if entry is None or output is None:
            leaf = adds[0].skip.leaf
            outside = self._weight_outside(name, leaf)
            return self._begins_projected(call, leaf) or outside or self._mixed_before(name, call, leaf)
        lost = self._lost_on_the_way(adds, entry, output)
        return self._refused(entry, output, adds) or lost or self._weight_outside(name, entry)

    def _call_around(self, name: str, adds: Sequence[ResidualAdd]) -> Call | None:
        """Return the call of the block around its first residual add; ``None`` for a block that is never called."""
        operation = self.tape.producer(adds[0].output)
        number = -1 if operation is None else operation.call
        while number >= 0 and self.tape.calls[number].path != name:
            number = self.tape.calls[number].parent
        return self.tape.calls[number] if number >= 0 else None

    def _ends(self, call: Call, adds: Sequence[ResidualAdd]) -> tuple[int | None, int | None]:
        """Return the values of the stream that enter and leave the call of a block, ``None`` for a missing one."""
        size = self.tape.tensors[adds[0].output].numel()
        entries = [
            value
            for value in call.inputs
            if self.tape.depends(adds[0].skip.leaf, value) and self.tape.tensors[value].numel() == size
        ]
        outputs = [
            value
            for _, value in call.outputs
            if self.tape.depends(value, adds[-1].output) and self.tape.tensors[value].numel() == size
        ]
        # Several entries: the embedding is passed along to every block, and the latest entry is the stream.
        return max(entries, default=None), min(outputs, default=None)

    def _refused(self, entry: int, output: int, adds: Sequence[ResidualAdd]) -> str | None:
        """Return the reason of the first refused sum inside a block, but outside of its branches."""
        refused = (
            refusal.reason
            for refusal in self.refusals
            if self.tape.depends(output, refusal.output)
            and self.tape.depends(refusal.output, entry)
            and not any(add.interior >> refusal.output & 1 for add in adds)
        )
        return next(refused, None)

    def _begins_projected(self, call: Call, stream: int) -> str | None:
        """Return the problem of a block whose first sum adds attention to a projection of its input.

        A stage that widens the stream begins so. Nothing of the input is passed on unchanged.
        """
        tape = self.tape
        for value in stream_values(tape, stream):
            operation = tape.producer(value)
            terms = () if operation is None or value in call.inputs else addends(tape, operation)
            ways = [tape.between(item, term) for term in terms for item in call.inputs if tape.depends(term, item)]
            inside = (item for way in ways for place in way[1:] if (item := tape.producer(place)) is not None)
            if len(ways) > 1 and any(is_attention(item) for item in inside):
                return "its first sum passes nothing on of what enters: the skip is projected, too"
        return None

    def _keeps_tokens_apart(self, operation: Operation, add: ResidualAdd) -> bool:
        """Whether a written-out norm on the stream takes its statistics over channels, not over positions."""
        channel, rank = norm_channel(self.tape, operation), len(self.tape.shape(operation.outputs[0]))
        if is_norm(operation) or channel == -1 or not operation.inputs:
            return True
        region = Region(self.tape, add.stream, add.branches[0].start)
        return channel % rank == self.prober.channel_dim(region) % len(self.tape.shape(region.stream))

    def _lost_on_the_way(self, adds: Sequence[ResidualAdd], entry: int, output: int) -> str | None:
        """Walk from the output of a block back to its entry, through residual adds, norms and constants.

        Returns:
            What is in the way, ``None`` for a free way.
        """
        tape, value = self.tape, output
        while value != entry:
            add = self._adds.get(value)
            operation = tape.producer(value)
            if operation is None or value < entry:
                return None  # the stream begins inside, or the entry was another view of the stream
            if add is None:
                step = stream_step(tape, operation) if self._keeps_tokens_apart(operation, adds[0]) else None
            else:
                step = add.skip.leaf if add.stack else add.skip.start
            if step is None:
                step = self._one_stream(entry, value)
            if step is None:
                return f"with every site at zero, something is left of the operation {operation.name!r} on the stream"
            value = step
        return None

    def _one_stream(self, entry: int, value: int) -> int | None:
        """Return the last value that all terms of a sum that come from the entry carry on as a stream."""
        operation = self.tape.producer(value)
        terms = () if operation is None else addends(self.tape, operation)
        others = () if operation is None else set(operation.inputs).difference(terms)
        if any(self.tape.depends(item, entry) for item in others):
            return None  # a smaller addend, with one entry for all channels or all positions, also comes from the entry
        found = [set(stream_values(self.tape, term)) for term in terms if self.tape.depends(term, entry)]
        return max(set.intersection(*found), default=None) if found else None

    def _mixed_before(self, name: str, call: Call, begin: int) -> str | None:
        """Return the problem of a block with attention before its stream begins, on a stream of another length."""
        tape = self.tape
        before = {value for entry in call.inputs if tape.depends(begin, entry) for value in tape.between(entry, begin)}
        operations = (operation for value in before if (operation := tape.producer(value)) is not None)
        if not any(is_attention(operation) and self._asks_by_data(operation) for operation in operations):
            return None
        weights = (weight for value, weight in self._outside if value in before and weight.startswith(f"{name}."))
        return next((f"{weight} acts outside the branches that were found" for weight in weights), None)

    def _asks_by_data(self, operation: Operation) -> bool:
        """Whether the queries of attention are made of data. Learned queries only pool a sequence."""
        asked: Operation | None = operation
        while asked is not None and not is_contraction(asked):
            asked = self.tape.producer(asked.inputs[0])
        if asked is None:
            return False
        return all(map(self.tape.is_data, asked.inputs[:2] if is_attention(asked) else matrix_operands(asked)))

    def _weight_outside(self, name: str, entry: int) -> str | None:
        """Return the problem of a block with a weight that acts on its stream outside of its branches."""
        for value, weight in self._outside:
            # If the block is the whole model, the weights behind its last sum are the head's.
            inside = weight.startswith(f"{name}.") if name else self.tape.depends(max(self._adds), value)
            if inside and value != entry and self.tape.depends(value, entry):
                return f"{weight} acts outside the branches that were found"
        return None


def _weights_outside(tape: Tape, branches: Sequence[FoundBranch]) -> Iterator[tuple[int, str]]:
    """Yield the products outside of all branches that the result depends on, each with the name of its weight."""
    returned = [value for call in tape.calls if call.parent < 0 for _, value in call.outputs]
    inside = 0
    for branch in branches:
        inside |= branch.add.interior
    for operation in tape.operations:
        if not is_product(tape, operation) or any(inside >> output & 1 for output in operation.outputs):
            continue
        if not any(tape.depends(value, output) for value in returned for output in operation.outputs):
            continue
        weight = weight_operand(tape, operation)
        names = [tape.names[item] for item in tape.parents_with_names(weight)] if weight is not None else []
        yield from ((operation.outputs[0], name) for name in names)
