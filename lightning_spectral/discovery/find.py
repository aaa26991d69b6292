"""``find_blocks``: from a model that nobody prepared to its residual blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from lightning_spectral.discovery.asked import check_blocks, check_hints, check_model
from lightning_spectral.discovery.attempts import Pass, passed, recorded
from lightning_spectral.discovery.hints import with_hints
from lightning_spectral.discovery.inputs import arguments_of
from lightning_spectral.discovery.structure.branches import FoundBranch, alike, branches_of, finished, times
from lightning_spectral.discovery.structure.ends import EndFinder
from lightning_spectral.discovery.structure.groups import Groups, calls_in_a_run, named_groups, settled_kinds
from lightning_spectral.discovery.structure.heard import stream_behind
from lightning_spectral.discovery.structure.layouts import channels_of_neighbours
from lightning_spectral.discovery.structure.parts import unseen
from lightning_spectral.discovery.structure.residual import residual_adds
from lightning_spectral.discovery.structure.selfcheck import SelfCheck
from lightning_spectral.discovery.structure.shapes import with_shapes
from lightning_spectral.discovery.trace.probe import Prober, Region
from lightning_spectral.discovery.trace.surprises import SURPRISES, surprise
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.errors import BlocksNotFoundError, ExampleInputError
from lightning_spectral.linalg.threads import one_thread
from lightning_spectral.records import Blocks, Branch, ResidualBlock
from lightning_spectral.weights.model import is_quantized

__all__ = ["Found", "asked_blocks", "blocks_in_calls", "blocks_of", "find_blocks"]

_TOLD = 4  # refused sums that are listed; further ones are counted
_HATCH = """If the model has residual blocks, describe them (paths relative to the block, * for one path component):

    find_blocks(model, hints={
        "layers.*": {
            "attention": {"site": "attn.out", "output": "attn.out.weight", "value": "attn.v.weight"},
            "mlp": {"site": "mlp", "down": "mlp.w2.weight", "up": "mlp.w1.weight"},
        },
    })"""


def find_blocks(model: nn.Module, *, batch: Any = None, hints: Mapping[str, Any] | None = None) -> Blocks:
    """Find every residual block of a model: its branches, their kinds, their sites and their factors.

    The structure is read from one traced forward pass: which values are added to the residual stream, which module
    returned each of them, whether it mixes tokens, and which matrices lie on its linear path. Names only break ties.
    The pass leaves parameters, buffers, hooks, training flags and random streams as they were.

    Without an example input, parts that did not run are run by themselves: for example the second tower of a model
    whose forward takes an optional second input. A model that has no forward of its own, such as many a
    LightningModule, is searched part by part. Frozen parts are searched only if all parts are frozen.

    Args:
        model: Any module; a LightningModule, a compiled module or a module in DDP as well.
        batch: Input of one forward pass: a tensor, a tuple of positional arguments or a dict of keyword arguments. A
            tiny batch of two sequences is enough. Without one, the module's ``example_input_array``, the conventions of
            its ``config``, token ids below the size of its embedding, images and floats of its width are tried in turn.
        hints: Overrides for a model that is not understood; see :mod:`lightning_spectral.discovery.hints`.

    Returns:
        The blocks in the order of execution. Each block's ``verified`` says whether the self-check passed; its
        ``evidence`` says how it was found and what failed. ``notes`` names the parts of the model that no pass ran,
        the sums that look like residual adds and are none, and what the norms leave out.

    Raises:
        ExampleInputError: No example input could be run, or the model looks at its data and its weights are on the meta
            device or spread over processes.
        BlocksNotFoundError: The pass contains no residual block; the message says what was tried.
        ConfigurationError: The hints do not fit the model, or an argument is of another type.

    Example:
        >>> find_blocks(model)
        3 residual blocks
              block            attention  mlp  self-check
           0  transformer.h.0  attn       mlp  verified
        ...
    """
    check_model(model, "find_blocks")
    check_hints(hints)
    args, kwargs = arguments_of(batch)
    try:
        passes = recorded(model, args, kwargs, symbolic=True)
    except ExampleInputError:
        if not hints:
            raise
        passes = []
    return _blocks_on(model, passes, hints)


def asked_blocks(
    model: nn.Module, blocks: Sequence[ResidualBlock] | None, batch: Any, function: str
) -> Sequence[ResidualBlock]:
    """Return the blocks that a public function works on: the given blocks, or else the blocks that are found.

    Args:
        model: The model.
        blocks: Its blocks, if the user has passed them.
        batch: Example input for finding blocks.
        function: Name of the public function, for its errors.

    Raises:
        ConfigurationError: The model is no module, or the blocks are no blocks.
        BlocksNotFoundError, ExampleInputError: As :func:`find_blocks` raises them.
    """
    check_model(model, function)
    check_blocks(blocks, f"{function}(model, find_blocks(model))")
    return find_blocks(model, batch=batch) if blocks is None else blocks


def blocks_in_calls(
    model: nn.Module,
    calls: Iterable[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]],
    hints: Mapping[str, Any] | None = None,
) -> Blocks:
    """Find the residual blocks in passes of some modules of a model. All names are paths in the model.

    Args:
        model: The model, which need not be callable itself.
        calls: Modules of the model, each with the positional and the keyword arguments of one pass.
        hints: Overrides, as in :func:`find_blocks`.

    Raises:
        ExampleInputError: A pass failed, or the model is sharded.
        BlocksNotFoundError: No pass contains a residual block.
        ConfigurationError: The hints do not fit the model.
    """
    passes = [passed(model, module, args, kwargs, symbolic=True) for module, args, kwargs in calls]
    return _blocks_on(model, passes, hints)


class Found(NamedTuple):
    """The blocks on one tape.

    Attributes:
        blocks: The blocks in the order of execution.
        refused: Why some sums that look like residual adds are none.
        notes: What the norms leave out.
    """

    blocks: list[ResidualBlock]
    refused: list[str]
    notes: list[str]


def blocks_of(tape: Tape, model: nn.Module) -> Found:
    """Find the residual blocks of a recorded forward pass: the steps 2 to 6 of "Finding the blocks", docs/inside.md.

    Args:
        tape: The recorded forward pass, which is step 1.
        model: The model that was recorded.
    """
    prober = Prober(tape)
    adds, refused = residual_adds(tape, prober)  # 2. where something is added to the stream
    prober.told = channels_of_neighbours(tape, adds, prober)
    branches, homeless = branches_of(tape, adds, prober)  # 3. what each addend is, and where it can be scaled
    groups = named_groups(tape, dict(model.named_modules()), branches)  # 4. which branches form a block
    records = _with_factors(tape, model, groups, branches, prober)  # 5. the matrices of each branch
    blocks = _checked(groups, records, SelfCheck(tape, prober, branches, [*refused, *homeless]))  # 6. is it so
    return Found(blocks, [refusal.reason for refusal in (*refused, *homeless)], list(dict.fromkeys(_notes(branches))))


def _with_factors(
    tape: Tape, model: nn.Module, groups: Groups, branches: Sequence[FoundBranch], prober: Prober
) -> dict[str, tuple[Branch, ...]]:
    """Return the records of the branches of each block: kinds, sites, factors and ends."""
    modules, aliases = dict(model.named_modules()), _further_paths(model)
    finder = EndFinder(tape, model, branches, prober)
    result = {}
    for name, members in groups.items():
        records: list[Branch] = []
        counts = calls_in_a_run(tape, branches, groups, name)
        for branch, kind in zip(members, settled_kinds(members), strict=True):
            # A shared block runs several times. Its factors have to be the same in every call.
            calls = [item for item in branches if item.site.path == branch.site.path]
            ways = [finished(tape, modules, name, call, kind, prober) for call in calls]
            for place in range(max(map(len, ways))):
                record = times(counts[branch.site.path], alike([way[min(place, len(way) - 1)] for way in ways]))
                records.append(finder.with_ends(record, branch, name))
        result[name] = tuple(replace(record, aliases=aliases.get(record.site, ())) for record in records)
    return result


def _further_paths(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the other paths of every module that has several, by its first path."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(path)
    return {first: tuple(others) for first, *others in found.values() if others}


def _checked(groups: Groups, records: Mapping[str, tuple[Branch, ...]], check: SelfCheck) -> list[ResidualBlock]:
    """Return the blocks, each with what its self-check says."""
    blocks = []
    for index, (name, members) in enumerate(groups.items()):
        problem = check.problem(name, members)
        if problem is None and len(records[name]) > len(members):
            problem = "attention and an MLP share one site, so neither can be scaled by itself"
        evidence = "trace" if problem is None else f"trace; not verified: {problem}"
        dims = _token_dims(check.tape, members, check.prober)
        stream = stream_behind(check.tape, name, members)
        blocks.append(ResidualBlock(index, name, records[name], problem is None, evidence, dims, stream))
    return blocks


def _token_dims(tape: Tape, members: Sequence[FoundBranch], prober: Prober) -> tuple[int, ...]:
    """Return the dimensions of the stream along which a block mixes positions."""
    ends = [branch.added if branch.add.stack is None else branch.add.stack.written for branch in members]
    regions = [Region(tape, branch.add.stream, end) for branch, end in zip(members, ends, strict=True)]
    try:
        return tuple(sorted({dim for region in regions for dim in prober.mixed_dims(region)}))
    except SURPRISES:
        return ()


def _notes(branches: Iterable[FoundBranch]) -> Iterator[str]:
    """Yield what the norms leave out of branches that write to several streams."""
    for branch in branches:
        stack = branch.add.stack
        if stack is not None and stack.depends:
            yield (
                f"the model keeps {stack.count} streams side by side, and maps that depend on its data read, mix or "
                "write them: those maps are left out of the norms"
            )


def _blocks_on(model: nn.Module, passes: Sequence[Pass], hints: Mapping[str, Any] | None) -> Blocks:
    """Return the blocks of several passes, each block once, with hints applied."""
    found: dict[str, ResidualBlock] = {}
    refusals: list[str] = []
    notes: list[str] = []
    for item in passes:
        try:
            with one_thread():
                on_tape = blocks_of(item.tape, model)
        except SURPRISES as error:
            refusals.append(surprise("the pass could not be read", error))
            continue
        refusals += on_tape.refused
        notes += on_tape.notes
        for block in on_tape.blocks:
            said = block.evidence if item.remark is None else f"{block.evidence}; recorded pass: {item.remark}"
            found.setdefault(block.name, replace(block, evidence=said))
    numbered = [replace(block, index=index) for index, block in enumerate(found.values())]
    if hints:
        numbered = list(with_hints(model, numbered, hints))
    elif not numbered:
        raise BlocksNotFoundError(_nothing_found(model, [item.description for item in passes], refusals))
    several = list(dict.fromkeys(refusals))
    notes += [f"no branch of a block: {reason}" for reason in several[:_TOLD]]
    notes += [f"and {len(several) - _TOLD} more such sums"] if len(several) > _TOLD else []
    notes += unseen(model, [item.tape for item in passes], numbered)
    return Blocks(with_shapes(model, numbered), dict.fromkeys(notes))


def _nothing_found(model: nn.Module, descriptions: Iterable[str], refusals: list[str]) -> str:
    """Return the message for a model without blocks: what was tried, what was refused, what to type next."""
    lines = [
        f"no residual block was found in {type(model).__name__}.",
        (
            f"Tried: one forward pass on {' and '.join(descriptions)}; a residual block is a sum x + f(x) in it, where "
            "f multiplies x with weights."
        ),
    ]
    lines += [f"Refused: {reason}." for reason in dict.fromkeys(refusals)]
    if packed := {name: type(item) for name, item in model.named_parameters() if is_quantized(item)}:
        name, kind = next(iter(packed.items()))
        lines.append(
            f"{len(packed)} of its parameters are tensors of a class of their own, whose products are not recorded, as "
            f"of a quantized model: {name} is a {kind.__module__}.{kind.__name__}. Look at the model before it is "
            "quantized."
        )
    return "\n".join([*lines, _HATCH])
