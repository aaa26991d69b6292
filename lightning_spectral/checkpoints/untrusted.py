"""Safe handling of files that nobody trusts: limits of size, short printable messages, plain tensors only."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lightning_spectral.errors import CheckpointError

__all__ = ["MAX_PICKLE", "Opened", "damage", "is_plain", "printable", "read_json", "refuse_bomb"]

# Limits in bytes, far above every real file. Larger files would take memory before they could be refused.
_MAX_JSON, MAX_PICKLE = 2**26, 2**28


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """What files hold: tensors by name, each of them read when it is asked for.

    Attributes:
        shapes: Shape of every tensor.
        read: Returns a tensor. Its memory belongs to the file wherever the format allows it.
        copied: Whether the format does not allow it.
        dicts: What the names in each state dict begin with, the last dot included.
        whole: What all names of the model begin with.
        step: Optimizer step at which it was written, 0 where the file does not say.
        blocks: What a monitor of this package has left in the checkpoint, as it is; ``None`` where there was none.
        config: The entries of a config, where the file has them itself.
        notes: What a reader of the numbers should know of the file.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    copied: bool = False
    dicts: tuple[str, ...] = ()
    whole: str = ""
    step: int = 0
    blocks: Any = None
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def printable(text: object, limit: int = 200) -> str:
    """Return a text from a file in a form that is safe for a terminal: one short line of printable ASCII.

    Args:
        text: The text.
        limit: In a longer text, in characters, the middle is left out.
    """
    line = str(text)
    if len(line) > limit:
        line = f"{line[: limit // 2]}...{line[-limit // 4 :]}"
    line = line.encode("ascii", "backslashreplace").decode()
    return "".join(item if item.isprintable() else f"\\x{ord(item):02x}" for item in line)


@contextmanager
def damage(path: Path, expected: str) -> Iterator[None]:
    """Turn every exception of a parser into a CheckpointError of one line.

    Args:
        path: The file.
        expected: The expected kind of file, for the message.

    Raises:
        CheckpointError: The code inside of the context raised an exception of any other type.
        FileNotFoundError: There is no such file.
    """
    try:
        yield
    except (CheckpointError, FileNotFoundError):  # what is not there is not damaged
        raise
    except Exception as error:
        text = printable(next(iter(str(error).strip().splitlines()), ""), 200)
        raise CheckpointError(
            f"{printable(path)}: not readable as {expected}: {type(error).__name__}{': ' if text else ''}{text}"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is too large, or does not hold a JSON object.
    """
    with damage(path, "a JSON object"):
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes, more than any real file of this kind has")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}")
        return found


def refuse_bomb(file: Path | IO[bytes]) -> None:
    """Refuse a compressed archive, which may unpack to any size. ``torch.save`` does not compress.

    Raises:
        ValueError: The archive is compressed, or its index is too large.
    """
    with zipfile.ZipFile(file) as archive:
        for item in archive.infolist():
            if item.compress_type != zipfile.ZIP_STORED or item.file_size > item.compress_size:
                raise ValueError("the archive is compressed")
            if item.filename.endswith("data.pkl") and item.file_size > MAX_PICKLE:
                raise ValueError(f"its index has {item.file_size} bytes, more than that of any real checkpoint")


def is_plain(value: Any) -> bool:
    """Whether a value is a strided CPU tensor with memory for every entry. A view may claim any size."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    if type(value) not in (Tensor, torch.nn.Parameter) or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
