"""Residual scales leave a model's structure as a user's code knows it; torch sees them."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_run import TinyGPT
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_spectral import attach_scales, find_blocks, fuse_scales
from lightning_spectral.scales.attach import ResidualScale

WIDTH = 16


class Chain(nn.Sequential):
    """A user's own sequence, as many libraries have one for their MLPs."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*(layers or (nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))))
        self.width = WIDTH

    def append(self, module: nn.Module) -> Chain:  # overridden, and still the user's
        return super().append(nn.Sequential(module))


class Listed(nn.ModuleList):
    """Runs what it lists."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Named(nn.ModuleDict):
    """Runs what it names."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = layer(x)
        return x


class Walks(nn.Module):
    """Runs its children in order."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.children())[:-1]:
            x = layer(x)
        return dict(self.named_children())["down"](x)


def layers() -> list[nn.Module]:
    return [nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)]


KINDS: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(*layers()),
    "chain": Chain,
    "list": lambda: Listed(layers()),
    "dict": lambda: Named(dict(zip("abc", layers(), strict=True))),
    "walks": Walks,
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
}


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(WIDTH), branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Residual(KINDS[kind]()), Residual(KINDS[kind]()))


def scaled(kind: str) -> tuple[nn.Module, Any]:
    """Return a model, and the first of its sites, scaled by 3."""
    model = built(kind)
    scales = attach_scales(model, find_blocks(model, batch=torch.randn(2, 5, WIDTH)))
    assert len(scales) == 2
    with torch.no_grad():
        scales.parameters()[0].fill_(math.log(3.0))
    return model, model.get_submodule("0.branch")


def seen(site: Any) -> list[Any]:
    """What a user's code asks of a module."""
    found = [list(site.children()), list(site.named_children())]
    if isinstance(site, nn.Sequential | nn.ModuleList):
        found += [len(site), list(site), [site[place] for place in range(3)], site[-1], list(reversed(site))]
    if isinstance(site, nn.ModuleDict):
        found += [len(site), list(site), list(site.keys()), list(site.items()), list(site.values())]
        found += ["residual_scale" in site, site["a"]]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_looks_as_before_and_computes_a_multiple(kind: str):
    plain = built(kind)
    site = plain.get_submodule("0.branch")
    x = torch.randn(2, 5, WIDTH)
    wanted, before, kinds = 3 * site(x), seen(site), [type(part).__name__ for part in plain.modules()]
    scales = attach_scales(plain, find_blocks(plain, batch=x))
    with torch.no_grad():
        scales.parameters()[0].fill_(math.log(3.0))
    assert seen(site) == before
    torch.testing.assert_close(site(x), wanted)
    names = [type(part).__name__ for part in plain.modules() if not isinstance(part, ResidualScale)]
    assert names == kinds
    assert isinstance(site, type(KINDS[kind]()))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_sees_the_scale(kind: str):
    model, site = scaled(kind)
    assert isinstance(site.residual_scale, ResidualScale)
    assert [name for name in model.state_dict() if name.startswith("0.branch.residual_scale")]
    assert any(part is site.residual_scale for part in model.modules())
    assert model.get_parameter("0.branch.residual_scale.log_scale").exp().item() == pytest.approx(3.0)
    model.double().train()
    model.eval()
    assert site.residual_scale.log_scale.dtype == torch.float64
    assert not site.residual_scale.training
    told: list[nn.Module] = []
    model.apply(told.append)
    assert any(part is site.residual_scale for part in told)
    model.to_empty(device="meta")
    assert site.residual_scale.log_scale.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_fused_models_are_whole(kind: str):
    model, site = scaled(kind)
    x = torch.randn(2, 5, WIDTH)
    wanted = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other = twin.get_submodule("0.branch")
        assert type(other) is type(site)
        assert len(list(other.children())) == len(list(site.children()))
        assert not set(other.modules()) & set(site.modules())
        assert torch.equal(twin(x), wanted)
    fuse_scales(model)
    assert type(site) is type(KINDS[kind]())
    assert {"children", "named_children"}.isdisjoint(vars(site))
    torch.testing.assert_close(model(x), wanted)
    assert list(model.state_dict()) == list(built(kind).state_dict())
    assert not any(part._load_state_dict_pre_hooks or part._forward_hooks for part in model.modules())
    assert pickle.dumps(model).find(b"lightning_spectral") == -1


@pytest.mark.parametrize("kind", ["sequential", "list"])
def test_parts_of_a_container_are_plain_and_it_can_be_changed(kind: str):
    _, site = scaled(kind)
    plain = type(KINDS[kind]())
    part = site[:-1]
    assert type(part) is plain
    assert list(part) == list(site)[:2]
    assert list(part.state_dict()) == ["0.weight", "0.bias"]
    added = site + type(part)(*([nn.Tanh()] if kind == "sequential" else [[nn.Tanh()]]))
    assert len(added) == 4
    last = nn.Linear(WIDTH, WIDTH)
    site.append(last)
    site.insert(0, nn.Identity())
    site.extend([nn.Tanh()])
    assert len(site) == 6
    assert site[4] is last
    assert site.pop(-1).__class__ is nn.Tanh
    del site[0]
    site[3] = nn.Identity()
    assert [type(layer) for layer in site] == [nn.Linear, nn.GELU, nn.Linear, nn.Identity]
    assert list(site._modules) == ["0", "1", "2", "3", "residual_scale"]
    with pytest.raises(IndexError, match="index 4 is out of range"):
        site[4]


def test_what_a_users_class_overrides_stays_overridden():
    _, site = scaled("chain")
    assert site.append(nn.Tanh()) is site
    assert isinstance(site[3], nn.Sequential)


def test_a_dictionary_can_be_changed():
    _, site = scaled("dict")
    site.update({"d": nn.Tanh()})
    assert list(site) == ["a", "b", "c", "d"]
    assert isinstance(site.pop("d"), nn.Tanh)
    site.clear()
    assert len(site) == 0
    assert isinstance(site.residual_scale, ResidualScale)


@pytest.mark.parametrize("kind", ["sequential", "chain", "walks"])
def test_a_scaled_site_is_one_compiled_frame_as_before(kind: str):
    torch.compiler.reset()
    x, frames = torch.randn(2, 5, WIDTH), []
    for model in (built(kind), scaled(kind)[0]):
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter)
        torch.testing.assert_close(compiled(x), model(x))
        frames.append(counter.frame_count)
    assert frames == [1, 1]


def test_code_that_takes_a_model_apart_finds_its_layers():
    """Leaves by recursion, the model without its head, groups for weight decay by the kind of the leaf."""
    torch.manual_seed(0)
    model = TinyGPT()

    def leaves(module: nn.Module) -> list[nn.Module]:
        parts = list(module.children())
        return [leaf for part in parts for leaf in leaves(part)] if parts else [module]

    before = leaves(model)
    attach_scales(model)
    assert leaves(model) == before
    assert [type(layer) is nn.Linear for layer in model.blocks[0].mlp] == [True, False, True]
    headless = nn.Sequential(OrderedDict(list(model.blocks[0].mlp.named_children())[:-1]))
    assert [name for name, _ in headless.named_parameters()] == ["0.weight", "0.bias"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_are_scaled_bitwise_as_padded_ones():
    scale = ResidualScale()
    nn.init.constant_(scale.log_scale, 0.3)
    rows = [torch.randn(3, WIDTH), torch.randn(5, WIDTH)]
    for layout in (torch.strided, torch.jagged):
        jagged = torch.nested.nested_tensor(rows, layout=layout)
        for row, whole in zip(scale.scaled(jagged).unbind(), rows, strict=True):
            assert torch.equal(row, scale.scaled(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_factor_without_dimensions_rounds_as_one_with(dtype: torch.dtype):
    scale = ResidualScale(like=torch.zeros(1, dtype=dtype))
    nn.init.constant_(scale.log_scale, 0.3)
    x = torch.randn(64, 48, dtype=dtype, requires_grad=True)
    one, other = scale.scaled(x), x * scale.log_scale.exp().to(dtype)
    assert torch.equal(one, other)
    weights = torch.randn_like(one)
    for mine, theirs in zip(
        torch.autograd.grad(one, (x, scale.log_scale), weights),
        torch.autograd.grad(other, (x, scale.log_scale), weights),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
