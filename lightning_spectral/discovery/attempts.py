"""Run a model, or the parts that it is made of, on given or guessed inputs, and record each pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from traceback import walk_tb
from typing import Any, NamedTuple

from torch import nn

from lightning_spectral.discovery.inputs import guesses
from lightning_spectral.discovery.structure.parts import attends_to_one, has_lists, idle_parts, parts
from lightning_spectral.discovery.trace.recorder import record
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.errors import ExampleInputError
from lightning_spectral.linalg.sharding.flattened import is_flattened
from lightning_spectral.linalg.sharding.presence import is_dtensor, is_fully_sharded
from lightning_spectral.passes.aside import kept

__all__ = ["Pass", "attempted_calls", "passed", "recorded", "refuse_unreadable"]


class Pass(NamedTuple):
    """A recorded pass of a model or of one part.

    Attributes:
        tape: The recorded pass.
        description: The input, in words.
    """

    tape: Tape
    description: str


def recorded(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Pass]:
    """Record a pass on the given inputs, or on the first guess that runs.

    Without given inputs, the parts of the model that did not run in this pass are run and recorded afterwards.

    Args:
        model: The model, or a wrapper around it.
        args: Positional arguments, if the caller has some.
        kwargs: Keyword arguments, if the caller has some.

    Raises:
        ExampleInputError: No input ran, or the model is sharded. The message lists what was tried.
    """
    refuse_unreadable(model)
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
    """Record a pass of one module of a model. The tape uses the names that parameters have in the model.

    Raises:
        ExampleInputError: The pass failed.
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
    """Record a pass of a module. If the module cannot be run, record a pass of each of its parts instead."""
    runs_itself = False
    poor: list[Pass] = []
    for description, make in _arguments(module, args, kwargs):
        try:
            positional, named = make()
            found = Pass(record(model, _call(module, positional, named), (positional, named)), description)
            if args or kwargs or not attends_to_one(found.tape):
                return [found]
            poor = [found]  # attention over one position cannot show that it mixes positions: try a larger picture
        except ExampleInputError:  # the message already says what to pass
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
        return []  # the module runs, but not on our guesses: its parts alone would show another model
    whole = [_search(model, args, kwargs, attempts, part) for part in below]
    return [item for passes in whole for item in passes] if all(whole) else []  # one missing part makes a wrong model


def _lacks_forward(module: nn.Module, error: BaseException) -> bool:
    """Whether a module itself has no forward. A NotImplementedError from an operation inside it does not count."""
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


def refuse_unreadable(model: nn.Module) -> None:
    """Raise for a sharded model: its weights are whole while a layer runs at most, and a tape needs whole weights.

    Raises:
        ExampleInputError: The model is sharded.
    """
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
    """Return the first line of a message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def attempted_calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, nn.Module, Callable[[], Any]]]:
    """Yield calls worth trying: the input in words, the module to call, and a function that makes its arguments.

    Args:
        model: The model, or a wrapper around it.
        args: Positional arguments, if the caller has some.
        kwargs: Keyword arguments, if the caller has some.
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
    """Yield the given arguments, or every guess: a description, and a function that makes the arguments."""
    if args or kwargs:
        yield "the given example input", lambda: (args, dict(kwargs))
        return
    with kept(module):  # an example may be a property that draws numbers
        tried = list(guesses(module))
    for description, make in tried:
        yield description, partial(_made, module, make)


def _made(module: nn.Module, make: Callable[[], Any]) -> Any:
    """Make guessed arguments. Making them may run the user's code, so the module is restored afterwards."""
    with kept(module):
        return make()
