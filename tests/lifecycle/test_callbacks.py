"""Lightning's own features beside the monitor: averaging, tuners, checkpoints in the background, two optimizers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import assert_same, everything
from journals import read_actions, read_journal
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from steered import unbalanced
from tiny_run import CONTEXT, VOCABULARY, LitGPT, SaveAt, TinyGPT, fit, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_spectral import ResidualRescaler, SpectralMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
]


def heavy(module: LitGPT) -> LitGPT:
    """Make the MLPs eight times as strong."""
    for block in module.model.blocks:
        block.mlp[2].weight.data.mul_(8)
    return module


def scales(module: nn.Module) -> dict[str, float]:
    return {name: value.item() for name, value in module.state_dict().items() if name.endswith("log_scale")}


def records(folder: Path) -> list[dict[str, Any]]:
    return read_journal(folder / "spectral.jsonl")[1]


# Averaging


AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
    "SWA": lambda: StochasticWeightAveraging(1e-2, 1),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
def test_averaging_in_front_of_a_monitor_that_watches_or_behind_it_is_what_it_was(
    tmp_path: Path, average: str, first: bool
):
    results = []
    for name, monitors in (("alone", []), ("watched", [SpectralMonitor(2, geometry=True, on_error="raise")])):
        seed_everything(0)
        module = LitGPT(dropout=0.2)
        averaging = AVERAGES[average]()
        callbacks = [averaging, *monitors] if first else [*monitors, averaging]
        trainer = fit(tmp_path / name, callbacks, module=module, shuffle=True, max_epochs=3, max_steps=-1)
        results.append(everything(module, trainer))
    assert_same(*results)
    # Behind the last epoch, stochastic weight averaging passes the batches once more for the sake of batch norms.
    extra = [13] if average == "SWA" else []
    assert [record["step"] for record in records(tmp_path / "watched")] == [0, 2, 4, 6, 8, 10, 12, *extra]


def test_averaged_scales_are_the_averages_of_the_scales(tmp_path: Path):
    seen: list[dict[str, float]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            seen.append(scales(pl_module))

    module, averaging = unbalanced(), EMAWeightAveraging(decay=0.5)
    fit(tmp_path, [SpectralMonitor(2, ResidualRescaler(patience=1)), averaging, Watch()], module=module)
    expected = dict.fromkeys(seen[0], 0.0)
    # The first update copies; from then on, the old average and the new value have equal weights.
    for number, values in enumerate(seen):
        weight = 0.0 if number == 0 else 0.5
        expected = {name: weight * expected[name] + (1 - weight) * value for name, value in values.items()}
    assert scales(module) == pytest.approx(expected, abs=1e-6)
    assert len(expected) == 6


# Tuners


def test_the_learning_rate_finder_searches_with_the_scales_and_gives_them_back(tmp_path: Path):
    """It trains for some steps and goes back to the start: the run after it is the run without it."""
    ends = []
    for name, tuners in (("plain", []), ("tuned", [LearningRateFinder(num_training_steps=5, update_attr=False)])):
        module = unbalanced()
        rescaler = ResidualRescaler(patience=1)
        fit(tmp_path / name, [SpectralMonitor(2, rescaler, on_error="raise"), *tuners], module=module)
        ends.append(module)
        assert [record["step"] for record in records(tmp_path / name)] == [0, 2, 4, 6, 8]
    assert_same(ends[0].state_dict(), ends[1].state_dict())
    assert read_actions(tmp_path / "plain" / "spectral.jsonl") == read_actions(tmp_path / "tuned" / "spectral.jsonl")


class Sized(LitGPT):
    """Makes its own batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 1

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(7)
        tokens = torch.randint(VOCABULARY, (64, CONTEXT), generator=generator)
        return DataLoader(tokens, batch_size=self.batch_size)


def fit_own_batches(folder: Path, callbacks: list[Callback], module: Sized) -> Trainer:
    flags: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = CSVLogger(folder, name="", version="")
    trainer = Trainer(
        callbacks=callbacks, max_steps=4, accelerator="cpu", logger=logger, log_every_n_steps=1, limit_val_batches=0,
        default_root_dir=folder, **flags,
    )  # fmt: skip
    trainer.fit(module, val_dataloaders=loader())
    return trainer


def test_the_batch_size_finder_finds_what_it_finds_alone(tmp_path: Path):
    sizes = []
    for monitors in ([], [SpectralMonitor(2, True, on_error="raise")]):
        module = heavy(Sized())
        finder = BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=2)
        folder = tmp_path / str(len(sizes))
        trainer = fit_own_batches(folder, [finder, *monitors], module)
        sizes.append(module.batch_size)
        assert trainer.global_step == 4
        assert not monitors or [record["step"] for record in records(folder)] == [0, 2, 4]
        assert len(scales(module)) == 6 * len(monitors)
    assert len(set(sizes)) == 1
    assert sizes[0] > 2


# Checkpoints in the background


class Slow(TorchCheckpointIO):
    """Writes so slowly that training has gone on before it begins."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        time.sleep(0.3)
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("steer", [False, True])
def test_a_checkpoint_that_is_written_in_the_background_holds_the_moment_it_was_taken(tmp_path: Path, steer: bool):
    saved = []
    for name, plugins in (("now", []), ("later", [AsyncCheckpointIO(Slow())])):
        module, path = unbalanced(), tmp_path / f"{name}.ckpt"
        monitor = SpectralMonitor(1, ResidualRescaler(patience=1) if steer else False, geometry=True)
        fit(tmp_path / name, [monitor, SaveAt(path, 3)], module=module, plugins=plugins)
        saved.append(torch.load(path, weights_only=True))
    now, later = saved
    (key,) = now["callbacks"]
    for state in (now, later):
        assert state["callbacks"][key]["measured_step"] == 2  # what is measured of step 3 is not acted on yet
        del state["callbacks"][key]["values"]["spectral_health/seconds"]
        del state["callbacks"][key]["run"]
    assert_same(now["state_dict"], later["state_dict"])
    assert_same(now["callbacks"], later["callbacks"])
    assert ("lightning_spectral" in later) is steer


# Optimizers


class Adversaries(LitGPT):
    """A generator and a discriminator, trained in turn by hand, the discriminator more often."""

    def __init__(self, critics: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic, self.critics = TinyGPT(), critics

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        for _ in range(self.critics):
            critic.zero_grad()
            fake = self.model(batch).detach().argmax(-1)
            self.manual_backward(self.critic(batch).mean() - self.critic(fake).mean())
            critic.step()
        generator.zero_grad()
        self.manual_backward(self.loss(batch) + self.critic(batch).mean() * 0)
        generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (self.model, self.critic)]


def test_the_models_of_two_optimizers_are_steered(tmp_path: Path):
    """The one that the LightningModule's forward runs through, and the one beside it, which is trained too."""
    module = heavy(Adversaries())
    monitor = SpectralMonitor(4, ResidualRescaler(patience=1), on_error="raise")
    trainer = fit(tmp_path, monitor, module=module, max_steps=16)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [0, 4, 8, 12, 16]
    both = {f"{model}.blocks.{i}" for model in ("model", "critic") for i in range(3)}
    assert {layer["name"] for record in found for layer in record["layers"]} == both
    assert len(scales(module)) == 12
    assert all(abs(value) > 0.1 for name, value in scales(module).items() if name.startswith("model."))
    assert len(trainer.optimizers) == 2
    assert all(layer["token_residual"] is not None for record in found[1:-1] for layer in record["layers"])


def test_tokens_are_measured_where_one_optimizer_steps_more_often(tmp_path: Path):
    module = Adversaries(critics=5)  # six steps a batch: 6, 12, 18, 24
    fit(tmp_path, SpectralMonitor(10, geometry=True, on_error="raise"), module=module, max_steps=24)
    heard = [record["layers"][0]["token_residual"] is not None for record in records(tmp_path)]
    assert [record["step"] for record in records(tmp_path)] == [0, 12, 24]
    assert heard == [True, True, False]  # no pass uses the last weights


@pytest.mark.parametrize("steer", [False, True])
def test_accumulation_counts_optimizer_steps(tmp_path: Path, steer: bool):
    monitor = SpectralMonitor(2, ResidualRescaler(patience=1) if steer else False, geometry=True, on_error="raise")
    module = unbalanced()
    fit(tmp_path, monitor, module=module, accumulate_grad_batches=4, batches=8, max_steps=6)
    assert len(module.losses) == 24
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 4, 6]
    assert all(layer["token_residual"] is not None for record in records(tmp_path)[:-1] for layer in record["layers"])
    assert {action["step"] for action in read_actions(tmp_path / "spectral.jsonl")} == ({2, 4} if steer else set())


# Flags


@pytest.fixture
def determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("determinism")
@pytest.mark.parametrize("steer", [False, True])
def test_algorithms_that_are_not_deterministic_are_not_used(tmp_path: Path, steer: bool):
    """torch raises at the first one."""
    monitor = SpectralMonitor(2, steer, geometry=True, on_error="raise")
    trainer = fit(tmp_path, monitor, module=unbalanced(), deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert trainer.global_step == 8


def test_there_is_no_thread_of_its_own(tmp_path: Path):
    alive: list[set[threading.Thread]] = []

    class Count(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            alive.append(set(threading.enumerate()))

    before = set(threading.enumerate())
    fit(tmp_path, [SpectralMonitor(1, True), Count()])
    assert alive == [before] * 8


# Stages


def prepared() -> LitGPT:
    module = unbalanced()
    module.test_step = module.validation_step  # type: ignore[assignment]
    module.predict_step = lambda batch, batch_idx: module(batch)  # type: ignore[assignment]
    return module


def test_every_stage_loads_the_checkpoint_of_a_steered_run(tmp_path: Path):
    path = tmp_path / "saved.ckpt"
    steered = prepared()
    fit(tmp_path / "run", [SpectralMonitor(2, ResidualRescaler(patience=1)), SaveAt(path, 8)], module=steered)
    expected = [steered.eval()(batch) for batch in loader()]
    for stage in ("validate", "test", "predict"):
        for given in (None, str(path)):
            module = prepared()
            if given is None:
                module.load_state_dict({n: v for n, v in steered.state_dict().items() if "residual_scale" not in n})
            trainer = Trainer(
                callbacks=SpectralMonitor(2, True), logger=False, enable_progress_bar=False, accelerator="cpu",
                enable_model_summary=False, default_root_dir=tmp_path,
            )  # fmt: skip
            quiet = {} if stage == "predict" else {"verbose": False}
            getattr(trainer, stage)(module, loader(), ckpt_path=given, **quiet)
            same = all(map(torch.equal, expected, [module.eval()(batch) for batch in loader()]))
            assert same is (given is not None)
            assert len(scales(module)) == 6
            assert not module._load_state_dict_pre_hooks


def test_validation_inside_fit_between_measurements_changes_no_schedule(tmp_path: Path):
    monitor = SpectralMonitor(3, ResidualRescaler(patience=1), on_error="raise")
    flags = {"validate": True, "val_check_interval": 1, "num_sanity_val_steps": 2, "limit_val_batches": 0.5}
    module = unbalanced()
    trainer = fit(tmp_path, monitor, module=module, limit_train_batches=0.75, **flags)
    assert trainer.num_training_batches == 3
    assert [record["step"] for record in records(tmp_path)] == [0, 3, 6, 8]
    assert {action["step"] for action in read_actions(tmp_path / "spectral.jsonl")} == {3, 6}


def test_the_best_checkpoint_by_a_spectral_key_is_reloaded_with_its_scales(tmp_path: Path):
    save = ModelCheckpoint(
        tmp_path / "best", monitor="spectral_ratio_max", mode="min", every_n_train_steps=2, save_top_k=1
    )
    module = prepared()
    callbacks = [SpectralMonitor(2, ResidualRescaler(patience=1)), save]
    trainer = fit(tmp_path / "run", callbacks, module=module, enable_checkpointing=True)
    kept = torch.load(save.best_model_path, weights_only=True)["state_dict"]
    trainer.test(module, loader(), ckpt_path="best", verbose=False)
    assert_same(dict(module.state_dict()), dict(kept))
