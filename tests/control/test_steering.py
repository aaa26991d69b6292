"""Steering in real runs: what auto_rescale does to the ratios, to the training run and to its checkpoints."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import MODES, assert_same
from journals import read_actions, read_journal
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from steered import FunctionalAttention, log_scales, unbalanced
from tiny_run import BLOCKS, LitGPT, PickyLitGPT, SaveAt, TinyGPT, fit, loader
from torch import Tensor, nn
from zoo import example

from lightning_spectral import (
    ExactSVD,
    GainCeiling,
    ResidualBlock,
    ResidualRescaler,
    SpectralMonitor,
    attach_scales,
    find_blocks,
    fuse_scales,
    measure,
)
from lightning_spectral.control.steering import Steering
from lightning_spectral.errors import ConfigurationError, ExampleInputError
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.weights.model import ModelWeights

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
]

ZONE = (0.5, 2.0)
LEARNED = GainCeiling(learnable=True)


def plain_parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if "residual_scale" not in name}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("spectral/ratio_max")]


# What it does


@pytest.mark.parametrize("branch", ["mlp", "attention"])
@pytest.mark.parametrize("learnable", [True, False])
def test_ratios_outside_the_zone_are_brought_back_and_stay(tmp_path: Path, branch: str, learnable: bool):
    monitor = SpectralMonitor(5, ResidualRescaler(learnable=learnable), per_layer=True)
    module = unbalanced(branch)
    fit(tmp_path, monitor, module=module, batches=25, max_steps=100)
    header, records = read_journal(tmp_path / "spectral.jsonl")
    assert header["rescaler"]["learnable"] is learnable
    ratios = {record["step"]: [layer["ratio"] for layer in record["layers"]] for record in records}
    assert not any(ZONE[0] < ratio < ZONE[1] for ratio in ratios[0])
    assert all(ZONE[0] < ratio < ZONE[1] for step in ratios if step >= 50 for ratio in ratios[step])

    actions = read_actions(tmp_path / "spectral.jsonl")
    assert {action["block"] for action in actions} == set(range(BLOCKS))
    first = actions[0]
    assert first["step"] == 10  # patience 2: the measurements at 5 and 10
    assert first["mlp_log_change"] == -first["attention_log_change"]
    assert first["mlp_log_change"] == pytest.approx(-0.2 if branch == "mlp" else 0.2)
    assert first["reason"] == f"ratio too {'high' if branch == 'mlp' else 'low'}"
    assert first["name"] == "model.blocks.0"

    logged = rows(tmp_path)
    moved = {int(row["step"]): float(row["spectral/rescaled"]) for row in logged}
    assert moved == {step: sum(action["step"] == step for action in actions) for step in ratios}
    last = {layer["index"]: layer for layer in records[-1]["layers"]}
    assert float(logged[-1]["spectral_blocks/mlp_scale/01"]) == pytest.approx(last[1]["mlp_scale"])
    assert float(logged[-1]["spectral/scale_max"]) == max(
        max(x["mlp_scale"], x["attention_scale"]) for x in last.values()
    )
    assert float(logged[0]["spectral/scale_min"]) == float(logged[0]["spectral/scale_max"]) == 1.0
    assert sorted(map(math.exp, log_scales(module))) == pytest.approx(
        sorted(x[name] for x in last.values() for name in ("mlp_scale", "attention_scale"))
    )
    assert (tmp_path / "spectral.png").exists()


def test_nothing_is_moved_before_the_first_step_nor_after_the_last(tmp_path: Path):
    module = unbalanced()
    fit(tmp_path, SpectralMonitor(3, ResidualRescaler(patience=1, learnable=False)), module=module, max_steps=2)
    assert read_actions(tmp_path / "spectral.jsonl") == []
    assert log_scales(module) == [0.0] * 2 * BLOCKS


def test_the_console_says_once_when_steering_begins_and_when_a_bound_is_reached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    rescaler = ResidualRescaler(learnable=False, bounds=(0.9, 1.1), max_step=0.15, smoothing=0.0)
    fit(tmp_path, SpectralMonitor(1, rescaler), module=unbalanced())
    told = [record.message for record in caplog.records if record.message.startswith("residual scales")]
    assert "step 2, steering: block 0 (model.blocks.0): ratio too high (smoothed ratio " in told[0]
    assert len(told) == 2
    assert "held by the bounds of the scales" in told[1]
    actions = read_actions(tmp_path / "spectral.jsonl")
    assert {action["action"] for action in actions} <= {"rescale", "hold"}
    assert len(actions) <= 3 * BLOCKS


@pytest.mark.parametrize("sides", ["low", "high"])
def test_one_side_can_be_left_alone(tmp_path: Path, sides: str):
    monitor = SpectralMonitor(1, ResidualRescaler(sides=sides, learnable=False))
    fit(tmp_path, monitor, module=unbalanced("mlp"))
    assert bool(read_actions(tmp_path / "spectral.jsonl")) is (sides == "high")


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_stale_momentum_does_not_undo_a_move(tmp_path: Path, optimizer: type):
    class Lit(LitGPT):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            extra = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
            return optimizer(self.parameters(), lr=1e-3, **extra)

    seed_everything(0)
    module = Lit()
    with torch.no_grad():
        for block in module.model.blocks[:1]:
            block.mlp[2].weight.mul_(8)
    first = "exp_avg" if optimizer is torch.optim.AdamW else "momentum_buffer"
    seen: dict[str, bool] = {}

    class Look(Callback):
        """Behind the monitor, which acts before the fifth step on what it has measured after the fourth."""

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            states = {
                name: optimizer.state[p] for name, p in pl_module.named_parameters() if name.endswith("log_scale")
            }
            if trainer.global_step == 4:
                seen.update({name: state[first].item() == 0.0 for name, state in states.items()})
                assert first == "momentum_buffer" or all(state["exp_avg_sq"].item() > 0 for state in states.values())

    fit(tmp_path, [SpectralMonitor(4, ResidualRescaler(patience=1)), Look()], module=module, max_steps=5)
    (acted,) = {action["block"] for action in read_actions(tmp_path / "spectral.jsonl")}
    assert len(seen) == 2 * BLOCKS
    assert seen == {name: name.startswith(f"model.blocks.{acted}.") for name in seen}


# What it leaves alone


@pytest.mark.parametrize("mode", MODES)
def test_frozen_scales_that_nothing_moves_cost_no_bit(tmp_path: Path, mode: str):
    results = []
    for monitors in ([], [SpectralMonitor(2, ResidualRescaler(learnable=False))]):
        seed_everything(0)
        module = LitGPT(dropout=0.2)
        trainer = fit(tmp_path / str(len(monitors)), monitors, module=module, shuffle=True, **MODES[mode])
        states = [*trainer.optimizers[0].state_dict()["state"].values()]
        results.append((module.losses, plain_parameters(module), states, torch.get_rng_state()))
    assert read_actions(tmp_path / "1" / "spectral.jsonl") == []
    assert_same(*results)
    assert log_scales(module) == [0.0] * 2 * BLOCKS


def test_a_dry_run_says_what_it_would_do_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    results = []
    for monitors in ([], [SpectralMonitor(2, ResidualRescaler(dry_run=True))]):
        module = unbalanced()
        fit(tmp_path / str(len(monitors)), monitors, module=module)
        results.append((module.losses, {name: value.clone() for name, value in module.state_dict().items()}))
    assert_same(*results)
    actions = read_actions(tmp_path / "1" / "spectral.jsonl")
    assert [action["step"] for action in actions if action["block"] == 0] == [4, 6]  # no step follows the 8th
    assert "would steer (dry run): block 0 (model.blocks.0): ratio too high (smoothed ratio " in caplog.text
    assert read_journal(tmp_path / "1" / "spectral.jsonl")[0]["rescaler"]["dry_run"] is True


def test_a_dry_run_that_is_resumed_says_nothing_of_scales(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    monitor = SpectralMonitor(2, ResidualRescaler(dry_run=True))
    fit(tmp_path / "first", [monitor, SaveAt(tmp_path / "saved.ckpt", 4)], max_steps=4)
    fit(tmp_path / "second", monitor, ckpt_path=str(tmp_path / "saved.ckpt"))
    assert "Restored all states from the checkpoint" in caplog.text
    assert "they start at 1" not in caplog.text


@pytest.mark.filterwarnings("ignore:SpectralMonitor, FAILURE at step")
def test_blocks_that_cannot_be_measured_are_held_still(tmp_path: Path):
    module = unbalanced()
    with torch.no_grad():
        module.model.blocks[1].mlp[2].weight[0, 0] = math.nan
    # Behind the first block with a NaN nothing shows what a branch is.
    with pytest.warns(UserWarning, match=r"1 block\(s\) get no residual scale, .*model\.blocks\.2\.mlp is NaN on"):
        fit(tmp_path, SpectralMonitor(1, ResidualRescaler(learnable=False)), module=module, max_steps=4)
    # The gradients of a model with a NaN are NaN, so that after one step no block can be measured.
    assert read_actions(tmp_path / "spectral.jsonl") == []
    assert log_scales(module) == [0.0] * 2 * (BLOCKS - 1)


class OneBranch(nn.Module):
    """Attention blocks alone: no block has both branches."""

    def __init__(self) -> None:
        super().__init__()
        whole = TinyGPT()
        self.tokens, self.head = whole.tokens, whole.head
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.parts = nn.ModuleList(block.attention for block in whole.blocks)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for norm, part in zip(self.norms, self.parts, strict=False):
            x = x + part(norm(x))
        return self.head(x)


def test_blocks_with_one_branch_have_a_scale_and_are_held_still(tmp_path: Path):
    module = LitGPT()
    module.model = OneBranch()
    fit(tmp_path, SpectralMonitor(1, ResidualRescaler(learnable=False, patience=1)), module=module)
    records = read_journal(tmp_path / "spectral.jsonl")[1]
    assert all(layer["ratio"] is None for layer in records[-1]["layers"])
    assert read_actions(tmp_path / "spectral.jsonl") == []
    assert len(log_scales(module)) == 3


# The loop without a Trainer, on real architectures


@pytest.mark.parametrize(
    "name",
    ["gpt2", "llama", "gemma2", "olmo2", "gpt_neox", "mixtral", "albert", "dinov2", "xlnet", "macaron", "conformer"],
)
def test_with_fixed_weights_the_error_shrinks_by_one_minus_gain(name: str):
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    settings = {"gain": 0.3, "max_step": 10.0, "patience": 1, "smoothing": 0.6, "inner_zone": (0.98, 1.02)}
    scales = attach_scales(model, find_blocks(model, batch=args or kwargs), learnable=False)
    with torch.no_grad():
        for block in scales.blocks:
            dict(scales.named_parameters())[block.mlp.site].add_(math.log(40.0))
    steering = Steering(ResidualRescaler(**settings, bounds=(1e-3, 1e3)), ZONE)
    steering.adopt(model, scales.blocks)
    meter, law = Meter(ModelWeights(model), scales.blocks, solver=ExactSVD()), []
    before = meter.measure(0)
    for step in range(1, 5):
        actions, law = steering.act(before, law, [])
        after = meter.measure(step)
        acting = {action.block for action in actions}
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            if old.log_ratio is None:
                assert number not in acting
                continue
            expected = 0.7 * old.log_ratio if number in acting else old.log_ratio
            assert new.log_ratio == pytest.approx(expected, abs=1e-5)
            if number in acting:
                kept = math.log(old.mlp_scale * old.attention_scale)
                assert math.log(new.mlp_scale * new.attention_scale) == pytest.approx(kept, abs=1e-6)
        assert acting
        before = after


def macaron(*, frozen: bool) -> tuple[Steering, ResidualBlock]:
    """A model with two MLPs a block, the first much too strong, the second frozen or not; and its steering."""
    member = example("macaron")
    model = member.build()
    model.example_input_array = member.inputs(model)[0]
    block = find_blocks(model, batch=model.example_input_array)[0]
    first, second = block.mlp_branches
    model.get_submodule(second.site).requires_grad_(not frozen)
    with torch.no_grad():
        for end in first.ends:
            model.get_parameter(end.parameter).mul_(50.0)
    steering = Steering(ResidualRescaler(patience=1, learnable=False), ZONE)
    steering.attach(model, None)
    return steering, block


def test_all_branches_of_a_kind_move_alike():
    steering, block = macaron(frozen=False)
    (action, *_), _ = steering.act(Meter(ModelWeights(steering.scales.model), steering.blocks).measure(1), [], [])
    moved = dict(steering.scales.named_parameters())
    assert action.mlp == pytest.approx(-0.2)
    assert [moved[branch.site].item() for branch in block.mlp_branches] == pytest.approx([-0.2, -0.2])
    assert steering.held_still() is None


def test_a_kind_with_a_frozen_branch_does_not_move():
    steering, block = macaron(frozen=True)
    assert block.mlp_branches[1].site not in dict(steering.scales.named_parameters())
    assert steering.act(Meter(ModelWeights(steering.scales.model), steering.blocks).measure(1), [], [])[0] == ()
    assert "block(s) are held still, because one of their two kinds of branches is frozen" in steering.held_still()


# Checkpoints

LAWS = [kind(learnable=learnable) for kind in (GainCeiling, ResidualRescaler) for learnable in (True, False)]


def run_through(
    folder: Path, law: Any = None, *, ckpt_path: str | None = None, callbacks: tuple[Any, ...] = (), **flags: Any
) -> LitGPT:
    module = unbalanced()
    monitor = SpectralMonitor(2, ResidualRescaler(patience=2) if law is None else law)
    fit(folder, [monitor, *callbacks], module=module, batches=1, max_steps=16, ckpt_path=ckpt_path, **flags)
    return module


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_resumed_run_is_bitwise_the_straight_run(tmp_path: Path, law: Any):
    # One batch an epoch: Lightning begins an interrupted epoch anew, and here anew is the same.
    saved = {step: tmp_path / f"{step}.ckpt" for step in (3, 8)}
    savers = tuple(SaveAt(path, step) for step, path in saved.items())
    straight = run_through(tmp_path / "straight", law, callbacks=savers)
    actions = read_actions(tmp_path / "straight" / "spectral.jsonl")
    for step, path in saved.items():
        resumed = run_through(tmp_path / f"from {step}", law, ckpt_path=str(path))
        assert_same(straight.state_dict(), resumed.state_dict())
        assert straight.losses[step:] == resumed.losses
        later = [action for action in actions if action["step"] >= step]
        assert later
        assert later == read_actions(tmp_path / f"from {step}" / "spectral.jsonl")


def test_resuming_in_the_same_folder_leaves_each_action_once(tmp_path: Path):
    saved = tmp_path / "middle.ckpt"
    run_through(tmp_path, callbacks=(SaveAt(saved, 6),))
    wanted = read_actions(tmp_path / "spectral.jsonl")
    run_through(tmp_path, ckpt_path=str(saved))
    assert read_actions(tmp_path / "spectral.jsonl") == wanted


def test_a_checkpoint_is_marked_and_loads_without_code(tmp_path: Path):
    run_through(tmp_path, callbacks=(SaveAt(tmp_path / "saved.ckpt", 8),))
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert saved["lightning_spectral"]["version"] == 1
    assert saved["lightning_spectral"]["scales"][:2] == ["model.blocks.0.attention", "model.blocks.0.mlp"]


@pytest.mark.parametrize("strict", [True, False])
def test_scales_are_never_lost_in_a_run_that_only_watches(tmp_path: Path, strict: bool):
    run_through(tmp_path, callbacks=(SaveAt(tmp_path / "saved.ckpt", 8),))
    module = LitGPT()
    module.strict_loading = strict
    with pytest.raises(
        (RuntimeError, ConfigurationError), match=r"has 6 residual scales, and the model has none.*fuse_scales"
    ):
        fit(tmp_path / "plain", SpectralMonitor(2), module=module, ckpt_path=str(tmp_path / "saved.ckpt"))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*residual_scale\.log_scale"):
        fit(tmp_path / "bare", [], ckpt_path=str(tmp_path / "saved.ckpt"))


def test_a_fused_checkpoint_needs_nothing_of_this_package(tmp_path: Path):
    steered = run_through(tmp_path, callbacks=(SaveAt(tmp_path / "saved.ckpt", 16),))
    fused = fuse_scales(torch.load(tmp_path / "saved.ckpt", weights_only=True))
    assert not {"lightning_spectral", "optimizer_states"} & fused.keys()
    torch.save(fused, tmp_path / "fused.ckpt")
    plain = LitGPT.load_from_checkpoint(tmp_path / "fused.ckpt")
    ids = torch.arange(16).view(2, 8)
    torch.testing.assert_close(plain.double().eval()(ids), steered.double().eval()(ids), rtol=1e-6, atol=1e-6)
    before = measure(steered, batch=ids)
    assert [layer.ratio for layer in measure(plain, batch=ids)] == pytest.approx([x.ratio for x in before], rel=1e-2)
    fit(
        tmp_path / "on", SpectralMonitor(2), ckpt_path=None, module=LitGPT.load_from_checkpoint(tmp_path / "fused.ckpt")
    )


class TwoGroups(LitGPT):
    """Decays matrices only, as most recipes do; the scales stand in the other group."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-2)


@pytest.mark.parametrize("kind", [LitGPT, TwoGroups])
def test_a_plain_run_can_be_resumed_with_steering(tmp_path: Path, kind: type[LitGPT], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    straight = kind()
    seed_everything(0)
    straight.load_state_dict(LitGPT().state_dict())
    start = {name: value.clone() for name, value in straight.state_dict().items()}
    fit(tmp_path / "plain", SaveAt(tmp_path / "plain.ckpt", 4), module=straight, batches=1)

    ends = []
    for name, rescaler in (("frozen", ResidualRescaler(learnable=False)), ("learned", ResidualRescaler())):
        module = kind()
        module.load_state_dict(start)
        flags = {"module": module, "batches": 1, "ckpt_path": str(tmp_path / "plain.ckpt")}
        fit(tmp_path / name, SpectralMonitor(2, rescaler), **flags)
        ends.append(module)
    assert "the checkpoint has no residual scales; they start at 1" in caplog.text
    frozen, learned = ends
    # With frozen scales the continuation is that of the plain run, to the bit: the optimizer's state arrived whole.
    assert_same(plain_parameters(frozen), straight.state_dict())
    assert straight.losses[4:] == frozen.losses
    assert learned.losses[0] == frozen.losses[0]
    assert all(value != 0.0 for value in log_scales(learned))


def test_validating_and_testing_load_the_checkpoint_of_a_steered_run(tmp_path: Path):
    module = run_through(tmp_path, callbacks=(SaveAt(tmp_path / "saved.ckpt", 16),))
    fresh = LitGPT()
    trainer = fit(tmp_path / "other", [], max_steps=1)
    trainer.callbacks.insert(0, SpectralMonitor(2, True))
    trainer.validate(fresh, loader(), ckpt_path=str(tmp_path / "saved.ckpt"), verbose=False)
    assert_same(fresh.state_dict(), module.state_dict())


# What cannot work is said


class EarlyOptimizer(LitGPT):
    """Builds its optimizer where the scales do not exist yet."""

    def __init__(self) -> None:
        super().__init__()
        self.early = torch.optim.AdamW(self.parameters(), lr=1e-2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.early


class NamedParameters(LitGPT):
    """Trains what it names."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [p for name, p in self.named_parameters() if name.endswith(("weight", "bias"))], lr=1e-2
        )


class OwnGroup(NamedParameters):
    """Gives the scales a group and a learning rate of their own."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        optimizer.add_param_group({"params": attach_scales(self).parameters(), "lr": 1e-3})
        return optimizer


@pytest.mark.parametrize("kind", [EarlyOptimizer, NamedParameters])
def test_scales_that_no_optimizer_trains_are_refused(tmp_path: Path, kind: type[LitGPT]):
    with pytest.raises(ConfigurationError, match=r"6 of 6 residual scales are in no optimizer.*learnable=False"):
        fit(tmp_path, SpectralMonitor(2, LEARNED), module=kind())
    fit(tmp_path, SpectralMonitor(2, ResidualRescaler(learnable=False)), module=kind())


def test_scales_may_have_a_parameter_group_of_their_own(tmp_path: Path):
    module = OwnGroup()
    fit(tmp_path, SpectralMonitor(2, LEARNED), module=module)
    assert all(value != 0.0 for value in log_scales(module))


class BuiltLate(LitGPT):
    """Builds its model where Lightning asks for it."""

    attaches = False

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = TinyGPT()
            if self.attaches:
                attach_scales(self)


class BuiltLateWithScales(BuiltLate):
    attaches = True


def test_a_model_that_is_built_late_gets_its_scales_right_after(tmp_path: Path):
    losses = []
    for module in (BuiltLate(), BuiltLateWithScales()):
        fit(tmp_path / type(module).__name__, SpectralMonitor(2, LEARNED), module=module)
        assert len(log_scales(module)) == 6
        assert all(value != 0.0 for value in log_scales(module))
        assert "configure_model" not in vars(module)
        losses.append(module.losses)
    assert losses[0] == losses[1]


def test_scales_that_learn_beside_a_law_that_says_otherwise_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    early, kept = LitGPT(), LitGPT()
    attach_scales(early)
    attach_scales(kept, learnable=False)
    told = []
    for module in (BuiltLateWithScales(), early, kept):
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning_spectral"):
            fit(tmp_path, SpectralMonitor(2, auto_rescale=True), module=module)
        told.append("an optimizer trains 6 of 6 residual scales (the first is at 'model.blocks.0.att" in caplog.text)
    assert told == [True, True, False]
    assert "attach_scales(model, learnable=False)" not in caplog.text


@pytest.mark.parametrize(("law", "settings"), [(LEARNED, "self"), (True, "self, learnable=False")])
def test_a_model_that_is_built_late_names_the_scales_that_the_law_asks_for(law: Any, settings: str):
    steering = Steering(GainCeiling() if law is True else law, ZONE)
    with pytest.raises(ConfigurationError, match=rf"call lightning_spectral.attach_scales\({settings}\) there"):
        steering.adopt(TinyGPT(), find_blocks(TinyGPT()))


def test_a_model_that_no_input_can_be_guessed_for_needs_one(tmp_path: Path):
    with pytest.raises(ExampleInputError, match="example_input_array"):
        fit(tmp_path, SpectralMonitor(2, True), module=PickyLitGPT())
    module = PickyLitGPT()
    blocks = find_blocks(module.model, batch=({"ids": torch.randint(1000, 1032, (2, 8))},))
    wrapped = find_blocks(Wrapper(module.model), batch=({"ids": torch.randint(1000, 1032, (2, 8))},))
    assert [block.name for block in wrapped] == [f"model.{block.name}" for block in blocks]
    fit(tmp_path, SpectralMonitor(2, True, blocks=wrapped), module=module)
    assert len(log_scales(module)) == 6


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch)


@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(1e-2, 1)]
)
def test_averaging_stands_behind_the_monitor(tmp_path: Path, averaging):
    name = type(averaging()).__name__
    with pytest.raises(
        ConfigurationError, match=rf"{name} copies the model before SpectralMonitor.*put SpectralMonitor"
    ):
        fit(tmp_path / "wrong", [averaging(), SpectralMonitor(2, True)])
    module = unbalanced()
    fit(tmp_path / "right", [SpectralMonitor(2, LEARNED), averaging()], module=module, max_epochs=3, max_steps=-1)
    assert all(value != 0.0 for value in log_scales(module))


def test_a_scale_that_multiplies_nothing_is_found_after_the_first_backward_pass(tmp_path: Path):
    class Torn(LitGPT):
        def on_train_start(self) -> None:
            self.model.blocks[1].mlp._forward_hooks.clear()

    with pytest.raises(
        ConfigurationError, match=r"1 residual scale\(s\) received no gradient.*blocks\.1\.mlp \(its forward hook"
    ):
        fit(tmp_path, SpectralMonitor(2, True), module=Torn())


def test_a_site_whose_weight_is_read_by_a_functional_is_told(tmp_path: Path):
    module = LitGPT()
    for block in module.model.blocks:
        block.attention = FunctionalAttention()
    fit(tmp_path / "found", SpectralMonitor(2, LEARNED), module=module)  # found by itself, the site is right
    hints = {"model.blocks.*": {"attention": "attention.inner.out_proj"}}
    module = LitGPT()
    for block in module.model.blocks:
        block.attention = FunctionalAttention()
    with pytest.raises(ConfigurationError, match=r"3 residual scale\(s\).*out_proj \(its forward is never called"):
        fit(tmp_path / "hinted", SpectralMonitor(2, True, blocks=hints), module=module)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_is_steered(tmp_path: Path):
    torch.compiler.reset()
    module = unbalanced()
    module.model.compile(backend="eager")
    fit(tmp_path, SpectralMonitor(1, LEARNED), module=module)
    assert read_actions(tmp_path / "spectral.jsonl")
    assert all(value != 0.0 for value in log_scales(module))


def test_dropped_layers_are_not_called_dead(tmp_path: Path):
    class Dropping(LitGPT):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.model.blocks[2].mlp.requires_grad_(self.global_step > 2)
            return super().training_step(batch, batch_idx)

    assert fit(tmp_path, SpectralMonitor(2, True), module=Dropping()).global_step == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"auto_rescale": "yes"},
            r"auto_rescale='yes': expected True, False, a GainCeiling\(\.\.\.\) or a ResidualRescaler\(\.\.\.\)",
        ),
        ({"auto_rescale": None}, r"auto_rescale=None: expected True"),
        (
            {"auto_rescale": True, "safe_zone": (0.8, 1.2)},
            r"margin=0\.35: expected less than .* to either edge of safe_zone=\(0\.8, 1\.2\), 0\.182 nats",
        ),
        (
            {"auto_rescale": ResidualRescaler(), "safe_zone": (0.8, 1.2)},
            r"inner_zone=\(0\.7, 1\.4\): expected an interval inside safe_zone",
        ),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        SpectralMonitor(**arguments)


def test_one_monitor_steers(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="two monitors in one Trainer would both move the scales"):
        fit(tmp_path, [SpectralMonitor(2, True), SpectralMonitor(2, True, linearization="paper", prefix="paper")])
    fit(tmp_path, [SpectralMonitor(2, True), SpectralMonitor(2, linearization="paper", prefix="paper")])


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize(
    "flags", [{"fast_dev_run": True}, {"barebones": True, "logger": None, "log_every_n_steps": None}]
)
def test_a_rehearsal_works(tmp_path: Path, flags: dict[str, Any]):
    if "barebones" in flags:
        flags = {**flags, "enable_progress_bar": None, "enable_model_summary": None, "enable_checkpointing": None}
        flags |= {"default_root_dir": None, "limit_val_batches": None}
    assert fit(tmp_path, SpectralMonitor(1, True), **flags).state.finished
