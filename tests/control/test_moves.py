"""Optimizers with weights of their own: a move that is undone is noticed, and the copy that undid it moves too."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import read_actions, read_journal
from lightning.pytorch.callbacks import Callback
from steered import unbalanced
from tiny_run import CONTEXT, VOCABULARY, fit
from torch import Tensor, nn

from lightning_spectral import ResidualRescaler, SpectralMonitor, Watch
from lightning_spectral.control.optimizers import hooked, own_copies


class Master(torch.optim.Optimizer):
    """Keeps copies in a wider type, by the parameters."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.master = {p: p.detach().double().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        for p, master in self.master.items():
            if p.grad is not None:
                p.copy_(master.sub_(p.grad.double(), alpha=self.param_groups[0]["lr"]))
        return loss


class InState(Master):
    """Keeps the copies in its state, beside a moment."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        for p, master in self.master.items():
            self.state[p] |= {"fp32": master, "exp_avg": torch.zeros_like(p)}
        return super().step(closure)


class ById(Master):
    """Keeps the copies by the parameters' ids, among other things."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, lr)
        self.others, self.copies = {0: "zero"}, {id(p): master for p, master in self.master.items()}
        self.master = ById.Hidden(self.master)

    class Hidden:
        """Looks like no dict."""

        def __init__(self, values: dict[Tensor, Tensor]) -> None:
            self.items = values.items


class Flat(torch.optim.Optimizer):
    """Keeps one flat copy of everything, in which nobody finds a scale."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.flat = torch.cat([p.detach().flatten() for p in self.param_groups[0]["params"]])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        parameters = self.param_groups[0]["params"]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.flat -= self.param_groups[0]["lr"] * torch.cat([gradient.flatten() for gradient in gradients])
        for p, part in zip(parameters, self.flat.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))
        return loss


class Lookahead(torch.optim.Optimizer):
    """Slow weights, in a list beside an inner optimizer, that follow at every third step."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": lr})
        self.inner, self.steps, self.slow = (
            torch.optim.AdamW(parameters, lr=lr),
            0,
            [p.detach().clone() for p in parameters],
        )

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        return looked_ahead(self, closure)


def looked_ahead(optimizer: Any, closure: Callable[[], Tensor] | None) -> Tensor:
    loss = optimizer.inner.step(closure)
    optimizer.steps += 1
    if optimizer.steps % 3 == 0:
        with torch.no_grad():
            for p, slow in zip(optimizer.param_groups[0]["params"], optimizer.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5))
    return loss


class Wrapper(torch.optim.Optimizer):
    """The same by a wrapper that never calls ``Optimizer.__init__``, and so has no place for hooks."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        parameters = list(parameters)
        self.inner, self.steps = torch.optim.AdamW(parameters, lr=lr), 0
        self.slow = [p.detach().clone() for p in parameters]
        self.param_groups, self.defaults = self.inner.param_groups, self.inner.defaults
        self.state = self.inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Tensor] | None) -> Tensor:
        return looked_ahead(self, closure)


class ScheduleFree(torch.optim.Optimizer):
    """SGD whose weights are drawn to an average, from a base sequence in its state (Defazio and others, 2024)."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        group = self.param_groups[0]
        group["k"] += 1
        for y in group["params"]:
            if y.grad is not None:
                z = self.state[y].setdefault("z", y.detach().clone())
                y.lerp_(z, 1 / (group["k"] + 1)).sub_(0.1 * group["lr"] * y.grad)
                z.sub_(group["lr"] * y.grad)
        return loss


def steered(
    folder: Path, kind: Callable[..., torch.optim.Optimizer], *, lr: float = 1e-4, learnable: bool = True, **flags: Any
) -> tuple[list[float], list[int], list[str]]:
    """Return the largest ratio of every measurement, the steps of the actions, and what was told."""
    module = unbalanced()
    module.configure_optimizers = lambda: kind(module.parameters(), lr=lr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = SpectralMonitor(2, ResidualRescaler(patience=1, learnable=learnable), geometry=False)
        fit(folder, [monitor, *flags.pop("callbacks", [])], module=module, **{"max_steps": 20, **flags})
    records = read_journal(folder / "spectral.jsonl")[1]
    largest = [max(layer["ratio"] for layer in record["layers"]) for record in records]
    steps = [action["step"] for action in read_actions(folder / "spectral.jsonl")]
    return largest, steps, [str(item.message) for item in caught if "did not stay" in str(item.message)]


@pytest.mark.parametrize("takes", [True, False])
def test_the_search_for_a_place_for_hooks_ends_where_wrappers_hold_each_other(takes: bool) -> None:
    first, second = Wrapper([nn.Parameter(torch.zeros(2))], 0.1), Wrapper([nn.Parameter(torch.zeros(2))], 0.1)
    inner = second.inner if takes else first
    first.inner, second.inner, second.other = second, first, inner
    calls: list[object] = []
    handles = hooked(first, "register_step_post_hook", lambda optimizer, *_: calls.append(optimizer))
    assert len(handles) == takes
    if takes:
        inner.step()
    assert calls == [inner] * takes


@pytest.mark.parametrize(
    ("kind", "learnable"),
    [(Master, True), (Lookahead, True), (Lookahead, False), (Wrapper, True), (Wrapper, False), (ScheduleFree, True)],
)
def test_the_copies_that_undo_a_move_are_told_once_and_moved_too(tmp_path: Path, kind: type, learnable: bool):
    largest, steps, (told,) = steered(tmp_path, kind, learnable=learnable)
    assert "From now on the law moves the copies too. To keep the scales out" in told
    assert largest[-1] < 2.0
    assert steps[-1] < 20  # and is at rest there


@pytest.mark.parametrize("auto_rescale", [False, True])
def test_a_watch_acts_before_the_step_of_the_optimizer_in_a_wrapper(auto_rescale: bool, caplog: Any):
    caplog.set_level(logging.INFO)
    model = unbalanced().model
    optimizer = Wrapper(model.parameters(), 1e-3)
    ids = torch.randint(VOCABULARY, (4, CONTEXT))
    with Watch(model, every_n_steps=2, auto_rescale=auto_rescale, optimizers=optimizer) as watch:
        for step in (1, 2, 3):
            watch.before_step(ids)
            model(ids).square().mean().backward()
            optimizer.step(None)
            optimizer.zero_grad()
            watch.step(step)
    assert ("residual scales, step 0, steering" in caplog.text) is auto_rescale
    assert "looks trained" not in caplog.text


def test_frozen_scales_that_an_optimizer_passes_over_stay_where_they_are(tmp_path: Path):
    largest, _, told = steered(tmp_path, Master, learnable=False)
    assert told == []
    assert largest[-1] < 2.0


class MakesUpGradients(torch.optim.Optimizer):
    """Lets a missing gradient be zero, and decays everything."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": 0.4 / lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        for p in self.param_groups[0]["params"]:
            if p.ndim < 2:  # weights that decay at this rate would leave nothing to steer
                p.mul_(0.6)
        return loss


def test_decay_of_scales_without_gradients_is_no_undoing(tmp_path: Path):
    _, steps, told = steered(tmp_path, MakesUpGradients, learnable=False)
    assert told == []
    assert len(set(steps)) > 2  # goes on


def test_a_copy_that_is_not_found_ends_the_steering_of_what_it_undoes(tmp_path: Path):
    largest, steps, (told,) = steered(tmp_path, Flat, max_steps=8)
    assert "6 residual scale(s) did not stay where the law had moved them (the first is at 'model.blocks.0.att" in told
    assert "The law leaves such scales alone from now on" in told
    assert set(steps) == {2}
    assert largest[-1] == pytest.approx(largest[0], rel=0.1)


class Resets(Callback):
    """Writes weights back between the steps, as averaging by hand does."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *args: Any) -> None:
        with torch.no_grad():
            for parameter, kept in zip(pl_module.parameters(), self.kept, strict=bool(self.kept)):
                parameter.copy_(kept)
        self.kept = [parameter.detach().clone() for parameter in pl_module.parameters()]


def test_what_writes_weights_back_between_the_steps_is_noticed_too(tmp_path: Path):
    class Once(Resets):
        def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *args: Any) -> None:
            if trainer.global_step < 2 or not self.kept:
                self.kept = [parameter.detach().clone() for parameter in pl_module.parameters()]
            super().on_train_batch_start(trainer, pl_module)

    _, steps, (told,) = steered(tmp_path, torch.optim.SGD, callbacks=[Once()], max_steps=8)
    assert "The law leaves such scales alone" in told
    assert set(steps) == {2}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_what_training_does_to_a_scale_is_no_undoing(tmp_path: Path, kind: type):
    *_, told = steered(tmp_path, kind, lr=3e-2, max_steps=10)
    assert told == []


def test_moments_are_no_copies():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1, bias=False))
    scale = nn.Parameter(torch.zeros(1))
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.ASGD, torch.optim.Rprop, torch.optim.Adafactor):
        optimizer = kind(
            [*model.parameters(), scale], lr=1e-3, **({"momentum": 0.9} if kind is torch.optim.SGD else {})
        )
        optimizer.master_list = [*model.parameters(), scale]  # the weights themselves
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.randn(4, 8)).sum() * scale.exp()).sum().backward()
            optimizer.step()
        found = own_copies(optimizer, scale)
        assert [copy is optimizer.state[scale]["ax"] for copy in found] == ([True] if kind is torch.optim.ASGD else [])


@pytest.mark.parametrize("kind", [InState, ById])
def test_copies_are_found_wherever_they_are_kept_by_parameter(kind: type):
    torch.manual_seed(0)
    model, scale = nn.Linear(8, 8), nn.Parameter(torch.zeros(1))
    optimizer = kind([*model.parameters(), scale], lr=1e-3)
    model(torch.randn(4, 8)).mul(scale.exp()).sum().backward()
    optimizer.step(lambda: None)
    (found,) = own_copies(optimizer, scale)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(scale.item())
    assert own_copies(optimizer, nn.Parameter(torch.zeros(1))) == []
