"""Which model is measured and steered: what the run trains, wherever it stands, whenever it is built."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import read_journal
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from steered import log_scales
from tiny_run import BLOCKS, VOCABULARY, WIDTH, Block, LitGPT, PickyGPT, TinyGPT, fit, loader
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral import ResidualRescaler, SpectralMonitor
from lightning_spectral.errors import BlocksNotFoundError

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`"),
]


class Deep(TinyGPT):
    """More blocks than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(0.0) for _ in range(6))


class Bare(LightningModule):
    """Has no forward; its training step calls its parts."""

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        if isinstance(model, PickyGPT):
            return model({"ids": ids + 1000})
        return model(ids)

    def loss_of(self, model: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


class Distillation(Bare):
    """A student learns from a larger teacher."""

    frozen = True

    def __init__(self, student: type[nn.Module] = TinyGPT, teacher: type[nn.Module] = Deep) -> None:
        super().__init__()
        self.student, self.teacher = student(), teacher()
        if self.frozen:
            self.teacher.requires_grad_(False)

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.logits(self.teacher, ids).softmax(-1)
        return F.cross_entropy(self.logits(self.student, ids).flatten(0, 1), target.flatten(0, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=1e-2)


class OnlyByTheOptimizer(Distillation):
    """Nothing is frozen: the teacher is in no optimizer."""

    frozen = False


class Together(Distillation):
    """Has a forward, which runs both."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = self.teacher(ids).softmax(-1)
        return self.student(ids), target

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        logits, target = self(ids)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))


class Held(Distillation):
    """Holds both in a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.ModuleDict({"student": self.student, "teacher": self.teacher})
        del self.student, self.teacher

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.pair["teacher"](ids).softmax(-1)
        return F.cross_entropy(self.pair["student"](ids).flatten(0, 1), target.flatten(0, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.pair["student"].parameters(), lr=1e-2)


class Momentum(Distillation):
    """The teacher is an average of the student."""

    def __init__(self) -> None:
        super().__init__(TinyGPT, TinyGPT)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        for mean, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mean.lerp_(value, 0.1)


class Towers(Bare):
    """Two models, trained together and called one by one."""

    def __init__(self, first: type[nn.Module] = PickyGPT, second: type[nn.Module] = PickyGPT) -> None:
        super().__init__()
        self.text, self.other = first(), second()

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        return self.loss_of(self.text, ids) + self.loss_of(self.other, ids.flip(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Adversaries(Towers):
    """Two models, each with an optimizer, trained in turn by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, ids: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        for model, optimizer in zip((self.text, self.other), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.loss_of(model, ids))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (self.text, self.other)]


class BlockByBlock(Bare):
    """Its training step is the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(Block(0.0) for _ in range(3))

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        x = self.tokens(ids[:, :-1])
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Frozen(LitGPT):
    """A part of it is frozen."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.model.get_submodule(name).requires_grad_(False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def numbered(prefix: str, count: int = BLOCKS) -> list[str]:
    return [f"{prefix}.{index}" for index in range(count)]


STUDENT, BOTH = numbered("student.blocks"), [*numbered("text.blocks"), *numbered("other.blocks")]
CASES: dict[str, tuple[Any, list[str]]] = {
    "a frozen teacher": (Distillation, STUDENT),
    "a frozen teacher, nothing to guess": (lambda: Distillation(PickyGPT, PickyGPT), STUDENT),
    "only the teacher could be guessed": (lambda: Distillation(PickyGPT, Deep), STUDENT),
    "a teacher that is in no optimizer": (OnlyByTheOptimizer, STUDENT),
    "the same, nothing to guess": (lambda: OnlyByTheOptimizer(PickyGPT, PickyGPT), STUDENT),
    "both in one forward": (Together, STUDENT),
    "both in one part": (Held, numbered("pair.student.blocks")),
    "a momentum teacher": (Momentum, STUDENT),
    "two towers": (Towers, BOTH),
    "two towers that can be guessed": (lambda: Towers(TinyGPT, TinyGPT), BOTH),
    "two adversaries": (Adversaries, BOTH),
    "block by block": (BlockByBlock, numbered("layers")),
    "some layers frozen": (lambda: Frozen("tokens", "blocks.0", "blocks.1"), numbered("model.blocks")),
    "all blocks frozen": (lambda: Frozen("tokens", "blocks"), numbered("model.blocks")),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_run_trains_is_measured_under_the_names_of_the_module(tmp_path: Path, case: str):
    make, expected = CASES[case]
    seed_everything(0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit(tmp_path, SpectralMonitor(1, geometry=True, on_error="raise"), module=make(), max_steps=4)
    assert not [text for warning in warned if "SpectralMonitor" in (text := str(warning.message))]
    records = read_journal(tmp_path / "spectral.jsonl")[1]
    assert [layer["name"] for layer in records[-1]["layers"]] == expected
    assert [layer["index"] for layer in records[-1]["layers"]] == list(range(len(expected)))
    assert all(layer["ratio"] is not None for record in records for layer in record["layers"])
    heard = [layer["token_residual"] for layer in records[-2]["layers"]]
    assert all(value is not None for value in heard)
    assert any(layer["functional"] for layer in records[-2]["layers"])


def test_a_part_that_is_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    fit(tmp_path, SpectralMonitor(1), module=Together(), max_steps=1)
    assert "left out, because nothing in it is trained: teacher (6 blocks)" in caplog.text


class Counting(nn.Module):
    """A metric, which counts how often it is asked; it has no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, logits: Tensor) -> Tensor:
        self.calls += 1
        return logits.mean()


def test_what_has_no_weights_is_not_run_again(tmp_path: Path):
    class Metered(Towers):
        def __init__(self) -> None:
            super().__init__()
            self.metric = Counting()

        def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
            self.metric(ids.float())
            return super().training_step(ids, batch_idx)

    module = Metered()
    fit(tmp_path, SpectralMonitor(1), module=module, max_steps=3)
    assert module.metric.calls == 3


# Models that are built late


class InSetup(LitGPT):
    """The vocabulary is known when the data is."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None  # type: ignore[assignment]

    def setup(self, stage: str) -> None:
        if self.model is None:
            seed_everything(5)
            self.model = TinyGPT()
            for block in self.model.blocks:
                block.mlp[2].weight.data.mul_(8)


class Replaced(LitGPT):
    """Puts another model into the place of the one that it was made with."""

    def setup(self, stage: str) -> None:
        seed_everything(5)
        self.model = TinyGPT()
        for block in self.model.blocks:
            block.mlp[2].weight.data.mul_(8)


class Extended(InSetup):
    """One block is there from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TinyGPT()
        self.model.blocks = self.model.blocks[:1]

    def setup(self, stage: str) -> None:
        if len(self.model.blocks) == 1:
            self.model.blocks.extend(Block(0.0) for _ in range(2))


class InBoth(InSetup):
    """Makes the model in one hook and the rest of it in the other."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if len(self.model.blocks) == BLOCKS:
            self.model.blocks = self.model.blocks[:2]

    def configure_model(self) -> None:
        if len(self.model.blocks) == 2:
            self.model.blocks.append(Block(0.0))


@pytest.mark.parametrize("kind", [InSetup, Replaced, Extended, InBoth])
def test_a_model_that_is_built_late_is_steered_from_the_first_step(tmp_path: Path, kind: type[LitGPT]):
    module = kind()
    fit(tmp_path, SpectralMonitor(1, ResidualRescaler(patience=1), on_error="raise"), module=module, max_steps=4)
    assert len(log_scales(module)) == 2 * BLOCKS
    assert all(value != 0.0 for value in log_scales(module))
    assert len(read_journal(tmp_path / "spectral.jsonl")[1][-1]["layers"]) == BLOCKS
    assert not {"setup", "configure_model"} & vars(module).keys()


@pytest.mark.parametrize("kind", [InSetup, InBoth])
def test_a_checkpoint_of_it_is_resumed_and_validated(tmp_path: Path, kind: type[LitGPT]):
    first, monitor = kind(), SpectralMonitor(1, ResidualRescaler(patience=1))
    fit(tmp_path / "first", monitor, module=first, max_steps=3, batches=1).save_checkpoint(tmp_path / "saved.ckpt")
    second = kind()
    fit(tmp_path / "second", SpectralMonitor(1, ResidualRescaler(patience=1)), module=second, max_steps=3, batches=1,
        ckpt_path=str(tmp_path / "saved.ckpt"))  # fmt: skip
    assert log_scales(second) == log_scales(first) != [0.0] * 6
    fresh = kind()
    flags: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=SpectralMonitor(1, True), logger=False, default_root_dir=tmp_path, **flags)
    trainer.validate(fresh, loader(), ckpt_path=str(tmp_path / "saved.ckpt"), verbose=False)
    assert log_scales(fresh) == log_scales(first)


def test_a_model_that_has_no_blocks_after_its_setup_either_is_refused(tmp_path: Path):
    class Nothing(InSetup):
        def setup(self, stage: str) -> None:
            self.model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY))  # type: ignore[assignment]

    module = Nothing()
    with pytest.raises(BlocksNotFoundError, match="no residual block was found in Nothing"):
        fit(tmp_path, SpectralMonitor(1, True), module=module)
    assert module.losses == []
    assert "setup" not in vars(module)


def test_an_average_copies_what_is_there_and_keeps_no_hook_of_the_monitor(tmp_path: Path):
    """The average is made between the setup of the monitor and that of the module."""

    class Configured(LitGPT):
        def __init__(self) -> None:
            super().__init__()
            self.model = None  # type: ignore[assignment]

        def configure_model(self) -> None:
            if self.model is None:
                self.model = TinyGPT()

    module, averaging = Configured(), EMAWeightAveraging(decay=0.5)
    with pytest.warns(UserWarning, match="overrides the configure_model"):
        fit(tmp_path, [SpectralMonitor(1, ResidualRescaler(patience=1)), averaging], module=module, max_steps=4)
    average = averaging._average_model.module
    assert len(log_scales(module)) == len(log_scales(average)) == 2 * BLOCKS
    assert callable(average.configure_model)
    assert average.configure_model.__self__ is average


def test_a_copy_that_is_made_before_the_module_is_set_up_has_its_own_hooks(tmp_path: Path):
    class Copies(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            self.copy = copy.deepcopy(pl_module)

    module, copies = InBoth(), Copies()
    fit(tmp_path, [SpectralMonitor(1, True), copies], module=module, max_steps=1)
    assert copies.copy.model is None
    copies.copy.setup("fit")
    copies.copy.configure_model()
    assert len(copies.copy.model.blocks) == BLOCKS
    assert log_scales(copies.copy) == []


# Lazy layers


class Lazy(LitGPT):
    """Its head learns its width from its first input."""

    def __init__(self) -> None:
        super().__init__()
        self.model.head = nn.LazyLinear(VOCABULARY)  # type: ignore[assignment]


class LazyMLP(LitGPT):
    """So do the matrices of its MLPs."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.model.blocks:
            block.mlp[0] = nn.LazyLinear(4 * WIDTH)


@pytest.mark.parametrize("kind", [Lazy, LazyMLP])
def test_a_lazy_model_is_watched_from_its_first_weights_on_without_a_word(tmp_path: Path, kind: type[LitGPT]):
    losses = []
    for watch in ([], [SpectralMonitor(1, geometry=True, on_error="raise")]):
        seed_everything(0)
        module = kind()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            fit(tmp_path / str(len(watch)), watch, module=module, max_steps=4)
        assert not [text for warning in warned if "SpectralMonitor" in (text := str(warning.message))]
        losses.append(module.losses)
    assert losses[0] == losses[1]
    records = read_journal(tmp_path / "1" / "spectral.jsonl")[1]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]  # the first pass makes the weights of step 0
    assert all(layer["ratio"] is not None for record in records for layer in record["layers"])
