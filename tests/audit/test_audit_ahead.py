"""Reading ahead: one block and no more, the same numbers, and errors at the turn of the block that has them."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from zoo import example

from lightning_spectral import ExactSVD, ResidualBlock, attach_scales, audit, find_blocks, measure
from lightning_spectral.audit import ahead
from lightning_spectral.audit.ahead import ReadAhead
from lightning_spectral.audit.files import open_checkpoint
from lightning_spectral.audit.skeleton import parameters_of
from lightning_spectral.audit.source import Source
from lightning_spectral.errors import CheckpointError


class Recorded:
    """A source in which every weight is ones, and notes who reads what."""

    def __init__(self, blocks: tuple[ResidualBlock, ...], copied: bool = False) -> None:
        self.read: list[tuple[str, str]] = []
        self.fail: str | None = None
        self.weights: dict[str, Tensor] = {}
        names = [name for block in blocks for name in parameters_of(block)]
        self.source = Source({name: lambda name=name: self._ones(name) for name in names}, {}, copied)
        self.shapes(dict.fromkeys(names, (8, 8)))

    def shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.source = Source(self.source.readers, shapes, self.source.copied)

    def _ones(self, name: str) -> Tensor:
        self.read.append((name, threading.current_thread().name))
        if name == self.fail:
            raise CheckpointError("damaged here")
        self.weights[name] = torch.ones(8, 8, dtype=torch.bfloat16)
        return self.weights[name]


@pytest.fixture(scope="module")
def blocks() -> tuple[ResidualBlock, ...]:
    return find_blocks(example("gpt2").build())


def wait(reader: ReadAhead) -> None:
    if reader._next is not None:
        reader._next.exception(timeout=60)


def test_one_block_is_read_ahead_and_in_another_thread(blocks: Any):
    recorded = Recorded(blocks)
    sizes = [len(parameters_of(block)) for block in blocks]
    with ReadAhead(blocks, recorded.source) as reader:
        for position in range(3):
            reader.read(position)
            wait(reader)
            assert len(recorded.read) == sum(sizes[: position + 2])
    own = threading.current_thread().name
    assert [thread == own for _, thread in recorded.read] == [True] * sizes[0] + [False] * (sizes[1] + sizes[2])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize(("copied", "limit", "expected"), [(False, 0, 2), (True, 0, 1), (True, 2**27, 2)])
def test_what_takes_memory_is_read_ahead_if_it_is_small(
    copied: bool, limit: int, expected: int, blocks: Any, monkeypatch: pytest.MonkeyPatch
):
    """And only what is small is held in float32."""
    monkeypatch.setattr(ahead, "_HELD", limit)
    recorded = Recorded(blocks, copied)
    with ReadAhead(blocks, recorded.source) as reader:
        model = reader.read(0)
        wait(reader)
        assert len(recorded.read) == sum(len(parameters_of(block)) for block in blocks[:expected])
    kept = {buffer.dtype for buffer in model.buffers()}
    assert kept == {torch.float32 if limit else torch.bfloat16}


def test_weights_in_pieces_are_read_at_their_turn(blocks: Any):
    """Nobody knows how large they are."""
    recorded = Recorded(blocks)
    recorded.shapes({})
    with ReadAhead(blocks, recorded.source) as reader:
        for position in range(3):
            reader.read(position)
            assert reader._next is None


def test_an_error_comes_at_the_turn_of_its_block(blocks: Any):
    recorded = Recorded(blocks)
    recorded.fail = next(iter(parameters_of(blocks[1])))
    with ReadAhead(blocks, recorded.source) as reader:
        reader.read(0)
        wait(reader)
        with pytest.raises(CheckpointError, match="damaged here"):
            reader.read(1)


def test_two_blocks_are_in_memory_and_no_third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was read of a block is gone when the block after the next one is read."""
    model: Any = example("llama").build()
    blocks = find_blocks(model)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "a.safetensors")
    alive: list[int] = []
    seen: list[Any] = []
    plain = ahead._read

    def noted(block: ResidualBlock, source: Source) -> Any:
        import weakref

        alive.append(sum(reference() is not None for reference in seen))
        made = plain(block, source)
        seen.append(weakref.ref(made))
        return made

    monkeypatch.setattr(ahead, "_read", noted)
    audit(tmp_path / "a.safetensors", blocks)
    assert len(alive) == len(blocks)
    assert max(alive) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "plain_functional_params"])
def test_weights_of_16_bits_give_the_numbers_of_their_model(name: str, dtype: torch.dtype, tmp_path: Path):
    """Scales included: those on a weight are multiplied with it in 16 bits, as the model does."""
    model: Any = example(name).build().to(dtype)
    blocks = find_blocks(example(name).build())
    scales = attach_scales(model, blocks)
    with torch.no_grad():
        for number, parameter in enumerate(scales.parameters()):
            parameter.fill_(0.13 * (number + 1))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for solver in (ExactSVD(), None):
        pairs = zip(audit(tmp_path / "a.pt", blocks, solver=solver), measure(model, blocks, solver=solver), strict=True)
        for layer, true in pairs:
            assert math.isclose(layer.mlp_norm or 0, true.mlp_norm or 0, rel_tol=1e-5)
            assert math.isclose(layer.attention_norm or 0, true.attention_norm or 0, rel_tol=1e-5)


def test_reading_does_not_copy_what_the_file_has(tmp_path: Path):
    save_file({"w": torch.ones(64, 64)}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert not checkpoint.copied
    assert checkpoint.read("w").data_ptr() == checkpoint.read("w").data_ptr()
