"""The state dicts in a file of ``torch.save``. The name of a tensor is the path of keys that leads to it."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.checkpoints.untrusted import Opened, damage, is_plain, printable
from lightning_spectral.errors import CheckpointError

__all__ = ["is_of_optimizer", "load_plain", "nested", "roots"]

TORCH = "a file of torch.save that holds tensors and plain values only"
"""Description of an expected file, for messages about files that are neither safetensors nor GGUF."""

_LIGHTNING = "pytorch-lightning_version"
_DAMAGED = "its pickle is damaged, or of another kind"
_DEPTH = 5  # deepest nesting of dicts that is searched
_OPTIMIZER = re.compile(r"(^|_)opt(im.*|s|_.*)?$")
_CLASS = re.compile(r"(?:GLOBAL|global|class|function) ([A-Za-z_][\w.]*\.\w+)")


def load_plain(path: Path, expected: str = TORCH, *, mapped: bool) -> Any:
    """Load a file of ``torch.save`` without running any code that it names.

    Args:
        path: The file.
        expected: The expected kind of file, for messages.
        mapped: Whether to map the tensors from the file instead of reading them. Only zip files allow this.

    Raises:
        CheckpointError: The file is damaged, or holds anything but tensors and plain values.
    """
    with damage(path, expected), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about a pickle that is refused anyway
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            named = _CLASS.search(str(error))
            raise CheckpointError(
                f"{printable(path)}: not readable as {expected}: {_DAMAGED if named is None else _named(named[1])}"
            ) from None
        except (LookupError, TypeError, AttributeError, AssertionError, RecursionError):
            # The unpickler of torch does not check its stack, so a damaged pickle raises any of these.
            raise CheckpointError(f"{printable(path)}: not readable as {expected}: {_DAMAGED}") from None


def _named(name: str) -> str:
    return (
        f"it names {printable(name, 100)}, which is not run. Where you trust the file, load it with weights_only=False "
        "and save the state dict alone: torch.save(model.state_dict(), 'weights.pt')"
    )


def nested(loaded: Any) -> Opened:
    """Return the tensors in a dict and in the dicts in it.

    States of optimizers are left out, because their tensors have the names and shapes of weights.

    Args:
        loaded: The content of a file.

    Raises:
        TypeError: The file holds no dict.
        ValueError: Two tensors have the same name.
    """
    if not isinstance(loaded, Mapping):
        raise TypeError(f"it holds a {type(loaded).__name__}, expected a state dict")
    stored = list(_walk(loaded, (), set()))
    found = [(keys, tensor) for keys, tensor in stored if is_plain(tensor)]
    others = dict.fromkeys(_kind(tensor) for _, tensor in stored if not is_plain(tensor))
    tensors = {".".join(keys): tensor for keys, tensor in found}
    if len(tensors) < len(found):
        raise ValueError("two of its tensors have one name: a key with a dot in it stands for two keys")
    lightning = _LIGHTNING in loaded and isinstance(loaded.get("state_dict"), Mapping)
    model = roots(keys for keys, _ in found if keys[0] == "state_dict" or not lightning)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    notes = (f"tensors of these kinds were not read: {', '.join(others)}",) if others else ()
    return Opened(shapes, tensors.__getitem__, False, *model, notes=notes)


def _kind(tensor: Tensor) -> str:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return type(tensor).__name__
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
        return "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else str(tensor.layout)
    return "a view that is larger than its memory"


def roots(paths: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], str]:
    """Return the prefix of the names in each dict, and the prefix that all names share.

    Args:
        paths: For each tensor, the keys that lead to it.
    """
    dicts = list(dict.fromkeys(tuple(path[:-1]) for path in paths))
    return tuple(map(_prefix, dicts)), _prefix(_common(dicts))


def _common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    first, last = min(paths, default=()), max(paths, default=())
    count = next((place for place, key in enumerate(first) if last[place : place + 1] != (key,)), len(first))
    return first[:count]


def _prefix(keys: Iterable[str]) -> str:
    return "".join(f"{key}." for key in keys)


def _walk(place: Mapping[Any, Any], keys: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if id(place) in seen or len(keys) > _DEPTH:  # a dict in a pickle may contain itself
        return
    seen.add(id(place))
    for key, value in place.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, Tensor):
            yield (*keys, key), value
        elif isinstance(value, Mapping) and not is_of_optimizer(key):
            yield from _walk(value, (*keys, key), seen)


def is_of_optimizer(key: str) -> bool:
    """Whether a key leads to the state of an optimizer, by the names that training scripts use."""
    return _OPTIMIZER.search(key.lower()) is not None
