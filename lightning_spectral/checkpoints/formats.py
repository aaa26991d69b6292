"""Formats that are recognized but not read. Each has a message on how to convert it."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from lightning_spectral.checkpoints.untrusted import damage, printable
from lightning_spectral.errors import CheckpointError

__all__ = ["HEAD", "refuse_foreign", "refuse_no_path"]

HEAD = 265
"""Number of bytes at the beginning of a file that tell its format. The mark of a tar archive is the last one."""

_STATE_DICT = (
    "load it with its own library, and save the state dict: safetensors.torch.save_file(model.state_dict(), ...)"
)
_UNPACK = "unpack it, and audit the weights that are inside"
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer in place of the weights", "git lfs pull fetches them"),
    (0, b"\x89HDF\r\n", "an HDF5 file, as Keras and TensorFlow write it", _STATE_DICT),
    (0, b"\x93NUMPY", "a single array of numpy", "save all weights by their names: safetensors.numpy.save_file(...)"),
    (4, b"TFL3", "a TFLite model", "audit the model that it was exported from"),
    (257, b"ustar", "a tar archive, as .nemo files are", _UNPACK),
    (0, b"\x1f\x8b", "a file that was compressed by gzip", _UNPACK),
    (0, b"BZh", "a file that was compressed by bzip2", _UNPACK),
    (0, b"\xfd7zXZ", "a file that was compressed by xz", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a file that was compressed by zstd", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    *((0, magic, "a GGML file from before GGUF", "convert it to GGUF first") for magic in (b"lmgg", b"fmgg", b"tjgg")),
    *((0, magic, "a web page", "download the file itself") for magic in (b"<!DOCTYPE", b"<!doctype", b"<html")),
)
_SUFFIX = {
    ".onnx": ("an ONNX model", "audit the model that it was exported from"),
    ".tflite": ("a TFLite model", "audit the model that it was exported from"),
    ".mlmodel": ("a Core ML model", "audit the model that it was exported from"),
    ".engine": ("a TensorRT engine", "audit the model that it was built from"),
    ".msgpack": ("a msgpack file, as Flax writes it", _STATE_DICT),
    ".h5": ("an HDF5 file, as Keras and TensorFlow write it", _STATE_DICT),
    ".pb": ("a TensorFlow graph", _STATE_DICT),
    ".nemo": ("a NeMo archive", _UNPACK),
    ".py": ("a Python file", "audit the checkpoint that it loads or writes"),
    ".yaml": ("a YAML file", "audit the checkpoint that belongs to it"),
}
# (all or any of the names in a zip archive match, pattern, kind, way to a readable format)
_ARCHIVES: tuple[tuple[Callable[..., bool], str, str, str], ...] = (
    (
        any,
        r".*/(constants\.pkl|code/.*)",
        "a TorchScript archive",
        "save its weights, where you trust it: torch.save(torch.jit.load(path).state_dict(), ...)",
    ),
    (
        all,
        r".*\.npy",
        "an archive of numpy arrays (.npz), as numpy and MLX write it",
        "convert it: safetensors.numpy.save_file(dict(numpy.load(path)), ...)",
    ),
    (
        any,
        r"(.*/)?(archive_format|serialized_exported_program\.json)",
        "a program of torch.export",
        "save its weights, where you trust it: torch.save(torch.export.load(path).state_dict, ...)",
    ),
    (any, r".*\.weights\.h5", "a Keras archive", _STATE_DICT),
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json"}
_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def refuse_foreign(path: Path, start: bytes) -> None:
    """Refuse a file of a format that is recognized but not read.

    Args:
        path: The file.
        start: The first :data:`HEAD` bytes of the file.

    Raises:
        CheckpointError: The file has such a format. The message names the format and says what to do.
    """
    found = next(((kind, way) for at, magic, kind, way in _MAGIC if start[at : at + len(magic)] == magic), None)
    found = found or _SUFFIX.get(path.suffix.lower())
    # An ONNX file begins with two entries of a protocol buffer: the version of the format, and the producer.
    if found is None and start[:1] == b"\x08" and start[2:3] in (b"\x12", b":"):
        found = _SUFFIX[".onnx"]
    if found is None and start.startswith((b"{", b"[")):
        found = ("JSON text without weights", "name the file of weights, or their folder")
    if found is None and start.startswith(b"PK\x03\x04"):
        found = _archive(path)
    if found is not None:
        raise CheckpointError(
            f"{printable(path)}: found {found[0]}, expected a file of safetensors, torch.save or GGUF: {found[1]}"
        )


def _archive(path: Path) -> tuple[str, str] | None:
    with damage(path, "a zip archive"), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for quantifier, pattern, kind, way in _ARCHIVES:
        if names and quantifier(re.fullmatch(pattern, name) for name in names):
            return kind, way
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return "a zip archive that torch.save has not written", _UNPACK
    return None


def refuse_no_path(named: str | Path) -> None:
    """Refuse a name to which there is no file.

    Args:
        named: The name.

    Raises:
        CheckpointError: Always. The message says what to do.
    """
    text, path = str(named), Path(named)
    if path.is_symlink():
        raise CheckpointError(
            f"{printable(text)}: no such file: it is a link to one that is not there, as an incomplete download leaves "
            "it: download it again"
        )
    if _URL.match(text):
        raise CheckpointError(
            f"{printable(text)}: found a URL, and nothing is downloaded: download the file, and name it where it lies"
        )
    remark = ""
    if _HUB.fullmatch(text) and path.suffix not in _FILES and ("/" not in text or not path.parent.exists()):
        remark = (
            f". If that is the name of a model on a hub: nothing is downloaded. Fetch it first, hf download "
            f"{printable(text)} --local-dir FOLDER, then name the folder"
        )
    raise CheckpointError(f"{printable(text)}: no such file, expected a checkpoint file or a model folder{remark}")
