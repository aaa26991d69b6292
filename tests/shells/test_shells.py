"""What a watched run promises, whatever loop it is watched in: the same tests for every shell."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PYTHONPATH
from safetensors.torch import load_file
from shells import BATCHES, GPT, SHELLS, Run, Tokens, built, loader, optimizer_of
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback, TrainingArguments

from lightning_spectral import GainCeiling, History, ResidualRescaler, Watch, attach_scales, find_blocks, fuse_scales
from lightning_spectral.alarms import Event
from lightning_spectral.errors import ConfigurationError, ExampleInputError
from lightning_spectral.hugging_face import SpectralCallback
from lightning_spectral.linalg import ExactSVD, RandomizedSVD
from lightning_spectral.watch import exits

pytestmark = [
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dataloader, train_dataloader, does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:SpectralCallback. checkpoints of this run have residual scales"),
]
Shell = Callable[[Run], Any]

OPTIONS: dict[str, dict[str, Any]] = {
    "watched": {"every_n_steps": 2},
    "signals": {"every_n_steps": 2, "signals": ("change", "stable_rank", "alignment", "logit_bound")},
    "ceiling": {"every_n_steps": 2, "auto_rescale": True},
    "learned": {"every_n_steps": 2, "auto_rescale": GainCeiling(learnable=True)},
    "band": {"every_n_steps": 2, "auto_rescale": ResidualRescaler(patience=1, inner_zone=(0.99, 1.01))},
}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> Shell:
    found: Shell = SHELLS[request.param]
    return found


@pytest.fixture(params=[name for name in SHELLS if name != "lightning"])
def other(request: pytest.FixtureRequest) -> Shell:
    found: Shell = SHELLS[request.param]
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def unbalanced() -> GPT:
    """A model whose MLPs are far too strong, which every law has to do with."""
    model = built()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp[2].weight *= 30
    return model


def told(action: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]


# One run is the same run in every shell.


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_measures_what_the_lightning_shell_measures(other: Shell, options: dict[str, Any], tmp_path: Path):
    runs = [Run(tmp_path / name, options=options, model=unbalanced()) for name in ("one", "two")]
    for run, loop in zip(runs, (SHELLS["lightning"], other), strict=True):
        loop(run)
    one, two = (History.read(run.journal) for run in runs)
    assert one.steps == two.steps == (0, 2, 4, 6)
    for quantity in ("ratio", "mlp_norm", "attention_norm", "mlp_scale", "attention_scale", "token_residual"):
        assert torch.equal(*(torch.from_numpy(run.values(quantity)).nan_to_num(-1) for run in (one, two)))
    assert [{**action, "name": ""} for action in one.actions] == [{**action, "name": ""} for action in two.actions]
    assert bool(one.actions) == ("auto_rescale" in options)
    messages = [[event.message.replace("model.blocks", "blocks") for event in run.events] for run in (one, two)]
    assert messages[0] == messages[1]


# Watching changes nothing.


def test_a_watched_run_is_bitwise_the_run_that_nobody_watches(shell: Shell, tmp_path: Path):
    runs = [Run(tmp_path / str(number), options=wanted) for number, wanted in enumerate((None, OPTIONS["watched"]))]
    for run in runs:
        shell(run)
    assert same(*(weights(run.model) for run in runs))


def test_it_leaves_the_random_stream_alone(shell: Shell, tmp_path: Path):
    drawn = []
    for number, options in enumerate((None, {"every_n_steps": 1})):
        torch.manual_seed(3)
        shell(Run(tmp_path / str(number), options=options))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("options", [OPTIONS["watched"], OPTIONS["ceiling"]], ids=["watched", "ceiling"])
def test_it_leaves_no_hook_behind(shell: Shell, options: dict[str, Any], tmp_path: Path):
    run = Run(tmp_path, options=options)
    twin = built()
    if "auto_rescale" in options:
        attach_scales(twin)  # a scale is hooks on its site
    shell(run)
    assert hooks(run.model) == hooks(twin)


@pytest.mark.parametrize("shell", [SHELLS[name] for name in SHELLS if name != "transformers"])
def test_a_loop_that_fails_leaves_no_hook_and_keeps_what_was_measured(shell: Shell, tmp_path: Path):
    def fail(step: int) -> None:
        if step == 3:
            raise ArithmeticError("the loss is gone")

    run = Run(tmp_path, options={"every_n_steps": 1}, between=fail)
    bare = hooks(run.model)
    with pytest.raises(ArithmeticError, match="the loss is gone"):
        shell(run)
    assert hooks(run.model) == bare
    assert set(History.read(run.journal).steps) >= {0, 1, 2}


def test_the_next_run_cleans_up_after_one_that_failed_in_transformers_which_tells_callbacks_nothing(tmp_path: Path):
    def fail(step: int) -> None:
        if fails and step == 3:
            raise ArithmeticError("the loss is gone")

    fails = True
    shell = SHELLS["transformers"]
    callback = SpectralCallback(every_n_steps=1, geometry=True)
    run = Run(tmp_path / "one", options=callback, between=fail)
    bare = hooks(run.model)
    with pytest.raises(ArithmeticError, match="the loss is gone"):
        shell(run)
    fails = False
    again = Run(tmp_path / "two", options=callback, model=run.model)
    shell(again)
    assert hooks(run.model) == bare
    assert History.read(again.journal).steps == (0, 1, 2, 3, 4, 5, 6)


# What a run leaves.


def test_it_writes_the_run(shell: Shell, tmp_path: Path):
    run = Run(tmp_path)
    shell(run)
    history = History.read(run.journal)
    assert history.steps == (0, 2, 4, 6)
    assert history.header["every_n_steps"] == 2
    assert len(history.header["run"]) == 32
    assert len(history.header["blocks"]) == 3
    assert run.journal.with_suffix(".png").stat().st_size > 1000


def test_the_last_weights_are_measured(shell: Shell, tmp_path: Path):
    run = Run(tmp_path, steps=5)
    shell(run)
    assert History.read(run.journal).steps == (0, 2, 4, 5)


def test_scales_stay_and_can_be_folded(shell: Shell, tmp_path: Path):
    run = Run(tmp_path, options=OPTIONS["ceiling"], model=unbalanced())
    shell(run)
    batch = next(iter(loader()))["ids"]
    run.model.eval()
    before = run.model(batch)
    assert any("log_scale" in name for name in run.model.state_dict())
    fuse_scales(run.model)
    assert not any("log_scale" in name for name in run.model.state_dict())
    torch.testing.assert_close(run.model(batch), before, rtol=1e-4, atol=1e-5)


def test_a_prefix_names_everything(shell: Shell, tmp_path: Path):
    run = Run(tmp_path, options={"every_n_steps": 3, "prefix": "geometry.spectral"})
    shell(run)
    assert run.journal.name == "geometry.spectral.jsonl"


# Resume.


@pytest.mark.parametrize("options", [OPTIONS["watched"], OPTIONS["ceiling"]], ids=["watched", "ceiling"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(shell: Shell, options: Any, tmp_path: Path):
    resumed_equals_whole(shell, options, BATCHES, tmp_path)


@pytest.mark.parametrize("options", [OPTIONS["watched"], OPTIONS["ceiling"]], ids=["watched", "ceiling"])
def test_a_run_that_was_stopped_between_two_measurements_is_too(other: Shell, options: Any, tmp_path: Path):
    resumed_equals_whole(other, options, BATCHES - 1, tmp_path)


def resumed_equals_whole(shell: Shell, options: Any, at: int, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", options=options, model=unbalanced())
    first = Run(tmp_path / "parts", options=options, model=unbalanced(), save_at=at)
    second = Run(tmp_path / "parts", options=options, model=unbalanced(), resume=first.folder)
    for run in (whole, first, second):
        shell(run)
    assert same(weights(whole.model), weights(second.model))
    one, two = (History.read(run.journal) for run in (whole, second))
    rows = [dict(zip(run.steps, run.values("ratio").T.tolist(), strict=True)) for run in (one, two)]
    assert set(rows[0]) == {0, 2, 4, 6}
    assert rows[0] == {step: rows[1][step] for step in rows[0]}


# Trouble.


class Failing(RandomizedSVD):
    def compute(self, *args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError("no norm today")


def test_what_fails_is_told_and_training_goes_on(shell: Shell, tmp_path: Path):
    run = Run(tmp_path, options={"every_n_steps": 1, "solver": Failing()})
    messages = told(lambda: shell(run))
    failed = [message for message in messages if "failed in measuring (ArithmeticError: no norm today)" in message]
    assert len(failed) == 3
    assert failed[-1].endswith("it is switched off now")
    twin = Run(tmp_path / "twin", options=None)
    shell(twin)
    assert same(weights(run.model), weights(twin.model))


def test_what_fails_is_raised_if_asked(shell: Shell, tmp_path: Path):
    run = Run(tmp_path, options={"every_n_steps": 1, "solver": Failing(), "on_error": "raise"})
    with pytest.raises(ArithmeticError, match="no norm today"):
        shell(run)


def test_a_bad_setting_is_refused_before_anything_runs(shell: Shell, tmp_path: Path):
    for options, match in (
        ({"every_n_steps": 0}, r"every_n_steps=0: expected an integer of at least 1"),
        ({"safe_zone": (2, 1)}, r"safe_zone=\(2, 1\): expected two ratios"),
        ({"auto_rescale": "yes"}, r"auto_rescale='yes': expected True, False, a GainCeiling"),
        ({"on_alarm": "shout"}, r"on_alarm='shout': expected 'log' or 'checkpoint' or 'stop'"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            shell(Run(tmp_path, options=options))


# Alarms.


class Collapsing:
    """Makes all tokens one vector while attention dominates."""

    def __init__(self, model: GPT) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        for block in self.model.blocks:
            block.mlp[2].weight.zero_().add_(1e-6)
            block.attention.qkv.weight[:32].zero_()
            block.attention.proj.bias.fill_(1e4)


def collapsing(tmp_path: Path, **options: Any) -> Run:
    run = Run(tmp_path, steps=30, options={"every_n_steps": 1, **options})
    run.between = Collapsing(run.model)
    return run


def test_a_failure_can_stop_the_run(shell: Shell, tmp_path: Path):
    run = collapsing(tmp_path, on_alarm="stop")
    told(lambda: shell(run))
    history = History.read(run.journal)
    assert [event for event in history.events if event.level == "failure"]
    assert history.steps[-1] < 30


def test_a_failure_can_save_the_run(shell: Shell, tmp_path: Path):
    run = collapsing(tmp_path, on_alarm="checkpoint")
    told(lambda: shell(run))
    journal = min(tmp_path.rglob("spectral.jsonl"), key=lambda path: len(path.parts))
    failure = next(event for event in History.read(journal).events if event.level == "failure")
    folder = journal.parent / f"spectral-failure-{failure.step}"
    assert torch.load(folder / "failed.ckpt", weights_only=True)
    assert History.read(folder / "spectral.jsonl").steps[-1] == failure.step


def test_a_failure_calls_a_function(shell: Shell, tmp_path: Path):
    seen: list[Any] = []
    told(lambda: shell(collapsing(tmp_path, on_alarm=lambda *args: seen.append(args[-1]))))
    assert seen
    assert isinstance(seen[0], Event)
    assert seen[0].level == "failure"


# Which blocks.


class Picky(GPT):
    """Takes an input that nobody would guess."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        if int(ids.max()) < 1000:
            raise ValueError("these are not my ids")
        return super().forward(ids - 1000, labels)


def picky() -> Picky:
    torch.manual_seed(0)
    return Picky()


@pytest.fixture
def large_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    import shells

    plain = shells.Tokens.__getitem__
    monkeypatch.setattr(
        shells.Tokens,
        "__getitem__",
        lambda self, number: {**(item := plain(self, number)), "ids": item["ids"] + 1000},
    )


@pytest.mark.usefixtures("large_ids")
def test_blocks_are_found_in_the_first_forward_pass(shell: Shell, tmp_path: Path):
    run = Run(tmp_path, model=picky())
    shell(run)
    history = History.read(run.journal)
    assert len(history.measurements[-1].layers) == 3
    assert history.steps[-1] == 6


class Inside(nn.Module):
    """A model as an attribute of another module, as in a LightningModule."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids)


def test_named_blocks_are_watched(shell: Shell, tmp_path: Path):
    inner = built()
    chosen = find_blocks(Inside(inner) if shell is SHELLS["lightning"] else inner)[1:2]
    run = Run(tmp_path, options={"every_n_steps": 2, "blocks": chosen})
    shell(run)
    assert [layer.name for layer in History.read(run.journal).measurements[-1]] == [chosen[0].name]


def test_numbers_of_every_block_are_given_if_asked(shell: Shell, tmp_path: Path):
    run = Run(tmp_path, options={"every_n_steps": 2, "per_layer": True})
    shell(run)
    values = History.read(run.journal).values("ratio")
    assert values.shape == (3, 4)
    assert not any(math.isnan(value) for value in values.flatten())


def test_weights_that_change_between_steps_are_measured_as_they_are_used(shell: Shell, tmp_path: Path):
    def shrink(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                run.model.blocks[0].mlp[2].weight *= 1e-3

    run = Run(tmp_path, steps=4, options={"every_n_steps": 2, "solver": ExactSVD()}, between=shrink)
    shell(run)
    ratios = History.read(run.journal).values("ratio")[0]
    assert ratios[1] < 0.1 * ratios[0]


def test_one_model_can_be_watched_again(shell: Shell, tmp_path: Path):
    run = Run(tmp_path / "one", options=OPTIONS["ceiling"], model=unbalanced())
    shell(run)
    model = copy.deepcopy(run.model)
    again = Run(tmp_path / "two", options=OPTIONS["ceiling"], model=run.model)
    shell(again)
    twin = Run(tmp_path / "three", options=OPTIONS["ceiling"], model=model)
    shell(twin)
    assert same(weights(again.model), weights(twin.model))
    assert History.read(again.journal).steps == (0, 2, 4, 6)


def test_more_steps_than_an_epoch_are_one_run(shell: Shell, tmp_path: Path):
    run = Run(tmp_path, steps=BATCHES + 3, options={"every_n_steps": 3})
    shell(run)
    assert History.read(run.journal).steps == (0, 3, 6, 7)


# A loop that says little.


def said_late(model: nn.Module, **options: Any) -> list[int]:
    """Train in a loop that knows only the end of a step, and return the steps that were measured."""
    optimizer, measured = torch.optim.SGD(model.parameters(), lr=1e-3), []
    with Watch(model, every_n_steps=2, optimizers=optimizer, **options) as watch:
        for step in range(1, 7):
            for batch in loader():
                model(**batch)["loss"].backward()
            optimizer.step()
            if watch.step(step):
                measured.append(watch.measured_step)
    return measured


def test_a_loop_that_never_announces_a_pass_is_watched():
    assert said_late(built()) == [0, 2, 4]


@pytest.mark.usefixtures("large_ids")
def test_a_loop_that_never_announces_a_pass_shows_its_blocks_all_the_same():
    assert said_late(picky()) == [2, 4]


@pytest.mark.usefixtures("large_ids")
@pytest.mark.parametrize("steer", [False, True])
def test_an_example_batch_shows_the_blocks_at_once(steer: bool):
    assert said_late(picky(), auto_rescale=steer, batch=torch.full((2, 8), 1001)) == [0, 2, 4]


@pytest.mark.usefixtures("large_ids")
def test_steering_asks_for_an_example_batch():
    with pytest.raises(ExampleInputError, match="Pass an example, batch=example_input"):
        said_late(picky(), auto_rescale=True)


def test_steering_asks_for_the_optimizers():
    with pytest.raises(ConfigurationError, match="auto_rescale without optimizers"):
        Watch(built(), auto_rescale=True)


def test_a_step_does_not_go_back_and_a_closed_watch_does_not_go_on():
    watch = Watch(built())
    watch.step(3)
    with pytest.raises(ConfigurationError, match="step=2: expected an integer of at least 3"):
        watch.step(2)
    with pytest.raises(ConfigurationError, match="load_state_dict comes before the first"):
        watch.load_state_dict(watch.state_dict())
    watch.close()
    with pytest.raises(ConfigurationError, match="the watch is closed: make another one to go on"):
        watch.before_step()


def test_what_reports_in_transformers_gets_the_keys_at_the_measured_steps(tmp_path: Path):
    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if "spectral/ratio_max" in logs:
                seen.append((state.global_step, logs["spectral/ratio_max"]))

    seen: list[tuple[int, float]] = []
    arguments = TrainingArguments(
        str(tmp_path), max_steps=5, report_to="tensorboard", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = Trainer(
        built(), arguments, train_dataset=Tokens(), callbacks=[Reporter(), SpectralCallback(every_n_steps=2)]
    )
    trainer.train()
    history = History.read(tmp_path / "spectral.jsonl")
    assert [step for step, _ in seen] == list(history.steps) == [0, 2, 4, 5]
    assert [value for _, value in seen] == [item.summary()["ratio_max"] for item in history.measurements]
    logged = [entry["step"] for entry in trainer.state.log_history if "spectral/in_zone" in entry]
    assert logged == [0, 2, 4, 5]
    events = [path.read_bytes() for path in Path(tmp_path).rglob("events.out.tfevents.*")]
    assert any(b"train/spectral/ratio_median" in part for part in events)


def test_what_reports_in_transformers_is_told_nothing_behind_its_end(tmp_path: Path):
    """Trackio and MLflow end their run with the training; a value behind it would begin a second run."""

    class Ending(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            told.append(state.global_step if "spectral/ratio_max" in logs else "train_runtime" in logs)

        def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            told.append("end")

    told: list[int | bool | str] = []
    arguments = TrainingArguments(str(tmp_path), max_steps=5, report_to=[], use_cpu=True, save_strategy="no")
    callbacks = [Ending(), SpectralCallback(every_n_steps=2)]
    trainer = Trainer(built(), arguments, train_dataset=Tokens(), callbacks=callbacks)
    trainer.train()
    assert told == [0, 2, 4, True, 5, "end"]
    assert "train_runtime" in trainer.state.log_history[-1]
    assert trainer.state.log_history[-2]["step"] == 5


def test_a_checkpoint_of_a_steered_run_warns_of_from_pretrained(tmp_path: Path):
    run = Run(tmp_path, options=OPTIONS["ceiling"], model=unbalanced(), save_at=4)
    messages = told(lambda: SHELLS["transformers"](run))
    assert sum("from_pretrained does not read them: call fuse_scales(model)" in message for message in messages) == 1


class Adapters(GPT):
    """Has the mark of a model whose checkpoints have adapters alone."""

    peft_config = "of the head"


class SavesAdapters(Trainer):
    """Saves no scales, because they are no adapters."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        state = weights(self.model)
        super()._save(output_dir, {name: item for name, item in state.items() if "residual_scale" not in name})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_state_dict(load_file(Path(resume_from_checkpoint, "model.safetensors")), strict=False)


def of_adapters(folder: Path, resume: str | None = None, **options: Any) -> tuple[nn.Module, list[str]]:
    """Train the head of a model whose MLPs are too strong, and return the model, and what was told."""
    torch.manual_seed(0)
    model = Adapters()
    model.load_state_dict(unbalanced().state_dict())
    arguments = TrainingArguments(
        str(folder), max_steps=5, save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    settings = {"every_n_steps": 2, "blocks": find_blocks(model, batch=torch.zeros(2, 8, dtype=torch.long)), **options}
    trainer = SavesAdapters(model, arguments, train_dataset=Tokens(), callbacks=[SpectralCallback(**settings)])
    return model, told(lambda: trainer.train(resume_from_checkpoint=resume))


def test_a_run_of_adapters_resumes_with_the_scales_that_its_checkpoint_lacks(tmp_path: Path):
    whole, messages = of_adapters(tmp_path, auto_rescale=True)
    assert sum("checkpoints of this run have adapters without the residual scales" in item for item in messages) == 1
    saved = str(tmp_path / "checkpoint-3")
    assert not any("log_scale" in name for name in load_file(Path(saved, "model.safetensors")))
    resumed, _ = of_adapters(tmp_path, resume=saved, auto_rescale=True)
    assert any(name.endswith("log_scale") and value.item() < 0.0 for name, value in weights(whole).items())
    assert same(weights(whole), weights(resumed))
    with pytest.raises(
        ConfigurationError, match=r"the checkpoint has 6 residual scales, and the model has none, so it"
    ):
        of_adapters(tmp_path, resume=saved)


def test_scales_that_are_folded_into_adapters_and_what_is_under_them_are_told(tmp_path: Path):
    _, messages = of_adapters(tmp_path, auto_rescale=True, fuse_at_end=True)
    assert (
        sum("which a checkpoint of adapters does not have: save model.merge_and_unload()" in m for m in messages) == 1
    )


def test_scales_are_folded_at_the_end_if_asked(tmp_path: Path):
    run = Run(tmp_path, options={**OPTIONS["ceiling"], "fuse_at_end": True}, model=unbalanced())
    SHELLS["transformers"](run)
    assert not any("log_scale" in name for name in run.model.state_dict())


class Follow(TrainerCallback):
    """Keeps a copy, and averages it beside the model."""

    def __init__(self, model: nn.Module) -> None:
        self.copied = copy.deepcopy(model)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        averaged(self.copied, model)


class FollowByName(Follow):
    """Passes over the parameters that it did not see at first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.names = {name for name, _ in model.named_parameters()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        new = dict(model.named_parameters())
        for name, value in self.copied.named_parameters():
            if name in self.names:
                value.lerp_(new[name], 0.5)


class WithReference(Trainer):
    """Has a reference that follows the model, as methods of reinforcement learning do."""

    reference: nn.Module

    def training_step(self, model: nn.Module, *args: Any) -> Tensor:
        loss = super().training_step(model, *args)
        with torch.no_grad():
            averaged(self.reference, model)
        return loss


def averaged(copied: nn.Module, model: nn.Module) -> None:
    for one, other in zip(copied.parameters(), model.parameters(), strict=True):
        one.lerp_(other, 0.5)


@pytest.mark.parametrize("keeper", [Follow, FollowByName, WithReference])
def test_a_copy_that_a_trainer_of_transformers_or_its_callback_keeps_follows_the_scales(tmp_path: Path, keeper: type):
    model = unbalanced()
    plain = copy.deepcopy(model)
    arguments = TrainingArguments(str(tmp_path), max_steps=6, report_to=[], use_cpu=True, save_strategy="no")
    callbacks = [SpectralCallback(every_n_steps=2, auto_rescale=True)]
    if keeper is WithReference:
        trainer = WithReference(model, arguments, train_dataset=Tokens(), callbacks=callbacks)
        follower = trainer.reference = plain
    else:
        callbacks.append(keeper(model))
        trainer = Trainer(model, arguments, train_dataset=Tokens(), callbacks=callbacks)
        follower = callbacks[-1].copied
    trainer.train()
    scales = {name: value for name, value in weights(follower).items() if name.endswith("log_scale")}
    assert len(scales) == len(attach_scales(model))
    assert any(value.item() < -0.1 for value in scales.values())
    for name, value in scales.items():
        assert (value.item() < 0.0) == (model.get_parameter(name).item() < 0.0)


def test_an_option_that_is_none_is_told():
    with pytest.raises(ConfigurationError, match="argument 'every'; the options are those of Watch"):
        SpectralCallback(every=5)


@pytest.mark.parametrize("law", [True, GainCeiling(ceiling=0.5), ResidualRescaler(patience=1, inner_zone=(0.99, 1.01))])
def test_the_trainer_of_transformers_may_make_the_callback_anew_from_a_checkpoint(law: Any, tmp_path: Path):
    options = {"every_n_steps": 2, "auto_rescale": law, "safe_zone": (0.4, 2.5)}
    first = Run(tmp_path, options=options, model=unbalanced(), save_at=4)
    SHELLS["transformers"](first)
    other = {"every_n_steps": 5, "auto_rescale": law}
    resumed = Run(tmp_path, options=other, model=unbalanced(), resume=first.folder)
    resumed.arguments = {"restore_callback_states_from_checkpoint": True, "report_to": "tensorboard"}
    SHELLS["transformers"](resumed)
    history = History.read(resumed.journal)
    assert history.steps == (0, 2, 4, 6)
    assert history.measurements[-1].safe_zone == (0.4, 2.5)
    expected = (GainCeiling() if law is True else law).to_dict()
    assert history.header["rescaler"] == json.loads(json.dumps(expected))
    events = [path.read_bytes() for path in tmp_path.rglob("events.out.tfevents.*")]
    assert any(b"train/spectral/ratio_median" in part for part in events)


def test_what_a_checkpoint_cannot_bring_back_is_told(tmp_path: Path):
    options = {"every_n_steps": 2, "blocks": find_blocks(built())}
    first = Run(tmp_path, options=options, save_at=4)
    SHELLS["transformers"](first)
    resumed = Run(tmp_path, options=options, resume=first.folder)
    resumed.arguments = {"restore_callback_states_from_checkpoint": True}
    with pytest.raises(ConfigurationError, match="cannot bring back blocks of a SpectralCallback"):
        SHELLS["transformers"](resumed)


@pytest.mark.parametrize("options", [OPTIONS["watched"], OPTIONS["learned"]], ids=["watched", "learned"])
def test_a_model_that_transformers_compiles_has_tokens_and_is_compiled_once(options: Any, tmp_path: Path):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    found = []
    for number, (wanted, arguments) in enumerate([(None, compiled), (options, {}), (options, compiled)]):
        torch.compiler.reset()
        counters.clear()
        run = Run(tmp_path / str(number), options=wanted, arguments=arguments)
        SHELLS["transformers"](run)
        found.append((run, counters["stats"]["unique_graphs"]))
    (alone, graphs), (eager, _), (watched, watched_graphs) = found
    assert graphs == watched_graphs == 1
    one, two = (History.read(run.journal) for run in (eager, watched))
    for quantity in ("ratio", "mlp_scale", "token_residual"):
        pair = [torch.from_numpy(run.values(quantity)).nan_to_num(-1) for run in (one, two)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)
    assert one.header["blocks"] == two.header["blocks"]
    if options is OPTIONS["watched"]:
        assert same(weights(alone.model), weights(watched.model))


@pytest.mark.usefixtures("large_ids")
def test_the_callback_of_transformers_takes_an_example_batch(tmp_path: Path):
    batch = {"ids": torch.full((2, 8), 1001)}
    run = Run(tmp_path, options={"every_n_steps": 2, "auto_rescale": True, "batch": batch}, model=picky())
    SHELLS["transformers"](run)
    assert History.read(run.journal).actions


@pytest.mark.parametrize("end", [Watch.close, Watch.abandon])
def test_a_watch_that_never_began_leaves_no_hook_in_the_optimizer(end: Callable[[Watch], Any]):
    model = built()
    optimizer = optimizer_of(model)
    watch = Watch(model, auto_rescale=True, optimizers=optimizer)
    end(watch)
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_load_state_dict_pre_hooks")
    assert not any(getattr(optimizer, kind) for kind in kinds)


class Schedule:
    """Holds an optimizer and is none, as schedules of a learning rate often are."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_an_optimizer_is_taken_out_of_what_holds_it():
    optimizer = optimizer_of(model := built())
    with Watch(model, optimizers=Schedule(optimizer)) as watch:
        watch.before_step()
        assert len(optimizer._optimizer_step_pre_hooks) == 1


@pytest.mark.parametrize(("given", "kind"), [(object(), "object"), (None, "NoneType"), ([1], "int")])
def test_what_is_no_optimizer_is_refused(given: Any, kind: str):
    with pytest.raises(ConfigurationError, match=rf"optimizers has a {kind}, expected torch\.optim\.Optimizer"):
        Watch(built(), optimizers=given)


def test_a_state_of_another_linearization_is_refused():
    state = Watch(built()).state_dict()
    with pytest.raises(ConfigurationError, match="the state is of linearization='circuit', this watch has 'paper'"):
        Watch(built(), linearization="paper").load_state_dict(state)


def test_a_state_from_before_the_first_measurement_keeps_the_run(tmp_path: Path):
    model = built()
    watch = Watch(model, tmp_path)
    watch.before_step()
    state = watch.state_dict()
    watch.abandon()
    again = Watch(model, tmp_path)
    again.load_state_dict(state)
    again.step(1)
    again.close()
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["spectral.jsonl"]


UNCLOSED = """
import torch
from lightning_spectral import Watch

def loop():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    watch = Watch(model, "run", every_n_steps=1, safe_zone=(0.01, 100.0))
    for step in (1, 2, 3):
        watch.before_step()
        model(torch.randn(4, 5, 16))
        watch.step(step)
        if step == 2:
            raise KeyboardInterrupt

loop()
"""


TERMINATED = "__import__('os').kill(__import__('os').getpid(), 15)"
FORKED = f"""import os
            child = os.fork()
            if not child:
                {TERMINATED}
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 15
            assert not os.path.exists("run/spectral.png")  # which is drawn at the end
            {TERMINATED}"""


@pytest.mark.parametrize(
    ("end", "code"), [("raise KeyboardInterrupt", 1), (TERMINATED, -15), (FORKED, -15)], ids=["ctrl-c", "term", "fork"]
)
def test_a_watch_that_nobody_closes_says_what_it_knows_at_the_exit_on_standard_error(
    end: str, code: int, tmp_path: Path
):
    """In a process without Lightning, in which nobody has configured logging."""
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", UNCLOSED.replace("raise KeyboardInterrupt", end)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    copies, start, *_, last, place, command = done.stderr.splitlines()
    assert "blocks 0, 1, 2 begin as copies" in copies
    assert start == "Watch: 3 blocks, all verified, measured every step"
    assert ("KeyboardInterrupt" in done.stderr) == (code == 1)
    assert "spectral ratio ?mlp??/?attention??, linearization='circuit', step 2" in done.stderr
    assert "3 of 3 blocks inside the safe zone; measured in" in last
    assert (place, command) == (
        "Watch: files are in run, and this makes a page of them:",
        "lightning-spectral report run",
    )
    assert History.read(tmp_path / "run").steps == (0, 1, 2)
    assert (tmp_path / "run" / "spectral.png").exists()


def test_a_program_keeps_its_own_way_to_handle_the_signal_and_gets_the_default_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exits, "_actions", [])  # of watches that other tests have left open

    def watched() -> None:
        watch = Watch(built())
        watch.before_step()
        during.append(signal.getsignal(signal.SIGTERM))
        watch.close()

    during: list[Any] = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN, lambda *_: None):
            signal.signal(signal.SIGTERM, handler)
            watched()
            assert signal.getsignal(signal.SIGTERM) is handler
            assert (during[-1] is handler) == (handler is not signal.SIG_DFL)
            thread = threading.Thread(target=watched)
            thread.start()
            thread.join()
            assert during[-1] is signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(during) == 6


def test_a_watch_that_is_gone_is_not_asked_at_the_exit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exits, "_actions", [])
    watch = Watch(built())
    watch.before_step()
    assert len(exits._actions) == 1
    del watch
    gc.collect()
    assert exits._actions == []
