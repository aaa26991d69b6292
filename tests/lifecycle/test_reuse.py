"""A series belongs to a run: savers anywhere, monitors and Trainers that are used again, axes that others count."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import assert_same
from journals import read_actions, read_events, read_journal
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from recorder import Recorder
from steered import unbalanced
from tiny_run import LitGPT, fit, loader
from torch import Tensor

from lightning_spectral import ResidualRescaler, SpectralMonitor, measure

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:SpectralMonitor, (FAILURE|WARNING) at step"),
]


def records(folder: Path) -> list[dict[str, Any]]:
    return read_journal(folder / "spectral.jsonl")[1]


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in records(folder)]


# Savers


class Save(Callback):
    """Saves at one step, in one hook."""

    def __init__(self, hook: str, path: Path, step: int) -> None:
        self.path, self.step = path, step
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


class SavesItself(LitGPT):
    """Saves in its own hook, behind every callback."""

    path: Path
    step = 4

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step == self.step and hasattr(self, "path"):
            self.trainer.save_checkpoint(self.path)


def saver(place: str, monitor: SpectralMonitor, path: Path, step: int) -> list[Callback]:
    hook, _, where = place.partition(", ")
    save = Save(hook, path, step)
    return [save, monitor] if where == "in front" else [monitor, save]


PLACES = [
    "on_train_batch_end, in front",
    "on_train_batch_end, behind",
    "on_validation_start, in front",
    "on_train_epoch_end, in front",
]


def steered(folder: Path, callbacks: list[Callback], module: LitGPT, **flags: Any) -> LitGPT:
    # One batch an epoch: Lightning begins an interrupted epoch anew, and here anew is the same.
    fit(folder, callbacks, module=module, batches=1, max_steps=8, validate=True, **flags)
    return module


def monitor() -> SpectralMonitor:
    return SpectralMonitor(2, ResidualRescaler(patience=1), on_error="raise")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LitGPT]:
    folder = tmp_path_factory.mktemp("straight")
    return folder, steered(folder, [monitor()], unbalanced())


def lines(folder: Path, after: int) -> list[dict[str, Any]]:
    entries = [*records(folder), *read_actions(folder / "spectral.jsonl")]
    hidden = ("seconds", "time")
    return [{key: entry[key] for key in entry if key not in hidden} for entry in entries if entry["step"] >= after]


@pytest.mark.parametrize(("place", "step"), [*((place, 4) for place in PLACES), (PLACES[0], 5)])
def test_a_steered_run_goes_on_bitwise_wherever_the_saver_stands(
    tmp_path: Path, straight: tuple[Path, LitGPT], place: str, step: int
):
    path = tmp_path / "saved.ckpt"
    steered(tmp_path / "stopped", saver(place, monitor(), path, step), unbalanced())
    resumed = steered(tmp_path / "resumed", [monitor()], unbalanced(), ckpt_path=str(path))
    folder, module = straight
    assert_same(module.state_dict(), resumed.state_dict())
    assert module.losses[step:] == resumed.losses
    expected = lines(folder, step)
    assert any("action" in line for line in expected)
    assert lines(tmp_path / "resumed", 0) == expected


def test_nor_does_it_matter_that_the_module_saves_itself(tmp_path: Path, straight: tuple[Path, LitGPT]):
    module = SavesItself()
    module.load_state_dict(unbalanced().state_dict())
    module.path = tmp_path / "saved.ckpt"
    steered(tmp_path / "stopped", [monitor()], module)
    resumed = steered(tmp_path / "resumed", [monitor()], unbalanced(), ckpt_path=str(module.path))
    assert_same(straight[1].state_dict(), resumed.state_dict())


class ByHand(LitGPT):
    """Steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        optimizer.step()


def test_a_run_that_steps_by_hand_goes_on_bitwise_too(tmp_path: Path):
    def module() -> ByHand:
        built = ByHand()
        built.load_state_dict(unbalanced().state_dict())
        return built

    path = tmp_path / "saved.ckpt"
    whole = steered(tmp_path / "straight", [monitor()], module())
    steered(tmp_path / "stopped", saver("on_train_batch_end, in front", monitor(), path, 5), module())
    resumed = steered(tmp_path / "resumed", [monitor()], module(), ckpt_path=str(path))
    assert_same(whole.state_dict(), resumed.state_dict())
    assert lines(tmp_path / "resumed", 0) == lines(tmp_path / "straight", 5)


def halve(trainer: Trainer, pl_module: LightningModule, event: Any) -> None:
    for group in trainer.optimizers[0].param_groups:
        group["lr"] /= 2


def test_an_alarm_is_answered_once_though_a_saver_stood_in_front_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # In this run, tokens count as one vector although they are not.
    monkeypatch.setattr(sys.modules["lightning_spectral.alarms.signs"], "COLLAPSED", 2.0)

    def run(name: str, others: list[Callback], **flags: Any) -> tuple[LitGPT, float]:
        module = unbalanced("attention", 64)
        watch = SpectralMonitor(1, on_alarm=halve, on_error="raise")
        trainer = fit(tmp_path / name, [*others, watch], module=module, batches=1, **flags)
        return module, trainer.optimizers[0].param_groups[0]["lr"]

    whole, rate = run("straight", [])
    assert rate == 0.005  # told once
    (told,) = [e for e in read_events(tmp_path / "straight" / "spectral.jsonl") if e["level"] == "failure"]
    path = tmp_path / "saved.ckpt"
    run("stopped", [Save("on_train_batch_end", path, told["step"] + 1)])
    resumed, again = run("resumed", [], ckpt_path=str(path))
    assert again == rate
    assert_same(whole.state_dict(), resumed.state_dict())


# Monitors and Trainers that are used again


class Failing(LitGPT):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise RuntimeError("a typo in the training step")


def rehearsed(folder: Path, watch: SpectralMonitor) -> None:
    fit(folder, watch, fast_dev_run=2)


def failed(folder: Path, watch: SpectralMonitor) -> None:
    with pytest.raises(RuntimeError, match="a typo"):
        fit(folder, watch, module=Failing())


def finished(folder: Path, watch: SpectralMonitor) -> None:
    fit(folder, watch, max_steps=3)


def used_for_a_test(folder: Path, watch: SpectralMonitor) -> None:
    """A test loads the state of the monitor as well."""
    save = Save("on_train_batch_end", folder / "tested.ckpt", 2)
    fit(folder / "trained", [SpectralMonitor(4, auto_rescale=bool(watch.auto_rescale)), save], max_steps=3)
    module = LitGPT()
    module.test_step = module.validation_step  # type: ignore[assignment]
    flags: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    tester = Trainer(callbacks=watch, logger=False, default_root_dir=folder, **flags)
    tester.test(module, loader(), ckpt_path=str(folder / "tested.ckpt"), verbose=False)


class Look(Callback):
    """What is published before the first step, and what is true then."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.published = float(trainer.callback_metrics["spectral/ratio_max"])
        self.true = max(layer.ratio for layer in measure(pl_module))  # type: ignore[type-var]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folders = {steer: tmp_path_factory.mktemp("fresh") for steer in (False, True)}
    for steer, folder in folders.items():
        fit(folder, SpectralMonitor(4, auto_rescale=steer), module=unbalanced())
    return folders


@pytest.mark.parametrize(
    ("before", "steer"),
    [(rehearsed, False), (failed, False), (finished, True), (used_for_a_test, False), (used_for_a_test, True)],
)
def test_a_monitor_that_was_used_before_begins_anew(
    tmp_path: Path, fresh: dict[bool, Path], before: Callable[[Path, SpectralMonitor], None], steer: bool
):
    watch, look = SpectralMonitor(4, auto_rescale=steer), Look()
    before(tmp_path / "before", watch)
    fit(tmp_path / "after", [watch, look], module=unbalanced())
    assert steps(tmp_path / "after") == [0, 4, 8]
    assert look.published == pytest.approx(look.true, rel=1e-2)
    assert lines(tmp_path / "after", 0) == lines(fresh[steer], 0)


class Brings(LitGPT):
    """Names its callbacks itself; Lightning asks for them at every fit."""

    def configure_callbacks(self) -> list[Callback]:
        return [SpectralMonitor(3)]


def test_a_new_monitor_in_a_later_fit_goes_on_with_the_run(tmp_path: Path):
    trainer = fit(tmp_path, [], module=(module := Brings()), max_steps=4)
    first, run = steps(tmp_path), read_journal(tmp_path / "spectral.jsonl")[0]["run"]
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, loader(), loader())
    assert (first, steps(tmp_path)) == ([0, 3, 4], [0, 3, 4, 6, 8])
    assert read_journal(tmp_path / "spectral.jsonl")[0]["run"] == run


def test_another_model_in_the_same_trainer_is_another_run(tmp_path: Path):
    watch = SpectralMonitor(3, auto_rescale=ResidualRescaler(patience=1))
    trainer = fit(tmp_path, watch, module=unbalanced(), max_steps=4)
    run = read_journal(tmp_path / "spectral.jsonl")[0]["run"]
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.logger = CSVLogger(tmp_path / "second", name="", version="")
    look = Look()
    trainer.callbacks.append(look)
    trainer.fit(unbalanced("attention"), loader(), loader())
    assert steps(tmp_path / "second") == [4, 7, 8]
    assert read_journal(tmp_path / "second" / "spectral.jsonl")[0]["run"] != run
    assert look.published == pytest.approx(look.true, rel=1e-2)
    assert look.published < 1  # the first model's were above


def test_a_resumed_run_has_the_name_of_the_run(tmp_path: Path):
    fit(tmp_path / "first", [SpectralMonitor(2), Save("on_train_batch_end", tmp_path / "saved.ckpt", 5)])
    fit(tmp_path / "second", SpectralMonitor(2), ckpt_path=str(tmp_path / "saved.ckpt"), batches=5)
    names = [read_journal(tmp_path / name / "spectral.jsonl")[0]["run"] for name in ("first", "second")]
    assert names[0] == names[1]
    assert len(names[0]) == 32


def test_a_run_that_breaks_off_leaves_the_measurement_of_its_last_weights(tmp_path: Path):
    class Breaks(LitGPT):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.global_step == 4:
                raise RuntimeError("loss is not finite")
            return super().training_step(batch, batch_idx)

    watch = SpectralMonitor(2, geometry=True)
    with pytest.raises(RuntimeError, match="not finite"):
        fit(tmp_path, watch, module=(module := Breaks()))
    assert steps(tmp_path) == [0, 2, 4]
    assert watch.state_dict()["measured_step"] == 2  # who goes on from here measures it again, and acts on it
    assert not any("_compiled_call_impl" in vars(part) for part in module.modules())


def test_what_is_saved_before_the_first_step_is_not_of_an_earlier_run(tmp_path: Path):
    class Early(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.state = next(item for item in trainer.callbacks if isinstance(item, SpectralMonitor)).state_dict()

    watch, early = SpectralMonitor(2), Early()
    fit(tmp_path / "before", watch, max_steps=3)
    fit(tmp_path / "after", [watch, early], max_steps=3)
    assert early.state["measured_step"] is early.state["scheduled_step"] is None
    assert early.state["values"] == {}


# The axis


class Alternating(ByHand):
    """Two optimizers that step in turn, one a batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        self.log("train/loss", loss)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.model.blocks, self.model.head)]


class EveryFourth(ByHand):
    """Accumulates by hand."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        loss = self.loss(batch)
        self.manual_backward(loss)
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad()
        self.log("train/loss", loss)


class Unseen(ByHand):
    """Steps an optimizer that Lightning knows, by names that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.truth: dict[int, float] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.truth[len(self.truth)] = max(layer.ratio for layer in measure(self))  # type: ignore[type-var]
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter -= 0.3 * parameter.grad
        self.log("train/loss", loss)


def axes(recorder: Recorder) -> tuple[list[int], list[int]]:
    """Return where the losses were logged, and where the ratios."""
    losses = [step for step, values in recorder.calls if "train/loss" in values]
    return losses, [step for step, _ in recorder.measured]


@pytest.mark.parametrize(
    ("kind", "flags", "indices", "labels"),
    [
        (Alternating, {}, [0, 2, 4, 6, 8], [0, 2, 4, 6, 8]),
        (EveryFourth, {"batches": 16, "max_steps": 4}, [3, 11, 16], [0, 2, 4]),
        (Unseen, {"max_steps": -1, "max_epochs": 2}, [0, 2, 4, 6, 8], [0, 2, 4, 6, 8]),
        (LitGPT, {"accumulate_grad_batches": 2, "batches": 16}, [0, 2, 4, 6, 8], [0, 2, 4, 6, 8]),
    ],
)
def test_the_index_is_that_of_the_loss(
    tmp_path: Path, kind: type[LitGPT], flags: dict[str, Any], indices: list[int], labels: list[int]
):
    recorder = Recorder()
    seed_everything(0)
    fit(tmp_path, SpectralMonitor(2), module=kind(), logger=[CSVLogger(tmp_path, "", ""), recorder], **flags)
    losses, measured = axes(recorder)
    assert losses == list(range(losses[-1] + 1))
    assert measured == indices
    assert steps(tmp_path) == labels
    assert [step for step, _ in recorder.calls] == sorted(step for step, _ in recorder.calls)


def test_steps_that_lightning_does_not_see_are_measured_as_they_are_taken(tmp_path: Path):
    module = Unseen()
    fit(tmp_path, SpectralMonitor(1, geometry=True), module=module, max_steps=-1, max_epochs=2)
    found = {record["step"]: max(layer["ratio"] for layer in record["layers"]) for record in records(tmp_path)}
    assert list(found) == list(range(9))
    assert {step: found[step] for step in module.truth} == pytest.approx(module.truth, rel=1e-2)
    assert all(layer["token_residual"] is not None for record in records(tmp_path)[:-1] for layer in record["layers"])


@pytest.mark.parametrize("kind", [Alternating, Unseen])
def test_the_index_stays_that_of_the_loss_after_a_resume_without_a_state(tmp_path: Path, kind: type[LitGPT]):
    limits: dict[str, Any] = {"max_steps": -1, "max_epochs": 2}
    fit(tmp_path / "old", [], module=kind(), **limits).save_checkpoint(tmp_path / "old.ckpt")
    recorder = Recorder()
    limits["max_epochs"] = 4
    fit(tmp_path, SpectralMonitor(2), module=kind(), logger=recorder, ckpt_path=str(tmp_path / "old.ckpt"), **limits)
    losses, measured = axes(recorder)
    assert losses == list(range(losses[0], 16))
    assert measured == [*range(losses[0], 16, 2), 16]
