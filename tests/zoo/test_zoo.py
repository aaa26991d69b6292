"""The zoo tells the truth: its models build, run, cover the survey, and add exactly what they say they add."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import Example, ExpectedBlock, example, examples, survey

EXAMPLES = [member.name for member in examples()]
SURVEYED = [member.name for member in examples() if member.survey]
WITH_BLOCKS = [member.name for member in examples() if member.blocks and member.callable]
WITH_MATRICES = [member.name for member in examples() if member.matrices]

pytestmark = [
    pytest.mark.usefixtures("process_group"),  # some members are sharded
    # What the compiler's own tracer says about the input of a block in the middle of a model.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture
def eager() -> Iterator[None]:
    """Compiled code would not notice that hooks come and go."""
    with torch.compiler.set_stance("force_eager"):
        yield


@functools.cache
def built(name: str) -> nn.Module:
    """One model for all tests that leave it as it was."""
    return example(name).build()


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns."""
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "values"):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def stream(value: Any) -> Tensor:
    """The tensor that a block takes or returns: alone or first of a tuple."""
    return next(tensors(value))


@contextlib.contextmanager
def scaled(model: nn.Module, factors: dict[str, float]) -> Iterator[dict[str, int]]:
    """Multiply what the sites return (or the parameters they name); yields how often each module ran."""
    fired = dict.fromkeys(factors, 0)

    def scale(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            fired[path] += 1
            if isinstance(output, (tuple, list)):
                return type(output)([output[0] * factors[path], *output[1:]])
            return output * factors[path]

        return hook

    handles = []
    weights = {}
    for path in factors:
        if path.startswith("param:"):
            weight = model.get_parameter(path.removeprefix("param:"))
            weights[weight] = weight.detach().clone()
            weight.data.mul_(factors[path])
        else:
            handles.append(model.get_submodule(path).register_forward_hook(scale(path)))
    try:
        yield fired
    finally:
        for handle in handles:
            handle.remove()
        for weight, value in weights.items():
            weight.data.copy_(value)


def through(model: nn.Module, member: Example, block: str) -> list[tuple[Tensor, Tensor]]:
    """What entered and what left a block, call by call, in one forward."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((stream([args, kwargs]).detach().clone(), stream(output).detach().clone()))

    handle = model.get_submodule(block).register_forward_hook(hook, with_kwargs=True)
    args, kwargs = member.inputs(model)
    try:
        model(*args, **kwargs)
    finally:
        handle.remove()
    return seen


def alternatives(blocks: Iterable[ExpectedBlock]) -> Iterator[dict[str, float]]:
    """Zeros on one acceptable site per branch, until every acceptable site was used."""
    branches = [sites for block in blocks for sites in block.branches]
    for turn in range(max(map(len, branches))):
        yield {sites[min(turn, len(sites) - 1)]: 0.0 for sites in branches}


def test_names_are_unique_and_the_survey_is_covered() -> None:
    """Every entry of the data file has its model."""
    assert len(set(EXAMPLES)) == len(EXAMPLES)
    assert set(SURVEYED) == set(survey.entries())
    with pytest.raises(KeyError, match="no such animal"):
        example("no such animal")


@pytest.mark.parametrize("name", EXAMPLES)
def test_model_is_seeded_and_in_eval_mode(name: str) -> None:
    member = example(name)
    before = torch.random.get_rng_state()
    model, twin = member.build(), member.build()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if example(name).callable])
def test_model_returns_finite_numbers_on_inputs_that_are_always_the_same(name: str) -> None:
    member = example(name)
    model = built(name)
    args, kwargs = member.inputs(model)
    again = member.inputs(model)
    assert all(torch.equal(one, two) for one, two in zip(tensors([args, kwargs]), tensors(list(again)), strict=True))
    outputs = [output for output in tensors(model(*args, **kwargs)) if output.is_floating_point()]
    assert outputs
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("name", SURVEYED)
def test_parameters_have_the_surveyed_shapes(name: str) -> None:
    """The tiny model is the one that was surveyed."""
    parameters = dict(built(name).named_parameters(remove_duplicate=False))
    for pattern in survey.entries()[name]["blocks"]:
        for index in pattern["indices"]:
            for parameter, shape in pattern["params"].items():
                assert list(parameters[f"{pattern['list']}.{index}.{parameter}"].shape) == shape


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_sites_run_as_often_as_the_block(name: str) -> None:
    """Every acceptable site exists and fires once per call of its block."""
    member = example(name)
    model = built(name)
    sites = {site: block.calls for block in member.blocks for sites in block.branches for site in sites}
    args, kwargs = member.inputs(model)
    with scaled(model, dict.fromkeys(sites, 1.0)) as fired:
        model(*args, **kwargs)
    for site, calls in sites.items():
        assert site.startswith("param:") or fired[site] == calls, site


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", [name for name in WITH_BLOCKS if any(block.whole for block in example(name).blocks)])
def test_zero_sites_leave_no_branch(name: str) -> None:
    """With all sites at zero no matrix in a block has a gradient left: nothing was missed."""
    member = example(name)
    model = built(name)
    args, kwargs = member.inputs(model)
    inside = {
        f"{name}.{path}": parameter
        for block in member.blocks
        for name in block.modules
        if block.whole or name != block.name
        for path, parameter in model.get_submodule(name).named_parameters()
        if parameter.ndim >= 2 and parameter.requires_grad
    }
    for zeros in alternatives(member.blocks):
        zeroed = {model.get_parameter(site.removeprefix("param:")) for site in zeros if site.startswith("param:")}
        with scaled(model, zeros):
            output = next(value for value in tensors(model(*args, **kwargs)) if value.requires_grad)
            gradients = torch.autograd.grad(output.square().sum(), list(inside.values()), allow_unused=True)
        for (path, parameter), gradient in zip(inside.items(), gradients, strict=True):
            assert gradient is None or parameter in zeroed or not gradient.any(), (path, zeros)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", [name for name in WITH_BLOCKS if example(name).identity])
def test_zero_sites_make_the_block_the_identity(name: str) -> None:
    """With its sites at zero a block returns the stream, exactly."""
    member = example(name)
    model = built(name)
    for block in filter(lambda block: block.whole, member.blocks):
        for zeros in alternatives([block]):
            with scaled(model, zeros), torch.no_grad():
                calls = through(model, member, block.name)
            assert len(calls) == block.calls or not calls
            for entered, left in calls:
                assert torch.equal(entered, left.view_as(entered)), (block.name, zeros)


@pytest.mark.zoo
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", [name for name in WITH_BLOCKS if example(name).identity])
def test_every_site_scales_its_branch(name: str) -> None:
    """With the other branches at zero, what a block adds is proportional to the factor on this site, and not zero."""
    member = example(name)
    model = built(name)
    for block in filter(lambda block: block.whole, member.blocks):
        for sites in block.branches:
            others = {group[0]: 0.0 for group in block.branches if group is not sites}
            for site in sites:
                added = {}
                for factor in (1.0, 3.0):
                    with scaled(model, others | {site: factor}), torch.no_grad():
                        added[factor] = [left.view_as(into) - into for into, left in through(model, member, block.name)]
                for once, thrice in list(zip(added[1.0], added[3.0], strict=True))[:1]:
                    assert once.abs().max() > 1e-3, (block.name, site)
                    torch.testing.assert_close(thrice, 3 * once, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", [name for name in WITH_BLOCKS if not example(name).identity])
def test_every_site_changes_its_block(name: str) -> None:
    """Where a norm or a multiplier stands on the stream itself, every site still matters."""
    member = example(name)
    model = built(name)
    with torch.no_grad():
        for block in filter(lambda block: block.whole, member.blocks):
            (_, plain), *_ = through(model, member, block.name)
            for site in (site for sites in block.branches for site in sites):
                with scaled(model, {site: 0.0}):
                    (_, changed), *_ = through(model, member, block.name)
                assert (changed - plain).abs().max() > 1e-3, site


@pytest.mark.parametrize("name", WITH_MATRICES)
def test_matrices_belong_to_blocks(name: str) -> None:
    """Every matrix names a block and a branch that it has."""
    member = example(name)
    assert member.matrices is not None
    blocks = {block.name: block for block in member.blocks}
    for block, branches in member.matrices(built(name)).items():
        for kind, matrices in branches.items():
            assert getattr(blocks[block], kind) is not None
            assert matrices
            assert all(matrix.ndim == 2 and not matrix.requires_grad for matrix in matrices)


ATTENTION_NAMES = ("attn", "attention", "self_attn", "sa")


@pytest.mark.parametrize("name", [name for name in WITH_MATRICES if name != "latent_attention_norm"])
def test_attention_on_one_token_is_its_matrix(name: str) -> None:
    """A token that attends to itself only is multiplied by W_o · W_v."""
    member = example(name)
    assert member.matrices is not None
    model = built(name)
    x = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(0))
    for block, branches in member.matrices(model).items():
        found = [getattr(model.get_submodule(block.partition(" + ")[0]), key, None) for key in ATTENTION_NAMES]
        for attention in filter(None, found):
            arguments = 3 if isinstance(attention, nn.MultiheadAttention) else 1
            with torch.no_grad():
                one, two = (stream(attention(*[y] * arguments)) for y in x)
            torch.testing.assert_close(one - two, (x[0] - x[1]) @ branches["attention"][0].T, rtol=1e-4, atol=1e-4)
