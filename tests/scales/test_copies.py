"""Copies of a model get scales where the model has them, so that what keeps both in step still does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from steered import unbalanced
from tiny_run import LitGPT, TinyGPT, fit
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from zoo import example

from lightning_spectral import ResidualRescaler, SpectralMonitor, attach_scales, find_blocks, fuse_scales, measure
from lightning_spectral.control.steering import Steering
from lightning_spectral.scales.attach import ResidualScale
from lightning_spectral.scales.copies import branches_of_copies

IDS = torch.arange(16).view(2, 8)


class Average:
    """A plain object that keeps an average, as a recipe copied from the web does."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = copy.deepcopy(model)


class Keeper(Callback):
    """Keeps a copy of the module that it was given."""

    def __init__(self, module: nn.Module) -> None:
        self.kept = copy.deepcopy(module)


def zipped(student: nn.Module, teacher: nn.Module) -> None:
    for one, other in zip(student.parameters(), teacher.parameters(), strict=True):
        other.lerp_(one, 0.5)


def by_name(student: nn.Module, teacher: nn.Module) -> None:
    own = student.state_dict()
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            value.lerp_(own[name], 0.5)


def by_update(student: nn.Module, teacher: Any) -> None:
    teacher.update_parameters(student)


class Momentum(LitGPT):
    """A student that learns and a teacher that follows it."""

    def __init__(self, make: Callable[[nn.Module], Any], follow: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self.model.load_state_dict(unbalanced().model.state_dict())
        self.teacher, self.follow = make(self.model), follow

    def configure_optimizers(self) -> torch.optim.Optimizer:
        learnt = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(learnt, lr=self.learning_rate)

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        self.follow(self.model, self.copied())

    def copied(self) -> Any:
        return self.teacher.shadow if isinstance(self.teacher, Average) else self.teacher


class Named(nn.Module):
    """Averages the parameters that it saw at first, and passes over all others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = frozen_copy(model)
        self.names = {name for name, _ in model.named_parameters()}

    def update_parameters(self, student: nn.Module) -> None:
        for (name, one), (_, other) in zip(student.named_parameters(), self.module.named_parameters(), strict=True):
            if name in self.names:
                other.lerp_(one, 0.5)


def frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


WAYS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any, Any], None]]] = {
    "zip": (frozen_copy, zipped),
    "AveragedModel": (lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)), by_update),
    "by name, in an object": (Average, by_name),  # not frozen, and trained by nobody
    "by a set of names": (Named, by_update),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_follows_the_scales_of_its_student(tmp_path: Path, way: str):
    module = Momentum(*WAYS[way])
    rescaler = ResidualRescaler(patience=1, learnable=way == "zip")
    fit(tmp_path, SpectralMonitor(2, rescaler), module=module, max_steps=12)
    teacher = getattr(module.copied(), "module", module.copied())
    student = [layer.ratio for layer in measure(module.model)]
    assert max(student) < 3.0
    assert [layer.ratio for layer in measure(teacher)] == pytest.approx(student, rel=0.2)
    scales = [part for part in teacher.modules() if isinstance(part, ResidualScale)]
    assert len(scales) == 6
    assert all(scale.log_scale.item() != 0.0 for scale in scales)
    wanted = teacher.eval()(IDS)
    torch.testing.assert_close(fuse_scales(copy.deepcopy(teacher))(IDS), wanted)


def steered(module: nn.Module, *others: object) -> int:
    """Attach scales as a run does, and count them."""
    Steering(ResidualRescaler(), (0.5, 2.0)).attach(module, None, others)
    return sum(isinstance(part, ResidualScale) for part in module.modules())


def test_a_copy_that_a_callback_keeps_gets_scales_too():
    module = LitGPT()
    keeper = Keeper(module)
    assert steered(module, keeper) == 6
    zipped(module.requires_grad_(False), keeper.kept.requires_grad_(False))
    assert [name for name, _ in keeper.kept.named_parameters()] == [name for name, _ in module.named_parameters()]


class Shadow:
    """Averages what is trained, by name, as the recipe that most people copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.backup = model, {}
        self.shadow = {name: p.data.clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self.shadow[name].lerp_(parameter, 0.5)


@pytest.mark.parametrize("learnable", [True, False])
def test_an_average_by_names_that_was_begun_before_goes_on_with_the_scales(learnable: bool):
    module = LitGPT()
    module.average, module.start = Shadow(module.model), {name: p.data.clone() for name, p in module.named_parameters()}
    module.start["model.head.bias"] = module.start["model.head.bias"][:1]  # no values of these parameters
    module.head = {name: value for name, value in module.start.items() if "head" in name}
    module.decayed = {name for name, p in module.named_parameters() if p.ndim > 1}
    before, decayed = set(module.start), set(module.decayed)
    attach_scales(module, find_blocks(module, batch=IDS), learnable=learnable)
    module.average.update()
    assert set(module.average.shadow) == {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert set(module.start) == before
    assert len(module.head) == 2
    assert module.decayed == decayed


def homes(model: nn.Module, **settings: Any) -> list[int]:
    """Which modules are taken for copies, by how many branches of each get scales."""
    blocks = find_blocks(model, batch=IDS)
    branches = [branch for block in blocks for branch in block.branches if "head" not in branch.site]
    found = [id(home) for home, _ in branches_of_copies(model, blocks, branches, **settings)]
    return [found.count(item) for item in dict.fromkeys(found)]


class Two(nn.Module):
    """Runs one of two models, or both."""

    def __init__(self, first: nn.Module, second: nn.Module, both: bool = False) -> None:
        super().__init__()
        self.nets, self.both = nn.ModuleList([first, second]), both

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.nets[0](ids)
        return y + self.nets[1](ids) if self.both else y


def gpt(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return TinyGPT().eval()


def test_what_is_a_copy_and_what_is_not():
    assert homes(Two(gpt(0), nn.Sequential(gpt(0)))) == [6]
    assert homes(Two(gpt(0), gpt(1))) == []  # another model, which something trains for itself
    frozen = gpt(1).requires_grad_(False)  # begins elsewhere, and may be set to the other before training
    assert homes(Two(gpt(0), frozen)) == [6]
    assert homes(Two(gpt(0), gpt(1), both=True)) == []  # both are found and scaled for themselves
    assert homes(gpt(0)) == []  # the blocks of a stack are no copies of each other
    other = gpt(0)
    other.blocks = other.blocks[:2]
    assert homes(Two(gpt(0), other)) == []
    one = nn.Module()
    one.student, one.teacher = gpt(0).blocks[0], gpt(0).blocks[0]
    one.forward = one.student.forward
    blocks = find_blocks(one, batch=torch.randn(2, 8, 16))
    assert len(list(branches_of_copies(one, blocks, blocks[0].branches))) == 2
    model = gpt(0)
    model.hidden = {"deep": [[gpt(0)]], "data": [0] * 100}
    assert homes(model) == []
    model.hidden = [gpt(0)]
    assert homes(model) == [6]
    assert homes(gpt(0), others=[Average(gpt(0))]) == [6]


def test_a_frozen_copy_that_runs_beside_its_model_is_scaled_and_another_frozen_model_is_not():
    for seed, count in ((0, 12), (1, 6)):
        module = Two(gpt(0), gpt(seed).requires_grad_(False), both=True)
        module.example_input_array = IDS
        assert steered(module) == count


def test_a_copy_of_a_model_whose_weights_carry_the_scales_keeps_its_order():
    member = example("plain_functional_params")
    model = nn.Module()
    model.student = member.build()
    model.teacher = copy.deepcopy(model.student)
    model.forward = model.student.forward
    args, kwargs = member.inputs(model.student)
    blocks = find_blocks(model, batch=args or kwargs)
    assert all(branch.site.startswith("param:student.") for block in blocks for branch in block.branches)
    scales = attach_scales(model, blocks)
    assert len(scales) == 2 * len(blocks)
    zipped(model.student.requires_grad_(False), model.teacher.requires_grad_(False))
    assert list(model.student.state_dict()) == list(model.teacher.state_dict())
