"""``find_blocks``: from a model that nobody prepared to its residual blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_spectral.discovery.blocks import blocks_of
from lightning_spectral.discovery.hints import with_hints
from lightning_spectral.discovery.inputs import guesses
from lightning_spectral.discovery.recorder import record
from lightning_spectral.discovery.tape import Tape
from lightning_spectral.errors import BlocksNotFoundError, ExampleInputError
from lightning_spectral.linalg.flattened import is_flattened
from lightning_spectral.records import ResidualBlock

__all__ = ["attempted_calls", "blocks_in_calls", "find_blocks", "passed", "recorded"]

_HATCH = """If the model has residual blocks, describe them (paths relative to the block, * for one path component):

    find_blocks(model, hints={
        "layers.*": {
            "attention": {"site": "attn.out", "output": "attn.out.weight", "value": "attn.v.weight"},
            "mlp": {"site": "mlp", "down": "mlp.w2.weight", "up": "mlp.w1.weight"},
        },
    })"""


def find_blocks(
    model: nn.Module, *example_inputs: Any, hints: Mapping[str, Any] | None = None, **example_kwargs: Any
) -> tuple[ResidualBlock, ...]:
    """Find every residual block of a model: its branches, their kinds, their sites and their factors.

    The structure is read from one traced forward pass: what is added to the residual stream, which module returned it,
    whether it mixes tokens, and which matrices lie on its linear path. Names only break ties. The pass leaves
    parameters, buffers, hooks, training flags and random streams as they were.

    Args:
        model: Any module; a LightningModule, a compiled module or a module in DDP as well.
        *example_inputs: Arguments of one forward pass; a tiny batch of two sequences is enough. Without them the
            module's ``example_input_array``, the conventions of its ``config``, token ids below the size of its
            embedding, images and floats of its width are tried in turn.
        hints: Overrides for a model that is not understood; see :mod:`lightning_spectral.discovery.hints`.
        **example_kwargs: Keyword arguments of the same pass.

    Returns:
        The blocks in the order of execution. Their ``verified`` says whether the self-check passed, ``evidence`` how
        they were found and what failed.

    Raises:
        ExampleInputError: No example input could be run, or the model is sharded or on the meta device.
        BlocksNotFoundError: The pass contains no residual block; the message says what was tried.
        ConfigurationError: The hints do not fit the model.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ExampleInputError(
            f"{type(model).__name__} has parameters on the meta device, which hold no numbers: materialize it first "
            "(to_empty and initialize, or load a checkpoint), then look for its blocks"
        )
    try:
        tape, description = recorded(model, example_inputs, example_kwargs)
        blocks, refusals = blocks_of(tape, model)
    except ExampleInputError:
        if not hints:
            raise
        blocks, refusals, description = [], [], "nothing"
    if hints:
        return with_hints(model, blocks, hints)
    if not blocks:
        raise BlocksNotFoundError(_nothing_found(model, description, refusals))
    return tuple(blocks)


def blocks_in_calls(
    model: nn.Module,
    calls: Iterable[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]],
    hints: Mapping[str, Any] | None = None,
) -> tuple[ResidualBlock, ...]:
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
    blocks: list[ResidualBlock] = []
    refusals: list[str] = []
    for module, args, kwargs in calls:
        found, refused = blocks_of(passed(model, module, args, kwargs), model)
        blocks += found
        refusals += refused
    numbered = [replace(block, index=index) for index, block in enumerate(blocks)]
    if hints:
        return with_hints(model, numbered, hints)
    if not numbered:
        raise BlocksNotFoundError(_nothing_found(model, "the first training batch", refusals))
    return tuple(numbered)


def _nothing_found(model: nn.Module, description: str, refusals: list[str]) -> str:
    lines = [
        f"no residual block was found in {type(model).__name__}.",
        (
            f"Tried: one forward pass on {description}; a residual block is a sum x + f(x) in it, where f multiplies x "
            "with weights."
        ),
    ]
    lines += [f"Refused: {reason}." for reason in dict.fromkeys(refusals)]
    return "\n".join([*lines, _HATCH])


def recorded(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tape, str]:
    """Record a pass on the given inputs, or on the first guess that runs.

    Returns:
        The tape, and a description of the inputs.

    Raises:
        ExampleInputError: None ran, which says what was tried, or the model is sharded.
    """
    _refuse_sharded(model)
    attempts: list[str] = []
    for description, module, make in attempted_calls(model, args, kwargs):
        try:
            positional, named = make()
            inputs = (positional, named)
            return record(model, _call(module, positional, named), inputs), description
        except Exception as error:  # whatever the user's forward raises
            if (args or kwargs) and not isinstance(error, NotImplementedError):
                raise ExampleInputError(
                    f"the model cannot be run on the given example input: {type(error).__name__}: {error}"
                ) from error
            attempts.append(f"  {type(module).__name__} on {description}: {type(error).__name__}: {_short(error)}")
    advice = (
        f"{type(model).__name__} could not be run on any guessed input, and its structure is read from one forward "
        "pass. Pass an example: find_blocks(model, example_input), or set example_input_array on the LightningModule. "
        "Tried:"
    )
    raise ExampleInputError("\n".join([advice, *(attempts or ["  nothing: the model gives no sign of what it takes"])]))


def passed(model: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tape:
    """Record a pass of a module of a model, under the names that the model has.

    Raises:
        ExampleInputError: It failed.
    """
    try:
        return record(model, _call(module, args, dict(kwargs)), (args, dict(kwargs)))
    except Exception as error:  # whatever the user's forward raises
        raise ExampleInputError(
            f"{type(module).__name__} cannot be run again on the input of its first pass: "
            f"{type(error).__name__}: {_short(error)}"
        ) from error


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse a model whose weights exist in one piece only while a layer runs, or never: no pass can be looked at."""
    name = next((name for name, item in model.named_parameters() if isinstance(item, DTensor)), None)
    if name is not None or is_flattened(model) or any(isinstance(module, FSDPModule) for module in model.modules()):
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
    for module in _runnable(model):
        if args or kwargs:
            yield "the given example input", module, lambda: (args, dict(kwargs))
        else:
            for description, make in guesses(module):
                yield description, module, make


def _runnable(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules worth running, the outermost first: a wrapper is looked into, half of a model is not one."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    while True:
        yield model
        children = [child for child in model.children() if not isinstance(child, nn.ModuleList | nn.ModuleDict)]
        sizes = [sum(parameter.numel() for parameter in child.parameters()) for child in children]
        if max(sizes, default=0) <= 0.8 * sum(parameter.numel() for parameter in model.parameters()):
            return
        model = children[sizes.index(max(sizes))]
        if isinstance(model, nn.Linear | nn.Embedding):
            return
