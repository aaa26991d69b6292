"""A hook on every site: at zero nothing is left of the branch, and the stream is linear in the factor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from found import Found, Search
from site_factors import scaled
from torch import Tensor, nn
from zoo import Example, examples

from lightning_spectral import ResidualBlock, find_blocks

RUNNING = [member.name for member in examples() if not member.expected_refusal and member.callable]
IDENTITY = [member.name for member in examples() if member.name in RUNNING and member.identity]
NORMALIZED = [member.name for member in examples() if member.norm_scheme in ("post", "after_norm")]
STREAMS = [member.name for member in examples() if member.blocks and not any(block.whole for block in member.blocks)]

# What the compiler's own tracer says about the input of a block in the middle of a model.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Compiled code would not notice that hooks come and go."""
    with torch.compiler.set_stance("force_eager"):
        yield


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a model takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)) or hasattr(value, "values"):
        for item in value.values() if hasattr(value, "values") else value:
            yield from tensors(item)


def run(model: nn.Module, member: Example) -> Any:
    args, kwargs = member.inputs(model)
    return model(*args, **kwargs)


def passes(model: nn.Module, member: Example, block: str) -> list[tuple[Tensor, Tensor]]:
    """The stream before and after each call of a block in one forward; none for a container that is never called."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entered, left = next(tensors([args, kwargs])), next(tensors(output))
        seen.append((entered.detach().clone(), left.detach().clone().view_as(entered)))

    with model.get_submodule(block).register_forward_hook(hook, with_kwargs=True), torch.no_grad():
        run(model, member)
    return seen


def read_after(model: nn.Module, member: Example, site: str) -> list[tuple[str, Tensor]]:
    """What modules read after the first call of a site, in the order of their calls."""
    read: list[tuple[str, Tensor]] = []
    done: list[str] = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            read.extend((path, tensor.clone()) for tensor in [*tensors([args, kwargs])][:1] if done)

        return hook

    handles = [model.get_submodule(site).register_forward_hook(lambda *_: done.append(site))]
    handles += [
        module.register_forward_pre_hook(enter(path), with_kwargs=True) for path, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            run(model, member)
    finally:
        for handle in handles:
            handle.remove()
    return read


def whole(result: Found) -> list[ResidualBlock]:
    """The blocks that take the stream and return it."""
    known = {expected.name: expected for expected in result.member.blocks}
    return [block for block in result.blocks if known[block.name].whole]


def different(blocks: Sequence[ResidualBlock]) -> list[ResidualBlock]:
    """The last block of every kind in a stack: others like it are searched by the same rule."""
    looks = {
        (block.name.rpartition(".")[0], *((item.kind, item.site[len(block.name) :]) for item in block.branches)): block
        for block in blocks
    }
    return list(looks.values())


@pytest.mark.parametrize("name", RUNNING)
def test_every_site_fires_and_in_the_listed_order(name: str, found: Search) -> None:
    """A site is a module that runs in every forward, as often as its block; no site belongs to two branches."""
    result = found(name)
    branches = {branch: 1.0 for block in result.blocks for branch in block.branches}
    listed = [branch.site for branch in branches if not branch.site.startswith("param:")]
    with scaled(result.model, branches) as fired, torch.no_grad():
        run(result.model, result.member)
    assert len({branch.site for branch in branches}) == sum(len(block.branches) for block in result.blocks)
    calls = {block.name: block.calls for block in result.member.blocks}
    for block in result.blocks:
        for branch in block.branches:
            assert branch.site.startswith("param:") or fired.count(branch.site) == calls[block.name]
        inside = [branch.site for branch in block.branches if branch.site in listed]
        assert sorted(inside, key=fired.index) == inside


@pytest.mark.parametrize("name", [name for name in RUNNING if name not in STREAMS])
def test_at_zero_no_weight_of_a_block_acts(name: str, found: Search) -> None:
    """With all sites at zero no matrix in a block has a gradient left: no branch was missed, post-norm or not."""
    result = found(name)
    branches = {branch: 0.0 for block in result.blocks for branch in block.branches}
    zeroed = {branch.site.removeprefix("param:") for branch in branches}
    alone = {block.name for block in whole(result)}
    names = (
        name for block in result.blocks for name in block.name.split(" + ") if block.name in alone or name != block.name
    )
    inside = {
        f"{name}.{path}": parameter
        for name in names
        for path, parameter in result.model.get_submodule(name).named_parameters()
        if parameter.ndim >= 2 and parameter.requires_grad and f"{name}.{path}" not in zeroed
    }
    with scaled(result.model, branches):
        output = next(value for value in tensors(run(result.model, result.member)) if value.requires_grad)
        gradients = torch.autograd.grad(output.square().sum(), list(inside.values()), allow_unused=True)
    for path, gradient in zip(inside, gradients, strict=True):
        assert gradient is None or not gradient.any(), path


@pytest.mark.parametrize("name", IDENTITY)
def test_at_zero_every_block_is_the_identity(name: str, found: Search) -> None:
    """What enters a block leaves it, bit by bit."""
    result = found(name)
    for block in different(whole(result)):
        with scaled(result.model, dict.fromkeys(block.branches, 0.0)):
            for entered, left in passes(result.model, result.member, block.name):
                assert torch.equal(entered, left), block.name


@pytest.mark.parametrize("name", [name for name in RUNNING if name not in NORMALIZED])
def test_the_stream_is_linear_in_every_site(name: str, found: Search) -> None:
    """What a block adds is proportional to the factor at one site, the other sites at zero.

    Where the stream itself is multiplied or shifted, zero does not give the identity, but the difference to zero is
    proportional all the same.
    """
    result = found(name)
    for block in different(whole(result)):
        for branch in block.branches:
            left = []
            for factor in (0.0, 1.0, 3.0):
                with scaled(result.model, dict.fromkeys(block.branches, 0.0) | {branch: factor}):
                    left += [[after for _, after in passes(result.model, result.member, block.name)[:1]]]
            for zero, one, three in zip(*left, strict=True):
                size = float(three.abs().max())
                assert float((one - zero).abs().max()) > 1e-3, branch.site
                torch.testing.assert_close(three - zero, 3 * (one - zero), rtol=0, atol=2e-6 * max(size, 1.0))


@pytest.mark.parametrize("name", [name for name in NORMALIZED if name in RUNNING])
def test_behind_the_add_a_norm_reads_a_sum_that_is_linear_in_every_site(name: str, found: Search) -> None:
    """In post-norm blocks: the first module that reads more than the branch reads stream + factor · branch."""
    result = found(name)
    for block in different(whole(result)):
        for branch in (branch for branch in block.branches if not branch.site.startswith("param:")):
            read = []
            for factor in (0.0, 1.0, 3.0):
                with scaled(result.model, dict.fromkeys(block.branches, 0.0) | {branch: factor}):
                    read.append(read_after(result.model, result.member, branch.site))
            (path, zero), one, three = next(
                (first, second[1], third[1]) for first, second, third in zip(*read, strict=True) if first[1].any()
            )
            assert float((one - zero).abs().max()) > 1e-3, (branch.site, path)
            torch.testing.assert_close(three - zero, 3 * (one - zero), rtol=0, atol=1e-5)


def test_elements_of_tuples_lists_and_dicts_are_sites() -> None:
    """The branch may be element 0 of a tuple, element 1 of a list or a value of a dictionary."""

    class Returning(nn.Module):
        def __init__(self, form: str) -> None:
            super().__init__()
            self.form = form
            self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x: Tensor) -> Any:
            hidden = torch.relu(self.up(x))
            out = self.down(hidden) * 1
            return {"tuple": (out, hidden), "list": [hidden, out], "dict": {"hidden": hidden, "out": out}}[self.form]

    class Layer(nn.Module):
        def __init__(self, form: str, key: int | str) -> None:
            super().__init__()
            self.mlp, self.key = Returning(form), key

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)[self.key]

    for form, key in (("tuple", 0), ("list", 1), ("dict", "out")):
        model = nn.Sequential(*(Layer(form, key) for _ in range(2)))
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
        first, second = find_blocks(model, batch=x)
        assert [(branch.site, branch.output_index) for branch in first.branches] == [("0.mlp", key)]
        with scaled(model, {first.branches[0]: 0.0, second.branches[0]: 0.0}), torch.no_grad():
            assert torch.equal(model(x), x)
        assert first.verified
