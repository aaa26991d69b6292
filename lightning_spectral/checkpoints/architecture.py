"""Structure from a ``config.json``: build the architecture with the installed transformers, and find its blocks.

This runs code of the library, never code that a file contains or names. The result is the blocks of the model, which
are names and layouts. Blocks do not depend on the widths, so for a large model they are found in a narrow copy.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lightning_spectral.checkpoints.files import Checkpoint
from lightning_spectral.checkpoints.shrink import NotScaledError, narrower, rescaled
from lightning_spectral.checkpoints.source import Source, find_transformers_source, refuse_differences
from lightning_spectral.checkpoints.untrusted import printable
from lightning_spectral.discovery import find_blocks
from lightning_spectral.errors import CheckpointError, SpectralError
from lightning_spectral.linalg.threads import one_thread
from lightning_spectral.records import ResidualBlock
from lightning_spectral.weights.names import parameters_of

__all__ = ["from_config"]

# Entries of a config that choose code or a download instead of an architecture.
_DROPPED = {
    "architectures",
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "dtype",
    "experts_implementation",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
    "use_pretrained_backbone",
}
# Counts of this kind make the library build lists before a limit can stop it. The limits are far above real models.
_COUNT = re.compile(r"(^|_)(num|n)_(?!positions|ctx|vocab)|layers?$|depths?$|heads?$|experts?$|groups?$|labels?$")
_MAX_COUNT, _MAX_SIZE = 2**17, 2**24
_LABELS = {"id2label", "label2id"}  # maps with the user's labels as keys, not with entries of a config
_SILENT = 100  # above every level of logging
_SMALL = 8_000_000  # a model with fewer weights is built at full width
_NARROW_HEADS = (4, 8, 16, 32)  # sizes of a head to try, until two narrow models have the same blocks


def from_config(
    checkpoint: Checkpoint, entries: dict[str, Any], path: Path
) -> tuple[tuple[ResidualBlock, ...], Source]:
    """Return the blocks of the architecture in a config, and the source of their weights in the checkpoint.

    Args:
        checkpoint: The checkpoint.
        entries: The entries of ``config.json``.
        path: The file of the entries, for messages.

    Raises:
        CheckpointError: transformers does not know the architecture, or the checkpoint holds another one.
    """
    with _quiet(), one_thread():
        try:
            make = _Architecture(entries, 4 * len(checkpoint.shapes) + 1000, _numbers(checkpoint.shapes))
            model = make.model({}, "meta")
            source = find_transformers_source(checkpoint, model, model.state_dict())
            blocks = _blocks(make, model)
        except CheckpointError as error:
            raise CheckpointError(f"{printable(path)}: {error}") from None
        except SpectralError as error:
            raise CheckpointError(
                f"{printable(path)}: no blocks were found in a {make.name}: {printable(error, 300)}"
            ) from None
        except Exception as error:  # a senseless config makes the library raise anything
            raise CheckpointError(
                f"{printable(path)}: transformers cannot build this model: {type(error).__name__}: "
                f"{printable(error, 300)}"
            ) from None
        source = _with_aliases(source, model)
        wide = _shapes(model)
        needed = {name: wide[name] for name in parameters_of(blocks) if name in wide}
        refuse_differences(checkpoint, source, needed)
    return blocks, source


class _Architecture:
    """A model class and a config that are known to the installed transformers."""

    def __init__(self, entries: dict[str, Any], most_weights: int, most_numbers: int) -> None:
        try:
            import transformers
        except ModuleNotFoundError:
            raise CheckpointError(
                "reading the structure from a config needs the package transformers: pip install transformers"
            ) from None
        kind = entries.get("model_type")
        known = transformers.CONFIG_MAPPING
        if not isinstance(kind, str) or kind not in known:
            raise CheckpointError(
                f"model_type is {printable(repr(kind))}, expected one that transformers {transformers.__version__} "
                "knows (code that a folder brings along is not run): pass the blocks of the model, "
                "audit(path, find_blocks(model))"
            )
        _refuse_immense(entries)
        config = known[kind].from_dict(_cleaned(entries))
        self.config_class = type(config)
        self.entries: dict[str, Any] = config.to_dict()
        self.limits = most_weights, max(2 * _SMALL, most_numbers)
        self.model_class = _model_class(transformers, entries.get("architectures"), self.config_class)
        self.name: str = self.model_class.__name__
        self.head_size = _head_size(config)

    def model(self, changes: Mapping[str, Any], device: str) -> Any:
        """Build the model in evaluation mode. ``changes`` replace entries of the config."""
        config = self.config_class.from_dict(_cleaned(deepcopy(self.entries | dict(changes))))
        with _limited(*self.limits), torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.model_class(config).eval()


def _cleaned(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that describe the architecture. Keys may be numbers, for example of layers."""
    kept = {key: value for key, value in entries.items() if not str(key).startswith("_") and key not in _DROPPED}
    return {key: value if key in _LABELS else _decoded(value) for key, value in kept.items()}


def _refuse_immense(entries: Mapping[str, Any]) -> None:
    for key, value in entries.items():
        if isinstance(value, dict):
            _refuse_immense(value)
        for number in value if isinstance(value, list) else [value]:
            most = _MAX_COUNT if _COUNT.search(str(key)) else _MAX_SIZE
            if isinstance(number, int) and abs(number) > most and "theta" not in str(key):
                raise CheckpointError(f"{printable(key)} is {printable(number, 30)}, expected {most} at most")


def _decoded(value: Any) -> Any:
    """Decode the library's notation for infinity, which JSON does not have, into a number."""
    if isinstance(value, dict):
        return float(value["__float__"]) if set(value) == {"__float__"} else _cleaned(value)
    return [_decoded(item) for item in value] if isinstance(value, list | tuple) else value


def _head_size(config: Any) -> int | None:
    """Return the number of channels of one head. Configs have several names for it."""
    config = getattr(config, "text_config", None) or config
    size = _first(config, "head_dim", "v_head_dim", "d_kv", "attention_head_dim")
    if size is not None:
        return size
    width = _first(config, "hidden_size", "d_model", "hidden_dim", "embed_dim")
    heads = _first(config, "num_attention_heads", "num_heads", "n_head", "encoder_attention_heads", "attention_heads")
    if width is None:
        return None
    return width // heads if heads else math.gcd(width, 64)


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # an entry that differs from layer to layer
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _model_class(transformers: Any, names: Any, config_class: type) -> Any:
    """Return the class that a config names, if it is one of the library for this config; else the one without head."""
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if known and getattr(found, "config_class", None) is config_class:
        return found
    mapping = transformers.MODEL_MAPPING
    if config_class not in mapping:
        raise CheckpointError(f"transformers has no model for a {config_class.__name__}")
    found = mapping[config_class]
    return found[0] if isinstance(found, tuple) else found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library: its messages only repeat the file."""
    try:
        from transformers.utils import logging
    except ModuleNotFoundError:
        yield
        return
    level = logging.get_verbosity()
    logging.set_verbosity(_SILENT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _limited(most_weights: int, most_numbers: int) -> Iterator[None]:
    """Stop the construction of a model that is larger than the file. A config may announce any size."""
    total = numbers = 0

    def check(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal total, numbers
        if parameter is None:
            return
        total += 1
        numbers += 0 if parameter.is_meta else parameter.numel()
        if total > most_weights or numbers > most_numbers:
            raise CheckpointError("the config describes a model with far more weights than the file has")

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _blocks(make: _Architecture, model: Any) -> tuple[ResidualBlock, ...]:
    """Find the blocks in the model itself if it is small; else in two narrow models, which have to agree."""
    wide = _shapes(model)
    if _numbers(wide) <= _SMALL:
        return find_blocks(make.model({}, "cpu"))
    problem: Exception = NotScaledError("the size of its heads is not known")
    found: list[tuple[ResidualBlock, ...]] = []
    for size in _NARROW_HEADS:
        if make.head_size is None or make.head_size % size:
            continue
        divisor = make.head_size // size
        try:
            # Grouped matrix products need rows of a multiple of 16 bytes.
            narrow = make.model(narrower(make.entries, divisor, inner=2 * size), "cpu")
            blocks, shapes = find_blocks(narrow), _shapes(narrow)
            del narrow  # frees memory before the next one: a mixture may have hundreds of experts per layer
            found.append(tuple(rescaled(block, shapes, wide, divisor) for block in blocks))
        except Exception as error:  # the widths of this config depend on each other in an unknown way
            problem = error
        if len(found) > 1 and found[-1] == found[-2]:
            return found[-1]
    if len(found) > 1:
        problem = NotScaledError("two narrow models have different blocks")
    raise CheckpointError(
        f"its blocks could not be found in a narrow {make.name}: {type(problem).__name__}: {printable(problem, 300)}"
    )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in named}


def _numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _with_aliases(source: Source, model: nn.Module) -> Source:
    """Add all names of tied weights, which a file may hold under one name."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    readers, shapes, pieces = dict(source.readers), dict(source.shapes), dict(source.pieces)
    for group in names.values():
        for stored in [name for name in group if name in source.readers][:1]:
            readers |= dict.fromkeys(group, source.readers[stored])
            pieces |= dict.fromkeys(group, source.pieces[stored])
            if stored in source.shapes:
                shapes |= dict.fromkeys(group, source.shapes[stored])
    return Source(readers, shapes, source.copied, pieces)
