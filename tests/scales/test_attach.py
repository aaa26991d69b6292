"""Residual scales on every architecture: nothing changes at first, then exactly the branch is multiplied."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from found import built
from tiny_run import TinyGPT
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only
from zoo import Example, example, examples

from lightning_spectral import RandomizedSVD, ResidualBlock, attach_scales, find_blocks, fuse_scales, measure
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.scales.attach import ResidualScale
from lightning_spectral.weights.names import absolute_path, relative_path
from lightning_spectral.weights.scaled import log_scale_tensor

MEMBERS = [
    member.name
    for member in examples()
    if not member.expected_refusal and not member.needs_process_group and member.callable
]
# Nothing linear stands at the end of some branch: a transform without weights, a parametrized weight, an activation.
UNFUSABLE = {"fnet", "spectral_norm_weights", "weight_norm_weights", "wav2vec2"}


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler():
    """Code that was compiled for the models of another test knows nothing of hooks."""
    torch.compiler.reset()


def prepared(name: str) -> tuple[Example, nn.Module, tuple[ResidualBlock, ...]]:
    return example(name), *built(name)


def outputs(member: Example, model: nn.Module) -> list[Tensor]:
    args, kwargs = member.inputs(model)
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def in_float64(member: Example, model: nn.Module) -> Callable[[nn.Module], list[Tensor]] | None:
    """Return how to run the model in float64, where its kernels can; rounding hides nothing there."""
    args, kwargs = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, member.inputs(model))

    def run(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]

    try:
        found = run(copy.deepcopy(model).double())
    except RuntimeError:
        return None
    return run if all(leaf.dtype != torch.float32 for leaf in found) else None


def disturb(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.fill_(0.2 * (number % 4) - 0.3)


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, wanted, strict=True):
        if a.is_floating_point():
            assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-9)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
@pytest.mark.parametrize("name", MEMBERS)
def test_attaching_changes_no_bit_and_the_scales_are_found_measured_and_trained(name: str):
    member, model, blocks = prepared(name)
    before, plain = outputs(member, model), measure(model, blocks)
    scales = attach_scales(model, blocks)
    assert len(scales) == len({branch.site for block in blocks for branch in block.branches})
    assert all(map(torch.equal, outputs(member, model), before))

    disturb(scales.parameters())
    args, kwargs = member.inputs(model)
    again = find_blocks(model, batch=args or kwargs)
    places = [[(branch.kind, branch.site, branch.output_index) for branch in block.branches] for block in blocks]
    assert [[(branch.kind, branch.site, branch.output_index) for branch in block.branches] for block in again] == places

    for known, late in zip(measure(model, blocks), measure(model, again), strict=True):
        first = plain.layers[known.index]
        for branch in ("mlp", "attention"):
            norm, scale = getattr(known, f"{branch}_norm"), getattr(known, f"{branch}_scale")
            assert (
                (norm is None)
                == (getattr(first, f"{branch}_norm") is None)
                == (getattr(late, f"{branch}_norm") is None)
            )
            if norm is not None:
                alone = len(getattr(blocks[known.index], f"{branch}_branches")) == 1
                assert not alone or norm == pytest.approx(scale * getattr(first, f"{branch}_norm"), rel=1e-2)
                assert norm == pytest.approx(getattr(late, f"{branch}_norm"), rel=1e-2)

    model.zero_grad()
    leaves = [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    torch.stack([leaf.float().square().mean() for leaf in leaves]).sum().backward()
    assert all(parameter.grad is not None for parameter in scales.parameters())


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in MEMBERS if name in UNFUSABLE])
def test_scales_that_no_weight_can_take_are_refused_and_all_stay(name: str):
    member, model, blocks = prepared(name)
    disturb(attach_scales(model, blocks).parameters())
    wanted = outputs(member, model)
    with pytest.raises(ConfigurationError, match=r"cannot be folded into weights, so none was: .*\(scale "):
        fuse_scales(model)
    assert_close(outputs(member, model), wanted, 0.0)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in UNFUSABLE])
def test_fused_scales_leave_the_plain_model(name: str):
    member, model, blocks = prepared(name)
    keys = set(model.state_dict())
    run, tolerance = in_float64(member, member.build()), 1e-6
    if run is None:  # in float32, rounding grows on the way through the model
        run, tolerance = functools.partial(outputs, member), 1e-5
    else:
        model.double()
    disturb(attach_scales(model, blocks).parameters())
    wanted, state = run(model), copy.deepcopy(model.state_dict())
    fused = fuse_scales(state)
    assert any(key.endswith("log_scale") for key in state)  # the given state dict is left alone
    assert fuse_scales(model) is model
    assert set(model.state_dict()) == keys
    assert not [module for module in model.modules() if isinstance(module, ResidualScale)]
    assert_close(run(model), wanted, tolerance)  # relative to the largest output

    plain = member.build().to(model.state_dict()[next(iter(keys))].dtype)
    plain.load_state_dict(fused, strict=True)
    assert_close(run(plain), wanted, tolerance)


def small(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return TinyGPT()


IDS = torch.arange(8)[None]


def test_attaching_twice_is_attaching_once():
    model = small()
    first = attach_scales(model)
    disturb(first.parameters())
    second = attach_scales(model, learnable=False)
    assert list(map(id, first.parameters())) == list(map(id, second.parameters()))
    assert second.blocks == first.blocks
    hooks = [module for module in model.modules() if module._forward_hooks]
    assert len(hooks) == len(first) == 6


def test_a_scale_multiplies_its_branch_once_even_where_the_site_calls_all_its_children():
    model = small()  # the MLP is an nn.Sequential, which calls whatever is added to it
    block = model.get_submodule("blocks.1")
    x = torch.randn(2, 8, 16)
    branch = block.mlp(x)
    scales = attach_scales(model)
    with torch.no_grad():
        dict(scales.named_parameters())["blocks.1.mlp"].fill_(math.log(3.0))
    torch.testing.assert_close(block.mlp(x), 3 * branch)


def test_a_scale_is_a_parameter_of_shape_one_whose_zero_is_the_identity():
    model = small()
    scales = attach_scales(model)
    names = [name for name, _ in model.named_parameters() if name.endswith("residual_scale.log_scale")]
    assert len(names) == len(scales) == 6
    assert all(parameter.shape == (1,) and parameter.item() == 0.0 for parameter in scales.parameters())
    disturb(scales.parameters())
    for module in model.modules():
        if isinstance(module, ResidualScale):
            module.reset_parameters()
    assert all(parameter.item() == 0.0 for parameter in scales.parameters())


def test_materializing_from_the_meta_device_means_identity():
    blocks = find_blocks(small())
    with torch.device("meta"):
        model = small()
    scales = attach_scales(model, blocks)
    assert all(parameter.is_meta for parameter in scales.parameters())
    model.to_empty(device="cpu")
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    assert all(parameter.item() == 0.0 for parameter in scales.parameters())


def test_scales_that_do_not_learn_have_no_gradient_and_those_of_frozen_branches_never_learn():
    model = small()
    assert not any(parameter.requires_grad for parameter in attach_scales(model, learnable=False).parameters())
    model = small()
    for parameter in model.get_submodule("blocks.0.mlp").parameters():
        parameter.requires_grad_(False)
    learns = {site: parameter.requires_grad for site, parameter in attach_scales(model).named_parameters()}
    assert learns == {site: site != "blocks.0.mlp" for site in learns}


class LowRank(nn.Module):
    """A linear layer with a frozen weight and a trainable update of low rank, as fine-tuning libraries make it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)
        nn.init.normal_(self.b.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def test_a_branch_with_adapters_on_frozen_weights_is_scaled_as_a_whole():
    model = small()
    for block in model.get_submodule("blocks"):
        block.attention.proj = LowRank(block.attention.proj)
    model.eval()
    scales = attach_scales(model)
    wanted = model(IDS)
    assert measure(model, scales.blocks).layers[0].attention_reason is None
    disturb(scales.parameters())
    scaled = model(IDS)
    assert not torch.allclose(scaled, wanted, rtol=1e-2)
    torch.testing.assert_close(fuse_scales(model)(IDS), scaled)


def test_copies_follow_their_own_scales():
    model = small().eval()
    scales = attach_scales(model)
    disturb(scales.parameters())
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    wanted = model(IDS)
    with torch.no_grad():
        for parameter in scales.parameters():
            parameter.zero_()
    for twin in twins:
        assert torch.equal(twin(IDS), wanted)
        assert not torch.equal(model(IDS), wanted)


def test_an_averaged_copy_averages_the_scales():
    model = small()
    scales = attach_scales(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    disturb(scales.parameters())
    average.update_parameters(model)
    mean = [parameter.clone() for parameter in scales.parameters()]
    with torch.no_grad():
        for parameter in scales.parameters():
            parameter.zero_()
    average.update_parameters(model)
    found = [module.log_scale for module in average.modules() if isinstance(module, ResidualScale)]
    assert sorted(scale.item() for scale in found) == pytest.approx(sorted(value.item() / 2 for value in mean))


def test_a_plain_checkpoint_is_a_checkpoint_with_identity_scales():
    plain, model = small(), small()
    scales = attach_scales(model)
    disturb(scales.parameters())
    assert str(model.load_state_dict(plain.state_dict(), strict=True)) == "<All keys matched successfully>"
    assert all(parameter.item() == 0.0 for parameter in scales.parameters())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*residual_scale\.log_scale"):
        plain.load_state_dict(model.state_dict())


def test_a_plain_checkpoint_fits_where_only_a_weight_can_be_scaled():
    member, model, blocks = prepared("plain_functional_params")
    plain = copy.deepcopy(model)
    scales = attach_scales(model, blocks)
    disturb(scales.parameters())
    model.load_state_dict(plain.state_dict(), strict=True)
    assert_close(outputs(member, model), outputs(member, plain), 0.0)
    assert measure(model, blocks) == measure(plain, blocks)


def test_the_dtype_of_the_branch_stays():
    for dtype in (torch.bfloat16, torch.float64):
        model = small().to(dtype)
        blocks = find_blocks(small())
        x = torch.randn(2, 8, 16, dtype=dtype)
        block = model.get_submodule("blocks.0")
        wanted = block(x)
        scales = attach_scales(model, blocks)
        assert torch.equal(block(x), wanted)
        disturb(scales.parameters())
        assert block(x).dtype == dtype
    model = small()
    scales = attach_scales(model)
    disturb(scales.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.get_submodule("blocks.0.mlp")(torch.randn(2, 8, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize("index", [1, "branch"])
def test_the_branch_is_multiplied_inside_whatever_the_site_returns(index: int | str):
    import collections

    pair = collections.namedtuple("pair", "weights branch")
    output: Any = (
        pair(torch.ones(2), torch.ones(3)) if index == 1 else {"weights": torch.ones(2), "branch": torch.ones(3)}
    )
    scale = ResidualScale(index)
    nn.init.constant_(scale.log_scale, math.log(2.0))
    result = scale.scaled(output)
    assert type(result) is type(output)
    assert torch.equal(result[0] if index == 1 else result["weights"], torch.ones(2))
    torch.testing.assert_close(result[index].detach(), torch.full((3,), 2.0))
    assert torch.equal(output[index], torch.ones(3))  # the site's own output is left alone
    plain = scale.scaled([torch.ones(2), torch.ones(3)]) if index == 1 else None
    assert plain is None or isinstance(plain, list)


def test_a_site_with_another_child_of_that_name_is_refused():
    model = small()
    model.get_submodule("blocks.0.attention").residual_scale = nn.Identity()
    with pytest.raises(
        ConfigurationError, match=r"blocks\.0\.attention\.residual_scale exists already and is no residual"
    ):
        attach_scales(model)


def test_blocks_of_another_model_are_refused():
    with pytest.raises(
        ConfigurationError, match=r"the model has no 'blocks\.0\.attention': pass blocks that were found in this"
    ):
        attach_scales(nn.Linear(2, 2), find_blocks(small()))


def test_blocks_whose_self_check_failed_get_no_scale_unless_they_are_passed():
    member, model, blocks = prepared("zaya")
    args, _ = member.inputs(model)
    doubtful = {block.name for block in blocks if not block.verified}
    assert doubtful
    model.example_input_array = args or member.inputs(model)[1]
    with pytest.warns(UserWarning, match=rf"{len(doubtful)} block\(s\) get no residual scale.*self-check failed"):
        scales = attach_scales(model)
    assert (
        not {block.name for block in scales.blocks for branch in block.branches if has_scale(model, branch)} & doubtful
    )
    assert len(attach_scales(model, blocks)) > len(doubtful)


class ByFunction(nn.Module):
    """A block whose MLP is no module, and ends in a weight and a bias: nothing there can be multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), TinyGPT().blocks[0].attention
        self.up, self.down = (nn.Parameter(torch.randn(*shape) / 4) for shape in ((32, 16), (16, 32)))
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + functional.linear(functional.gelu(functional.linear(self.norm(x), self.up)), self.down, self.bias)


def test_found_branches_that_cannot_be_scaled_are_left_out_and_named_and_passed_ones_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(ByFunction(), ByFunction())
    model.example_input_array = torch.randn(2, 5, 16)
    before = list(model.state_dict())
    with pytest.raises(ConfigurationError, match=r"no module carries the branch of 'param:0\.down'.*\(0\.bias\)"):
        attach_scales(model, find_blocks(model))
    assert list(model.state_dict()) == before
    with pytest.warns(UserWarning, match=r"2 branch\(es\) get no residual scale: no module carries.*0\.bias.*1\.bias"):
        scales = attach_scales(model)
    assert dict(scales.named_parameters()).keys() == {"0.attention", "1.attention"}


def has_scale(model: nn.Module, branch: Any) -> bool:
    return log_scale_tensor(model, branch) is not None


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_is_refused_unless_its_scales_came_first():
    from torch.distributed.fsdp import fully_shard

    model = small()
    blocks = find_blocks(model)
    late, early = copy.deepcopy(model), model
    scales = attach_scales(early, blocks)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for item in (late, early):
        fully_shard(item, mesh=mesh)
    assert len(attach_scales(early, blocks)) == len(scales)
    with pytest.raises(
        ConfigurationError, match=r"sharded already.*attach_scales\(model\) in configure_model, before fully"
    ):
        attach_scales(late, blocks)


def test_paths_are_relative_to_the_site_and_hold_inside_any_wrapper():
    for site, parameter, relative in (
        ("layers.0.mlp", "layers.0.mlp.down.weight", ".down.weight"),
        ("layers.0.dropout", "layers.0.linear.weight", "..linear.weight"),
        ("a.b.c", "d.weight", "....d.weight"),
        ("", "down.weight", ".down.weight"),
        ("norm", "norm.weight", ".weight"),
        ("a", "a", "..a"),
    ):
        assert relative_path(site, parameter) == relative
        assert absolute_path(site, relative) == parameter
        assert absolute_path(f"model.{site}".rstrip("."), relative) == f"model.{parameter}"


def test_a_norm_behind_the_branch_takes_the_scale_into_its_gain():
    for name, offset in (("gemma2", 1.0), ("olmo2", 0.0)):
        _, model, blocks = prepared(name)
        scales = attach_scales(model, blocks)
        site = blocks[0].mlp.site
        gain = model.get_parameter(f"{site}.weight")
        before = gain.detach().clone()
        with torch.no_grad():
            dict(scales.named_parameters())[site].fill_(math.log(2.0))
        fuse_scales(model)
        torch.testing.assert_close(model.get_parameter(f"{site}.weight") + offset, 2 * (before + offset))


class Weightless(nn.Module):
    """A block whose MLP ends in a norm without gain."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.norm2(self.mlp(x))


def test_nothing_is_fused_where_one_scale_cannot_be():
    torch.manual_seed(0)
    model = nn.Sequential(Weightless(), Weightless()).eval()
    x = torch.randn(2, 5, 16)
    blocks = find_blocks(model, batch=x)
    scales = attach_scales(model, blocks)
    disturb(scales.parameters())
    wanted, state = model(x), copy.deepcopy(model.state_dict())
    for target in (model, state):
        with pytest.raises(
            ConfigurationError, match=r"2 residual scale\(s\) cannot be folded.*0\.norm2 .*1\.norm2 "
        ) as info:
            fuse_scales(target)
        assert "norm" in str(info.value)
    assert torch.equal(model(x), wanted)
    with torch.no_grad():
        for site, parameter in scales.named_parameters():
            if site.endswith("norm2"):
                parameter.zero_()  # the identity needs no weight
    wanted = model(x)
    torch.testing.assert_close(fuse_scales(model)(x), wanted)


def test_a_state_dict_that_lost_its_recipe_is_refused():
    model = small()
    disturb(attach_scales(model).parameters())
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("_extra_state")}
    with pytest.raises(
        ConfigurationError, match=r"residual_scale\._extra_state, which says what to fold it into: fuse the"
    ):
        fuse_scales(state)


def test_a_state_dict_is_fused_under_any_prefix():
    model = small().eval()
    disturb(attach_scales(model).parameters())
    outer = nn.ModuleDict({"module": nn.ModuleDict({"model": model})})
    wanted = model(IDS)
    fused = fuse_scales(outer.state_dict())
    plain = nn.ModuleDict({"module": nn.ModuleDict({"model": small()})})
    plain.load_state_dict(fused, strict=True)
    torch.testing.assert_close(plain["module"]["model"].eval()(IDS), wanted)
    inner = fuse_scales({key.removeprefix("blocks."): value for key, value in model.blocks.state_dict().items()})
    blocks = small().blocks
    blocks.load_state_dict(inner, strict=True)


def test_the_state_dict_holds_tensors_only_and_loads_without_code(tmp_path):
    model = small()
    attach_scales(model)
    assert all(isinstance(value, Tensor) for value in model.state_dict().values())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    small().load_state_dict(fuse_scales(state), strict=True)


def test_the_warm_start_of_a_measurement_survives_a_move_of_the_scales():
    model = small()
    scales = attach_scales(model)
    solver = RandomizedSVD()
    before = measure(model, scales.blocks, solver=solver)
    disturb(scales.parameters())
    after = measure(model, scales.blocks, solver=solver)
    for first, second in zip(before, after, strict=True):
        assert second.mlp_norm == pytest.approx(first.mlp_norm * second.mlp_scale, rel=2e-3)
        assert second.attention_norm == pytest.approx(first.attention_norm * second.attention_scale, rel=2e-3)
