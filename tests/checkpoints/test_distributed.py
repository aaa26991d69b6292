"""Folders of ``torch.distributed.checkpoint``: read without unpickling, put together from any tiles, never believed."""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from zoo import example

from lightning_spectral import ExactSVD, audit, measure
from lightning_spectral.checkpoints.distributed import METADATA
from lightning_spectral.checkpoints.files import open_checkpoint
from lightning_spectral.checkpoints.inert import Inert, read_pickle
from lightning_spectral.errors import CheckpointError


def saved(state: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def tiles(shape: tuple[int, ...], parts: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut every dimension into parts as equal as whole numbers allow; some have no entries."""
    edges = [[size * part // parts for part in range(parts + 1)] for size in shape]
    return [
        (tuple(a for a, _ in box), tuple(b - a for a, b in box))
        for box in itertools.product(*(itertools.pairwise(edge) for edge in edges))
    ]


def tiled(state: dict[str, Tensor], folder: Path, parts: int, change: Callable[[Metadata], None] | None = None) -> Path:
    """Write a folder by hand, every tensor in tiles that are spread over three files."""
    folder.mkdir(exist_ok=True)
    files = [io.BytesIO() for _ in range(3)]
    index = Metadata({}, planner_data={}, storage_data={})
    for name, value in state.items():
        chunks = []
        for number, (offsets, sizes) in enumerate(tiles(tuple(value.shape), parts)):
            file = files[number % 3]
            start = file.tell()
            box = tuple(slice(a, a + b) for a, b in zip(offsets, sizes, strict=True))
            torch.save(value[box].clone(), file)
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            place = _StorageInfo(f"__{number % 3}_0.distcp", start, file.tell() - start)
            index.storage_data[MetadataIndex(name, offsets, number)] = place
        properties = TensorProperties.create_from_tensor(value)
        index.state_dict_metadata[name] = TensorStorageMetadata(properties, value.shape, chunks)
        index.planner_data[name] = (name,)
    if change is not None:
        change(index)
    for number, file in enumerate(files):
        (folder / f"__{number}_0.distcp").write_bytes(file.getvalue())
    (folder / METADATA).write_bytes(pickle.dumps(index))
    return folder


def refused(folder: Path, blocks: Any) -> str:
    with pytest.raises(CheckpointError, match=re.escape(str(folder))) as info:
        audit(folder, blocks)
    message = str(info.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("parts", [1, 2, 3, 40])
def test_a_tensor_is_put_together_from_its_tiles(parts: int, state: Any, tmp_path: Path):
    state = {"w": torch.randn(5, 12), "v": torch.arange(7), "s": torch.tensor(3.0), "b": torch.ones(2, 3).bfloat16()}
    checkpoint = open_checkpoint(tiled(state, tmp_path / "tiles", parts))
    assert dict(checkpoint.shapes) == {name: tuple(value.shape) for name, value in state.items()}
    for name, value in state.items():
        found = checkpoint.read(name)
        assert found.dtype == value.dtype
        assert torch.equal(found, value)


@pytest.mark.parametrize("inside", [(), ("state_dict",), ("model",), ("app", "model")])
def test_folders_are_measured_as_their_model(inside: tuple[str, ...], state: Any, blocks: Any, tmp_path: Path):
    """As torch writes them, the state of a model alone or among other things, which may have the same names."""
    expected = measure(example("gpt2").build(), blocks, solver=ExactSVD())
    whole: Any = state
    for name in reversed(inside):
        whole = {name: whole, f"{name}_optimizer": {key: 2 * value for key, value in state.items()}, "step": 3}
    found = audit(saved(whole, tmp_path / "torch"), blocks, solver=ExactSVD())
    assert found.layers == expected.layers
    assert audit(tiled(state, tmp_path / "tiles", 3), blocks, solver=ExactSVD()).layers == expected.layers


def test_what_is_read_is_one_tensor(tmp_path: Path):
    """Damage to one tensor is found when that one is asked for, and the others are not read."""
    folder = saved({"a": torch.ones(100), "b": torch.ones(200)}, tmp_path / "torch")
    (file,) = folder.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[: len(content) // 3] = bytes(len(content) // 3)
    file.write_bytes(content)
    checkpoint = open_checkpoint(folder)
    intact = []
    for name in "ab":
        try:
            intact.append(len(checkpoint.read(name)))
        except CheckpointError:
            intact.append(0)
    assert sorted(intact) in ([0, 100], [0, 200])


def test_an_index_that_contradicts_its_files_gives_one_clear_error(state: Any, blocks: Any, tmp_path: Path):
    name = "transformer.h.0.mlp.c_fc.weight"

    def chunk(index: Metadata, number: int) -> ChunkStorageMetadata:
        return index.state_dict_metadata[name].chunks[number]  # type: ignore[union-attr]

    def places(index: Metadata) -> list[_StorageInfo]:
        return [info for key, info in index.storage_data.items() if key.fqn == name]

    def moved(index: Metadata) -> None:
        """The second tile lies where the first one does, and the index knows it."""
        chunk(index, 1).offsets = chunk(index, 0).offsets

    def described_larger(index: Metadata) -> None:
        entry: Any = index.state_dict_metadata[name]
        entry.size = torch.Size((10**6, 10**6))

    def other_dtype(index: Metadata) -> None:
        entry: Any = index.state_dict_metadata[name]
        entry.properties.dtype = torch.bfloat16

    changes: list[tuple[Callable[[Metadata], Any], str]] = [
        (moved, "chunks of transformer.h.0.mlp.c_fc.weight overlap, or some are missing"),
        (lambda index: index.state_dict_metadata[name].chunks.pop(), "overlap, or some are missing"),
        (lambda index: setattr(chunk(index, 3), "sizes", torch.Size((999, 1))), "does not lie inside of"),
        (lambda index: setattr(chunk(index, 3), "sizes", torch.Size((1,))), "a chunk has 1 dimensions and its tensor"),
        (lambda index: setattr(chunk(index, 3), "offsets", (16, 16)), "offsets of a ChunkStorageMetadata is a tuple"),
        (lambda index: setattr(chunk(index, 3), "offsets", torch.Size((-1, 1))), "numbers that no tensor has"),
        (lambda index: setattr(chunk(index, 3), "offsets", torch.Size((1,) * 50)), "expected a Size"),
        (lambda index: setattr(places(index)[0], "relative_path", "../x"), "'../x' is not the name of a file beside"),
        (lambda index: setattr(places(index)[0], "offset", 10**9), "bytes, fewer than"),
        (lambda index: setattr(places(index)[0], "length", -5), "bytes, fewer than -5"),
        (lambda index: setattr(places(index)[0], "length", 50), "BadZipFile"),
        (lambda index: setattr(places(index)[0], "transform_descriptors", ("zstd",)), "its files are transformed"),
        (lambda index: setattr(places(index)[0], "offset", 0), "something else at 0"),
        (described_larger, "is larger than all files together"),
        (other_dtype, "something else at"),
        (lambda index: index.storage_data.clear(), "expected a _StorageInfo"),
        (lambda index: setattr(index, "storage_data", None), "storage_data of a Metadata is a NoneType"),
        (lambda index: setattr(index, "state_dict_metadata", {name: 3}), "expected a TensorStorageMetadata"),
        (lambda index: index.state_dict_metadata.update({3: index.state_dict_metadata[name]}), "3 is larger than all"),
        (lambda index: index.state_dict_metadata.clear(), "found no tensors, expected the weights of a model"),
        (lambda index: setattr(index.state_dict_metadata[name], "properties", places(index)[0]), "no properties"),
    ]
    for number, (change, message) in enumerate(changes):
        assert message in refused(tiled(state, tmp_path / str(number), 2, change), blocks), message


def test_an_archive_in_a_folder_may_be_no_bomb(state: Any, blocks: Any, tmp_path: Path):
    folder = saved(state, tmp_path / "torch")
    (file,) = folder.glob("*.distcp")
    # Entry by entry of the directory of each archive: the method is that of deflation.
    entry = re.compile(rb"(PK\x01\x02.{6})\0\0", re.DOTALL)
    file.write_bytes(entry.sub(lambda match: match[1] + b"\x08\0", file.read_bytes()))
    assert "the archive is compressed" in refused(folder, blocks)


class Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_an_index_that_runs_code_is_refused_and_does_not_run(state: Any, blocks: Any, tmp_path: Path):
    marker = tmp_path / "was_here"
    for number, change in enumerate(
        (
            lambda index: setattr(index, "planner_data", Trap(marker)),
            lambda index: setattr(index, "storage_meta", Trap(marker)),
            lambda index: index.state_dict_metadata.update(a=Trap(marker)),
        )
    ):
        folder = tiled(state, tmp_path / str(number), 1, change)
        assert "the pickle names posix.mkdir, which the index of a checkpoint never does" in refused(folder, blocks)
    (folder / METADATA).write_bytes(pickle.dumps(Trap(marker), protocol=0))
    assert "the pickle names posix.mkdir" in refused(folder, blocks)
    assert not marker.exists()
    saved(state, tmp_path / "chunk")
    (file,) = (tmp_path / "chunk").glob("*.distcp")
    content = file.read_bytes()
    torch.save(Trap(marker), file)
    file.write_bytes(file.read_bytes().ljust(len(content), b"\0"))
    refused(tmp_path / "chunk", blocks)
    assert not marker.exists()


def test_a_file_beside_the_shards_is_read_as_data_only(state: Any, blocks: Any, tmp_path: Path):
    folder = saved({"state_dict": state}, tmp_path / "torch")
    torch.save({"global_step": 12, "callbacks": [1]}, folder / "meta.pt")
    assert audit(folder, blocks).step == 12
    torch.save({"global_step": Trap(tmp_path / "was_here")}, folder / "meta.pt")
    assert "not readable as the file that Lightning writes beside the shards" in refused(folder, blocks)
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_plain_values_is_what_unpickling_makes(protocol: int):
    shared = ["again"]
    value = {
        "numbers": [0, -1, 300, 70_000, -(2**40), 2**60, 1.5, math.inf],
        "words": ("", "ä", "x" * 300, None, True, False),
        "nested": [(), [], {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {1: {"a": [[2]]}}],
        "shared": [shared, shared],
        "many": list(range(3000)),
        "dict": {str(number): number for number in range(3000)},
    }
    found = read_pickle(pickle.dumps(value, protocol), ())
    assert found == value
    assert found["shared"][0] is found["shared"][1]


def test_things_stay_inert():
    content = pickle.dumps([MetadataIndex("a", (1, 2)), torch.Size((3,)), torch.bfloat16, _StorageInfo("f", 1, 2)])
    room = "torch.distributed.checkpoint"
    names = {f"{room}.metadata.MetadataIndex", "torch.Size", "torch.bfloat16", f"{room}.filesystem._StorageInfo"}
    key, size, dtype, place = read_pickle(content, names)
    assert isinstance(key, Inert)
    assert (key.name, key.arguments, key.state["fqn"]) == (f"{room}.metadata.MetadataIndex", (), "a")
    assert key.state["offset"].arguments == ((1, 2),)
    assert (size.name, size.arguments) == ("torch.Size", ((3,),))
    assert (dtype.name, dtype.arguments) == ("torch.bfloat16", None)
    assert place.state == {"relative_path": "f", "offset": 1, "length": 2}


def endless() -> bytes:
    """A dict whose key is a tuple of tuples of tuples: to hash it would take for ever."""
    key: Any = ()
    for _ in range(70):
        key = (key, key)
    content = pickle.dumps([key, 1])
    return content.replace(b"]\x94(", b"}\x94(", 1)[:-2] + b"u."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (endless(), "a dict with a key that is neither text nor a number nor an object"),
        (b"\x80\x04.", "does not end with one value"),
        (b"\x80\x04K\x01K\x02.", "does not end with one value"),
        (b"\x80\x04(K\x01.", "does not end with one value"),
        (b"\x80\x04\x85.", "takes more values than it has"),
        (b"\x80\x04K\x01(\x85.", "takes more values than it has"),
        (b"\x80\x04t.", "takes more values than it has"),
        (b"\x80\x04h\x05.", "takes more values than it has"),
        (b"\x80\x04K\x01K\x02a.", "fills a int as if it were a list"),
        (b"\x80\x04}(K\x01u.", "a dict with a key"),
        (b"\x80\x04K\x01)R.", "calls something other than a class or function"),
        (b"\x80\x04K\x01K\x02\x93.", "imports a name that is not text"),
        (b"\x80\x04C\x01a.", "has the instruction SHORT_BINBYTES"),
        (b"(S'x'\nios\nsystem\n.", "has the instruction STRING"),
        (b"\x80\x04cos\nsystem\n.", "names os.system"),
        (b"\x80\x04\x82\x01.", "has the instruction EXT1"),
        (b"\x80\x04K\x01Q.", "has the instruction BINPERSID"),
        (b"\x80\x04K\x01", "pickle exhausted before seeing STOP"),
        (b"", "pickle exhausted before seeing STOP"),
        (b"\x80\x04X\xff\xff\xff\xff", "expected 4294967295 bytes"),
    ],
)
def test_a_pickle_that_is_no_index_is_refused(content: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        read_pickle(content, {"torch.Size"})


def mutated(content: bytes, source: random.Random) -> bytes:
    """Damage a file anywhere: bits, cuts, insertions, extreme numbers."""
    data, how = bytearray(content), source.randrange(5)
    place = source.randrange(len(data))
    if how == 0:
        for _ in range(source.randrange(1, 8)):
            data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    elif how == 1:
        del data[place:]
    elif how == 2:
        del data[place : place + source.randrange(1, 200)]
    elif how == 3:
        data[place:place] = source.randbytes(source.randrange(1, 60))
    else:
        data[place : place + 8] = source.choice([b"\xff" * 8, b"\0" * 8, b"K\xffK\xff0000"])
    return bytes(data)


def measured_or_refused(folder: Path, blocks: Any) -> bool:
    try:
        audit(folder, blocks)
    except CheckpointError as error:
        message = str(error)
    else:
        return True
    assert message.isprintable()
    assert len(message) < 1200
    return False


@pytest.mark.parametrize("damaged", ["index", "shard"])
def test_damaged_folders_are_measured_or_refused(damaged: str, state: Any, blocks: Any, tmp_path: Path):
    """Three hundred of each: no other exception, no warning, one printable line."""
    folder = tiled(state, tmp_path / "tiles", 2)
    path = folder / (METADATA if damaged == "index" else "__0_0.distcp")
    content, source, outcomes = path.read_bytes(), random.Random(0), {True: 0, False: 0}
    for _ in range(300):
        path.write_bytes(mutated(content, source))
        outcomes[measured_or_refused(folder, blocks[:1])] += 1
    assert all(outcomes.values())  # both happen; how often depends on how torch writes the index
