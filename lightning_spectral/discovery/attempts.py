"""Run a model, or the parts that it is made of, on given or guessed inputs, and record each pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from traceback import walk_tb
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_spectral.discovery.inputs import guesses
from lightning_spectral.discovery.structure.parts import attends_to_one, has_lists, idle_parts, parts
from lightning_spectral.discovery.trace.recorder import LooksAtDataError, record
from lightning_spectral.discovery.trace.tape import Tape
from lightning_spectral.errors import ExampleInputError
from lightning_spectral.linalg.sharding.flattened import is_flattened
from lightning_spectral.linalg.sharding.presence import is_dtensor, is_fully_sharded
from lightning_spectral.linalg.threads import one_thread
from lightning_spectral.passes.aside import kept

__all__ = ["Pass", "attempted_calls", "passed", "recorded", "refuse_unreadable"]


# Weights from which on shapes alone are recorded. A symbolic operation costs 0.1 ms of Python, whatever its size; below
# this size running the model costs less.
_LARGE = 2**26


class Pass(NamedTuple):
    """A recorded pass of a model or of one part.

    Attributes:
        tape: The recorded pass.
        description: The input, in words.
        remark: Why the pass was run and not only its shapes recorded, where shapes would have cost less.
    """

    tape: Tape
    description: str
    remark: str | None = None


def recorded(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, symbolic: bool = False
) -> list[Pass]:
    """Record a pass on the given inputs, or on the first guess that runs.

    Without given inputs, the parts of the model that did not run in this pass are run and recorded afterwards.

    Args:
        model: The model, or a wrapper around it.
        args: Positional arguments, if the caller has some.
        kwargs: Keyword arguments, if the caller has some.
        symbolic: Whether shapes alone may be recorded: see :func:`_pass`.

    Raises:
        ExampleInputError: No input ran, or the model is sharded. The message lists what was tried.
    """
    if not symbolic:
        refuse_unreadable(model)
    attempts: list[str] = []
    search = partial(_search, model, args, kwargs, attempts, symbolic)
    found = search(_unwrapped(model))
    if found and not (args or kwargs):
        found += [item for part in idle_parts(model, [item.tape for item in found]) for item in search(part)]
    if found:
        return found
    advice = (
        f"{type(model).__name__} could not be run on any guessed input, and its structure is read from one forward "
        "pass. Pass an example, batch=example_input (to a monitor: blocks=find_blocks(model, batch=example_input)), "
        "or set example_input_array on the LightningModule. Tried:"
    )
    raise ExampleInputError("\n".join([advice, *(attempts or ["  nothing: the model gives no sign of what it takes"])]))


def passed(
    model: nn.Module,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    symbolic: bool = False,
) -> Pass:
    """Record a pass of one module of a model. The tape uses the names that parameters have in the model.

    Raises:
        ExampleInputError: The pass failed.
    """
    try:
        return _pass(model, module, args, dict(kwargs), "the first training batch", symbolic)
    except ExampleInputError:
        raise
    except Exception as error:  # whatever the user's forward raises
        raise ExampleInputError(
            f"{type(module).__name__} cannot be run again on the input of its first pass: "
            f"{type(error).__name__}: {_short(error)}"
        ) from error


def _pass(
    model: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], description: str, symbolic: bool
) -> Pass:
    """Record a pass of a module of a model.

    Of a large model, and of one whose weights are not all here, shapes alone are recorded if that is allowed and if the
    model does not look at its data.

    Raises:
        ExampleInputError: Shapes are not enough, and the weights are not here.
        Exception: Whatever the user's forward raises.
    """
    call = _call(module, args, kwargs)
    problem = None
    if symbolic and (_is_elsewhere(model) or _size(model) >= _LARGE):
        try:
            return Pass(_recorded(model, call, (args, kwargs), symbolic=True), description)
        except LooksAtDataError as error:
            problem = str(error)
        except Exception as error:  # whatever the user's forward raises, or an operation without a meta kernel
            if _is_elsewhere(model):
                raise
            problem = f"its shapes alone could not be recorded: {type(error).__name__}: {_short(error)}"
    refuse_unreadable(model, problem)
    return Pass(_recorded(model, call, (args, kwargs)), description, problem)


def _recorded(model: nn.Module, call: Callable[[], Any], inputs: Any, *, symbolic: bool = False) -> Tape:
    try:
        return record(model, call, inputs, symbolic=symbolic)
    except NotImplementedError:  # of a kernel without a backward pass here, such as flex_attention on a CPU
        return record(model, call, inputs, symbolic=symbolic, grad=False)


def _search(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    attempts: list[str],
    symbolic: bool,
    module: nn.Module,
) -> list[Pass]:
    """Record a pass of a module. If the module cannot be run, record a pass of each of its parts instead."""
    runs_itself = False
    poor: list[Pass] = []
    for description, make in _arguments(module, args, kwargs):
        try:
            positional, named = make()
            with nullcontext() if args or kwargs else one_thread():  # guesses are small
                found = _pass(model, module, positional, named, description, symbolic)
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
                    f"{_on_lists(args)}"
                ) from error
            runs_itself |= not without_forward
            attempts.append(f"  {type(module).__name__} on {description}: {type(error).__name__}: {_short(error)}")
    if poor:
        return poor
    below = parts(module)
    if runs_itself and (len(below) > 1 or has_lists(module)):
        return []  # the module runs, but not on our guesses: its parts alone would show another model
    whole = [_search(model, args, kwargs, attempts, symbolic, part) for part in below]
    return [item for passes in whole for item in passes] if all(whole) else []  # one missing part makes a wrong model


def _on_lists(args: Sequence[Any]) -> str:
    """Return a remedy where a list came, as a DataLoader yields it: a list is one argument."""
    if not any(isinstance(item, list) for item in args):
        return ""
    return ". A list is one argument: pass the input alone, batch=batch[0], or a tuple of all arguments, tuple(batch)"


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


def _size(model: nn.Module) -> int:
    """Return the number of entries of all parameters that have a shape."""
    return sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))


def _is_elsewhere(model: nn.Module) -> bool:
    """Whether some weights hold no numbers, or are spread over processes, if only between two passes."""
    weights = (item for item in model.parameters() if not is_lazy(item))
    return any(map(is_fully_sharded, model.modules())) or any(item.is_meta or is_dtensor(item) for item in weights)


def refuse_unreadable(model: nn.Module, problem: str | None = None) -> None:
    """Raise for a model whose weights are not all here: a pass needs whole weights.

    Args:
        model: The model.
        problem: Why its shapes alone are not enough.

    Raises:
        ExampleInputError: The model is sharded, or on the meta device.
    """
    because = "" if problem is None else f", and {problem}"
    if any(parameter.is_meta for parameter in model.parameters() if not is_lazy(parameter)):
        raise ExampleInputError(
            f"{type(model).__name__} has parameters on the meta device, which hold no numbers{because}: materialize it "
            "first (to_empty and initialize, or load a checkpoint), then look for its blocks"
        )
    name = next((name for name, item in model.named_parameters() if is_dtensor(item)), None)
    if name is not None or is_flattened(model) or any(map(is_fully_sharded, model.modules())):
        raise ExampleInputError(
            f"{type(model).__name__} is sharded{f' ({name} is a DTensor)' if name else ''}{because}, and structure is "
            "read from one forward pass of whole weights. Find the blocks before sharding, blocks = find_blocks(model) "
            "in configure_model ahead of parallelize_module and fully_shard, and pass them on: measure(model, blocks), "
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
