"""Branches as functions of the residual stream, taken from one recorded forward pass.

A residual add is S = skip + branches. The update of a branch, as a function of the stream that it reads, is

    B(x) = S(branch at x) − S(branch at 0)

with the skip and the other branches fixed at their recorded values:

    x ── norm ── W ── act ── W ── site ── · scale ──(+)── norm behind the add ── S
    │           body: rerun at x            start    │           tail: rerun twice
    └── skip: recorded ──────────────────────────────┘

This equals ``block(x) − x`` with the other sites at zero, but for one add instead of one module. So it does not matter
whether the block can be called alone, or whether a norm stands behind the add. B contains every multiplier (residual
scales, LayerScale, ReZero, constants) and every norm, gate and mask. In a sequential block, the MLP reads the stream
behind the attention, and the derivative by that stream does not contain the attention.

The recorded operations run again in float64 in any model, so that derivatives have more exact digits than the weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_spectral.discovery.attempts import passed, recorded
from lightning_spectral.discovery.chains.recipes import attribute_path
from lightning_spectral.discovery.structure.adds import ResidualAdd
from lightning_spectral.discovery.structure.residual import residual_adds
from lightning_spectral.discovery.structure.terms import Term
from lightning_spectral.discovery.trace.probe import Prober
from lightning_spectral.discovery.trace.replay import execute
from lightning_spectral.discovery.trace.tape import Call, Operation, Tape, bits
from lightning_spectral.records import Branch, ResidualBlock

__all__ = ["BranchFunction", "BranchSum", "branch_functions"]


class BranchFunction:
    """The update that a branch adds to the residual stream, as a function of the stream that it reads.

    The function is pure: the model is neither run nor changed. It holds the recorded pass and, from the first call
    until :meth:`forget`, float64 copies of the weights of the branch.

    Attributes:
        stream: The stream as it was recorded, in float64 (on the CPU where the device has no float64).
        behind: Constant that multiplies the output of the branch's site before the add; ``None`` if the multiplier is a
            parameter, or if no module carries the branch.
    """

    def __init__(self, tape: Tape, add: ResidualAdd, terms: Sequence[Term], site: int | None) -> None:
        """Make the function of the terms of one residual add that form a branch; ``site`` is the value at its site."""
        self._tape, self._output = tape, add.output if add.stack is None else add.stack.written
        self._size = 1.0 if add.stack is None else add.stack.size(tape)
        # source: the stream that is read. starts: the values at which the branch meets the add. They cut the recorded
        # program in two: the body from the source to the starts, and the tail from the starts to the sum.
        self._source, self._starts = add.stream, tuple(dict.fromkeys(term.start for term in terms))
        # Both are planned once; a call only executes them.
        self._body = _plan(tape, (self._source,), self._starts)
        self._tail = _plan(tape, self._starts, (self._output,))
        self._constants: dict[int, Tensor] = {}
        self.stream = tape.wide(self._source).clone()
        self.behind = None if add.stack is not None and add.stack.writers else _behind(terms[0], site)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the update at ``x``, in the shape of the sum; with several parallel streams, the update of each."""
        return self._added(self._run(self._body, {self._source: x}))

    def forget(self) -> None:
        """Drop the copies of the weights; the next call makes new ones."""
        self._constants.clear()

    def recorded(self) -> Tensor:
        """Return the update of the recorded pass, with the precision of that pass."""
        return self._added({start: self._tape.wide(start) for start in self._starts})

    def precision(self) -> float:
        """Return the rounding error of the recorded pass."""
        return float(torch.finfo(self._tape.tensors[self._output].dtype).eps)

    def _added(self, values: Mapping[int, Tensor]) -> Tensor:
        # The tail is linear in the starts only without a norm behind the add, so S(branch at 0) is a second run.
        with_branch = {start: values[start] for start in self._starts}
        without = {start: torch.zeros_like(value) for start, value in with_branch.items()}
        ends = [self._run(self._tail, sources)[self._output] for sources in (with_branch, without)]
        return self._size * (ends[0] - ends[1])

    def _run(self, plan: Iterable[Operation], sources: Mapping[int, Tensor]) -> dict[int, Tensor]:
        environment = dict(sources)

        def fetch(value: int) -> Tensor:
            return environment[value] if value in environment else self._constant(value)

        for operation in plan:
            for output, tensor in zip(operation.outputs, execute(self._tape, operation, fetch), strict=True):
                if tensor is not None and output not in sources:
                    environment[output] = tensor
        return environment

    def _constant(self, value: int) -> Tensor:
        if value not in self._constants:
            tensor = self._tape.wide(value)
            # Autograd saves tensors for the backward pass, and refuses to save tensors of inference mode.
            self._constants[value] = tensor.clone() if tensor.is_inference() else tensor
        return self._constants[value]


@dataclass(frozen=True, slots=True)
class BranchSum:
    """The sum of the updates of several branches, when the stream of each is moved by the same vector.

    Its derivative is the sum of the Jacobians of the branches.

    Attributes:
        functions: The branches. All read the stream in one shape.
    """

    functions: tuple[BranchFunction, ...]

    @property
    def stream(self) -> Tensor:
        """The stream that the first branch reads."""
        return self.functions[0].stream

    def __call__(self, x: Tensor) -> Tensor:
        """Return the sum of the updates when the first branch reads ``x``."""
        # Branches of a kind may read the stream at different places of the block, where it has different values. So
        # each gets the shift, not x.
        first, *others = self.functions
        shift = x - first.stream
        return sum((function(function.stream + shift) for function in others), first(x))

    def forget(self) -> None:
        """Drop the copies of the weights; the next call makes new ones."""
        for function in self.functions:
            function.forget()

    def recorded(self) -> Tensor:
        """Return the sum of the updates of the recorded pass."""
        first, *others = (function.recorded() for function in self.functions)
        return sum(others, first)

    def precision(self) -> float:
        """Return the rounding error of the recorded pass."""
        return max(function.precision() for function in self.functions)


def _plan(tape: Tape, sources: Sequence[int], targets: Iterable[int]) -> tuple[Operation, ...]:
    """Return the operations that lead from the sources to the targets, in order.

    An operation is in the plan if a target depends on it, and if it depends on a source. All other values are constants
    of the recorded pass.
    """
    # Sets of values are bit masks: bit i of ancestors[t] is set if target t depends on value i. Values are numbered in
    # the order of the pass, so bits below the first source cannot depend on a source and are cleared.
    mask = 0
    for target in targets:
        mask |= tape.ancestors[target]
    known, plan = set(sources), dict[int, Operation]()
    for value in bits(mask & ~((1 << min(sources)) - 1)):
        operation = tape.producer(value)
        if operation is None or operation.index in plan or value in sources:
            continue
        if any(parent in known for parent in operation.inputs):
            plan[operation.index] = operation
            known.update(operation.outputs)
    return tuple(plan.values())


def _behind(term: Term, site: int | None) -> float | None:
    """Return the product of the constants between a site and the add, ``None`` if it is not constant or not known."""
    if site in term.gated:
        return None
    product = 1.0
    for value, multiplier in term.multipliers:
        if site is None or (value >= site and not isinstance(multiplier, float)):
            return None
        if value >= site:
            product *= float(multiplier)  # type: ignore[arg-type]
    return None if site is None else product


def branch_functions(
    model: nn.Module,
    blocks: Iterable[ResidualBlock],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    through: nn.Module | None = None,
) -> dict[Branch, BranchFunction | str]:
    """Run the model once and return the branches of its blocks as functions.

    The pass runs in evaluation mode without dropout and autocast. The model, its buffers, its training flags and the
    random streams are unchanged afterwards. All activations of the pass are kept until the functions are deleted, so
    use a small batch.

    Args:
        model: The model that the blocks were found in.
        blocks: The blocks.
        args: Positional arguments of the pass. Without any argument, an input is guessed, as :func:`find_blocks` does.
        kwargs: Keyword arguments of the pass.
        through: The module of the model that takes the arguments; the model or the module it wraps by default.

    Returns:
        For each branch the function, or the reason for none: the branch does not reach the stream in this pass, or
        reaches it several times, each time with another Jacobian.

    Raises:
        ExampleInputError: The model could not be run.
    """
    # Products by J differentiate twice. Fused attention kernels can be differentiated once, plain arithmetic twice.
    with sdpa_kernel(SDPBackend.MATH):
        passes = recorded(model, args, kwargs) if through is None else [passed(model, through, args, kwargs)]
    places = [_Places(item.tape, residual_adds(item.tape, Prober(item.tape))[0]) for item in passes]
    functions: dict[Branch, BranchFunction | str] = {}
    for block in blocks:
        for branch in block.branches:
            joined = [other for other in block.branches if other.site == branch.site and other.kind != branch.kind]
            shared = f"{branch.site} returns the sum of attention and an MLP, which cannot be told apart"
            functions[branch] = shared if joined else _function(places, branch)
    return functions


def _function(passes: Iterable[_Places], branch: Branch) -> BranchFunction | str:
    """Return the function from the first pass that has the branch, or the reason from the first pass."""
    found = [places.function(branch) for places in passes]
    return next((item for item in found if isinstance(item, BranchFunction)), found[0])


class _Places:
    """Index of a tape: where the outputs of modules and the weights reach the stream."""

    def __init__(self, tape: Tape, adds: Sequence[ResidualAdd]) -> None:
        self._tape = tape
        self._calls: defaultdict[str, list[Call]] = defaultdict(list)
        for call in tape.calls:
            self._calls[call.path].append(call)
        self._terms = [(add, term) for add in adds for term in add.branches]
        # By value, the terms that end in it: its spine runs from the sum down to the leaf, its gated values lie behind.
        self._spines: defaultdict[int, list[tuple[ResidualAdd, Term]]] = defaultdict(list)
        for add, term in self._terms:
            for value in (*term.spine, *term.gated):
                self._spines[value].append((add, term))

    def function(self, branch: Branch) -> BranchFunction | str:
        """Return a branch as a function, or the reason for none."""
        by_weight = branch.site.startswith("param:")
        found: dict[int, tuple[ResidualAdd, list[Term], int | None]] = {}
        for add, term, site in self._by_weight(branch) if by_weight else self._by_module(branch):
            known = found.setdefault(add.output, (add, [], site))
            if term not in known[1]:
                known[1].append(term)
        if not found:
            return f"no output of {branch.site} is added to the residual stream in this pass"
        if len(found) > 1:
            return f"{branch.site} runs {len(found)} times in one pass, each time with another Jacobian"
        return BranchFunction(self._tape, *next(iter(found.values())))

    def _by_module(self, branch: Branch) -> Iterator[tuple[ResidualAdd, Term, int | None]]:
        """Yield the terms that contain the output of the site, with the value at the site."""
        for call in self._calls[branch.site]:
            for key, value in call.outputs:
                if key == branch.output_index:
                    yield from ((add, term, value) for add, term in self._spines[value])

    def _by_weight(self, branch: Branch) -> Iterator[tuple[ResidualAdd, Term, int | None]]:
        """Yield the terms that contain the weight of the site."""
        path = branch.site.removeprefix("param:")
        yield from ((add, term, None) for place, (add, term) in enumerate(self._terms) if path in self._weights[place])

    @cached_property
    def _weights(self) -> list[set[str]]:
        """The attribute paths of the weights of every term."""
        return [self._weights_of(add, term) for add, term in self._terms]

    def _weights_of(self, add: ResidualAdd, term: Term) -> set[str]:
        tape, operations = self._tape, _plan(self._tape, (add.stream,), (term.start,))
        values = {value for operation in operations for value in operation.inputs if tape.made_of_parameters(value)}
        return {attribute_path(tape.names[name]) for value in values for name in tape.parents_with_names(value)}
