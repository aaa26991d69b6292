"""Open a checkpoint that nobody trusts: names, shapes and, one at a time, tensors. Nothing in it is executed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.checkpoints.distributed import METADATA, open_distributed
from lightning_spectral.checkpoints.folders import INDEX, saved_in_run, weights_in
from lightning_spectral.checkpoints.formats import HEAD, refuse_foreign, refuse_no_path
from lightning_spectral.checkpoints.gguf import open_gguf
from lightning_spectral.checkpoints.gguf_header import MAGIC
from lightning_spectral.checkpoints.pieces import refuse_part
from lightning_spectral.checkpoints.state_dicts import TORCH, load_plain, nested
from lightning_spectral.checkpoints.untrusted import Opened, damage, printable, read_json, refuse_bomb
from lightning_spectral.errors import CheckpointError
from lightning_spectral.records.plain import FORMAT
from lightning_spectral.weights.names import plain_name

__all__ = ["Checkpoint", "open_checkpoint"]

# Limits far above every real file. A larger header would take memory before it could be refused.
_MAX_HEADER, _MAX_NAME = 2**26, 512

_REST = "meta.pt"  # of a distributed checkpoint of Lightning
_STATE = "trainer_state.json"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Checkpoint(Opened):
    """The tensors of a checkpoint, by the names that they have in the model.

    Attributes:
        path: What the user named.
        folder: Where ``config.json`` would lie.
    """

    path: Path
    folder: Path


def open_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Open a checkpoint file or a model folder.

    Args:
        path: A ``.safetensors`` file, a file of ``torch.save`` (a state dict, or dicts with state dicts in them), a
            GGUF file, an index of shards, or a folder: of Hugging Face, or of ``torch.distributed.checkpoint``.
        key: Prefix of the names of the wanted weights, for a file with several models: keys that lead to a state dict,
            or the name of a module, joined by dots.

    Raises:
        CheckpointError: There is no such file, the file is damaged, its format is not supported, or a folder has
            several candidates.
    """
    named, path = path, Path(path)
    with damage(path, "a path"):
        if not path.exists():
            refuse_no_path(named)
        is_folder = path.is_dir()
        found = weights_in(path) if is_folder else path
    folder = path if is_folder else path.parent
    if found.name == METADATA:
        opened = _open_distributed(found.parent)
    elif found.name.endswith(INDEX):
        opened = _open_shards(found)
    else:
        refuse_part(found)
        opened = _open_file(found)
    if is_folder:
        opened = replace(opened, notes=(*opened.notes, *_choice(path, found)))
    return _named(path, folder, replace(opened, step=opened.step or _step_beside(found)), key)


def _step_beside(weights: Path) -> int:
    """Return the step that the Trainer of transformers writes beside weights, 0 where nobody knows it."""
    state = weights.parent / _STATE
    step: Any = 0
    with suppress(CheckpointError):  # weights are read without it
        step = read_json(state).get("global_step") if state.is_file() else 0
    return max(step, 0) if isinstance(step, int) and not isinstance(step, bool) else 0


def _choice(folder: Path, found: Path) -> Iterator[str]:
    """Say which checkpoint of the folder of a run is read."""
    read = found.parent if found.name == METADATA else found
    if read in (saved := saved_in_run(folder)):
        others = f", the newest of {len(saved)} checkpoints" if len(saved) > 1 else ""
        yield f"{printable(read.relative_to(folder))} was read{others}"


def _named(path: Path, folder: Path, found: Opened, key: str | None) -> Checkpoint:
    """Leave out what wrappers add to names, names that belong to no module, and what was not asked for."""
    begin = found.whole if key is None else _beginning(path, found, key)
    stored: dict[str, list[str]] = defaultdict(list)
    for name in found.shapes:
        if name.startswith(begin) and len(name) <= _MAX_NAME and name.isprintable():
            stored[plain_name(name.removeprefix(begin))].append(name)
    if not stored:
        remark = "".join(f" ({printable(note)})" for note in found.notes)
        raise CheckpointError(f"{printable(path)}: found no tensors, expected the weights of a model{remark}")
    names = {name: _only(path, name, held, found) for name, held in stored.items()}
    return Checkpoint(
        path=path,
        folder=folder,
        shapes={name: found.shapes[held] for name, held in names.items()},
        read=lambda name: found.read(names[name]),
        dicts=tuple(plain_name(item.removeprefix(begin)) for item in found.dicts if item.startswith(begin)),
        **{name: getattr(found, name) for name in ("copied", "step", "blocks", "config", "notes")},
    )


def _beginning(path: Path, found: Opened, key: str) -> str:
    """Return the prefix of the names that a key selects. The key may leave out the prefix of the whole model."""
    for begin in (f"{found.whole}{key}.", f"{key}."):
        if any(name.startswith(begin) for name in found.shapes):
            return begin
    counts = Counter(".".join(name.split(".")[:-1][:2]) for name in found.shapes if name.isprintable())
    listed = ", ".join(repr(printable(begin, 60)) for begin, _ in counts.most_common(6) if begin)
    raise CheckpointError(
        f"{printable(path)}: no name in it begins with the key {printable(key, 60)!r}, expected something like {listed}"
    )


def _only(path: Path, name: str, held: Sequence[str], found: Opened) -> str:
    """Return the stored name of a weight. Several names are accepted if they hold the same numbers."""
    first, *others = held
    for other in others:
        if found.shapes[first] != found.shapes[other] or not torch.equal(found.read(first), found.read(other)):
            raise CheckpointError(
                f"{printable(path)}: found {printable(name)} twice, as {printable(first)!r} and as "
                f"{printable(other)!r}, with different numbers, expected one copy"
            )
    return first


def _open_shards(index: Path) -> Opened:
    """Open all files that an index names. All of their tensors count, as in transformers."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(f"{printable(index)}: expected an object 'weight_map' from tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.isprintable():
            raise CheckpointError(
                f"{printable(index)}: the shard {printable(name)!r} is not the name of a file beside it"
            )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{printable(index)}: {len(missing)} of its {len(names)} files are not there, {printable(missing[0], 80)}: "
            "no such file, expected all of them beside the index (is the index from an older model, or a "
            "download incomplete?)"
        )
    shards = {name: _open_file(index.parent / name) for name in names}
    absent = [key for key, name in weight_map.items() if key not in shards[name].shapes]
    if absent:
        raise CheckpointError(
            f"{printable(index)}: {len(absent)} tensor(s) are not in the shard that the index names, the first is "
            f"{printable(absent[0])}"
        )
    places: dict[str, str] = {}
    for name, shard in shards.items():
        for key in shard.shapes:
            if places.setdefault(key, name) != name:
                raise CheckpointError(
                    f"{printable(index)}: {printable(key)} is in {printable(places[key], 80)} and in "
                    f"{printable(name, 80)}: they are not of one model, expected the files of one"
                )
    shapes = {key: shards[name].shapes[key] for key, name in places.items()}
    return Opened(shapes, lambda key: shards[places[key]].read(key))


def _open_file(path: Path) -> Opened:
    if not path.is_file():
        refuse_no_path(path)
    with damage(path, "a file"), path.open("rb") as file:
        start = file.read(HEAD)
    if not start:
        raise CheckpointError(f"{printable(path)}: the file is empty, expected a checkpoint")
    if start.startswith(MAGIC):
        return open_gguf(path)
    # A safetensors file begins with the length of its header and the brace that opens it.
    is_safe = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    if not is_safe:
        refuse_foreign(path, start)
    if is_safe or path.suffix == ".safetensors":
        return _open_safetensors(path, start)
    if not start.startswith((_ZIP, _PICKLE)):
        raise CheckpointError(
            f"{printable(path)}: not readable as {TORCH}: it begins with {printable(start[:16])}, as no known format "
            "does"
        )
    return _open_torch(path, mapped=start.startswith(_ZIP))


def _open_safetensors(path: Path, start: bytes) -> Opened:
    expected = "a safetensors file"
    with damage(path, expected):
        try:
            from safetensors import safe_open
        except ModuleNotFoundError:
            raise CheckpointError(
                f"{printable(path)}: reading it needs the package safetensors: pip install safetensors"
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

    return Opened(shapes, read)


def _open_torch(path: Path, *, mapped: bool) -> Opened:
    with damage(path, TORCH):
        if mapped:
            refuse_bomb(path)
        loaded = load_plain(path, mapped=mapped)
        found = nested(loaded)
        step, blocks = _facts(loaded)
    return replace(found, step=step, blocks=blocks)


def _open_distributed(folder: Path) -> Opened:
    found = open_distributed(folder)
    rest, expected = folder / _REST, "the file that Lightning writes beside the shards"
    if not rest.is_file():
        return found
    with damage(rest, expected):
        refuse_bomb(rest)
        step, blocks = _facts(load_plain(rest, expected, mapped=False))
    return replace(found, step=step, blocks=blocks)


def _facts(loaded: Mapping[Any, Any]) -> tuple[int, Any]:
    """Return the step of a Lightning checkpoint, and the blocks that a monitor wrote into it."""
    step, callbacks = loaded.get("global_step", 0), loaded.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    kept = (state.get("blocks") for state in states if isinstance(state, Mapping))
    blocks = next((item for item in kept if isinstance(item, Mapping) and FORMAT in item), None)
    return (step if isinstance(step, int) else 0), blocks
