"""Check a residual block: with every site at zero it passes the stream on, and it is linear in each site.

Nothing but the stream, its norms, constant factors and what does not come from this stream may be left at zero (zero
test), and what reaches the stream is proportional to the factor at each site (linear test).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from lightning_spectral.discovery.branches import FoundBranch
from lightning_spectral.discovery.operations import addends, is_attention, is_product, weight_operand
from lightning_spectral.discovery.probe import Prober, Region
from lightning_spectral.discovery.replay import replay
from lightning_spectral.discovery.residual import Refusal, ResidualAdd, stream_step, stream_values
from lightning_spectral.discovery.sites import linked
from lightning_spectral.discovery.surprises import SURPRISES, surprise
from lightning_spectral.discovery.tape import Call, Tape

__all__ = ["SelfCheck"]


class SelfCheck:
    """Checks the blocks of one recorded forward pass."""

    def __init__(self, tape: Tape, prober: Prober, found: Sequence[FoundBranch], refusals: Sequence[Refusal]) -> None:
        """Take note of what was found and what was not.

        Args:
            tape: The recorded forward pass.
            prober: Remembers answers.
            found: All branches of the pass.
            refusals: The sums that look like residual adds and were refused.
        """
        self.tape, self.prober, self.refusals = tape, prober, refusals
        self._adds = {branch.add.output: branch.add for branch in found}
        self._outside = list(_weights_outside(tape, found))

    def problem(self, name: str, branches: Sequence[FoundBranch]) -> str | None:
        """Return what fails in the self-check of a block, ``None`` where nothing does.

        Args:
            name: Name of the block.
            branches: Its branches in the order of execution.
        """
        try:
            return self._problem(name, branches)
        except SURPRISES as error:
            return surprise("the self-check could not be made", error)

    def _problem(self, name: str, branches: Sequence[FoundBranch]) -> str | None:
        adds = list({branch.add.output: branch.add for branch in branches}.values())
        for earlier, later in itertools.pairwise(adds):
            if not linked(self.tape, later, earlier):
                return "its residual adds do not lie on one stream"
        checks = (self._branch_problem(branch, branches[0].add.skip.leaf) for branch in branches)
        return next(filter(None, checks), None) or self._left_at_zero(name, adds)

    def _branch_problem(self, branch: FoundBranch, stream: int) -> str | None:
        tape = self.tape
        if branch.kind == "mlp" and math.prod(tape.shape(stream)[1:-1]) == 1 and self._attends(branch):
            return "one position cannot show whether a branch mixes positions: pass an example of two tokens or more"
        if not branch.site.path or not branch.site.carries:
            return "no module or weight carries one of its branches"
        region = Region(tape, branch.add.skip.leaf, branch.add.output)
        question = ("linear", region.local(branch.site.value))
        if not self.prober.once(region, question, partial(self._is_linear, branch)):
            return f"with {branch.site.path} at zero the stream is not passed on, or it is not linear in it"
        return None

    def _attends(self, branch: FoundBranch) -> bool:
        values = self.tape.between(branch.add.stream, branch.site.value)
        return any((operation := self.tape.producer(value)) is not None and is_attention(operation) for value in values)

    def _is_linear(self, branch: FoundBranch) -> bool:
        """Whether the sum is the stream alone with the site at 0, and proportional to the factor at the site."""
        tape = self.tape
        region = Region(tape, branch.site.value, branch.add.output)
        content = 1 + self.prober.finite(branch.site.value)  # what was recorded may be zero
        held = self.prober.made_up_weights(region) | self.prober.finite_around(region)
        # Positions and the like, which do not come from the stream, are left out with the other branches.
        others = [term for term in branch.add.others if not tape.depends(term.leaf, branch.add.skip.leaf)]
        silent = [term for term in (*branch.add.branches, *others) if term not in branch.terms]
        rest = {term.start: torch.zeros_like(tape.wide(term.start)) for term in silent}
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
        """Return what is left of a block with every site at zero, beside what it passes on."""
        call = self._call_around(name, adds)
        if call is None:
            return self._weight_outside(name, adds[0].skip.leaf)
        entry, output = self._ends(call, adds)
        if entry is None or output is None:
            return self._weight_outside(name, adds[0].skip.leaf)
        return self._refused(entry, output) or self._lost_on_the_way(entry, output) or self._weight_outside(name, entry)

    def _call_around(self, name: str, adds: Sequence[ResidualAdd]) -> Call | None:
        """Return the call of the block that made its first residual add; ``None`` for a list that is never called."""
        operation = self.tape.producer(adds[0].output)
        number = -1 if operation is None else operation.call
        while number >= 0 and self.tape.calls[number].path != name:
            number = self.tape.calls[number].parent
        return self.tape.calls[number] if number >= 0 else None

    def _ends(self, call: Call, adds: Sequence[ResidualAdd]) -> tuple[int | None, int | None]:
        """Return the stream as it enters and as it leaves the call of a block."""
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
        # Of several (the first stream is passed along), the latest is the stream.
        return max(entries, default=None), min(outputs, default=None)

    def _refused(self, entry: int, output: int) -> str | None:
        refused = (
            refusal.reason
            for refusal in self.refusals
            if self.tape.depends(output, refusal.output) and self.tape.depends(refusal.output, entry)
        )
        return next(refused, None)

    def _lost_on_the_way(self, entry: int, output: int) -> str | None:
        """Walk from what leaves a block back to what enters it, through residual adds, norms and constants."""
        tape, value = self.tape, output
        while value != entry:
            add = self._adds.get(value)
            operation = tape.producer(value)
            if operation is None or value < entry:
                return None  # it begins inside, or the entry was another view of the stream
            step = stream_step(tape, operation) if add is None else add.skip.leaf if add.stack else add.skip.start
            if step is None:
                step = self._one_stream(entry, value)
            if step is None:
                return f"with every site at zero, something is left of the operation {operation.name!r} on the stream"
            value = step
        return None

    def _one_stream(self, entry: int, value: int) -> int | None:
        """Return the stream that all terms of a sum carry which come from the entry."""
        operation = self.tape.producer(value)
        terms = () if operation is None else addends(self.tape, operation)
        found = [set(stream_values(self.tape, term)) for term in terms if self.tape.depends(term, entry)]
        return max(set.intersection(*found), default=None) if found else None

    def _weight_outside(self, name: str, entry: int) -> str | None:
        for value, weight in self._outside:
            if weight.startswith(f"{name}.") and value != entry and self.tape.depends(value, entry):
                return f"{weight} acts outside the branches that were found"
        return None


def _weights_outside(tape: Tape, branches: Sequence[FoundBranch]) -> Iterator[tuple[int, str]]:
    """Yield the products that lie in no branch and lead to what the pass returns, each with the name of its weight."""
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
