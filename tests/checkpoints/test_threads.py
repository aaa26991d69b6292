"""Two blocks at a time: the same numbers in the same order, no third block in memory, and errors at their turn."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from zoo import example

from lightning_spectral import ExactSVD, ResidualBlock, attach_scales, audit, find_blocks, measure
from lightning_spectral.checkpoints import blockwise
from lightning_spectral.checkpoints import two_at_a_time as room
from lightning_spectral.checkpoints.files import open_checkpoint
from lightning_spectral.checkpoints.source import Source
from lightning_spectral.checkpoints.two_at_a_time import two_at_a_time, weights_of
from lightning_spectral.errors import CheckpointError
from lightning_spectral.weights.names import parameters_of


@pytest.fixture(scope="module")
def blocks() -> tuple[ResidualBlock, ...]:
    return find_blocks(example("gpt2").build())


def source_of(blocks: Any, copied: bool = False, known: bool = True) -> Source:
    """A source in which every weight is ones, in 16 bits."""

    def ones() -> Tensor:
        return torch.ones(8, 8, dtype=torch.bfloat16)

    names = list(parameters_of(blocks))
    return Source(dict.fromkeys(names, ones), dict.fromkeys(names, (8, 8)) if known else {}, copied)


def test_two_blocks_are_measured_at_a_time_and_come_in_order(blocks: Any):
    """The first waits for the second, which it could not if they were measured one after the other."""
    second_runs = threading.Event()

    def measured(block: ResidualBlock) -> int:
        if block.index == 0:
            assert second_runs.wait(timeout=60)
        elif block.index == 1:
            second_runs.set()
        return block.index

    assert list(two_at_a_time(blocks, source_of(blocks), measured)) == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("audit")]


@pytest.mark.parametrize(("copied", "known", "most"), [(False, True, 2), (True, True, 1), (False, False, 1)])
def test_what_takes_memory_is_measured_alone(copied: bool, known: bool, most: int, blocks: Any):
    """What is copied out of the file, and what is put together from pieces."""
    lock, running, seen = threading.Lock(), [0], []
    both = threading.Barrier(most, timeout=60)

    def measured(block: ResidualBlock) -> None:
        with lock:
            running[0] += 1
            seen.append(running[0])
        if block.index < 2:
            both.wait()
        with lock:
            running[0] -= 1

    list(two_at_a_time(blocks, source_of(blocks, copied, known), measured))
    assert max(seen) == most


def test_an_error_comes_at_the_turn_of_its_block_and_ends_the_rest(blocks: Any):
    begun = []

    def measured(block: ResidualBlock) -> int:
        begun.append(block.index)
        if block.index == 1:
            raise CheckpointError("damaged here")
        time.sleep(0.01)  # else all are done before the thread that gets the error has its turn
        return block.index

    many = blocks * 50
    results = two_at_a_time(many, source_of(blocks), measured)
    assert next(results) == 0
    with pytest.raises(CheckpointError, match="damaged here"):
        next(results)
    assert len(begun) < len(many)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_torch_has_as_many_threads_as_before(threads: int, blocks: Any):
    """Here, in the two threads together, and in threads that begin later."""
    before, seen, later = torch.get_num_threads(), [], []
    torch.set_num_threads(threads)
    try:
        list(two_at_a_time(blocks, source_of(blocks), lambda _: seen.append(torch.get_num_threads())))
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (torch.get_num_threads(), later) == (threads, [threads])
        assert set(seen) == {max(1, threads // 2)}
    finally:
        torch.set_num_threads(before)


def test_a_twin_is_built_by_one_thread(tmp_path: Path):
    """And a file that is refused leaves torch its threads, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model: Any = example("llama").build()
        model.save_pretrained(tmp_path)
        assert len(audit(tmp_path).layers) == 3
        assert torch.get_num_threads() == 3
        (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
        with pytest.raises(CheckpointError, match="hidden_size"):
            audit(tmp_path)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("limit", "dtype"), [(0, torch.bfloat16), (2**27, torch.float32)])
def test_only_what_is_small_is_held_in_32_bits(
    limit: int, dtype: torch.dtype, blocks: Any, monkeypatch: pytest.MonkeyPatch
):
    """Whatever torch makes by default."""
    monkeypatch.setattr(room, "_HELD", limit)
    torch.set_default_dtype(torch.float64)
    try:
        weights = weights_of(blocks[0], source_of(blocks))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in weights.tensors.values()} == {dtype}
    assert all(bool((tensor == 1).all()) for tensor in weights.tensors.values())


def test_no_third_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was read of a block is gone before another one is read in its place."""
    model: Any = example("llama").build()
    blocks = find_blocks(model)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "a.safetensors")
    read: list[Any] = []
    alive: list[int] = []
    plain = weights_of

    def noted(block: ResidualBlock, source: Source) -> Any:
        gc.collect()
        alive.append(sum(reference() is not None for reference in read))
        made = plain(block, source)
        read.append(weakref.ref(next(iter(made.tensors.values()))))
        return made

    monkeypatch.setattr(blockwise, "weights_of", noted)
    audit(tmp_path / "a.safetensors", blocks)
    assert len(alive) == len(blocks) == 3
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
