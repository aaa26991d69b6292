"""What an optimizer, weight decay, a teacher and a checkpoint do to scales that learn and to scales that do not."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_run import TinyGPT
from torch import Tensor, nn

from lightning_spectral import attach_scales
from lightning_spectral.control.optimizers import with_fresh_scales
from lightning_spectral.scales import ResidualScales

IDS = torch.arange(16).view(2, 8)
RATE, DECAY, VALUE = 0.01, 0.1, -0.5


def scaled(*, learnable: bool) -> tuple[TinyGPT, ResidualScales]:
    """Return a model whose scales are at exp(-0.5)."""
    torch.manual_seed(0)
    model = TinyGPT()
    scales = attach_scales(model, learnable=learnable)
    with torch.no_grad():
        for scale in scales.parameters():
            scale.fill_(VALUE)
    return model, scales


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)


def values(scales: ResidualScales) -> list[float]:
    return [scale.item() for scale in scales.parameters()]


def gradients(model: nn.Module) -> list[Tensor]:
    model(IDS).square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_decoupled_decay_draws_a_learned_scale_to_the_identity_by_rate_times_decay_a_step():
    model, scales = scaled(learnable=True)
    optimizer = adamw(model)
    for scale in scales.parameters():
        scale.grad = torch.zeros(1)
    for step in (1, 2, 3):
        optimizer.step()
        assert values(scales) == pytest.approx([VALUE * (1 - RATE * DECAY) ** step] * 6, rel=1e-6)


def test_a_scale_that_does_not_learn_has_no_gradient_no_state_no_decay_and_no_share_of_the_clipping():
    model, scales = scaled(learnable=False)
    optimizer = adamw(model)
    weights = gradients(model)
    assert not any(scale.grad is not None for scale in scales.parameters())
    assert len(weights) == len(list(model.parameters())) - 6
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    learned, own = scaled(learnable=True)
    gradients(learned)
    share = sum(scale.grad.item() ** 2 for scale in own.parameters())
    with_share = torch.nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
    assert share > 0
    assert with_share.item() ** 2 == pytest.approx(total.item() ** 2 + share, rel=1e-5)
    optimizer.step()
    assert values(scales) == [VALUE] * 6
    assert not any(scale in optimizer.state for scale in scales.parameters())


def test_the_state_of_an_optimizer_that_never_saw_scales_loads_beside_scales_that_do_not_learn():
    plain = TinyGPT()
    old = adamw(plain)
    gradients(plain)
    old.step()
    model, scales = scaled(learnable=False)
    trained = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1.0)
    trained.load_state_dict(old.state_dict())
    every = adamw(model)
    completed = with_fresh_scales(every, old.state_dict(), scales.parameters())
    assert completed is not None
    every.load_state_dict(completed)
    for optimizer in (trained, every):
        assert torch.equal(optimizer.state[model.head.weight]["exp_avg"], old.state[plain.head.weight]["exp_avg"])


@pytest.mark.parametrize("learnable", [True, False])
def test_a_teacher_that_is_averaged_side_by_side_averages_the_scales(learnable: bool):
    model, scales = scaled(learnable=learnable)
    teacher = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for scale in scales.parameters():
            scale.fill_(0.0)
        for t, s in zip(teacher.parameters(), model.parameters(), strict=True):
            t.mul_(0.9).add_(s, alpha=0.1)
    own = [value.item() for name, value in teacher.named_parameters() if name.endswith("log_scale")]
    assert own == pytest.approx([0.9 * VALUE] * 6)
