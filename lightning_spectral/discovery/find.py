"""``find_blocks``: from a model that nobody prepared to its residual blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from traceback import walk_tb
from typing import Any, NamedTuple

from torch import nn

from lightning_spectral.discovery.asked import check_blocks, check_hints, check_model
from lightning_spectral.discovery.hints import with_hints
from lightning_spectral.discovery.inputs import arguments_of, guesses
from lightning_spectral.discovery.structure.assembly import blocks_of
from lightning_spectral.discovery.structure.parts import attends_to_one, has_lists, idle_parts, parts, unseen
from lightning_spectral.discovery.structure.shapes import with_shapes
from lightning_spectral.discovery.trace.recorder import record
from lightning_spectral.discovery.trace.surprises import SURPRISES, surprise
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.errors import BlocksNotFoundError, ExampleInputError
from lightning_spectral.linalg.sharding.flattened import is_flattened
from lightning_spectral.linalg.sharding.presence import is_dtensor, is_fully_sharded
from lightning_spectral.passes.aside import kept
from lightning_spectral.records import Blocks, ResidualBlock

__all__ = ["Pass", "asked_blocks", "attempted_calls", "blocks_in_calls", "find_blocks", "passed", "recorded"]

_TOLD = 4  # sums that are no residual adds: further ones are counted
_HATCH = """If the model has residual blocks, describe them (paths relative to the block, * for one path component):

    find_blocks(model, hints={
        "layers.*": {
            "attention": {"site": "attn.out", "output": "attn.out.weight", "value": "attn.v.weight"},
            "mlp": {"site": "mlp", "down": "mlp.w2.weight", "up": "mlp.w1.weight"},
        },
    })"""


def find_blocks(model: nn.Module, *, batch: Any = None, hints: Mapping[str, Any] | None = None) -> Blocks:
    """Find every residual block of a model: its branches, their kinds, their sites and their factors.

    The structure is read from one traced forward pass: what is added to the residual stream, which module returned it,
    whether it mixes tokens, and which matrices lie on its linear path. Names only break ties. The pass leaves
    parameters, buffers, hooks, training flags and random streams as they were.

    Without an example input, parts that did not run are run by themselves: a tower of a model of two, whose input is
    optional. A model that has no forward of its own, such as many a LightningModule, is searched in its parts, frozen
    ones only if all are frozen.

    Args:
        model: Any module; a LightningModule, a compiled module or a module in DDP as well.
        batch: Input of one forward pass: a tensor, a tuple of positional arguments or a dict of keyword arguments. A
            tiny batch of two sequences is enough. Without one, the module's ``example_input_array``, the conventions of
            its ``config``, token ids below the size of its embedding, images and floats of its width are tried in turn.
        hints: Overrides for a model that is not understood; see :mod:`lightning_spectral.discovery.hints`.

    Returns:
        The blocks in the order of execution. Their ``verified`` says whether the self-check passed, ``evidence`` how
        they were found and what failed. ``notes`` names the parts of the model that no pass has looked at, sums that
        look like residual adds and are none, and what is left out of the norms.

    Raises:
        ExampleInputError: No example input could be run, or the model is sharded or on the meta device.
        BlocksNotFoundError: The pass contains no residual block; the message says what was tried.
        ConfigurationError: The hints do not fit the model, or an argument is of another type.
    """
    check_model(model, "find_blocks")
    check_hints(hints)
    args, kwargs = arguments_of(batch)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ExampleInputError(
            f"{type(model).__name__} has parameters on the meta device, which hold no numbers: materialize it first "
            "(to_empty and initialize, or load a checkpoint), then look for its blocks"
        )
    passes: list[Pass] = []
    try:
        passes = recorded(model, args, kwargs)
    except ExampleInputError:
        if not hints:
            raise
    return _blocks_on(model, passes, hints)


def asked_blocks(
    model: nn.Module, blocks: Sequence[ResidualBlock] | None, batch: Any, function: str
) -> Sequence[ResidualBlock]:
    """Return the blocks that a public function is asked about: those that came, or those that are found.

    Args:
        model: The model.
        blocks: Its blocks, if the user has passed them.
        batch: Example input for finding them.
        function: Name of the public function, for its errors.

    Raises:
        ConfigurationError: The model or the blocks are something else.
        BlocksNotFoundError, ExampleInputError: As :func:`find_blocks` does.
    """
    check_model(model, function)
    check_blocks(blocks, f"{function}(model, find_blocks(model))")
    return find_blocks(model, batch=batch) if blocks is None else blocks


def blocks_in_calls(
    model: nn.Module,
    calls: Iterable[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]],
    hints: Mapping[str, Any] | None = None,
) -> Blocks:
    """Find the residual blocks in passes of some modules of a model. All names are those that the model has.

    Args:
        model: The model, which need not be callable itself.
        calls: Modules of the model, each with the positional and the keyword arguments of one pass.
        hints: Overrides, as in :func:`find_blocks`.

    Raises:
        ExampleInputError: A pass failed, or the model is sharded.
        BlocksNotFoundError: No pass contains a residual block.
        ConfigurationError: The hints do not fit the model.
    """
    _refuse_sharded(model)
    passes = []
    for module, args, kwargs in calls:
        passes.append(passed(model, module, args, kwargs))
    return _blocks_on(model, passes, hints)


def _blocks_on(model: nn.Module, passes: Sequence[Pass], hints: Mapping[str, Any] | None) -> Blocks:
    """Return the blocks on some tapes, each of them once."""
    found: dict[str, ResidualBlock] = {}
    refusals: list[str] = []
    notes: list[str] = []
    for item in passes:
        try:
            on_tape = blocks_of(item.tape, model)
        except SURPRISES as error:
            refusals.append(surprise("the pass could not be read", error))
            continue
        refusals += on_tape.refused
        notes += on_tape.notes
        for block in on_tape.blocks:
            found.setdefault(block.name, block)
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
    lines = [
        f"no residual block was found in {type(model).__name__}.",
        (
            f"Tried: one forward pass on {' and '.join(descriptions)}; a residual block is a sum x + f(x) in it, where "
            "f multiplies x with weights."
        ),
    ]
    lines += [f"Refused: {reason}." for reason in dict.fromkeys(refusals)]
    return "\n".join([*lines, _HATCH])


class Pass(NamedTuple):
    """A recorded pass of a model, or of a part of it, and what it was run on."""

    tape: Tape
    description: str


def recorded(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Pass]:
    """Record a pass on the given inputs, or on the first guess that runs, and passes of parts that did not run in it.

    Args:
        model: The model, or a wrapper around it.
        args: Positional arguments, if the caller has some.
        kwargs: Keyword arguments, the same.

    Raises:
        ExampleInputError: None ran, which says what was tried, or the model is sharded.
    """
    _refuse_sharded(model)
    attempts: list[str] = []
    search = partial(_search, model, args, kwargs, attempts)
    found = search(_unwrapped(model))
    if found and not (args or kwargs):
        found += [item for part in idle_parts(model, [item.tape for item in found]) for item in search(part)]
    if found:
        return found
    advice = (
        f"{type(model).__name__} could not be run on any guessed input, and its structure is read from one forward "
        "pass. Pass an example, batch=example_input, or set example_input_array on the LightningModule. "
        "Tried:"
    )
    raise ExampleInputError("\n".join([advice, *(attempts or ["  nothing: the model gives no sign of what it takes"])]))


def passed(model: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
    """Record a pass of a module of a model, under the names that the model has.

    Raises:
        ExampleInputError: It failed.
    """
    try:
        tape = record(model, _call(module, args, dict(kwargs)), (args, dict(kwargs)))
        return Pass(tape, "the first training batch")
    except ExampleInputError:
        raise
    except Exception as error:  # whatever the user's forward raises
        raise ExampleInputError(
            f"{type(module).__name__} cannot be run again on the input of its first pass: "
            f"{type(error).__name__}: {_short(error)}"
        ) from error


def _search(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], attempts: list[str], module: nn.Module
) -> list[Pass]:
    """Record a pass of a module or, where it cannot be run itself, of each of the parts that it is made of."""
    runs_itself = False
    poor: list[Pass] = []
    for description, make in _arguments(module, args, kwargs):
        try:
            positional, named = make()
            found = Pass(record(model, _call(module, positional, named), (positional, named)), description)
            if args or kwargs or not attends_to_one(found.tape):
                return [found]
            poor = [found]  # a picture that is too small shows nothing of attention: the largest that runs is kept
        except ExampleInputError:  # says itself what to pass
            raise
        except Exception as error:  # whatever the user's forward raises
            without_forward = _lacks_forward(module, error)
            if (args or kwargs) and not without_forward:
                raise ExampleInputError(
                    f"the model cannot be run on the given example input: {type(error).__name__}: {error}"
                ) from error
            runs_itself |= not without_forward
            attempts.append(f"  {type(module).__name__} on {description}: {type(error).__name__}: {_short(error)}")
    if poor:
        return poor
    below = parts(module)
    if runs_itself and (len(below) > 1 or has_lists(module)):
        return []  # its parts are not the model that its own forward makes of them, nor is a stem before its layers
    whole = [_search(model, args, kwargs, attempts, part) for part in below]
    return [item for passes in whole for item in passes] if all(whole) else []  # half of a model is none


def _lacks_forward(module: nn.Module, error: BaseException) -> bool:
    """Whether a module says that it has no forward; what an operation inside of it lacks is another matter."""
    trace = error.__traceback__
    if not isinstance(error, NotImplementedError) or trace is None:
        return False
    *_, (frame, _) = walk_tb(trace)
    own = frame.f_code.co_varnames[:1]
    return frame.f_code.co_name == "_forward_unimplemented" or any(frame.f_locals.get(name) is module for name in own)


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return model.module  # type: ignore[no-any-return]
    return model


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse a model whose weights exist in one piece only while a layer runs, or never: no pass can be looked at."""
    name = next((name for name, item in model.named_parameters() if is_dtensor(item)), None)
    if name is not None or is_flattened(model) or any(map(is_fully_sharded, model.modules())):
        raise ExampleInputError(
            f"{type(model).__name__} is sharded{f' ({name} is a DTensor)' if name else ''}, and structure is read from "
            "one forward pass of whole weights. Find the blocks before sharding, blocks = find_blocks(model) in "
            "configure_model ahead of parallelize_module and fully_shard, and pass them on: measure(model, blocks), "
            "SpectralMonitor(blocks=blocks). They stay valid, because they hold names"
        )


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: module(*args, **kwargs)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def attempted_calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, nn.Module, Callable[[], Any]]]:
    """Yield calls worth trying: what the input is, the module to call, and how to make its arguments.

    Args:
        model: The model, or a wrapper around it.
        args: Positional arguments, if the caller has some.
        kwargs: Keyword arguments, the same.
    """
    below = [_unwrapped(model)]
    while len(below) == 1:
        (module,) = below
        for description, make in _arguments(module, args, kwargs):
            yield description, module, make
        below = parts(module)


def _arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    if args or kwargs:
        yield "the given example input", lambda: (args, dict(kwargs))
        return
    with kept(module):  # an example may be a property that draws numbers
        tried = list(guesses(module))
    for description, make in tried:
        yield description, partial(_made, module, make)


def _made(module: nn.Module, make: Callable[[], Any]) -> Any:
    with kept(module):
        return make()
