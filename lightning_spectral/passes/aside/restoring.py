"""Run the code of a user, and put back everything that it changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from lightning_spectral.linalg.sharding.presence import is_fully_sharded
from lightning_spectral.passes.aside.kinds import kind_of
from lightning_spectral.passes.aside.memento import Memento
from lightning_spectral.passes.aside.stand_ins import mute
from lightning_spectral.passes.aside.streams import random_streams_kept
from lightning_spectral.passes.aside.writes import Writes

__all__ = ["evaluated", "kept", "kept_while_sharded", "undisturbed"]

_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.is_grad_enabled, torch.set_grad_enabled),
)


@contextmanager
def kept(*roots: Any) -> Iterator[set[torch.device]]:
    """Put back, at the end, everything that Python can reach from some objects. Meanwhile, logs and warnings are off.

    In place, and also after an exception, the context puts back attributes, containers, tensors that were written to or
    replaced, random generators, closures, and the globals and class attributes that the code of the objects names. It
    does not put back threads, files, the state of C code, and running generators.

    Args:
        roots: The objects, usually a model and the arguments of a pass.

    Yields:
        The devices of the tensors that were reached.
    """
    with ExitStack() as stack:
        models = [root for root in roots if isinstance(root, nn.Module)]
        memento = Memento(kind_of, {type(module).__module__ for model in models for module in model.modules()})
        # Left in reverse order: first the numbers of tensors, then settings and random streams, then the memento.
        stack.callback(memento.restore)
        for root in (*roots, *_hooks_of_all_modules()):
            memento.see(root)
        memento.look()
        devices = {tensor.device for tensor in memento.tensors}
        stack.enter_context(random_streams_kept(devices))
        stack.enter_context(_settings_kept())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the real run will give the same warnings
        writes = Writes(memento.tensors)
        stack.callback(writes.undo)
        stack.enter_context(writes)
        yield devices


@contextmanager
def kept_while_sharded(model: nn.Module) -> Iterator[set[torch.device]]:
    """Put back, at the end, buffers, random streams and what a LightningModule logs. Meanwhile, warnings are off.

    ``fully_shard`` frees and fills the memory of parameters in a pass, and remembers what it has done. To put its
    parameters back as they were would crash it, so that only these are put back, and nothing else that a pass changes.

    Args:
        model: A model with parts that ``fully_shard`` was applied to.

    Yields:
        The devices of its parameters.
    """
    with ExitStack() as stack:
        devices = {parameter.device for parameter in model.parameters()}
        stack.enter_context(random_streams_kept(devices))
        stack.enter_context(_settings_kept())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for module in model.modules():
            own = vars(module)
            before = dict(own)
            mute(type(module), own)
            for name, value in own.items():
                if name not in before:
                    stack.callback(own.pop, name)
                elif before[name] is not value:
                    stack.callback(own.__setitem__, name, before[name])
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            yield devices
        finally:
            with torch.no_grad():
                for buffer, numbers in buffers:
                    buffer.copy_(numbers)


@contextmanager
def evaluated(model: nn.Module, *inputs: Any, gathers: bool = True) -> Iterator[set[torch.device]]:
    """Evaluation mode, no compilation, no fused layers. Afterwards everything is put back (:func:`kept`).

    Of a model that ``fully_shard`` was applied to, less is put back (:func:`kept_while_sharded`) after a pass that
    gathers its weights.

    Args:
        model: The model.
        inputs: The arguments of its forward.
        gathers: Whether the pass gathers sharded weights.

    Yields:
        The devices of the tensors that were reached.
    """
    with ExitStack() as stack:
        sharded = gathers and any(map(is_fully_sharded, model.modules()))
        devices = stack.enter_context(kept_while_sharded(model) if sharded else kept(model, *inputs))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        # Autocast keeps the casts of weights. One that is made without grad mode would cost the real pass its gradient.
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            module.training = False  # not .eval(), which a module may have overridden
        yield devices


@contextmanager
def undisturbed(model: nn.Module, *inputs: Any, gathers: bool = True) -> Iterator[None]:
    """What :func:`evaluated` does, and no autocast.

    Args:
        model: The model.
        inputs: The arguments of its forward.
        gathers: Whether the pass gathers sharded weights.
    """
    with ExitStack() as stack:
        devices = stack.enter_context(evaluated(model, *inputs, gathers=gathers))
        for kind in {"cpu", *(device.type for device in devices)} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _hooks_of_all_modules() -> list[object]:
    """Return the containers of hooks that torch registers for all modules."""
    return [hooks for name, hooks in vars(torch_module).items() if name.startswith("_global_")]


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Put back the settings of the whole process that a forward may change."""
    before = [read() for read, _ in _SETTINGS]
    try:
        yield
    finally:
        for (read, write), value in zip(_SETTINGS, before, strict=True):
            if read() != value:
                write(value)
