"""The ceiling law in real runs and on real models, all settings by default unless a test is about them."""

from __future__ import annotations

import logging
import math
import sys
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import assert_same
from journals import read_actions, read_journal
from steered import unbalanced
from tiny_run import BLOCKS, CONTEXT, VOCABULARY, LitGPT, SaveAt, TinyGPT, fit
from torch import Tensor, nn
from zoo import example

from lightning_spectral import ExactSVD, GainCeiling, SpectralMonitor, Watch, attach_scales, find_blocks, measure
from lightning_spectral.control.steering import Steering
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.weights.model import ModelWeights

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import wrong_starts

ZONE = (0.5, 2.0)
CEILING = 1 / math.sqrt(2 * BLOCKS)
NAMES = ("mlp", "attention")
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


# What it does in a run


@pytest.mark.parametrize("branch", NAMES)
@pytest.mark.parametrize("law", [True, GainCeiling(learnable=True)], ids=["default", "learned"])
def test_every_block_is_brought_inside_and_stays(tmp_path: Path, branch: str, law: Any):
    module = unbalanced(branch)
    fit(tmp_path, SpectralMonitor(5, law), module=module, batches=25, max_steps=100)
    header, records = read_journal(tmp_path / "spectral.jsonl")
    assert header["rescaler"]["law"] == "GainCeiling"
    inside = [all(ZONE[0] < layer["ratio"] < ZONE[1] for layer in record["layers"]) for record in records]
    assert inside == [False] + [True] * 20
    scales = [scale for name, scale in module.named_parameters() if name.endswith("log_scale")]
    assert [scale.requires_grad for scale in scales] == [law is not True] * 2 * BLOCKS


def test_scales_go_down_only_and_by_what_the_journal_says(tmp_path: Path):
    """The law alone moves them, so that each scale is the last one times the exponential of the change."""
    fit(tmp_path, SpectralMonitor(2, True, solver=ExactSVD()), module=unbalanced(), batches=25, max_steps=40)
    records, actions = read_journal(tmp_path / "spectral.jsonl")[1], read_actions(tmp_path / "spectral.jsonl")
    assert {action["step"] for action in actions} > {0, 2, 4}
    changes = {(action["step"], action["block"]): action for action in actions}
    for now, later in pairwise(records):
        for old, new in zip(now["layers"], later["layers"], strict=True):
            for name in NAMES:
                change = changes.get((now["step"], old["index"]), {}).get(f"{name}_log_change", 0.0)
                assert change <= 0.0
                assert new[f"{name}_scale"] == pytest.approx(old[f"{name}_scale"] * math.exp(change), rel=1e-5)
                if change:
                    assert old[f"{name}_norm"] * math.exp(change) < CEILING * (1 + 1e-5)


def test_it_acts_before_the_first_step(tmp_path: Path):
    module = unbalanced()
    fit(tmp_path, SpectralMonitor(50, True), module=module, max_steps=1)
    first, last = read_journal(tmp_path / "spectral.jsonl")[1]
    assert (first["step"], last["step"]) == (0, 1)
    assert all(layer["mlp_norm"] == pytest.approx(CEILING, rel=0.1) for layer in last["layers"])
    assert {action["step"] for action in read_actions(tmp_path / "spectral.jsonl")} == {0}


def test_a_dry_run_says_it_and_changes_no_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    plain, dry = unbalanced(), unbalanced()
    fit(tmp_path / "plain", [], module=plain)
    fit(tmp_path / "dry", SpectralMonitor(2, GainCeiling(dry_run=True)), module=dry)
    assert_same(plain.state_dict(), dry.state_dict())
    assert plain.losses == dry.losses
    actions = read_actions(tmp_path / "dry" / "spectral.jsonl")
    assert [action["step"] for action in actions] == [step for step in (0, 2, 4, 6) for _ in range(BLOCKS)]
    (told,) = [record.message for record in caplog.records if record.message.startswith("residual scales")]
    assert "step 0, would steer (dry run): block 0 (model.blocks.0): MLP above its ceiling: " in told


def test_a_block_whose_attention_starts_at_zero_learns(tmp_path: Path):
    """The MLP beside it is not lowered to nothing: it keeps a tenth of the ceiling at least."""
    module = unbalanced()
    for block in module.model.blocks:
        nn.init.zeros_(block.attention.proj.weight)
    fit(tmp_path, SpectralMonitor(1, True, per_layer=True), module=module)
    records = read_journal(tmp_path / "spectral.jsonl")[1]
    assert [layer["ratio"] for layer in records[0]["layers"]] == [None] * BLOCKS
    assert all(layer["mlp_norm"] > 0.099 * CEILING for record in records[1:] for layer in record["layers"])
    assert all(layer["attention_norm"] > 0 for layer in records[-1]["layers"])


# Models that were trained before


def trained(folder: Path) -> LitGPT:
    module = unbalanced()
    fit(folder, [], module=module, batches=25, max_steps=25)
    return module


def test_a_trained_model_keeps_what_it_had(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    module = trained(tmp_path / "before")
    start = measure(module)
    assert min(layer.mlp_norm for layer in start) > 5 * CEILING
    module.learning_rate = 3e-2
    fit(tmp_path / "after", SpectralMonitor(1, True), module=module, batches=25, max_steps=25)
    assert "the model looks trained (the norm gain model.blocks.0.norm" in caplog.text
    records = read_journal(tmp_path / "after" / "spectral.jsonl")[1]
    assert any(action["step"] > 0 for action in read_actions(tmp_path / "after" / "spectral.jsonl"))
    assert not any(action["step"] == 0 for action in read_actions(tmp_path / "after" / "spectral.jsonl"))
    for name in NAMES:
        for old, *later in zip(*(record["layers"] for record in records), strict=True):
            assert min(layer[f"{name}_norm"] for layer in later) > 0.9 * old[f"{name}_norm"]


class SecondModel(LitGPT):
    """A second model of the same kind steps twice by hand before the first one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = TinyGPT()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for model, optimizer in ((self.critic, 1), (self.critic, 1), (self.model, 0)):
            optimizers[optimizer].zero_grad()
            self.manual_backward(nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten()))
            optimizers[optimizer].step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.model, self.critic)]


class UncountedSteps(LitGPT):
    """The optimizer steps without Lightning, so that what follows from a measurement follows behind the step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("kind", [SecondModel, UncountedSteps])
def test_steps_within_the_first_batch_do_not_make_a_fresh_model_look_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[LitGPT]
):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    fit(tmp_path, SpectralMonitor(2, True), module=kind(), max_epochs=1)
    assert "looks trained" not in caplog.text
    assert {action["step"] for action in read_actions(tmp_path / "spectral.jsonl")} >= {0}


def test_nor_does_a_step_that_is_given_a_closure(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    model = TinyGPT()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    watch = Watch(model, every_n_steps=2, auto_rescale=True, optimizers=optimizer)
    ids = torch.randint(VOCABULARY, (4, CONTEXT))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        return loss

    watch.before_step(ids)
    optimizer.step(closure)
    watch.step(1)
    watch.close()
    assert "looks trained" not in caplog.text
    assert "residual scales, step 0, steering" in caplog.text


def test_a_plain_checkpoint_is_one_of_a_trained_model_and_a_steered_one_knows_its_start(tmp_path: Path):
    """The start that counts is that of the law's first measurement, also after a second resume."""
    plain = tmp_path / "plain.ckpt"
    fit(tmp_path / "off", SaveAt(plain, 20), module=unbalanced(), batches=25, max_steps=20)
    saved = tmp_path / "steered.ckpt"
    fit(
        tmp_path / "on",
        [SpectralMonitor(2, True), SaveAt(saved, 24)],
        module=unbalanced(),
        batches=25,
        max_steps=26,
        ckpt_path=str(plain),
    )
    assert not any(action["step"] == 20 for action in read_actions(tmp_path / "on" / "spectral.jsonl"))
    callbacks = torch.load(saved, weights_only=True)["callbacks"]
    (state,) = [value for key, value in callbacks.items() if key.startswith("SpectralMonitor")]
    first = read_journal(tmp_path / "on" / "spectral.jsonl")[1][0]
    for memory, layer in zip(state["law"], first["layers"], strict=True):
        assert [memory[name] for name in NAMES] == pytest.approx([math.log(layer[f"{name}_norm"]) for name in NAMES])


def test_a_fresh_model_remembers_no_start(tmp_path: Path):
    saved = tmp_path / "steered.ckpt"
    fit(tmp_path, [SpectralMonitor(2, True), SaveAt(saved, 4)], module=unbalanced())
    callbacks = torch.load(saved, weights_only=True)["callbacks"]
    (state,) = [value for key, value in callbacks.items() if key.startswith("SpectralMonitor")]
    assert state["law"] == [{"begun": True}] * BLOCKS


# Architectures


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "llama", "gemma2", "olmo2", "gpt_neox", "mixtral", "albert", "dinov2", "xlnet", "macaron"),
        *("conformer", "torch_encoder_post", "torch_encoder_pre", "t5", "mamba2"),
    ],
)
def test_one_action_brings_every_norm_to_its_limit(name: str):
    """With exact norms. Cross-attention and mixers count in the number of branches, which is that of the blocks."""
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    scales = attach_scales(model, find_blocks(model, batch=args or kwargs), learnable=False)
    with torch.no_grad():
        for number, (_, scale) in enumerate(scales.named_parameters()):
            scale.add_(math.log((40.0, 3.0, 0.2)[number % 3]))
    steering = Steering(GainCeiling(), ZONE)
    steering.adopt(model, scales.blocks)
    meter = Meter(ModelWeights(model), scales.blocks, solver=ExactSVD())
    before = meter.measure(0)
    actions, law = steering.act(before, [], [])
    after = meter.measure(1)
    kinds = sum(len({branch.kind for branch in block.branches}) for block in scales.blocks)
    ceiling = 1 / math.sqrt(kinds)
    moved = [scale for scale in scales.parameters() if scale.item() != 0.0]
    assert moved
    for old, new in zip(before, after, strict=True):
        for kind in NAMES:
            one, two = getattr(old, f"{kind}_norm"), getattr(new, f"{kind}_norm")
            assert (one is None) is (two is None)
            assert one is None or two <= min(one, ceiling) * (1 + 1e-3)
        if new.ratio is not None and max(new.mlp_norm, new.attention_norm) > 0.101 * ceiling:
            assert ZONE[0] < new.ratio < ZONE[1]
    assert steering.act(after, law, [])[0] == ()
    assert bool(actions) is any(layer.mlp_norm or layer.attention_norm for layer in before)


@pytest.mark.parametrize(("model", "start"), [("llama", "attention"), ("encoder", "MLP"), ("vit", "attention")])
def test_models_of_others_with_wrong_starts_come_inside(model: str, start: str):
    """The benchmark in small; its table in docs/steering.md is of 5 seeds and 300 steps."""
    args = Namespace(rate=2e-3, steps=40, every_n_steps=5)
    rows = wrong_starts.run(model, start, 0, args)
    assert [*rows] == [10, 20, 30, 40]
    assert wrong_starts.settled(rows, math.log(2)) <= 20
