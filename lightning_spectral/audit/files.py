"""Open a checkpoint that nobody trusts: names, shapes and, one at a time, tensors. Nothing in it is ever executed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.audit.distributed import METADATA, open_distributed
from lightning_spectral.audit.untrusted import STATE_DICTS, damage, is_plain, printable, read_json, refuse_bomb
from lightning_spectral.discovery.plain import FORMAT
from lightning_spectral.errors import CheckpointError

__all__ = ["Checkpoint", "open_checkpoint", "plain_name"]

# No real file comes near these, and what lies beyond costs memory before it can be refused.
_MAX_HEADER, _MAX_NAME = 2**26, 512

# What wrappers put into the names of the modules that they wrap.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_REST = "meta.pt"  # of a distributed checkpoint of Lightning
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The tensors of a checkpoint, by name; a tensor is read when it is asked for.

    Attributes:
        path: What the user named.
        folder: Where ``config.json`` would lie.
        shapes: Shape of every tensor.
        read: Returns a tensor. Its memory belongs to the file wherever the format allows it.
        copied: Whether the format does not allow it.
        step: Optimizer step at which it was written, 0 where the file does not say.
        blocks: What a monitor of this package has left in the checkpoint, as it is; ``None`` where there was none.
    """

    path: Path
    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    copied: bool = False
    step: int = 0
    blocks: Any = None


def plain_name(path: str) -> str:
    """Return the path of a module or a weight without what wrappers put into it.

    Args:
        path: The path, which may be that of the wrapper itself.
    """
    return _WRAPPERS.sub("", f"{path}.").removesuffix(".")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint file or a model folder.

    Args:
        path: A ``.safetensors`` file, a file of ``torch.save`` (a state dict, or a Lightning checkpoint with one), or a
            Hugging Face folder, sharded or not.

    Raises:
        CheckpointError: There is no such file, it is damaged, or its format is not one of these.
    """
    path = Path(path)
    if not path.is_dir():
        return _named(path, path.parent, _open_file(path))
    if (path / METADATA).exists():
        return _named(path, path, _open_distributed(path))
    index = next((path / name for name in _INDICES if (path / name).exists()), None)
    if index is not None:
        return _named(path, path, _open_shards(index))
    candidates = [path / name for name in _SINGLE if (path / name).exists()] or sorted(path.glob("*.safetensors"))
    if len(candidates) != 1 and not (candidates and candidates[0].name in _SINGLE):
        found = ", ".join(printable(item.name, 40) for item in candidates[:5]) or "no weights"
        raise CheckpointError(
            f"{printable(path)}: found {found} in this folder, expected one of {', '.join((*_INDICES, *_SINGLE))} or a "
            "single *.safetensors"
        )
    return _named(path, path, _open_file(candidates[0]))


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """What a file or the files of a folder hold; see :class:`Checkpoint`."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    copied: bool = False
    step: int = 0
    blocks: Any = None


def _named(path: Path, folder: Path, found: _Opened) -> Checkpoint:
    """Leave out what wrappers add to names, and names that belong to no module."""
    stored = {plain_name(name): name for name in found.shapes if len(name) <= _MAX_NAME and name.isprintable()}
    if not stored:
        raise CheckpointError(f"{printable(path)}: found no tensors, expected the weights of a model")
    shapes = {name: found.shapes[key] for name, key in stored.items()}
    return Checkpoint(
        path, folder, shapes, lambda name: found.read(stored[name]), found.copied, found.step, found.blocks
    )


def _open_shards(index: Path) -> _Opened:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(f"{printable(index)}: expected an object 'weight_map' from tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.isprintable():
            raise CheckpointError(
                f"{printable(index)}: the shard {printable(name)!r} is not the name of a file beside it"
            )
    shards = {name: _open_file(index.parent / name) for name in names}
    absent = [key for key, name in weight_map.items() if key not in shards[name].shapes]
    if absent:
        raise CheckpointError(
            f"{printable(index)}: {len(absent)} tensor(s) are not in the shard that the index names, the first is "
            f"{printable(absent[0])}"
        )
    shapes = {key: shards[name].shapes[key] for key, name in weight_map.items()}
    return _Opened(shapes, lambda key: shards[weight_map[key]].read(key))


def _open_file(path: Path) -> _Opened:
    if not path.is_file():
        raise CheckpointError(f"{printable(path)}: no such file, expected a checkpoint file or a model folder")
    with damage(path, "a file"), path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise CheckpointError(f"{printable(path)}: the file is empty, expected a checkpoint")
    # A safetensors file begins with the length of its header and the brace that opens it.
    if path.suffix == ".safetensors" or (start[8:] == b"{" and not start.startswith(_ZIP)):
        return _open_safetensors(path, start)
    return _open_torch(path, start)


def _open_safetensors(path: Path, start: bytes) -> _Opened:
    expected = "a safetensors file"
    with damage(path, expected):
        try:
            from safetensors import safe_open
        except ModuleNotFoundError:
            raise CheckpointError(
                f"{printable(path)}: reading it needs the package safetensors: pip install 'lightning-spectral[cli]'"
            ) from None
        size, length = path.stat().st_size, int.from_bytes(start[:8], "little")
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"it announces a header of {length} bytes and has {size} bytes in all")
        file: Any = safe_open(path, "pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read(name: str) -> Tensor:
        with damage(path, expected):
            tensor = file.get_tensor(name)
            assert isinstance(tensor, Tensor)
            return tensor

    return _Opened(shapes, read)


def _open_torch(path: Path, start: bytes) -> _Opened:
    with damage(path, "a file of torch.save that holds tensors and plain values only"):
        mapped = start.startswith(_ZIP)
        if mapped:
            refuse_bomb(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        state = _state_dict(loaded)
        tensors = {key: value for key, value in state.items() if isinstance(key, str) and is_plain(value)}
        step, blocks = _facts(loaded)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return _Opened(shapes, tensors.__getitem__, step=step, blocks=blocks)


def _open_distributed(folder: Path) -> _Opened:
    shapes, read = open_distributed(folder)
    step, blocks, rest = 0, None, folder / _REST
    if rest.is_file():
        with damage(rest, "what Lightning writes beside the shards"):
            refuse_bomb(rest)
            step, blocks = _facts(torch.load(rest, map_location="cpu", weights_only=True))
    return _Opened(shapes, read, copied=True, step=step, blocks=blocks)


def _facts(loaded: Mapping[Any, Any]) -> tuple[int, Any]:
    """Return what a Lightning checkpoint says besides its tensors: its step, and the blocks that a monitor left."""
    step, callbacks = loaded.get("global_step", 0), loaded.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    kept = (state.get("blocks") for state in states if isinstance(state, Mapping))
    blocks = next((item for item in kept if isinstance(item, Mapping) and FORMAT in item), None)
    return (step if isinstance(step, int) else 0), blocks


def _state_dict(loaded: Any) -> Mapping[Any, Any]:
    if not isinstance(loaded, Mapping):
        raise TypeError(f"it holds a {type(loaded).__name__}, expected a state dict")
    inner = next((loaded[key] for key in STATE_DICTS if isinstance(loaded.get(key), Mapping)), None)
    return loaded if inner is None else inner
