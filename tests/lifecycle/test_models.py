"""Models as they are used: adapters, packed weights, shared and frozen parts, computed weights, the meta device."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import assert_same, everything
from journals import read_actions, read_journal
from lightning.pytorch import seed_everything
from steered import unbalanced
from tiny_run import BLOCKS, Block, LitGPT, TinyGPT, fit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_spectral import ResidualRescaler, SpectralMonitor, attach_scales, find_blocks, measure


class Packed(nn.Module):
    """A linear layer with two weights of four bits in each byte, unpacked in its forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.shape, self.bias = weight.shape, linear.bias
        self.register_buffer("step", weight.abs().max() / 7)
        levels = (weight / self.step).round().add(8).to(torch.uint8).flatten()
        self.weight = nn.Parameter((16 * levels[::2] + levels[1::2]).view(-1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.stack([self.weight // 16, self.weight % 16], -1).view(self.shape)
        return F.linear(x, (levels.to(x.dtype) - 8) * self.step, self.bias)


class LowRank(nn.Module):
    """A frozen layer and a trained update of low rank."""

    def __init__(self, linear: nn.Linear, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, linear.in_features) / 10)
        self.up = nn.Parameter(torch.zeros(linear.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base.weight += self.up @ self.down
        return self.base


def each_linear(module: LitGPT, replace: Callable[[nn.Linear], nn.Module]) -> None:
    for block in module.model.blocks:
        for owner, name in ((block.attention, "qkv"), (block.attention, "proj"), (block.mlp, "0"), (block.mlp, "2")):
            setattr(owner, name, replace(getattr(owner, name)))


def adapters(module: LitGPT) -> None:
    module.requires_grad_(False)
    each_linear(module, lambda linear: LowRank(linear, linear))


def packed(module: LitGPT) -> None:
    each_linear(module, Packed)


def adapters_on_packed(module: LitGPT) -> None:
    module.requires_grad_(False)
    each_linear(module, lambda linear: LowRank(linear, Packed(linear)))


def shared(module: LitGPT) -> None:
    module.model.blocks = nn.ModuleList([module.model.blocks[0]] * 3)
    module.model.head.weight = module.model.tokens.weight


def partly_frozen(module: LitGPT) -> None:
    module.model.blocks[0].requires_grad_(False)
    module.model.blocks[1].attention.requires_grad_(False)


def spectrally_normed(module: LitGPT) -> None:
    each_linear(module, parametrizations.spectral_norm)


def weight_normed(module: LitGPT) -> None:
    each_linear(module, parametrizations.weight_norm)


def spectrally_normed_by_hooks(module: LitGPT) -> None:
    each_linear(module, torch.nn.utils.spectral_norm)


class Checkpointed(nn.Module):
    """Forgets the activations of a block and computes them again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False) if self.training else self.block(x)


def recomputed(module: LitGPT) -> None:
    module.model.blocks = nn.ModuleList(map(Checkpointed, module.model.blocks))


class Dropped(Block):
    """Is left out of some passes, of the first one too; which, does not depend on a random number."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        return x if self.training and self.passes % 3 == 1 else super().forward(x)


def dropped_layers(module: LitGPT) -> None:
    module.model.blocks[1] = dropped = Dropped(0.0)
    dropped.load_state_dict(module.model.blocks[0].state_dict())


def built(change: Callable[[LitGPT], None], **settings: Any) -> LitGPT:
    module = unbalanced(**settings)
    change(module)
    return module


def scales(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.named_parameters() if name.endswith("log_scale")}


def layers(folder: Path, number: int = -1) -> list[dict[str, Any]]:
    return read_journal(folder / "spectral.jsonl")[1][number]["layers"]


KINDS = {
    adapters: None,
    packed: r"weight, model.blocks.0.mlp.2.step cannot be read: it is computed by the operation 'mul'",
    adapters_on_packed: r"base.step cannot be read: it is computed by the operation 'mul'",
    shared: None,
    partly_frozen: None,
    spectrally_normed: None,
    weight_normed: None,
    spectrally_normed_by_hooks: None,
    recomputed: None,
    dropped_layers: None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_watched_bitwise_and_measured_or_told_why_not(
    tmp_path: Path, kind: Callable[[LitGPT], None]
):
    results = []
    for name, monitors in (("alone", []), ("watched", [SpectralMonitor(1, geometry=True, on_error="raise")])):
        module = built(kind, dropout=0.2)
        results.append(everything(module, fit(tmp_path / name, monitors, module=module, max_steps=4)))
    assert_same(*results)  # buffers included: reading a computed weight advances no power iteration
    for layer in (*layers(tmp_path / "watched", 0), *layers(tmp_path / "watched")):
        if KINDS[kind] is None:
            assert layer["ratio"] is not None
        else:
            assert layer["mlp_norm"] is None
            assert KINDS[kind].replace("blocks.0", f"blocks.{layer['index']}") in layer["reason"]
    heard = layers(tmp_path / "watched", -2)
    assert all(layer["token_residual"] is not None for layer in heard if layer["ratio"] is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_steered_where_it_is_measured_and_its_scales_learn(
    tmp_path: Path, kind: Callable[[LitGPT], None]
):
    module = built(kind)
    before = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    fit(tmp_path, SpectralMonitor(2, ResidualRescaler(patience=1), on_error="raise"), module=module)
    after = dict(module.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert len(scales(module)) == {shared: 2, partly_frozen: 2 * BLOCKS - 3}.get(kind, 2 * BLOCKS)
    assert all(value.item() != 0.0 for value in scales(module).values())
    acted = {action["block"] for action in read_actions(tmp_path / "spectral.jsonl")}
    normed = kind in (spectrally_normed, spectrally_normed_by_hooks)  # every matrix has norm 1: all is in balance
    moved = {2} if kind is partly_frozen else {layer["index"] for layer in layers(tmp_path)}
    assert acted == (set() if KINDS[kind] or normed else moved)


def test_frozen_branches_are_left_alone_and_a_block_that_has_one_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    module = built(partly_frozen)
    fit(tmp_path, SpectralMonitor(2, ResidualRescaler(patience=1)), module=module)
    found = {name.rpartition(".residual")[0].removeprefix("model.blocks.") for name in scales(module)}
    assert found == {"1.mlp", "2.attention", "2.mlp"}
    assert "1 block(s) are held still" in caplog.text
    assert "(the first is model.blocks.1)" in caplog.text
    assert {action["block"] for action in read_actions(tmp_path / "spectral.jsonl")} == {2}


def test_a_run_whose_branches_are_all_frozen_steers_nothing_and_says_so(tmp_path: Path):
    module = built(lambda module: module.model.blocks.requires_grad_(False))
    with pytest.warns(UserWarning, match=r"auto_rescale steers nothing: every branch is frozen\. Pass blocks=find_bl"):
        fit(tmp_path, SpectralMonitor(2, True), module=module, max_steps=2)
    assert not scales(module)


def test_scales_of_frozen_branches_that_are_passed_are_moved_by_the_law_alone(tmp_path: Path):
    module = built(partly_frozen)
    monitor = SpectralMonitor(2, ResidualRescaler(patience=1), blocks=find_blocks(module))
    fit(tmp_path, monitor, module=module)
    learnable = {name.rpartition(".residual")[0]: value.requires_grad for name, value in scales(module).items()}
    assert learnable == {
        "model.blocks.0.attention": False, "model.blocks.0.mlp": False, "model.blocks.1.attention": False,
        "model.blocks.1.mlp": True, "model.blocks.2.attention": True, "model.blocks.2.mlp": True,
    }  # fmt: skip
    moved = dict.fromkeys(("mlp", "attention"), 0.0)
    for action in read_actions(tmp_path / "spectral.jsonl"):
        if action["block"] == 0:
            moved = {name: moved[name] + action[f"{name}_log_change"] for name in moved}
    for name, change in moved.items():
        assert scales(module)[f"model.blocks.0.{name}.residual_scale.log_scale"].item() == pytest.approx(change)


def test_adapters_are_measured_as_if_they_were_merged(tmp_path: Path):
    module = built(adapters)
    fit(tmp_path, SpectralMonitor(4), module=module)
    beside = [layer["ratio"] for layer in layers(tmp_path)]
    each_linear(module, LowRank.merged)
    assert beside == pytest.approx([layer.ratio for layer in measure(module)], rel=1e-2)


def test_a_scale_of_a_shared_block_counts_at_each_use(tmp_path: Path):
    plain, steered = built(shared).double(), built(shared).double()
    attach_scales(steered)
    with torch.no_grad():
        for scale in scales(steered).values():
            scale += 0.3
        for part in (plain.model.blocks[0].attention.proj, plain.model.blocks[0].mlp[2]):
            part.weight *= math.exp(0.3)
            part.bias *= math.exp(0.3)
    ids = torch.arange(16).view(2, 8)
    torch.testing.assert_close(steered.eval()(ids), plain.eval()(ids))
    assert [layer.mlp_norm for layer in measure(steered)] == pytest.approx([x.mlp_norm for x in measure(plain)], 1e-4)


@pytest.mark.parametrize("change", [spectrally_normed, weight_normed])
def test_computed_weights_are_those_of_evaluation(tmp_path: Path, change: Callable[[LitGPT], None]):
    module = built(change)
    fit(tmp_path, SpectralMonitor(3), module=module)
    module.eval().double().requires_grad_(False)
    for layer, block in zip(layers(tmp_path), module.model.blocks, strict=True):
        exact = torch.linalg.matrix_norm(block.mlp[2].weight @ (block.mlp[0].weight * block.norm2.weight), 2)
        assert layer["mlp_norm"] == pytest.approx(float(exact), rel=1e-2)


def test_recomputed_blocks_are_steered_as_those_that_are_kept(tmp_path: Path):
    ends = []
    for name, change in (("kept", lambda module: None), ("recomputed", recomputed)):
        module = built(change)
        fit(tmp_path / name, SpectralMonitor(2, ResidualRescaler(patience=1)), module=module)
        ends.append((module.losses, [value.detach().clone() for value in module.parameters()]))
    assert_same(*ends)


# The meta device


class OnMeta(LitGPT):
    """Is built without numbers, which come when Lightning asks for the model."""

    attaches = False

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = TinyGPT()

    def configure_model(self) -> None:
        if not next(self.model.parameters()).is_meta:
            return
        self.model.to_empty(device="cpu")
        seed_everything(0)
        for module in self.model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if self.attaches:
            attach_scales(self)


class OnMetaWithScales(OnMeta):
    attaches = True


def test_a_model_from_the_meta_device_is_measured_when_it_has_numbers(tmp_path: Path):
    seed_everything(0)
    reference = LitGPT()
    reference.model = TinyGPT()
    module = OnMeta()
    fit(tmp_path / "meta", SpectralMonitor(4, on_error="raise"), module=module)
    found = layers(tmp_path / "meta", 0)
    seed_everything(0)
    for part in reference.model.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert [layer["ratio"] for layer in found] == pytest.approx([x.ratio for x in measure(reference)], rel=1e-2)


def test_a_model_from_the_meta_device_attaches_its_scales_when_it_has_numbers(tmp_path: Path):
    for module in (OnMeta(), OnMetaWithScales()):
        fit(tmp_path / type(module).__name__, SpectralMonitor(2, True, on_error="raise"), module=module)
        assert len(scales(module)) == 2 * BLOCKS
        assert all(value.item() != 0.0 for value in scales(module).values())
    assert len(attach_scales(OnMeta())) == 2 * BLOCKS
