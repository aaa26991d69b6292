"""Refuse files with only a part of a model (some of its tensors, or a slice of every matrix)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lightning_spectral.checkpoints.untrusted import printable
from lightning_spectral.errors import CheckpointError

__all__ = ["refuse_part"]

_SHARD = re.compile(r"(.+?)[-_.](\d{3,6})-of-(\d{3,6})((?:\.\w+)+)")
# _PROCESS, _STAGE: numbers that only parts of model parallelism have. _MAYBE: numbers that a setting may have too.
_PROCESS = re.compile(r"(?:consolidated[._-]|(?<![a-z])[mtp]p_rank_|model_part-|layer_(?=\d+-model))(\d+)")
_STAGE = re.compile(r"mp_rank_\d+_(\d+)")
_MAYBE = re.compile(r"(?<![a-z])(?:rank|part|shard|tp|mp)[._-]?(\d+)")
_ZERO = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt|.*_optim_states\.pt")


def refuse_part(path: Path) -> None:
    """Refuse a file that holds a part of a model, judging by its name and the names beside it.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is one of several. The message names the others and says what to do.
    """
    shard = _SHARD.fullmatch(path.name)
    if shard is not None and int(shard[3]) > 1:
        raise CheckpointError(
            f"{printable(path)}: it is number {int(shard[2])} of {int(shard[3])} files that hold the model together: "
            + _way_to_all(path, shard[1] + shard[4])
        )
    if _ZERO.fullmatch(path.name):
        raise CheckpointError(
            f"{printable(path)}: it holds a part of every tensor, as DeepSpeed writes them: put the parts together "
            "first, python zero_to_fp32.py FOLDER WHOLE, and audit what that writes"
        )
    for place in (path, path.parent):
        beside = next(_others(place), None)
        if beside is not None:
            others = f"{', '.join(beside[:3])} beside it" if beside else "its number"
            raise CheckpointError(
                f"{printable(path)}: {printable(place.name, 60)} is one of several model-parallel parts, as {others} "
                "says, and a part of a matrix has another norm than the matrix: put the parts together first, and "
                "audit what that writes (if the file is whole, copy it to a folder of its own under another name)"
            )


def _way_to_all(path: Path, name: str) -> str:
    if path.suffix == ".gguf":
        return "merge them first, gguf-split --merge, and audit what that writes"
    index = path.parent / f"{name}.index.json"
    if index.is_file():
        return f"name the index, audit({printable(index)!r}), or the folder"
    return f"name the folder that has all of them and {printable(index.name, 80)}, which says what is in them"


def _others(path: Path) -> Iterator[list[str]]:
    """For every number in the name that counts parts, yield the other files that differ only in this number."""
    for pattern in (_PROCESS, _STAGE, _MAYBE):
        for match in pattern.finditer(path.name):
            before, after = path.name[: match.start(1)], path.name[match.end(1) :]
            like = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
            names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else [path.name]
            numbers = {int(found[1]): name for name in names if (found := like.fullmatch(name))}
            counted = len(numbers) > 1 and sorted(numbers) == list(range(len(numbers)))
            if counted or (pattern is not _MAYBE and (len(numbers) > 1 or int(match[1]) > 0)):
                yield sorted(printable(name, 60) for name in numbers.values() if name != path.name)
