"""Make branches of the terms of a residual add: their kind, their site and their factors."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lightning_spectral.discovery.chains.coefficients import agreed_paths
from lightning_spectral.discovery.chains.experts import with_all_experts
from lightning_spectral.discovery.chains.factors import FoundChain, chains, kind_of, merged
from lightning_spectral.discovery.chains.linear import LinearPart
from lightning_spectral.discovery.chains.multipliers import multiplier_factors
from lightning_spectral.discovery.chains.recipes import attribute_path
from lightning_spectral.discovery.chains.scores import scores_of
from lightning_spectral.discovery.chains.steps import Steps
from lightning_spectral.discovery.structure.adds import Refusal, ResidualAdd
from lightning_spectral.discovery.structure.layouts import turned_over
from lightning_spectral.discovery.structure.residual_stream import goes_on
from lightning_spectral.discovery.structure.sites import Site, choose_site, usable_modules
from lightning_spectral.discovery.structure.terms import Term
from lightning_spectral.discovery.trace.hankel import entrywise
from lightning_spectral.discovery.trace.operands import UnmeasurableError
from lightning_spectral.discovery.trace.operations import (
    Multiplier,
    is_attention,
    is_contraction,
    is_fused_attention,
    is_product,
    matrix_operands,
    refs,
    weight_operand,
)
from lightning_spectral.discovery.trace.probe import Prober, Region
from lightning_spectral.discovery.trace.replay import replay
from lightning_spectral.discovery.trace.surprises import SURPRISES, surprise
from lightning_spectral.discovery.trace.tape import Operation, Tape
from lightning_spectral.records import Branch, BranchKind, Factor, Path

__all__ = ["FoundBranch", "alike", "branches_of", "finished", "times"]


@dataclass(frozen=True, slots=True)
class FoundBranch:
    """A branch, and where it lies on the tape.

    Attributes:
        kind: The kind of the branch.
        add: The residual add that the branch enters.
        terms: The terms of the residual add that form the branch.
        site: The place where the branch can be scaled.
        modules: Paths of the modules whose calls made the products of the branch.
        neighbours: How many other positions of its output move when one position of the stream is perturbed.
    """

    kind: BranchKind
    add: ResidualAdd
    terms: tuple[Term, ...]
    site: Site
    modules: tuple[str, ...]
    neighbours: int

    @property
    def added(self) -> int:
        """The last value that contains this branch and no other, in the layout of the stream."""
        first, *rest = self.terms
        others = (term for term in (self.add.skip, *self.add.branches, *self.add.others) if term not in self.terms)
        shared = set(first.spine).intersection(*(term.spine for term in rest))
        return max(shared.difference({self.add.output}, *(term.spine for term in others)))


def branches_of(tape: Tape, adds: Sequence[ResidualAdd], prober: Prober) -> tuple[list[FoundBranch], list[Refusal]]:
    """Return every branch in the order of execution, and the sums whose branches were refused, with reasons."""
    usable = usable_modules(tape, adds)
    found: list[FoundBranch] = []
    refusals: list[Refusal] = []
    turned = turned_over(tape, adds, prober)
    for add in adds:
        try:
            grouped = list(_grouped(tape, add, prober, usable))
        except SURPRISES as error:
            what = f"what a sum of shape {tape.shape(add.output)} adds could not be told"
            refusals.append(Refusal(add.output, surprise(what, error)))
            continue
        for kind, terms, neighbours in grouped:
            if kind == "mlp" and add.output in turned:
                kind, neighbours = "mixer", tape.shape(add.stream)[-1] - 1
            others = [term for term in (add.skip, *add.branches, *add.others) if term not in terms]
            site = choose_site(tape, add, terms, others, usable)
            if site is None and not goes_on(tape, add.output):
                reason = (
                    f"a sum of shape {tape.shape(add.output)} is gated, squashed or joined: it is no residual stream"
                )
                refusals.append(Refusal(add.output, reason))
                continue
            try:
                site = site or _parameter_site(tape, add, terms, prober)
            except UnmeasurableError as error:
                reason = f"a branch of shape {tape.shape(terms[0].start)} is carried by no module, and {error}"
                refusals.append(Refusal(add.output, reason))
                continue
            modules = tuple(dict.fromkeys(path for term in terms for path in _modules(tape, add, term)))
            found.append(FoundBranch(kind, add, tuple(terms), site, modules, neighbours))
    return sorted(found, key=lambda branch: min(term.start for term in branch.terms)), refusals


def _grouped(
    tape: Tape, add: ResidualAdd, prober: Prober, usable: Container[str]
) -> Iterator[tuple[BranchKind, list[Term], int]]:
    """Yield branches as (kind, terms, neighbours). Terms of one kind form one branch if a module returns their sum.

    Routed and shared experts are an example: the module of the mixture returns their sum.
    """
    kinds = {term.start: _kind(tape, add, term, prober) for term in add.branches}
    remaining = list(add.branches)

    def one_module_returns(terms: Sequence[Term]) -> bool:
        others = [item for item in (add.skip, *add.branches, *add.others) if item not in terms]
        return choose_site(tape, add, terms, others, usable) is not None

    while remaining:
        first, *rest = remaining
        kind, neighbours = kinds[first.start]
        alike = [term for term in rest if kinds[term.start][0] == kind]
        together = [first, *alike]
        if not one_module_returns(together):  # not all of them: add the terms one by one while a module returns the sum
            together = [first]
            for term in alike:
                if one_module_returns([*together, term]):
                    together.append(term)
        remaining = [term for term in rest if term not in together]
        yield kind, together, neighbours


def _kind(tape: Tape, add: ResidualAdd, term: Term, prober: Prober) -> tuple[BranchKind, int]:
    """Return the kind of one term, and how many other positions move when one is perturbed.

    ===============  =================  ==============================================  =================
    moves others     softmax or kernel  further sign                                    kind
    ===============  =================  ==============================================  =================
    yes              yes                a product of data with data                     attention
    yes              otherwise                                                          mixer
    no               yes                looks up positions that were put beside its own attention
    no               any                looks up data that is not of the stream         cross_attention
    no               any                                                                mlp
    ===============  =================  ==============================================  =================
    """
    region = Region(tape, add.stream, term.start)
    operations = [operation for value in region.values[1:] if (operation := tape.producer(value)) is not None]
    attends = any(is_attention(operation) for operation in operations)
    moved = prober.moved_positions(region)
    if not moved and attends and any(_reads_beside(tape, operation, add.stream) for operation in operations):
        return "attention", 0  # the stream is a class token, which attends to itself and to the patches
    if moved > 0:
        mixes = any(is_contraction(operation) and not is_product(tape, operation) for operation in operations)
        return ("attention" if attends and mixes else "mixer"), moved
    for operation in operations:
        if any(tape.is_data(value) and not tape.depends(value, add.stream) for value in _looked_up(tape, operation)):
            return "cross_attention", 0
    return "mlp", 0


def _reads_beside(tape: Tape, operation: Operation, stream: int) -> bool:
    """Whether attention looks up positions of a sequence that joins the stream with data that is not of the stream."""
    rows = (value for item in _looked_up(tape, operation) for value in tape.between(stream, item)[1:])
    joins = (join for value in rows if (join := tape.producer(value)) is not None and _joins_positions(tape, join))
    return any(tape.is_data(item) and not tape.depends(item, stream) for join in joins for item in join.inputs)


def _joins_positions(tape: Tape, operation: Operation) -> bool:
    """Whether an operation joins values along a dimension of positions: neither the first (batch) nor the last."""
    rank = len(tape.shape(operation.outputs[0]))
    dim = operation.args[1] if len(operation.args) > 1 else 0
    return operation.name == "cat" and isinstance(dim, int) and 0 < dim % rank < rank - 1


def _looked_up(tape: Tape, operation: Operation) -> tuple[int, ...]:
    """Return the values that an operation looks up: the keys of attention, or a picture that is sampled at places."""
    if "grid_sampler" in operation.name:
        return refs(operation, 0)
    if not is_contraction(operation) or is_product(tape, operation):
        return ()
    return refs(operation, 1) if is_fused_attention(operation) else matrix_operands(operation)


def _modules(tape: Tape, add: ResidualAdd, term: Term) -> Iterator[str]:
    """Yield the paths of the calls that made the products of a branch, or all its operations if it has no product."""
    inside = [value for value in tape.between(add.stream, term.start) if value not in add.skip.spine]
    operations = [operation for value in inside if (operation := tape.producer(value)) is not None]
    products = [operation for operation in operations if is_product(tape, operation)] or operations
    for operation in products:
        yield tape.calls[operation.call].path if operation.call >= 0 else ""


def _parameter_site(tape: Tape, add: ResidualAdd, terms: Sequence[Term], prober: Prober) -> Site:
    """Return the last weight of a branch as its site, for a branch that no module carries.

    Scaling that weight scales the branch if the branch is affine in it and uses it once. A branch is not affine in the
    weight of a gate. If it is affine in no weight, the last one still gives the branch its name.

    Raises:
        UnmeasurableError: There is no such weight. The message continues a sentence that ends with "and".
    """
    gates: list[Site] = []
    problem = "no weight is in it"
    for value in reversed(tape.between(add.stream, terms[0].start)):
        operation = tape.producer(value)
        if operation is None or not is_product(tape, operation):
            continue
        weight = weight_operand(tape, operation)
        known = [] if weight is None else tape.parents_with_names(weight)
        paths = {attribute_path(tape.names[value]) for value in known}  # a parametrized weight has several parents
        if len(paths) != 1:
            problem = f"its last weight is made of {' and '.join(sorted(paths)) or 'no parameter'}"
            break
        site = Site(f"param:{paths.pop()}", None, terms[0].start)
        beside = any(tape.depends(term.leaf, value) for term in add.branches if term not in terms)
        if beside or any(_product_count(tape, value) > 1 for value in known):
            path = site.path.removeprefix("param:")
            problem = f"its last weight {path} is used more than once (by a recurrence, or by a second branch)"
            break
        if weight is not None and _is_affine_in(tape, prober, add, terms, weight):
            return site
        gates.append(replace(site, carries=False))
    if gates:
        return gates[0]
    raise UnmeasurableError(problem)


def _is_affine_in(tape: Tape, prober: Prober, add: ResidualAdd, terms: Sequence[Term], weight: int) -> bool:
    """Whether a branch is an affine function of one of its weights: f(3w) − f(0) = 3 (f(w) − f(0))."""
    region = Region(tape, add.stream, terms[0].start)
    held = prober.made_up_weights(region) | prober.finite_around(region)
    content = held.pop(weight, tape.wide(weight))
    try:
        zero, one, three = (
            replay(tape, {weight: _times(factor, content)}, terms[0].start, held=held) for factor in (0.0, 1.0, 3.0)
        )
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False
    return bool((three - zero - 3 * (one - zero)).abs().max() <= 1e-9 * three.abs().max())


def _times(factor: float, content: Tensor) -> Tensor:
    return entrywise(lambda entries: factor * entries, content)


def _product_count(tape: Tape, parameter: int) -> int:
    """Return how many products of the pass use a parameter."""
    weights = [weight_operand(tape, operation) for operation in tape.operations if is_product(tape, operation)]
    return sum(weight is not None and tape.depends(weight, parameter) for weight in weights)


def finished(
    tape: Tape, modules: Mapping[str, nn.Module], block: str, branch: FoundBranch, kind: BranchKind, prober: Prober
) -> tuple[Branch, ...]:
    """Return the record of a branch, with its factors or the reason why it has none.

    Returns:
        One record. Two records with one site where attention and an MLP share their last matrix.
    """
    site = branch.site
    record = Branch(kind, site.path, site.output_index)
    if kind == "mixer":
        return (replace(record, reason="a token mixer that is not attention has no weight linearization"),)
    if kind == "cross_attention":
        return (replace(record, reason="cross-attention reads another sequence and is not part of the ratio"),)
    try:
        region, multipliers = _whole(tape, branch)
        linear = LinearPart(Steps(tape, region, prober), mixes_tokens=kind == "attention")
        found = chains(linear, prober, kind)
        kinds = _kinds(found, kind)
        paths = with_all_experts(tape, modules, block, found)
        paths = agreed_paths(linear, prober, paths)
        if len(set(kinds)) > 1 and len(paths) != len(kinds):
            raise UnmeasurableError("attention and an MLP lie in one branch, with several matrices side by side")
        outer = (*_written(tape, branch.add), *multiplier_factors(tape, [item for _, item in multipliers]))
    except UnmeasurableError as error:
        return (replace(record, reason=str(error)),)
    except SURPRISES as error:
        return (replace(record, reason=surprise("its product could not be read", error)),)
    paths = tuple(replace(path, factors=merged((*outer, *path.factors))) for path in paths)
    if kind == "attention":
        record = replace(record, scores=scores_of(linear, prober, modules))
    if len(set(kinds)) == 1:
        return (replace(record, paths=paths),)
    pairs = tuple(zip(kinds, paths, strict=True))
    return tuple(
        replace(record, kind=kind, paths=tuple(path for own, path in pairs if own == kind))
        for kind in dict.fromkeys((kind, *kinds))
    )


def _kinds(found: Sequence[FoundChain], kind: BranchKind) -> list[BranchKind]:
    """Return the kind of every chain of a branch.

    Raises:
        UnmeasurableError: Attention and an MLP lie one behind the other in one branch, or the data chooses chains.
    """
    kinds = [kind_of(chain, kind) for chain in found]
    if "mlp" in kinds and kind == "attention":
        if any(chain.mixes and chain.bends for chain in found):
            raise UnmeasurableError("attention and an MLP behind it lie in one branch")
        if any(chain.selective for chain in found):
            raise UnmeasurableError("attention and an MLP lie in one branch, and the data chooses between its ways")
    return kinds


def alike(records: Sequence[Branch]) -> Branch:
    """Return the record of a branch that a model runs several times, without factors if they differ between calls.

    Args:
        records: The records of the calls, in the order of execution.
    """
    first, *others = records
    if all(_rounded(other.paths) == _rounded(first.paths) for other in others):
        return first
    reason = f"it runs {len(records)} times, and what multiplies it or its matrices is not the same each time"
    return replace(first, paths=(), reason=first.reason or reason)


def times(count: int, record: Branch) -> Branch:
    """Return the record of a branch that one run of its block calls several times: to first order, their sum."""
    if count == 1:
        return record
    scale = Factor("scale", None, constant=float(count))
    return replace(record, paths=tuple(replace(path, factors=merged((scale, *path.factors))) for path in record.paths))


def _rounded(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return paths with rounded constants, which each call computed anew."""

    def chain(factors: Sequence[Factor]) -> tuple[Factor, ...]:
        return tuple(replace(item, constant=round(item.constant, 6)) for item in factors)

    return tuple(replace(path, factors=chain(path.factors)) for path in paths)


def _written(tape: Tape, add: ResidualAdd) -> Iterator[Factor]:
    """Yield the multipliers of a branch on its way to several streams; a vector counts by its root mean square."""
    for factor in multiplier_factors(tape, add.stack.writers) if add.stack is not None else ():
        many = factor.size is not None and factor.size > 1
        yield replace(factor, layout=(*factor.layout, ("rms",)), size=None) if many else factor


def _whole(tape: Tape, branch: FoundBranch) -> tuple[Region, tuple[tuple[int, Multiplier], ...]]:
    """Return the region of a branch, up to the value that is the sum of its terms, and the multipliers of that value.

    Raises:
        UnmeasurableError: One value is added several times, with learned multipliers.
    """
    first, *rest = branch.terms
    if not rest:
        return Region(tape, branch.add.stream, first.start), first.outer
    together = min(set(first.spine).intersection(*(term.spine for term in rest)))
    outer = [tuple(item for item in term.multipliers if item[0] >= together) for term in branch.terms]
    if all(term.start >= together for term in branch.terms):  # one value, added several times
        numbers = [[item for _, item in multipliers if isinstance(item, float)] for multipliers in outer]
        if list(map(len, numbers)) != list(map(len, outer)):
            raise UnmeasurableError("it is added several times, each time with a learned multiplier")
        return Region(tape, branch.add.stream, together), ((together, float(sum(map(math.prod, numbers)))),)
    return Region(tape, branch.add.stream, together), outer[0]
