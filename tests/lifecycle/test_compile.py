"""torch.compile: how many frames are compiled, with and without the monitor, and which hooks compiled code ignores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import read_actions, read_journal
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from steered import log_scales, unbalanced
from tiny_run import LitGPT, fit, loader
from torch._dynamo.testing import CompileCounter

from lightning_spectral import GainCeiling, ResidualRescaler, SpectralMonitor
from lightning_spectral.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def in_place(module: LitGPT, backend: Any) -> None:
    module.model.compile(backend=backend)


def each_block(module: LitGPT, backend: Any) -> None:
    for block in module.model.blocks:
        block.compile(backend=backend)


def wrapped_blocks(module: LitGPT, backend: Any) -> None:
    blocks = module.model.blocks
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend=backend)


WAYS = [in_place, each_block, wrapped_blocks]
Way = Callable[[LitGPT, Any], None]


def compiled_run(folder: Path, way: Way, callbacks: list[Callback], **flags: Any) -> tuple[int, int, LitGPT]:
    """Return how many frames and operations were compiled, and the trained module."""
    torch.compiler.reset()
    module, counter = unbalanced(), CompileCounter()
    way(module, counter)
    fit(folder, callbacks, module=module, **flags)
    return counter.frame_count, counter.op_count, module


@pytest.mark.parametrize("way", WAYS)
def test_watching_compiles_no_frame_and_no_operation_more(tmp_path: Path, way: Way):
    alone = compiled_run(tmp_path / "alone", way, [])
    monitor = SpectralMonitor(every_n_steps=1, geometry=True, on_error="raise")
    watched = compiled_run(tmp_path / "watched", way, [monitor])
    assert alone[0] > 0
    assert watched[:2] == alone[:2]
    assert watched[2].losses == alone[2].losses
    *before, last = read_journal(tmp_path / "watched" / "spectral.jsonl")[1]
    assert last["layers"][0]["ratio"] is not None
    for layer in (layer for record in before for layer in record["layers"]):
        assert layer["token_residual"] > 0
        assert layer["functional"]["update_ratio"] > 0


@pytest.mark.parametrize(("way", "learnable"), [(in_place, False), *((way, True) for way in WAYS)])
def test_scales_that_change_in_every_step_are_never_compiled_anew(tmp_path: Path, way: Way, learnable: bool):
    alone = compiled_run(tmp_path / "alone", way, [])
    rescaler = ResidualRescaler(learnable=learnable, patience=1, gain=0.1, guard=False)
    frames, _, module = compiled_run(tmp_path / "steered", way, [SpectralMonitor(1, rescaler)])
    assert frames == alone[0]
    moved = {action["step"] for action in read_actions(tmp_path / "steered" / "spectral.jsonl")}
    assert len(moved) >= 5
    assert all(value != 0.0 for value in log_scales(module))
    eager = unbalanced()
    fit(tmp_path / "eager", [SpectralMonitor(1, rescaler)], module=eager)
    assert module.losses == pytest.approx(eager.losses, rel=1e-5)


class CompileLater(Callback):
    """Compiles the model after every callback has been set up."""

    def __init__(self, way: Way, backend: Any) -> None:
        self.way, self.backend = way, backend

    def on_train_start(self, trainer: Trainer, pl_module: LitGPT) -> None:  # type: ignore[override]
        self.way(pl_module, self.backend)


@pytest.mark.parametrize(("way", "first"), [(in_place, True), (each_block, False)])
def test_a_model_that_is_compiled_after_the_scales_were_attached_trains_them(tmp_path: Path, way: Way, first: bool):
    torch.compiler.reset()
    counter, monitor = CompileCounter(), SpectralMonitor(2, True)
    compiler, module = CompileLater(way, counter), unbalanced()
    fit(tmp_path, [monitor, compiler] if first else [compiler, monitor], module=module)
    assert counter.frame_count > 0
    assert all(value != 0.0 for value in log_scales(module))


def test_a_model_that_was_compiled_and_run_before_the_monitor_came_is_compiled_anew(tmp_path: Path):
    torch.compiler.reset()
    module, counter = unbalanced(), CompileCounter()
    in_place(module, counter)
    module(torch.zeros(4, 7, dtype=torch.long))
    before = counter.frame_count
    fit(tmp_path, SpectralMonitor(2, True), module=module)
    assert counter.frame_count > before
    assert all(value != 0.0 for value in log_scales(module))


class RunsBeforehand(LitGPT):
    """Was compiled and run while one branch had no hook, as in code that attaches a scale by hand and too late."""

    def on_train_start(self) -> None:
        hooks = self.model.blocks[1].mlp._forward_hooks
        kept = dict(hooks)
        hooks.clear()
        self.model.compile(backend="eager")
        self.loss(next(iter(loader()))).backward()
        self.zero_grad()
        hooks.update(kept)


def test_hooks_that_compiled_code_ignores_are_named_with_the_remedy(tmp_path: Path):
    torch.compiler.reset()
    with pytest.raises(
        ConfigurationError,
        match=r"1 residual scale\(s\) received no gradient.*blocks\.1\.mlp \(the model was compiled and run before the "
        r"scale was attached.*attach first, or call torch\._dynamo\.reset\(\)",
    ):
        fit(tmp_path, SpectralMonitor(2, GainCeiling(learnable=True)), module=RunsBeforehand())
