"""A scale that multiplies nothing is refused; a run whose gradients come in another order is not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from steered import FunctionalAttention
from tiny_run import LitGPT, TinyGPT, fit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_spectral import ResidualRescaler, SpectralMonitor, attach_scales, find_blocks
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.scales.attach import ResidualScale
from lightning_spectral.scales.liveness import Liveness

IDS = torch.arange(16).view(2, 8)
HINTS = {"blocks.*": {"attention": "attention.inner.out_proj"}}


def gpt(*, bypassed: bool = False) -> nn.Module:
    """Return a model; with sites that are never called, because a functional reads their weights."""
    torch.manual_seed(0)
    model = TinyGPT()
    for block in model.blocks if bypassed else ():
        block.attention = FunctionalAttention()
    return model


def watched(model: nn.Module, *, learnable: bool = True, hints: Any = None) -> Liveness:
    scales = attach_scales(model, find_blocks(model, batch=IDS, hints=hints), learnable=learnable)
    return Liveness(model, scales.blocks)


def penalty(model: nn.Module) -> Tensor:
    return 1e-3 * sum(p.pow(2).sum() for p in model.parameters() if p.ndim == 2)


def loss(model: nn.Module) -> Tensor:
    return model(IDS).square().mean()


def both(model: nn.Module) -> Tensor:
    return loss(model) + penalty(model)


def without_gradients(model: nn.Module) -> Tensor:
    """An evaluation, then a step that trains something else."""
    with torch.no_grad():
        model(IDS)
    return penalty(model)


def first_block_only(model: nn.Module) -> Tensor:
    return model.blocks[0](model.tokens(IDS)).square().mean() + penalty(model)


def recomputed(model: nn.Module) -> Tensor:
    x = model.tokens(IDS)
    for number, block in enumerate(model.blocks):
        x = checkpoint(block, x, use_reentrant=number == 1)
    return x.square().mean()


def attention_only(model: nn.Module) -> Tensor:
    """The MLPs join later; their weights are penalized from the first step on."""
    x = model.tokens(IDS)
    for block in model.blocks:
        x = x + block.attention(block.norm1(x))
    return x.square().mean() + penalty(model)


ORDERS: dict[str, list[Callable[[nn.Module], Tensor]]] = {
    "penalty first": [penalty, penalty, loss],
    "an evaluation first": [without_gradients, loss],
    "one block at a time": [first_block_only, first_block_only, both],
    "branches that come late": [*[attention_only] * 5, both],
    "recomputed": [recomputed, both],
    "penalty alone": [penalty] * 3,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("learnable", [True, False])
def test_no_order_of_passes_is_refused(order: str, learnable: bool):
    model = gpt()
    liveness = watched(model, learnable=learnable)
    for step in ORDERS[order]:
        model.zero_grad()
        step(model).backward()
        liveness.check()
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert (len(hooks) == 6) is (order != "penalty alone")  # those of the scales, once all were seen
    liveness.release()
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert len(hooks) == 6


@pytest.mark.parametrize("order", [[loss], [penalty, loss], [first_block_only], [recomputed]])
@pytest.mark.parametrize("learnable", [True, False])
def test_a_site_that_is_passed_by_is_refused_with_the_cause(order: list[Any], learnable: bool):
    model = gpt(bypassed=True)
    liveness = watched(model, learnable=learnable, hints=HINTS)
    for step in order[:-1]:
        step(model).backward()
        liveness.check()
    order[-1](model).backward()
    with pytest.raises(
        ConfigurationError,
        match=r"residual scale\(s\) received no gradient although the weights of their branches did.*"
        r"blocks\.0\.attention\.inner\.out_proj \(its forward is never called",
    ):
        liveness.check()


class ByHand(nn.Module):
    """Reads all weights in functionals, those of both branches from one module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.q, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.o(F.scaled_dot_product_attention(self.q(y), self.q(y), self.v(y)))
        return x + F.linear(F.gelu(F.linear(self.norm(x), self.up.weight)), self.down.weight)


def test_where_no_module_of_a_branch_runs_the_other_scales_tell():
    model = nn.Sequential(ByHand())
    blocks = find_blocks(model, batch=torch.randn(2, 5, 16), hints={"0": {"attention": "o", "mlp": "down"}})
    liveness = Liveness(model, attach_scales(model, blocks).blocks)
    model(torch.randn(2, 5, 16)).sum().backward()
    with pytest.raises(ConfigurationError, match=r"1 residual scale\(s\).*: 0\.down \(its forward is never called"):
        liveness.check()


def test_a_site_that_something_has_wrapped_meanwhile_is_alive():
    model = gpt()
    liveness = watched(model)
    for block in model.blocks:
        block.mlp = nn.Sequential(block.mlp)
    penalty(model).backward()
    liveness.check()
    loss(model).backward()
    liveness.check()
    assert not liveness._unseen  # every scale has shown that it multiplies something


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_compiled_code_is_neither_changed_nor_accused():
    frames = []
    for steps in ([], [penalty, penalty, loss, loss]):
        torch.compiler.reset()
        model, counter = gpt(), CompileCounter()
        for block in model.blocks:
            block.compile(backend=counter)
        liveness = watched(model)
        for step in steps or [loss, loss]:
            step(model).backward()
            if steps:
                liveness.check()
        frames.append(counter.frame_count)
        assert not any(module.fired for module in model.modules() if isinstance(module, ResidualScale))
    assert frames[0] == frames[1] > 0


def test_a_copy_that_is_made_meanwhile_can_be_pickled_and_tells_nothing():
    model = gpt()
    liveness = watched(model)
    twin = copy.deepcopy(model)
    assert pickle.dumps(model)
    loss(twin).backward()
    penalty(model).backward()
    liveness.check()
    assert not any(module.fired for module in model.modules() if isinstance(module, ResidualScale))


class Penalized(LitGPT):
    """Optimizes by hand: first a penalty on the weights of the blocks, then the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, ids: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for part in (penalty(self.model.blocks), self.loss(ids)):
            self.manual_backward(part)
        optimizer.step()
        optimizer.zero_grad()


class Alternating(LitGPT):
    """Two optimizers in turn: one for a critic, which sees no block, and one for the model."""

    def __init__(self) -> None:
        super().__init__()
        self.critic, self.automatic_optimization = nn.Linear(8, 1), False

    def training_step(self, ids: Tensor, batch_idx: int) -> None:
        for optimizer, part in zip(
            self.optimizers(), (self.critic(ids.float()).mean() + penalty(self.model), self.loss(ids)), strict=True
        ):
            optimizer.zero_grad()
            self.manual_backward(part)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.critic, self.model)]


@pytest.mark.parametrize("kind", [Penalized, Alternating])
def test_runs_by_hand_are_steered(tmp_path: Path, kind: type):
    module = kind()
    fit(tmp_path, SpectralMonitor(2, ResidualRescaler()), module=module, max_steps=4)
    assert all(scale.log_scale.item() for scale in module.modules() if isinstance(scale, ResidualScale))
