"""Write files so that a crash, a full disk or a second process costs at most the lines that are being written."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path

__all__ = ["append", "link", "replace", "set_aside"]

# Errors of file systems that do not support fsync.
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def append(path: Path, data: bytes, *, head: bytes = b"") -> None:
    """Append data to a file and sync it to the disk: all of the data, or nothing.

    Args:
        path: The file.
        data: Whole lines.
        head: Bytes that the file has to begin with.

    Raises:
        FileNotFoundError: There is no such file, or it does not begin with ``head``.
        OSError: The data cannot be written.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    # Read the head through the descriptor that is written to: another process may rename the file in between.
    with open(path, "r+b", buffering=0, opener=_at_the_end) as file:
        assert isinstance(file, FileIO)
        if file.read(len(head)) != head:
            raise FileNotFoundError(errno.ENOENT, "the file has become another one", str(path))
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        try:
            _write(file, b"\n" + data if torn else data)
        except BaseException:
            with suppress(OSError):
                file.truncate(end)
            raise


def link(source: Path, path: Path) -> None:
    """Give a file, or every file of a folder, a second name: it stays when the first name is deleted.

    Where the file system has no links, the content is copied.

    Args:
        source: The file or folder.
        path: The second name, which must not exist.

    Raises:
        OSError: It cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, path, copy_function=_link)
    else:
        _link(str(source), str(path))


def _link(source: str, path: str) -> None:
    try:
        os.link(source, path)
    except OSError:
        shutil.copy2(source, path)


def replace(path: Path, data: bytes, *, new: bool = False) -> None:
    """Write a whole file atomically: the name always leads to the complete old or the complete new content.

    Args:
        path: The file. A terminal or a pipe is written to directly. A link stays a link.
        data: The new content.
        new: Whether to fail if the file exists.

    Raises:
        FileExistsError: The file exists, and ``new`` is set.
        OSError: The file cannot be written.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)
        return
    path = Path(os.path.realpath(path))
    draft = path.with_name(f".{uuid.uuid4().hex}.tmp")  # no other process uses this name
    try:
        with draft.open("xb", buffering=0) as file:
            _write(file, data)
        (_rename_to_new if new else os.replace)(draft, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # with the name of the file, not of the draft
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    with suppress(OSError):  # sync the folder too, for the new name; not every system can open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def set_aside(path: Path, names: Iterable[str]) -> Path:
    """Rename a file, folder or link without overwriting anything.

    Args:
        path: The file.
        names: Names in the same folder, in order of preference. The first free name is taken.

    Returns:
        The new path.

    Raises:
        OSError: The file cannot be renamed.
    """
    for place in map(path.with_name, names):
        try:  # creating the name reserves it against other processes
            place.mkdir() if path.is_dir() and not path.is_symlink() else place.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            path.replace(place)
        except BaseException:
            with suppress(OSError):
                place.rmdir() if place.is_dir() else place.unlink()
            raise
        return place
    raise FileExistsError(errno.EEXIST, "no name is free to set this file aside", str(path))


def _at_the_end(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND)


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _rename_to_new(draft: Path, path: Path) -> None:
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        raise
    except OSError:  # this file system has no hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        draft.replace(path)
