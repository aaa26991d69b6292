"""Branches as functions of the residual stream, taken from one recorded forward pass.

A residual add is S = skip + branches. What a branch adds, as a function of the stream that it reads, is

    B(x) = S(branch at x) − S(branch at 0)

with the skip and the other branches held where they were. This is ``block(x) − x`` with the other sites at zero, but
for one add instead of one module: it needs no block that can be called alone, holds behind norms that stand behind the
add, and has every multiplier in it (residual scales, LayerScale, ReZero, constants) and every norm, gate and mask. The
stream of a sequential block's MLP is what the attention branch has been added to; its derivative by that stream knows
nothing of the attention.

The recorded operations run again in float64, whatever the dtype of the model, so that derivatives are exact to many
more digits than the weights are.
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
from lightning_spectral.discovery.structure.residual import ResidualAdd, Term, residual_adds
from lightning_spectral.discovery.trace.probe import Prober
from lightning_spectral.discovery.trace.replay import execute
from lightning_spectral.discovery.trace.tape import Call, Operation, Tape, bits
from lightning_spectral.records import Branch, ResidualBlock

__all__ = ["BranchFunction", "BranchSum", "branch_functions"]


class BranchFunction:
    """What a branch adds to the residual stream, as a function of the stream that it reads.

    Pure: the model is not run and not touched. Holds the recorded pass, and from the first call on float64 copies of
    the weights of the branch, until told to forget them.

    Attributes:
        stream: The stream as it was recorded, in float64 (on the CPU where the device has no float64).
        behind: Constant by which the output of the branch's site is multiplied before it is added; ``None`` where that
            is a parameter, or where no module carries the branch.
    """

    def __init__(self, tape: Tape, add: ResidualAdd, terms: Sequence[Term], site: int | None) -> None:
        """Take the terms of one residual add that form a branch; ``site`` is the value at its site."""
        self._tape, self._output = tape, add.output if add.stack is None else add.stack.written
        self._size = 1.0 if add.stack is None else add.stack.size(tape)
        self._source, self._starts = add.stream, tuple(dict.fromkeys(term.start for term in terms))
        self._body = _plan(tape, (self._source,), self._starts)
        self._tail = _plan(tape, self._starts, (self._output,))
        self._constants: dict[int, Tensor] = {}
        self.stream = tape.wide(self._source).clone()
        self.behind = None if add.stack is not None and add.stack.writers else _behind(terms[0], site)

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the branch adds when it reads ``x``, in the shape of the sum; of several streams, to each."""
        return self._added(self._run(self._body, {self._source: x}))

    def forget(self) -> None:
        """Drop the copies of the weights; the next call makes new ones."""
        self._constants.clear()

    def recorded(self) -> Tensor:
        """Return what the branch added in the recorded pass, in its precision."""
        return self._added({start: self._tape.wide(start) for start in self._starts})

    def precision(self) -> float:
        """Return the rounding error of the recorded pass."""
        return float(torch.finfo(self._tape.tensors[self._output].dtype).eps)

    def _added(self, values: Mapping[int, Tensor]) -> Tensor:
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
            # Autograd keeps what it differentiates through, and refuses to keep tensors of inference mode.
            self._constants[value] = tensor.clone() if tensor.is_inference() else tensor
        return self._constants[value]


@dataclass(frozen=True, slots=True)
class BranchSum:
    """What several branches add together when the stream that each of them reads is moved by the same vector.

    Its derivative is the sum of the Jacobians of the branches.

    Attributes:
        functions: The branches, which read the stream in one shape.
    """

    functions: tuple[BranchFunction, ...]

    @property
    def stream(self) -> Tensor:
        """The stream that the first branch reads."""
        return self.functions[0].stream

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the branches add when the first reads ``x``."""
        first, *others = self.functions
        shift = x - first.stream
        return sum((function(function.stream + shift) for function in others), first(x))

    def forget(self) -> None:
        """Drop the copies of the weights; the next call makes new ones."""
        for function in self.functions:
            function.forget()

    def recorded(self) -> Tensor:
        """Return what the branches added in the recorded pass."""
        first, *others = (function.recorded() for function in self.functions)
        return sum(others, first)

    def precision(self) -> float:
        """Return the rounding error of the recorded pass."""
        return max(function.precision() for function in self.functions)


def _plan(tape: Tape, sources: Sequence[int], targets: Iterable[int]) -> tuple[Operation, ...]:
    """Return the operations that lead from the sources to the targets, in order."""
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

    The pass runs in evaluation mode without dropout and autocast, and leaves the model, its buffers, its training flags
    and the random streams as they were. All activations of the pass are kept until the functions are gone: use a small
    batch.

    Args:
        model: The model that the blocks were found in.
        blocks: The blocks.
        args: Positional arguments of the pass; with no arguments at all, guessed as :func:`find_blocks` does.
        kwargs: Its keyword arguments.
        through: The module of the model that takes them, by default the model or what it wraps.

    Returns:
        For each branch the function, or the reason why there is none: no weight and no module of the branch reaches the
        stream in this pass, or it does so several times, each with a Jacobian of its own.

    Raises:
        ExampleInputError: The model could not be run.
    """
    # Fused attention kernels can be differentiated once; plain arithmetic twice.
    with sdpa_kernel(SDPBackend.MATH):
        passes = recorded(model, args, kwargs) if through is None else [passed(model, through, args, kwargs)]
    places = [_Places(item.tape, residual_adds(item.tape, Prober(item.tape))[0]) for item in passes]
    functions: dict[Branch, BranchFunction | str] = {}
    for block in blocks:
        for branch in block.branches:
            joined = [other for other in block.branches if other.site == branch.site and other.kind != branch.kind]
            shared = f"{branch.site} returns the sum of attention and an MLP, which are no functions of their own"
            functions[branch] = shared if joined else _function(places, branch)
    return functions


def _function(passes: Iterable[_Places], branch: Branch) -> BranchFunction | str:
    """Return a branch as it is in the first pass that has it, or the reason of the first pass."""
    found = [places.function(branch) for places in passes]
    return next((item for item in found if isinstance(item, BranchFunction)), found[0])


class _Places:
    """Where the branches of a tape reach the stream."""

    def __init__(self, tape: Tape, adds: Sequence[ResidualAdd]) -> None:
        self._tape = tape
        self._calls: defaultdict[str, list[Call]] = defaultdict(list)
        for call in tape.calls:
            self._calls[call.path].append(call)
        self._terms = [(add, term) for add in adds for term in add.branches]
        self._spines: defaultdict[int, list[tuple[ResidualAdd, Term]]] = defaultdict(list)
        for add, term in self._terms:
            for value in (*term.spine, *term.gated):
                self._spines[value].append((add, term))

    def function(self, branch: Branch) -> BranchFunction | str:
        """Return a branch as a function, or the reason why it is none."""
        by_weight = branch.site.startswith("param:")
        found: dict[int, tuple[ResidualAdd, list[Term], int | None]] = {}
        for add, term, site in self._by_weight(branch) if by_weight else self._by_module(branch):
            known = found.setdefault(add.output, (add, [], site))
            if term not in known[1]:
                known[1].append(term)
        if not found:
            return f"nothing that {branch.site} makes is added to the residual stream in this pass"
        if len(found) > 1:
            return f"{branch.site} runs {len(found)} times in one pass, each time with a Jacobian of its own"
        return BranchFunction(self._tape, *next(iter(found.values())))

    def _by_module(self, branch: Branch) -> Iterator[tuple[ResidualAdd, Term, int | None]]:
        """Yield the terms that the output of a module is part of, with the value at the site."""
        for call in self._calls[branch.site]:
            for key, value in call.outputs:
                if key == branch.output_index:
                    yield from ((add, term, value) for add, term in self._spines[value])

    def _by_weight(self, branch: Branch) -> Iterator[tuple[ResidualAdd, Term, int | None]]:
        """Yield the terms that a weight is part of."""
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
