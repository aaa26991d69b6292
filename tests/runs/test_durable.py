"""Files are written whole or not at all, and no name is taken from anybody."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from full_disk import full_disk

from lightning_spectral.runs.durable import append, replace, set_aside


def test_what_does_not_fit_is_not_begun(tmp_path: Path):
    path = tmp_path / "file"
    replace(path, b"head\n")
    append(path, b"1\n")
    with full_disk(10), pytest.raises(OSError, match="File too large"):
        append(path, b"22222222222222\n")
    assert path.read_bytes() == b"head\n1\n"
    append(path, b"3\n")
    assert path.read_bytes() == b"head\n1\n3\n"


@pytest.mark.parametrize("new", [False, True])
def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path, new: bool):
    path = tmp_path / "file"
    if not new:
        path.write_bytes(b"old")
    with full_disk(10), pytest.raises(OSError, match=rf"File too large: '{path}'"):
        replace(path, b"n" * 11, new=new)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if new else [b"old"])
    replace(path, b"new", new=new)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_another_has_torn_ends_before_something_is_added(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"head\n{torn")
    append(path, b"next\n", head=b"head\n")
    assert path.read_bytes() == b"head\n{torn\nnext\n"


@pytest.mark.parametrize("there", [None, b"", b"hea", b"other\n"])
def test_nothing_is_added_to_a_file_of_somebody_else(tmp_path: Path, there: bytes | None):
    path = tmp_path / "file"
    if there is not None:
        path.write_bytes(there)
    with pytest.raises(FileNotFoundError, match=str(path)):
        append(path, b"mine\n", head=b"head\n")
    assert (path.read_bytes() if path.exists() else None) == there


def test_a_name_that_is_taken_is_left_alone(tmp_path: Path):
    path = tmp_path / "file"
    replace(path, b"1", new=True)
    with pytest.raises(FileExistsError, match=str(path)):
        replace(path, b"2", new=True)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"1"]


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path):
    link, target, pipe = tmp_path / "link", tmp_path / "elsewhere" / "file", tmp_path / "pipe"
    target.parent.mkdir()
    link.symlink_to(target)
    replace(link, b"new")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"new")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace(pipe, b"through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    with pytest.raises(FileNotFoundError, match=str(pipe)):  # and is never waited for
        append(pipe, b"x")


def test_others_may_read_what_they_may_read_of_any_new_file(tmp_path: Path):
    replace(tmp_path / "one", b"")
    (tmp_path / "two").write_bytes(b"")
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}) == 1


def test_an_error_names_the_file_and_not_its_draft(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/page.html'$"):
        replace(tmp_path / "nowhere" / "page.html", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder'$"):
        replace(tmp_path / "folder", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_set_aside_overwrites_nothing(tmp_path: Path, kind: str):
    path = tmp_path / "x"
    for number in range(3):
        if kind == "folder":
            (path / str(number)).mkdir(parents=True)
        elif kind == "link":
            path.symlink_to(f"nowhere-{number}")
        else:
            path.write_text(str(number))
        assert set_aside(path, (f"x-{n}" for n in range(9))) == tmp_path / f"x-{number}"
    found = [tmp_path / f"x-{number}" for number in range(3)]
    assert not os.path.lexists(path)
    if kind == "folder":
        assert [(place / str(n)).is_dir() for n, place in enumerate(found)] == [True] * 3
    elif kind == "link":
        assert [str(place.readlink()) for place in found] == ["nowhere-0", "nowhere-1", "nowhere-2"]
    else:
        assert [place.read_text() for place in found] == ["0", "1", "2"]


def test_what_is_gone_cannot_be_set_aside_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="gone"):
        set_aside(tmp_path / "gone", ["aside"])
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError, match=r"no name is free.*there"):
        set_aside(tmp_path / "there", ["there"])
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
