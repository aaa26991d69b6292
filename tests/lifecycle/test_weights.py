"""Which weights a measurement is of: those that the loss at its index used, and at the end those of the user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import assert_same
from journals import read_actions, read_journal
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from recorder import Recorder
from steered import unbalanced
from tiny_run import LitGPT, fit
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_spectral import RandomizedSVD, ResidualRescaler, SpectralMonitor, find_blocks, measure
from lightning_spectral.weights.model import ModelWeights

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
]

STEPS = 6


@torch.no_grad()
def exact(module: LitGPT) -> list[float]:
    """Return the ratio of every block, from the weights that the last forward pass used."""
    found = []
    for block in module.model.blocks:
        down, up, output, qkv, one, two = (
            part.weight.double()
            for part in (
                block.mlp[2],
                block.mlp[0],
                block.attention.proj,
                block.attention.qkv,
                block.norm1,
                block.norm2,
            )
        )
        mlp, attention = down @ up * two, output @ qkv[32:] * one
        found.append(float(torch.linalg.matrix_norm(mlp, 2) / torch.linalg.matrix_norm(attention, 2)))
    return found


def left(module: LitGPT) -> list[float]:
    """Return the ratio of every block of the model that the user gets."""
    module.eval()(torch.zeros(1, 4, dtype=torch.long))
    return exact(module)


class Truthful(LitGPT):
    """Remembers by itself the ratios of the weights that each loss is computed with."""

    def __init__(self, *, normalizes: bool = False) -> None:
        super().__init__()
        self.normalizes = normalizes
        self.truth: dict[int, list[float]] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.normalizes:
            turn(self)
        loss = super().training_step(batch, batch_idx)
        self.truth.setdefault(self.global_step, exact(self))
        return loss


def turn(module: LitGPT) -> None:
    """Change the weights in place so much that no ratio can be taken for another one."""
    with torch.no_grad():
        for block in module.model.blocks:
            block.mlp[2].weight.data.mul_(1.5 if block.mlp[2].weight.norm() < 4 else 0.2)


def ratios(folder: Path) -> dict[int, list[float]]:
    return {
        record["step"]: [layer["ratio"] for layer in record["layers"]]
        for record in read_journal(folder / "spectral.jsonl")[1]
    }


def assert_true(folder: Path, module: Truthful) -> None:
    """Every record is of the weights that the forward pass used; the last one is of those that are left."""
    found = ratios(folder)
    assert set(found) == {*module.truth, max(found)}
    for step, truth in {**module.truth, max(found): left(module)}.items():
        assert found[step] == pytest.approx(truth, rel=1e-2), step


class Changing(Callback):
    """Changes weights in one hook."""

    def __init__(self, hook: str) -> None:
        self.hook = hook
        setattr(self, hook, lambda trainer, pl_module, *args: None if trainer.sanity_checking else turn(pl_module))


@pytest.mark.parametrize(
    ("hook", "first"),
    [
        ("on_train_batch_start", False),
        ("on_validation_end", True),
        ("on_train_end", False),
    ],
)
def test_weights_that_another_callback_changes_are_measured_as_they_are_used(tmp_path: Path, hook: str, first: bool):
    module, monitor = Truthful(), SpectralMonitor(1, on_error="raise")
    callbacks = [Changing(hook), monitor] if first else [monitor, Changing(hook)]
    fit(tmp_path, callbacks, module=module, max_steps=STEPS, validate=True, val_check_interval=2)
    assert_true(tmp_path, module)


OWN_HOOKS = ["on_train_batch_end", "on_train_batch_start", "on_train_end", "training_step"]


@pytest.mark.parametrize("hook", OWN_HOOKS)
def test_weights_that_the_module_changes_in_its_own_hooks_are_too(tmp_path: Path, hook: str):
    """Lightning calls them behind those of all callbacks."""

    class Own(Truthful):
        def __init__(self) -> None:
            super().__init__(normalizes=hook == "training_step")

    if hook != "training_step":
        setattr(Own, hook, lambda self, *args: turn(self))
    module = Own()
    fit(tmp_path, SpectralMonitor(1, on_error="raise"), module=module, max_steps=STEPS)
    assert_true(tmp_path, module)


class Counting(RandomizedSVD):
    """Counts how often it is asked."""

    calls = 0

    def compute(self, *args: Any) -> Any:
        Counting.calls += 1
        return super().compute(*args)


def test_weights_that_nobody_changes_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To look again is not to measure again, also where validation comes between."""
    monkeypatch.setattr(Counting, "calls", 0)
    fit(tmp_path, SpectralMonitor(1, solver=Counting()), max_steps=STEPS, validate=True, val_check_interval=1)
    assert list(ratios(tmp_path)) == [0, 1, 2, 3, 4, 5, 6]
    assert Counting.calls == 7


# Averages


class Swap(Callback):
    """Puts an average in for validation, as recipes without Lightning's own callback do."""

    def __init__(self, start: str, end: str) -> None:
        self.average: dict[str, Tensor] = {}
        setattr(self, start, self.swap)
        setattr(self, end, self.swap)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = {name: 3 * value.clone() for name, value in pl_module.named_parameters()}

    @torch.no_grad()
    def swap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in pl_module.named_parameters():
            kept = value.clone()
            value.data.copy_(self.average[name])
            self.average[name] = kept


AVERAGES: dict[str, Callable[[], Callback]] = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "SWA": lambda: StochasticWeightAveraging(1e-2, 1),
    "swapped in on_validation_start": lambda: Swap("on_validation_start", "on_validation_end"),
    "swapped in on_validation_epoch_start": lambda: Swap("on_validation_epoch_start", "on_validation_epoch_end"),
}


@pytest.mark.parametrize(
    ("average", "first"),
    [
        ("EMA", True),
        ("EMA", False),
        ("SWA", True),
        ("SWA", False),
        ("swapped in on_validation_start", True),
        ("swapped in on_validation_epoch_start", False),
    ],
)
def test_averages_are_never_taken_for_the_run_and_are_measured_where_they_are_left(
    tmp_path: Path, average: str, first: bool
):
    module, monitor = Truthful(), SpectralMonitor(1, on_error="raise")
    averaging = AVERAGES[average]()
    callbacks = [averaging, monitor] if first else [monitor, averaging]
    flags = {"max_epochs": 3, "max_steps": -1, "validate": True, "val_check_interval": 2, "num_sanity_val_steps": 1}
    trainer = fit(tmp_path, callbacks, module=module, batches=2, **flags)
    assert_true(tmp_path, module)
    assert float(trainer.callback_metrics["spectral/ratio_max"]) == pytest.approx(max(exact(module)), rel=1e-2)


def test_the_last_record_the_logs_and_the_table_are_of_one_measurement(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    recorder, module = Recorder(), LitGPT()
    callbacks = [SpectralMonitor(2), EMAWeightAveraging(decay=0.9)]
    fit(tmp_path, callbacks, module=module, logger=[CSVLogger(tmp_path, "", ""), recorder])
    assert [step for step, _ in recorder.measured] == [0, 2, 4, 6, 8]  # nothing is written twice
    last = max(ratios(tmp_path)[8])
    assert recorder.measured[-1][1]["spectral/ratio_max"] == pytest.approx(last, rel=1e-9)
    assert last == pytest.approx(max(exact(module)), rel=1e-2)
    assert f"max {last:.3g};" in caplog.text


# Those who choose by a ratio


@pytest.mark.parametrize(
    "when", [{"every_n_train_steps": 2}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}, {"every_n_epochs": 1}]
)
def test_a_checkpoint_is_judged_by_the_weights_in_it(tmp_path: Path, when: dict[str, Any]):
    save = ModelCheckpoint(tmp_path / "best", monitor="spectral_ratio_max", mode="max", save_top_k=-1, **when)
    flags = {"validate": True, "enable_checkpointing": True, "max_steps": 8}
    fit(tmp_path, [SpectralMonitor(2), save], **flags)
    assert len(save.best_k_models) >= 2
    for path, score in save.best_k_models.items():
        module = LitGPT()
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert float(score) == pytest.approx(max(exact(module)), rel=1e-2)


class Clipped(Truthful):
    """Changes weights behind every callback."""

    def on_train_batch_end(self, *args: Any) -> None:
        turn(self)


def test_what_the_module_has_changed_is_published_before_an_epoch_is_judged(tmp_path: Path):
    seen: dict[int, float] = {}

    class Stop(EarlyStopping):
        def _run_early_stopping_check(self, trainer: Trainer) -> None:
            seen[trainer.global_step] = float(trainer.callback_metrics["spectral/ratio_max"])

    module = Clipped()
    fit(tmp_path, [Stop("spectral/ratio_max"), SpectralMonitor(4)], module=module, validate=True, max_epochs=2)
    assert seen == {4: pytest.approx(max(module.truth[4]), rel=1e-2), 8: pytest.approx(max(exact(module)), rel=1e-2)}


# Weights that are made anew for every pass


def each_matrix(module: LitGPT, change: Callable[[nn.Module], object]) -> None:
    for block in module.model.blocks:
        for layer in (block.mlp[0], block.mlp[2], block.attention.proj):
            change(layer)


def drawing(layer: nn.Module) -> None:
    """A maker of the user's own, which counts its calls and draws numbers."""
    layer.weight_whole, layer.calls = layer.weight, 0  # type: ignore[assignment]
    del layer._parameters["weight"]

    def make(layer: Any, args: Any) -> None:
        layer.calls += 1
        layer.weight = layer.weight_whole / 2 + 0 * torch.randn(())

    make(layer, ())
    layer.register_forward_pre_hook(make)


MAKERS: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4),
    "pruned twice": lambda layer: [prune.random_unstructured(layer, "weight", amount=0.2) for _ in range(2)],
    "weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "weight norm, parametrized": nn.utils.parametrizations.weight_norm,
    "the user's own": drawing,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_weights_that_a_hook_makes_are_those_of_the_next_pass(tmp_path: Path, maker: str):
    """Between two passes the attribute is that of the last pass, one step behind."""

    class Made(Truthful):
        def on_train_start(self) -> None:  # the monitor has found the blocks
            each_matrix(self, MAKERS[maker])
            self.trainer.optimizers[0].param_groups[0]["params"][:] = list(self.parameters())

    module = Made()
    fit(tmp_path, SpectralMonitor(1, on_error="raise"), module=module, max_steps=STEPS)
    assert_true(tmp_path, module)


@pytest.mark.parametrize("maker", ["pruned", "weight norm", "spectral norm", "the user's own"])
def test_such_a_weight_is_read_without_a_side_effect(maker: str):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    MAKERS[maker](layer)
    layer.train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    attribute, stream, calls = layer.weight, torch.get_rng_state(), getattr(layer, "calls", None)
    with ModelWeights(nn.ModuleDict({"layer": layer})).read("layer.weight") as weight:
        made = weight.detach().clone()
    assert layer.weight is attribute
    assert layer.training
    assert getattr(layer, "calls", None) == calls
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.eval()(torch.zeros(1, 4))
    assert torch.equal(layer.weight, made)


def test_a_weight_that_a_hook_makes_of_the_input_has_a_reason_and_no_norm(tmp_path: Path):
    class Made(LitGPT):
        def on_train_start(self) -> None:
            layer = self.model.blocks[1].mlp[2]
            drawing(layer)
            layer.register_forward_pre_hook(lambda layer, args: args[0].shape and None)

    fit(tmp_path, SpectralMonitor(2, on_error="raise"), module=Made(), max_steps=4)
    layers = read_journal(tmp_path / "spectral.jsonl")[1][-1]["layers"]
    assert [layer["mlp_norm"] is None for layer in layers] == [False, True, False]
    assert "may be made by a hook in every forward pass, which needs the input" in layers[1]["mlp_reason"]


@pytest.mark.parametrize("permanent", [True, False])
def test_lightnings_own_pruning_is_measured(tmp_path: Path, permanent: bool):
    module = Truthful()
    layers = [(layer, "weight") for block in module.model.blocks for layer in (block.mlp[0], block.mlp[2])]
    pruning = ModelPruning(
        "l1_unstructured", layers, amount=0.2, use_global_unstructured=True, make_pruning_permanent=permanent, verbose=0
    )
    fit(tmp_path, [SpectralMonitor(1, on_error="raise"), pruning], module=module, max_steps=8, batches=2)
    assert_true(tmp_path, module)
    assert bool((module.model.blocks[0].mlp[2].weight == 0).any())


# The end of a run that is steered, and of one that goes on


def test_the_law_does_not_act_on_weights_that_nobody_will_use(tmp_path: Path):
    module = unbalanced()
    fit(tmp_path, SpectralMonitor(2, ResidualRescaler(patience=1)), module=module, max_steps=4)
    assert {action["step"] for action in read_actions(tmp_path / "spectral.jsonl")} == {2}
    after = measure(module, find_blocks(module))
    assert ratios(tmp_path)[4] == pytest.approx([layer.ratio for layer in after], rel=1e-2)


@pytest.mark.parametrize("every", [2, 3])
def test_a_run_that_goes_on_after_its_end_is_the_run_that_was_never_ended(tmp_path: Path, every: int):
    """What was measured at the end is measured again, now with the tokens and the law: the later record counts."""
    ends = []
    for name, limits in (("straight", [8]), ("in two", [4, 8])):
        path = None
        for limit in limits:
            module, monitor = unbalanced(), SpectralMonitor(every, ResidualRescaler(patience=1))
            flags: dict[str, Any] = {"module": module, "max_steps": limit, "batches": 1, "ckpt_path": path}
            path = str(tmp_path / f"{name}.ckpt")
            fit(tmp_path / name, monitor, **flags).save_checkpoint(path)
        ends.append((module, read_actions(tmp_path / name / "spectral.jsonl")))
    (straight, acted), (resumed, acted_in_two) = ends
    assert straight.losses[4:] == resumed.losses
    assert_same(straight.state_dict(), resumed.state_dict())
    assert acted == acted_in_two
    assert list(ratios(tmp_path / "in two")) == sorted({*ratios(tmp_path / "straight"), 4})
