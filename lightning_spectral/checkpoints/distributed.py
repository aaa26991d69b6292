"""Open a folder of ``torch.distributed.checkpoint``, the format of strategies that shard a model."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.checkpoints.inert import Inert, read_pickle
from lightning_spectral.checkpoints.state_dicts import is_of_optimizer, roots
from lightning_spectral.checkpoints.untrusted import MAX_PICKLE, Opened, damage, is_plain, printable, refuse_bomb

__all__ = ["open_distributed"]

METADATA = ".metadata"
"""Name of the index: the file that lists which part of which tensor is in which file."""

_EXPECTED = "the index of a distributed checkpoint"
_RECORDS, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_CLASSES = {
    **dict.fromkeys(
        ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"), _RECORDS
    ),
    **dict.fromkeys(("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"), _RECORDS),
    "_StorageInfo": _FILES,
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_NAMES = {
    *(f"{room}.{name}" for name, room in _CLASSES.items()),
    *("torch.Size", "torch.serialization._get_layout", *_DTYPES),
    *(f"{room}.{kind}Path" for room in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
}
_MAX_DIMENSIONS, _MAX_CHUNKS, _MAX_SIZE = 8, 2**14, 2**48


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A box of a tensor, and the position of its bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in chunks."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


def open_distributed(folder: Path) -> Opened:
    """Return the tensors in a folder. What is no tensor, or belongs to an optimizer, is left out.

    The index is a pickle, which is read without unpickling (:mod:`lightning_spectral.checkpoints.inert`). Each tensor
    is assembled from its chunks, and each chunk is a file of ``torch.save`` inside of a larger file. So reading a
    tensor takes its own memory plus the memory of its largest chunk.

    Args:
        folder: The folder.

    Raises:
        CheckpointError: The index is damaged, or does not match the files.
    """
    path = folder / METADATA
    with damage(path, _EXPECTED):
        if path.stat().st_size > MAX_PICKLE:
            raise ValueError(f"{path.stat().st_size} bytes, more than any real file of this kind has")
        index = read_pickle(path.read_bytes(), _NAMES)
        stored = dict(_tensors(index, folder))
        paths = _paths(index, stored)
        names = {".".join(keys): name for name, keys in paths.items()}
        if len(names) < len(paths):
            raise ValueError("two of its tensors have one name")

    def read(name: str) -> Tensor:
        with damage(path, _EXPECTED):
            return _read(folder, names[name], stored[names[name]])

    return Opened({name: stored[key].shape for name, key in names.items()}, read, True, *roots(paths.values()))


def _tensors(index: Any, folder: Path) -> Iterator[tuple[str, _Stored]]:
    """Yield every tensor that the index describes, after checks against the sizes of the files."""
    places: dict[Any, Any] = {}
    for key, info in _entry(index, "Metadata", "storage_data", dict).items():
        offsets = _state(key, "MetadataIndex").get("offset")
        places[_entry(key, "MetadataIndex", "fqn", str), None if offsets is None else _size(offsets)] = info
    files = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    total = sum(files.values())
    for name, described in _entry(index, "Metadata", "state_dict_metadata", dict).items():
        if _is(described, "BytesStorageMetadata"):
            continue
        dtype, shape, boxes = _described(described)
        if not isinstance(name, str) or math.prod(shape) * dtype.itemsize > total:
            raise ValueError(f"{printable(name)} is larger than all files together, or no name")
        filled = [box for box in boxes if math.prod(box[1])]  # with more processes than rows, some chunks are empty
        chunks = (_Chunk(first, sizes, *_place(places.get((name, first)), files)) for first, sizes in filled)
        yield name, _Stored(dtype, shape, tuple(chunks))


def _described(tensor: Any) -> tuple[torch.dtype, tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Return dtype and shape of a tensor, and offsets and sizes of its chunks."""
    kind = "TensorStorageMetadata"
    shape, listed = _size(_entry(tensor, kind, "size", Inert)), _entry(tensor, kind, "chunks", list)
    properties = _entry(tensor, kind, "properties", Inert)
    if not _is(properties, "TensorProperties") or not isinstance(properties.state, tuple):
        raise TypeError("a tensor has no properties")
    dtype = next((_DTYPES[item.name] for item in properties.state if getattr(item, "name", None) in _DTYPES), None)
    if dtype is None or len(listed) > _MAX_CHUNKS:
        raise ValueError(f"a tensor has {len(listed)} chunks of {dtype}")
    kind = "ChunkStorageMetadata"
    boxes = [(_size(_entry(box, kind, "offsets", Inert)), _size(_entry(box, kind, "sizes", Inert))) for box in listed]
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(shape):
            raise ValueError(f"a chunk has {len(sizes)} dimensions and its tensor {len(shape)}")
        if any(start + size > whole for start, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"the chunk {sizes} at {offsets} does not lie inside of {shape}")
    return dtype, shape, boxes


def _place(info: Any, files: Mapping[str, int]) -> tuple[str, int, int]:
    """Return the file, the first byte and the number of bytes of a chunk."""
    file, start, length = (
        _entry(info, "_StorageInfo", name, kind)
        for name, kind in (("relative_path", str), ("offset", int), ("length", int))
    )
    if _state(info, "_StorageInfo").get("transform_descriptors"):
        raise ValueError("its files are transformed, by compression for example")
    if file not in files:
        raise ValueError(f"{printable(file)!r} is not the name of a file beside it")
    if min(start, length) < 0 or start + length > files[file]:
        raise ValueError(f"{printable(file)} has {files[file]} bytes, fewer than {length} from {start}")
    return file, start, length


def _paths(index: Any, stored: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the keys that lead to each tensor, without the tensors of optimizers."""
    kept = _entry(index, "Metadata", "planner_data", dict) if _state(index, "Metadata").get("planner_data") else {}
    found = {}
    for name in stored:
        path: Any = kept.get(name)
        known = isinstance(path, tuple) and path and all(isinstance(part, str | int) for part in path)
        keys = tuple(map(str, path)) if known else (name,)
        if not any(map(is_of_optimizer, keys[:-1])):
            found[name] = keys
    return found


def _read(folder: Path, name: str, tensor: _Stored) -> Tensor:
    """Assemble a tensor from its chunks."""
    if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.shape) or _overlap(tensor.chunks):
        raise ValueError(f"the chunks of {printable(name)} overlap, or some are missing")
    if len(tensor.chunks) == 1:
        return _read_chunk(folder, tensor.dtype, tensor.chunks[0])
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    for chunk in tensor.chunks:
        box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = _read_chunk(folder, tensor.dtype, chunk)
    return whole


def _read_chunk(folder: Path, dtype: torch.dtype, chunk: _Chunk) -> Tensor:
    with (folder / chunk.file).open("rb") as file:
        file.seek(chunk.start)
        content = io.BytesIO(file.read(chunk.length))
    refuse_bomb(content)
    content.seek(0)
    tensor: Tensor = torch.load(content, map_location="cpu", weights_only=True)
    if not is_plain(tensor) or tensor.dtype != dtype or tuple(tensor.shape) != chunk.sizes:
        raise ValueError(f"{printable(chunk.file)} has something else at {chunk.start} than {chunk.sizes} of {dtype}")
    return tensor


def _overlap(chunks: Sequence[_Chunk]) -> bool:
    """Whether two boxes overlap: their intervals overlap in every dimension."""
    first = torch.tensor([chunk.offsets for chunk in chunks], device="cpu")
    last = first + torch.tensor([chunk.sizes for chunk in chunks], device="cpu")
    pairs = ((first[i] < last[i + 1 :]) & (first[i + 1 :] < last[i]) for i in range(len(chunks) - 1))
    return any(bool(inside.all(1).any()) for inside in pairs)


def _is(thing: Any, kind: str) -> bool:
    return isinstance(thing, Inert) and thing.name == f"{_CLASSES[kind]}.{kind}"


def _state(thing: Any, kind: str) -> dict[Any, Any]:
    """Return the fields of a data class in the index."""
    if not _is(thing, kind) or not isinstance(thing.state, dict):
        raise TypeError(f"expected a {kind}")
    state: dict[Any, Any] = thing.state
    return state


def _entry(thing: Any, kind: str, name: str, wanted: type) -> Any:
    value = _state(thing, kind).get(name)
    if not isinstance(value, wanted):
        raise TypeError(f"{name} of a {kind} is a {type(value).__name__}, expected a {wanted.__name__}")
    return value


def _size(thing: Any) -> tuple[int, ...]:
    """Return the numbers of a ``torch.Size``."""
    arguments = thing.arguments if isinstance(thing, Inert) and thing.name == "torch.Size" else None
    numbers = arguments[0] if isinstance(arguments, tuple) and len(arguments) == 1 else None
    if not isinstance(numbers, tuple) or len(numbers) > _MAX_DIMENSIONS:
        raise TypeError("expected a Size")
    if not all(isinstance(number, int) and 0 <= number < _MAX_SIZE for number in numbers):
        raise ValueError("a Size has numbers that no tensor has")
    return numbers
