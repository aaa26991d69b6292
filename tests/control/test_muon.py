"""Muon and residual scales: which parameters it takes for matrices, and what is said where a scale is one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tiny_run import TinyGPT
from torch import Tensor, nn

from lightning_spectral import attach_scales
from lightning_spectral.control.muon import check_muon, muon_groups
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.scales import ResidualScales


class Muon(torch.optim.Optimizer):
    """Takes what it gets, and makes the step of anything orthogonal, a vector as a matrix of one row."""

    def __init__(self, parameters: Iterable[Any], **flags: Any) -> None:
        super().__init__(parameters, {"lr": 0.02, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw", **flags})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    u, _, v = torch.linalg.svd(p.grad.view(len(p), -1), full_matrices=False)
                    p.sub_(group["lr"] * (u @ v).view_as(p))


class NorMuonWithAuxAdam(Muon):
    """By its groups a Muon or an Adam."""


class MuonByState(Muon):
    """Moonlight's way: which rule a parameter gets stands in its state."""

    def __init__(self, matrices: list[Tensor], others: list[Tensor]) -> None:
        super().__init__([*matrices, *others])
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["use_muon"] = any(parameter is item for item in matrices)


class Lookahead(torch.optim.Optimizer):
    """Holds another optimizer."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})


class MuonAndAdamW(torch.optim.Optimizer):
    """Shows the groups of two optimizers as its own."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([dict(group) for part in parts for group in part.param_groups], {})
        self.parts = dict(enumerate(parts))


def scaled(*, learnable: bool = True) -> tuple[TinyGPT, ResidualScales]:
    torch.manual_seed(0)
    model = TinyGPT()
    return model, attach_scales(model, learnable=learnable)


def split(model: nn.Module, scales: ResidualScales) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices together with the scales, and the vectors."""
    own = {id(scale) for scale in scales.parameters()}
    matrices = [p for p in model.parameters() if p.ndim >= 2 or id(p) in own]
    return matrices, [p for p in model.parameters() if p.ndim < 2 and id(p) not in own]


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


WRONG = {
    "alone": lambda m, v: [Muon(m), adam(v)],
    "flag": lambda m, v: [NorMuonWithAuxAdam([{"params": m, "use_muon": True}, {"params": v, "use_muon": False}])],
    "rule": lambda m, v: [Muon([{"params": m, "algorithm": "muon"}, {"params": v, "algorithm": "adamw"}])],
    "kind of another name": lambda m, v: [
        Lookahead(torch.optim.SGD([{"params": m, "kind": "muon"}, {"params": v, "kind": "adamw"}]))
    ],
    "state": lambda m, v: [MuonByState(m, v)],
    "inside": lambda m, v: [Lookahead(Muon(m)), adam(v)],
    "a part": lambda m, v: [MuonAndAdamW(Muon(m), adam(v))],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_muon_that_would_train_scales_as_matrices_is_refused_however_it_is_wrapped(kind: str):
    model, scales = scaled()
    optimizers = WRONG[kind](*split(model, scales))
    with pytest.raises(ConfigurationError, match=r"Muon\w* would train 6 .*blocks\.0.*p\.ndim >= 2|SGD would train 6"):
        check_muon(optimizers, scales.named_parameters())


RIGHT = {
    "alone": lambda m, v: [torch.optim.Muon(m), adam(v)],
    "flag": lambda m, v: [NorMuonWithAuxAdam([{"params": m, "use_muon": True}, {"params": v, "use_muon": False}])],
    "rule": lambda m, v: [Muon([{"params": m, "algorithm": "muon"}, {"params": v, "algorithm": "adamw"}])],
    "state": lambda m, v: [MuonByState(m, v)],
    "inside": lambda m, v: [Lookahead(Muon(m)), adam(v)],
    "a part": lambda m, v: [MuonAndAdamW(Muon(m), adam(v))],
    "no Muon": lambda m, v: [adam([*m, *v])],
}


@pytest.mark.parametrize("kind", RIGHT)
def test_parameters_that_are_split_by_their_dimensions_are_right(kind: str):
    model, scales = scaled()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    optimizers = RIGHT[kind](matrices, [p for p in model.parameters() if p.ndim < 2])
    assert check_muon(optimizers, scales.named_parameters()) is None
    groups = [group for optimizer in optimizers for _, group in muon_groups(optimizer)]
    assert {id(p) for group in groups for p in group} == (set() if kind == "no Muon" else set(map(id, matrices)))


def test_a_group_with_other_vectors_is_told_and_left_to_its_optimizer():
    model, scales = scaled()
    told = check_muon([Muon(model.parameters())], scales.named_parameters())
    assert told is not None
    assert told.startswith("residual scales: 6 of them are in a group of Muon")


def test_scales_that_do_not_learn_pass_where_parameters_without_a_gradient_are_passed_over():
    model, scales = scaled(learnable=False)
    matrices, _ = split(model, scales)
    optimizer = Muon(matrices)
    assert check_muon([optimizer], scales.named_parameters()) is None
    weight = model.blocks[0].mlp[0].weight
    before = weight.clone()
    model(torch.arange(16).view(2, 8)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(weight, before)
    assert all(scale.item() == 0.0 for scale in scales.parameters())
