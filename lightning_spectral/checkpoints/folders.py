"""Choose the file of weights in a folder: the one that transformers would load, or an error with the choices."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_spectral.checkpoints.distributed import METADATA
from lightning_spectral.checkpoints.pieces import refuse_part
from lightning_spectral.checkpoints.untrusted import printable, read_json
from lightning_spectral.errors import CheckpointError

__all__ = ["INDEX", "saved_in_run", "weights_in"]

INDEX = ".index.json"
_ADAPTERS = "adapter_config.json"
_CONFIG = "config.json"
# In the order in which transformers looks for them. Variants (model.fp16.safetensors) are loaded only by name.
_ORDER = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
_CUT = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")
_ZERO = re.compile(r"(bf16_)?zero_pp_rank_|mp_rank_\d+_model_states\.pt|global_step\d")
_CKPT = ".ckpt"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_OTHERS = (".h5", ".msgpack", ".onnx", ".npz", ".pb", ".nemo", ".tflite")
_NO_WEIGHTS = re.compile(r"optim|scheduler|scaler|training_args|rng_state|random_states|tokenizer|trainer_state")
_SHOWN, _DEEPEST, _MOST = 5, 3, 2000


def weights_in(folder: Path) -> Path:
    """Return the file or the index of the weights in a model folder.

    Args:
        folder: The folder.

    Raises:
        CheckpointError: The folder has no weights, or several files of weights without a rule to choose one.
    """
    names = {item.name for item in folder.iterdir()}
    _refuse_adapters(folder, names)
    found = _explicit(folder) or next((folder / name for name in _ORDER if name in names), None)
    if METADATA in names:
        if found is not None:
            raise CheckpointError(
                f"{printable(folder)}: found two models in this folder, {METADATA} with its shards and {found.name}: "
                f"name one of them, audit({_shown(folder / METADATA)}) or audit({_shown(found)})"
            )
        return folder / METADATA
    if found is None and (saved := saved_in_run(folder)):
        newest = saved[-1]
        return weights_in(newest) if newest.is_dir() else newest
    return _single(folder, names) if found is None else found


def saved_in_run(folder: Path) -> list[Path]:
    """Return the checkpoints that a run of Lightning has saved in a folder or in its ``checkpoints``, the newest last.

    The folder of a run has no other weights. Lightning itself goes on from the newest one, too.
    """
    for place in (folder, folder / "checkpoints"):
        if place.is_dir():
            names = [item.name for item in place.iterdir() if item.name.endswith(_WEIGHTS)]
            if names and all(name.endswith(_CKPT) for name in names):
                return sorted((place / name for name in names), key=_age)
    return []


def _refuse_adapters(folder: Path, names: set[str]) -> None:
    """Refuse a folder with adapters: the model computes with base weights and adapters together."""
    if _ADAPTERS not in names:
        return
    beside = next((name for name in _ORDER if name in names), None)
    if beside is not None:
        raise CheckpointError(
            f"{printable(folder)}: found {beside} and the adapters of {_ADAPTERS}, and the model computes with both: "
            f"merge them first (merge_and_unload), or audit the weights alone: audit({_shown(folder / beside)})"
        )
    base = read_json(folder / _ADAPTERS).get("base_model_name_or_path")
    of = "" if base is None else f", for the weights of {printable(base, 100)!r}"  # None: the model had no name
    raise CheckpointError(
        f"{printable(folder)}: found only adapters, {_ADAPTERS}{of}: merge "
        "them first (merge_and_unload, save_pretrained), and audit what that saves"
    )


def _explicit(folder: Path) -> Path | None:
    """Return the file that the entry ``transformers_weights`` of the config names, if there is one."""
    path = folder / _CONFIG
    named = read_json(path).get("transformers_weights") if path.is_file() else None
    if named is None:
        return None
    if not isinstance(named, str) or not named.endswith((".safetensors", f".safetensors{INDEX}")):
        raise CheckpointError(
            f"{printable(path)}: transformers_weights is {printable(repr(named), 60)}, expected the name of a "
            f"*.safetensors or a *.safetensors{INDEX}"
        )
    if Path(named).name != named or "\\\\" in named or not named.isprintable() or not (folder / named).is_file():
        raise CheckpointError(
            f"{printable(path)}: transformers_weights is {printable(named, 60)!r}, which is not a file beside it"
        )
    return folder / named


def _single(folder: Path, names: set[str]) -> Path:
    """Return the only safetensors file of a folder without a file name that transformers knows."""
    if any(_CUT.fullmatch(name) for name in names):
        raise CheckpointError(
            f"{printable(folder)}: each shard-*.safetensors holds a part of every tensor: put them together first, "
            "torch.distributed.checkpoint.consolidate_hf_safetensors.consolidate_safetensors_files(FOLDER, WHOLE), and "
            "audit what that writes"
        )
    safe = sorted(name for name in names if name.endswith(".safetensors") and not _NO_WEIGHTS.search(name))
    if len(safe) == 1:
        return folder / safe[0]
    raise CheckpointError(f"{printable(folder)}: {_nothing(folder, names)}")


def _nothing(folder: Path, names: set[str]) -> str:
    """Return why no file of a folder can be chosen, and what to name instead."""
    if "zero_to_fp32.py" in names or any(_ZERO.match(name) for name in names):
        return _of_deepspeed(folder)
    if "latest_checkpointed_iteration.txt" in names or any(name.startswith("mp_rank_") for name in names):
        return (
            "found the model-parallel parts that Megatron writes, each with a part of every matrix: put them together "
            "first (its tools/checkpoint), and audit what that writes"
        )
    if "saved_model.pb" in names:
        return "found saved_model.pb, a TensorFlow graph, which is not read: audit the model that it was exported from"
    here = sorted(name for name in names if name.endswith(_WEIGHTS) and not _NO_WEIGHTS.search(name))
    shards = {(match[1], match[2]) for name in here if (match := _SHARD.fullmatch(name))}
    if len(here) > 1 and len(shards) == 1 and all(map(_SHARD.fullmatch, here)):
        ((stem, suffix),) = shards
        return f"found {_listed(here)}, but not the index that says what is in them, {stem}{suffix}{INDEX}"
    if here:
        refuse_part(folder / here[0])
    paths = [folder / name for name in here] or list(_below(folder))
    others = sorted(name for name in names if name.endswith(_OTHERS))
    expected = f"expected one of {', '.join(_ORDER)} or a single *.safetensors"
    if paths:
        found = _listed([path.relative_to(folder).as_posix() for path in paths])
        several = f"found {found} in this folder, {expected}"
        none = f"found no weights in this folder, {expected}, but {found}"
        return (
            f"{several if paths[0].suffix == '.safetensors' else none}: name what is meant, audit({_shown(paths[-1])})"
        )
    if "spectral.jsonl" in names:
        return "found the file of a run, but no checkpoint of it; lightning-spectral report FOLDER draws the run"
    if others:
        return f"found only {_listed(others)} in this folder, which is not read: convert it to safetensors"
    return f"found no weights in this folder, {expected}"


def _of_deepspeed(folder: Path) -> str:
    files = sorted(folder.glob("**/*_model_states.pt"))
    whole = (
        ""
        if len(files) != 1 or "zero_pp_rank" in files[0].name
        else (
            f" (or, as its weights are in one file, which ZeRO below stage 3 leaves whole: audit({_shown(files[0])}))"
        )
    )
    return (
        "found a checkpoint of DeepSpeed, in parts: put them together first, python zero_to_fp32.py FOLDER WHOLE, and "
        f"audit what that writes{whole}"
    )


def _below(folder: Path) -> Iterator[Path]:
    """Yield candidates in the folders below, such as ``checkpoint-500`` and ``checkpoints/last.ckpt``."""
    seen = 0
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(folders, key=_natural) if len(here.relative_to(folder).parts) < _DEEPEST else []
        seen += len(files) + 1
        if seen > _MOST:
            return
        if here == folder:
            continue
        if METADATA in files or any(name in files for name in _ORDER):
            yield here
        else:
            named = [name for name in files if name.endswith(_WEIGHTS) and not _NO_WEIGHTS.search(name)]
            yield from (here / name for name in sorted(named, key=_natural))


def _age(path: Path) -> tuple[int, list[tuple[int, str]]]:
    return path.stat().st_mtime_ns, _natural(path.name)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _listed(names: Sequence[str]) -> str:
    shown = [printable(name, 80) for name in names]
    return ", ".join(shown if len(shown) <= _SHOWN else [*shown[: _SHOWN - 1], "...", shown[-1]])


def _shown(path: Path) -> str:
    return repr(printable(path))
