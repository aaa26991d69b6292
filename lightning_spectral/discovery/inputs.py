"""Guess example inputs for a model that nobody prepared: two sequences of random content."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["arguments_of", "guesses"]

# A prime, so that no feature size of a real model equals it by accident.
_TOKENS = 13
_BATCH = 2

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as positional and keyword arguments.

    Args:
        batch: A tensor, a tuple of positional arguments, a mapping of keyword arguments, or ``None`` for no arguments.
    """
    if batch is None:
        return (), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def guesses(model: nn.Module) -> Iterator[tuple[str, Callable[[], Inputs]]]:
    """Yield ``(description, make)`` for every kind of input worth trying, the most specific first.

    Args:
        model: The model to run.
    """
    if getattr(model, "example_input_array", None) is not None:
        yield "example_input_array", lambda: _as_inputs(model.example_input_array)
    if getattr(model, "config", None) is not None and hasattr(model, "main_input_name"):
        yield f"{model.main_input_name} by the model's config", lambda: ((), _by_config(model))
    count = len(_required(model))
    for vocabulary in _vocabularies(model):
        yield (
            f"{count} argument(s) of token ids below {vocabulary}, shape ({_BATCH}, {_TOKENS})",
            partial(_repeated, partial(_ids, model, vocabulary), count),
        )
    for shape in (*_image_shapes(model), *((_BATCH, _TOKENS, width) for width in _widths(model))):
        yield (
            f"{count} argument(s) of floats of shape {shape}",
            partial(_repeated, partial(_floats, model, shape), count),
        )


def _repeated(make: Callable[[], Tensor], count: int) -> Inputs:
    """Return as many positional arguments as a forward requires, made alike."""
    return tuple(make() for _ in range(count)), {}


def _as_inputs(example: Any) -> Inputs:
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def _required(model: nn.Module) -> list[str]:
    """Return the names of the required positional arguments of a forward, one name for ``*args``."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [
        item.name
        for item in parameters
        if item.default is item.empty and item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)
    ]
    return names or ["input"]


def _reference(model: nn.Module) -> Tensor:
    """Return a tensor with the device and dtype of the inputs: those of the first floating-point parameter.

    The inputs of a model on the meta device are on the CPU: nothing is known of an input without numbers.
    """
    nothing = torch.empty(0, device="cpu")
    like = next((item for item in model.parameters() if item.is_floating_point()), nothing)
    return nothing.to(like.dtype) if like.is_meta else like


def _floats(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    like = _reference(model)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like.device, like.dtype)


def _ids(model: nn.Module, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (_BATCH, _TOKENS)
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, shape, generator=generator, device="cpu")
    return ids.to(_reference(model).device)


def _vocabularies(model: nn.Module) -> list[int]:
    """Return the sizes of the embeddings, the largest first.

    The largest is not always the vocabulary: a table of positions can have more rows. So each size is tried.
    """
    sizes = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    return sorted(sizes, reverse=True)


def _widths(model: nn.Module) -> list[int]:
    """Return candidates for the width of the input: of the first linear layer, LayerNorm and vector."""
    norms = [tuple(module.normalized_shape) for module in model.modules() if isinstance(module, nn.LayerNorm)]
    linears = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    first = [item.shape[-1] for item in model.parameters() if not is_lazy(item) and item.dim() == 1]
    candidates = [*linears[:1], *[shape[-1] for shape in norms[:1]], *first[:1]]
    return list(dict.fromkeys(candidates))


def _image_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes of pictures, the smallest first: attention over the pixels of a large picture fills the memory.

    The stride of the first convolution is the size of a token in pixels. 4 × 4 tokens are enough to show a structure.
    """
    convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if convolution is None:
        return
    owners = (model, getattr(model, "config", None))
    named = [getattr(owner, name, None) for owner in owners for name in ("image_size", "img_size", "input_size")]
    sizes = [size[-1] if isinstance(size, tuple | list) else size for size in named if size]
    grown = [4 * max(convolution.stride) * 2**doubling for doubling in range(4)]
    for size in sorted({*sizes, *grown, 16, 32, 224}):
        if isinstance(size, int) and (size in sizes or size <= 256):
            yield _BATCH, convolution.in_channels, size, size


def _by_config(model: Any) -> dict[str, Any]:
    """Follow the conventions of models that carry a ``config`` and a ``main_input_name``."""
    config = model.config
    text = getattr(config, "text_config", None) or config
    name = model.main_input_name
    inputs: dict[str, Any] = {}
    if name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        inputs[name] = _floats(model, (_BATCH, getattr(config, "num_channels", 3), height, width))
    elif name == "input_ids":
        inputs[name] = _ids(model, text.vocab_size)
    elif name == "input_values" and getattr(config, "conv_stride", None):
        inputs[name] = _floats(model, (_BATCH, (_TOKENS + 4) * math.prod(config.conv_stride)))  # raw sound
    else:
        raise NotImplementedError(f"no convention for the input {name!r}")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(model, text.vocab_size)
    return inputs
