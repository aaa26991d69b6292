"""Errors in the user's code that the scales have caused say so; no other error does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Block, LitGPT, TinyGPT, fit
from torch import Tensor, nn

from lightning_spectral import GainCeiling, SpectralMonitor, Watch, attach_scales
from lightning_spectral.errors import ConfigurationError


class Matrices(torch.optim.Optimizer):
    """Takes matrices, and looks at none of them before a step; a missing gradient is an error."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(_orthogonal(parameter.grad), alpha=1e-2)
        return loss


def _orthogonal(gradient: Tensor) -> Tensor:
    assert gradient.ndim == 2
    return gradient / gradient.norm()


class InBlocks(LitGPT):
    """Gives all of its blocks but norms and biases to an optimizer for matrices."""

    kind: Callable[..., torch.optim.Optimizer] = torch.optim.Muon

    def configure_optimizers(self) -> torch.optim.Optimizer:
        named = self.model.blocks.named_parameters()
        return type(self).kind([item for name, item in named if "norm" not in name and "bias" not in name])


class Stepped(InBlocks):
    kind = Matrices


class Student(LitGPT):
    """Averages a copy that nobody finds, in a closure."""

    def __init__(self, update: Callable[[Any, Any], None]) -> None:
        super().__init__()
        teacher = copy.deepcopy(self.model)
        self.average = lambda: update(teacher, self.model)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        self.average()


def zipped(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=False):
        t.mul_(0.9).add_(s, alpha=0.1)


def of_data(teacher: nn.Module, student: nn.Module) -> None:
    for (_, t), (_, s) in zip(teacher.named_parameters(), student.named_parameters(), strict=False):
        t.data.copy_(0.9 * t.data + 0.1 * s.data)


def strictly(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        assert t.shape == s.shape


def by_name(teacher: nn.Module, student: nn.Module) -> None:
    own = dict(teacher.named_parameters())
    for name, s in student.named_parameters():
        own[name].lerp_(s, 0.1)


def whole(teacher: nn.Module, student: nn.Module) -> None:
    teacher.load_state_dict(student.state_dict())


class Checkpointed(torch.autograd.Function):
    """Runs a module again in the backward pass, and asks for gradients by all parameters that it was given."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.x.detach().requires_grad_(True)
        with torch.enable_grad():
            output = ctx.run(x)
        return (None, *torch.autograd.grad(output, [x, *ctx.parameters], grads, allow_unused=True))


class CheckpointedBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return Checkpointed.apply(super().forward, x, *self.parameters())  # type: ignore[no-any-return]


class OwnCheckpointing(LitGPT):
    def __init__(self) -> None:
        super().__init__()
        self.model.blocks = nn.ModuleList(CheckpointedBlock(0.0) for _ in range(2))


def notes(folder: Path, module: LitGPT, error: type[Exception], match: str, *, learnable: bool = False) -> list[str]:
    monitor = SpectralMonitor(2, GainCeiling(learnable=learnable), geometry=False)
    with pytest.raises(error, match=match) as caught:
        fit(folder, [monitor], module=module, max_steps=2)
    return getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize(
    ("kind", "error", "match"),
    [(InBlocks, ValueError, "Muon only supports 2D"), (Stepped, AttributeError, "'NoneType' object has no attribute")],
)
def test_an_optimizer_that_takes_only_matrices_is_explained(
    tmp_path: Path, kind: type[LitGPT], error: type[Exception], match: str
):
    (told,) = notes(tmp_path, kind(), error, match)
    assert told.startswith("SpectralMonitor has attached 6 residual scales, parameters of shape (1,), such as")
    assert "'model.blocks.0.attention.residual_scale.log_scale'" in told
    assert "[p for p in parameters if p.ndim >= 2]" in told


def test_checkpointing_that_asks_for_gradients_by_all_parameters_is_explained(tmp_path: Path):
    error = "One of the differentiated Tensors does not require grad"
    (told,) = notes(tmp_path, OwnCheckpointing(), RuntimeError, error)
    assert "let the scales learn, auto_rescale=GainCeiling(learnable=True)" in told
    monitor = SpectralMonitor(2, GainCeiling(learnable=True), geometry=False)
    assert fit(tmp_path / "learns", [monitor], module=OwnCheckpointing(), max_steps=2).global_step == 2


def test_a_watch_explains_as_well(tmp_path: Path):
    model, ids = OwnCheckpointing().model, torch.randint(1, 32, (2, 9))
    optimizer = torch.optim.AdamW(model.parameters())

    def run(folder: str, work: Callable[[], None]) -> None:
        with Watch(model, tmp_path / folder, optimizers=optimizer, auto_rescale=True, batch=ids) as watch:
            watch.before_step(ids)
            work()

    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        run("1", lambda: model(ids).sum().backward())
    (told,) = caught.value.__notes__
    assert told.startswith("Watch has attached 4 residual scales, parameters of shape (1,), such as")
    with pytest.raises(ValueError, match="the batch has the wrong shape") as caught:
        run("2", lambda: in_vain(model, model))
    assert getattr(caught.value, "__notes__", []) == []


def test_frozen_weights_of_the_user_are_not_explained(tmp_path: Path):
    module = OwnCheckpointing()
    module.model.blocks[0].requires_grad_(False)
    error = "One of the differentiated Tensors does not require grad"
    with pytest.raises(RuntimeError, match=error) as caught:
        fit(tmp_path, [SpectralMonitor(2, geometry=False)], module=module, max_steps=2)
    assert getattr(caught.value, "__notes__", []) == []


def test_a_trained_scale_is_refused_before_the_first_step(tmp_path: Path):
    class Muon(Matrices):
        pass

    class Lit(InBlocks):
        kind = Muon

    module = Lit()
    # The error itself says it.
    assert notes(tmp_path, module, ConfigurationError, "Muon would train 6 residual", learnable=True) == []
    assert module.losses == []


@pytest.mark.parametrize(
    ("update", "error", "match"),
    [
        (zipped, RuntimeError, "must match the size of tensor"),
        (of_data, RuntimeError, "must match the size of tensor"),
        (strictly, AssertionError, "Size"),
        (by_name, KeyError, "residual_scale.log_scale"),
        (whole, RuntimeError, "Unexpected key.*residual_scale.log_scale"),
    ],
)
def test_a_teacher_without_scales_is_explained(
    tmp_path: Path, update: Callable[..., None], error: type[Exception], match: str
):
    (told,) = notes(tmp_path, Student(update), error, match)
    assert "attach_scales(" in told


class Counted:
    """Averages a list of tensors, and counts it."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.shadow = [parameter.detach().clone() for parameter in parameters]

    def update(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        if len(parameters) != len(self.shadow):
            raise ValueError("Number of parameters passed is different from the number of shadow parameters")


class Averaging(LitGPT):
    def __init__(self) -> None:
        super().__init__()
        self.averages = Counted(self.model.parameters())

    def on_train_batch_end(self, *_: Any) -> None:
        self.averages.update(self.model.parameters())


class AveragingLater(Averaging):
    def on_fit_start(self) -> None:
        self.averages = Counted(self.model.parameters())


def test_an_average_of_a_list_without_scales_is_explained_and_the_advice_helps(tmp_path: Path):
    (told,) = notes(tmp_path, Averaging(), ValueError, "Number of parameters passed is different")
    assert "make it, or the average that keeps it, in on_fit_start" in told
    assert fit(tmp_path / "later", [SpectralMonitor(2, True)], module=AveragingLater(), max_steps=2).global_step == 2


def test_the_advice_helps(tmp_path: Path):
    class Lit(LitGPT):
        def __init__(self) -> None:
            super().__init__()
            attach_scales(self, learnable=False)
            teacher = copy.deepcopy(self.model)
            self.average = lambda: strictly(teacher, self.model)

        def on_train_batch_end(self, *_: Any) -> None:
            self.average()

    assert fit(tmp_path, [SpectralMonitor(2, True, geometry=False)], module=Lit(), max_steps=2).global_step == 2


def of_another_copy(teacher: nn.Module, student: nn.Module) -> None:
    torch.zeros(3).add_(torch.zeros(4))


def of_other_counts(teacher: nn.Module, student: nn.Module) -> None:
    layers = list(student.children())
    raise ValueError(f"the number of parameters of {len(layers)} layers is odd")


def in_vain(teacher: nn.Module, student: nn.Module) -> None:
    raise ValueError("the batch has the wrong shape")


class Mistaken(TinyGPT):
    """Fails in its own training, with two parameters at hand."""

    trains = False

    def forward(self, ids: Tensor) -> Tensor:
        weight, bias = self.head.weight, self.blocks[0].mlp[0].bias
        return super().forward(ids) + (weight + bias).sum() if self.trains else super().forward(ids)


class OwnMistake(LitGPT):
    def __init__(self) -> None:
        super().__init__()
        self.model = Mistaken()

    def on_train_start(self) -> None:
        self.model.trains = True


@pytest.mark.parametrize(
    ("module", "error", "match"),
    [
        (lambda: Student(of_another_copy), RuntimeError, "must match the size of tensor"),
        (lambda: Student(in_vain), ValueError, "the batch has the wrong shape"),
        (lambda: Student(of_other_counts), ValueError, "the number of parameters of 4 layers is odd"),
        (OwnMistake, RuntimeError, "must match the size of tensor"),
    ],
)
def test_an_error_of_other_causes_is_left_as_it_is(
    tmp_path: Path, module: Callable[[], LitGPT], error: type[Exception], match: str
):
    assert notes(tmp_path, module(), error, match) == []


def test_scales_that_the_user_attached_are_not_explained(tmp_path: Path):
    module = InBlocks()
    attach_scales(module, learnable=False)
    assert notes(tmp_path, module, ValueError, "Muon only supports 2D") == []
