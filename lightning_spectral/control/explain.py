"""Explanations for exceptions in the user's code that the scales may have caused.

The user's code may not expect parameters of one element, or that do not learn, and the message of torch does not name
them. An explanation is given only if the traceback shows an optimizer that handles a scale, code that walks over the
parameters of two models side by side, or code that counts a list with a scale in it or asks for gradients by it.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Iterable, Mapping
from types import FrameType

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_spectral.errors import SpectralError

__all__ = ["explanation"]

_KINDS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_SHAPES = re.compile(r"size of tensor|broadcast shape|shapes?\b|size mismatch|zip\(\) argument|number of tensors")
_COUNTS = re.compile(r"number of (\w+ )?(parameters|tensors)|zip\(\) argument", re.IGNORECASE)
_OPTIMIZER = (
    "Give an optimizer for matrices [p for p in parameters if p.ndim >= 2], and the other parameters to AdamW. Give an "
    "optimizer that fails on parameters without a gradient [p for p in parameters if p.requires_grad]"
)
_STATE = (
    "A state that was saved without these scales, or with other ones, does not fit. attach_scales(model) gives another "
    "model the same scales"
)
_TEACHER = (
    "A copy that is updated side by side with the model needs scales too: call attach_scales(student) before "
    "copy.deepcopy(student)"
)
_UNTRAINED = "One of the differentiated Tensors does not require grad"  # of torch.autograd.grad
_GRADIENTS = (
    "Code that asks for gradients by all parameters, as a model's own checkpointing may, needs scales that have some: "
    "let the scales learn, auto_rescale=GainCeiling(learnable=True), or switch that checkpointing off"
)
_LIST = (
    "A list of the parameters that was made before lacks the scales: make it, or the average that keeps it, in "
    "on_fit_start, or call attach_scales(model) before"
)


def explanation(exception: BaseException, model: nn.Module, name: str = "SpectralMonitor") -> str | None:
    """Return an explanation of an exception that scales may have caused, ``None`` for any other exception.

    Args:
        exception: The exception, with its traceback.
        model: The model with the scales.
        name: What has attached them.
    """
    if not isinstance(exception, _KINDS) or isinstance(exception, SpectralError | torch.OutOfMemoryError):
        return None
    parameters = {id(item): name for name, item in model.named_parameters()}
    scales = {key: name for key, name in parameters.items() if name.endswith("log_scale")}
    advice = _advice(exception, parameters, scales)
    if not scales or advice is None:
        return None
    return (
        f"{name} has attached {len(scales)} residual scales, parameters of shape (1,), such as "
        f"{next(iter(scales.values()))!r}, which this code may not expect. {advice}"
    )


def _advice(exception: BaseException, parameters: Collection[int], scales: Collection[int]) -> str | None:
    frames = [frame for frame, _ in traceback.walk_tb(exception.__traceback__)]
    optimizing = _optimizer_frame(frames)
    if optimizing is not None and _holds(_within(optimizing), scales):
        if optimizing.f_code.co_name == "load_state_dict":
            return _STATE
        optimizer = optimizing.f_locals["self"]
        own = type(optimizer).__module__.startswith("torch.optim") and type(optimizer).__name__ != "Muon"
        return None if own else _OPTIMIZER
    if "log_scale" in str(exception):
        return _STATE
    if _UNTRAINED in str(exception):
        return _GRADIENTS if any(_lists(frame, scales) for frame in frames) else None
    if _COUNTS.search(str(exception)) and any(_lists(frame, scales) for frame in frames):
        return _LIST
    of_shapes = isinstance(exception, AssertionError) or _SHAPES.search(str(exception))
    side_by_side = any(_walks_over_two(frame, parameters) for frame in frames)
    return _TEACHER if of_shapes and side_by_side else None


def _optimizer_frame(frames: Iterable[FrameType]) -> FrameType | None:
    """Return the innermost frame of an optimizer; ``None`` if it called back into other code, as a closure does."""
    found = None
    for frame in frames:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Optimizer):
            found = frame
        elif owner is not None:
            found = None
    return found


def _within(frame: FrameType) -> list[object]:
    return [*frame.f_locals.values(), getattr(frame.f_locals["self"], "param_groups", ())]


def _holds(value: object, wanted: Collection[int]) -> bool:
    """Whether a value is one of the wanted tensors or contains one: as a list, a parameter group, a list of groups."""
    if isinstance(value, Mapping):
        return _holds(value.get("params"), wanted)
    if isinstance(value, list | tuple):
        return any(_holds(item, wanted) for item in value)
    return id(value) in wanted


def _lists(frame: FrameType, scales: Collection[int]) -> bool:
    """Whether a frame holds a list with a scale in it, by itself or in the context of a function of autograd."""
    held = (*frame.f_locals.values(), *getattr(frame.f_locals.get("ctx"), "__dict__", {}).values())
    return any(id(item) in scales for value in held if isinstance(value, list | tuple) for item in value)


def _walks_over_two(frame: FrameType, parameters: Collection[int]) -> bool:
    """Whether a frame holds two parameters, one of them of the model, and is no forward of the model."""
    if frame.f_code.co_name == "forward":
        return False
    held = {id(value) for value in frame.f_locals.values() if isinstance(value, nn.Parameter)}
    return len(held) > 1 and not held.isdisjoint(parameters)
