"""The factors that were found: an affine probe on the real model, the survey's own probe, and the known products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from found import Found, Search
from torch import Tensor, nn
from zoo import example, examples, survey
from zoo.gpt import MLP, Block, CausalSelfAttention, NanoGPT

from lightning_spectral import ResidualBlock, find_blocks
from lightning_spectral.measuring.linearize import linearize
from lightning_spectral.records import Branch, Factor, Path
from lightning_spectral.weights.model import ModelWeights

MATRICES = ("output", "value", "latent", "down", "up")
COMPUTED = ("spectral_norm_weights", "weight_norm_weights")  # their weights are results, not parameters
PROBED = [
    member.name
    for member in examples()
    if not member.expected_refusal and member.callable and member.name not in COMPUTED
]
GATED = (
    *("gated_separate", "gate_up", "up_gate", "gate_up_interleaved", "experts_out_in", "experts_looped"),
    "adapters_on_every_projection",
    *("experts_looped_idle", "experts_modules", "experts_modules_shared", "experts_modules_idle"),
    *("phi3", "exaone4", "seed_oss", "glm4", "granitemoehybrid", "phimoe"),
    *("palm_fused", "megatron", "x_transformers_values", "litgpt_grouped"),
)
# The output is not affine in a matrix with a norm behind it, nor in values that also make the mask.
BENT = {
    "bitnet": ("value", "up"),
    "gemma4_text": ("value",),
    "doge": ("value",),
    "x_transformers_values": ("value",),
    "normformer": ("output", "value"),
}

# What mixes the heads behind a softmax is part of the attention pattern.
PATTERN = {"vit_cait": ("attention.fn.behind",)}


class SeenError(Exception):
    """The branch was seen; the rest of the forward pass is of no interest."""


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Compiled code would not notice that hooks come and go."""
    with torch.compiler.set_stance("force_eager"):
        yield


def branch_output(result: Found, branch: Branch) -> Tensor:
    """The branch at its site in the first call; before the norm where the site is a norm behind the branch."""
    behind = result.member.norm_scheme in ("sandwich", "branchpost")
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        value = args[0] if behind else output
        caught.append(value if isinstance(value, Tensor) else value[branch.output_index])
        raise SeenError

    args, kwargs = result.member.inputs(result.model)
    site = result.model.get_submodule(branch.site)
    with site.register_forward_hook(catch), torch.no_grad(), pytest.raises(SeenError, match=r"^$"):
        result.model(*args, **kwargs)
    return caught[0].double()


def numbers(parameter: Tensor, factor: Factor) -> Tensor:
    """The entries of the stored parameter that a factor claims, as positions in it."""
    positions = torch.arange(parameter.numel()).view_as(parameter)
    for name, *arguments in factor.layout:
        if name not in ("add", "sub", "mul", "div"):
            positions = getattr(positions, name)(*arguments)
    assert positions.ndim == 2
    return positions if factor.rows is None else positions[[row for run in factor.rows for row in run]]


def claims(result: Found, branch: Branch) -> dict[str, dict[str, Tensor]]:
    """For each role and each parameter, the mask of what the branch claims of it, all experts together.

    The first, second, ... matrices of the adapters are claimed as ``"role+1"``, ``"role+2"``, ...
    """
    found: dict[str, dict[str, Tensor]] = {}

    def claim(role: str, factor: Factor) -> Tensor:
        parameter = result.model.get_parameter(str(factor.parameter))
        mask = found.setdefault(role, {}).setdefault(
            str(factor.parameter), torch.zeros(parameter.shape, dtype=torch.bool)
        )
        mask.view(-1)[numbers(parameter, factor).flatten()] = True
        return mask

    for factor in dict.fromkeys(factor for path in branch.paths for factor in path.factors):
        if factor.role in MATRICES and factor.parameter is not None:
            claim(factor.role, factor)
        for adapter in factor.adapters:
            first, *others = (item for item in adapter if item.role in MATRICES)
            # Where the branch reads a part of the rows, the matrices behind them feed the other rows as well.
            if claim(f"{factor.role}+1", replace(first, rows=factor.rows)).all():
                for number, item in enumerate(others, 2):
                    claim(f"{factor.role}+{number}", item)
    return found


@contextmanager
def multiplied(model: nn.Module, masks: dict[str, Tensor], factor: float) -> Iterator[None]:
    """Multiply parts of parameters."""
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    for name, mask in masks.items():
        model.get_parameter(name).data[mask] *= factor
    yield
    for name, content in before.items():
        model.get_parameter(name).data.copy_(content)


def bend(result: Found, branch: Branch, masks: dict[str, Tensor], once: Tensor) -> float | None:
    """How far the output at 0, 1 and -3 times the masked weights is from a straight line; ``None`` if it stays."""
    outputs = []
    for factor in (0.0, -3.0):
        with multiplied(result.model, masks, factor):
            outputs.append(branch_output(result, branch))
    zero, other = outputs
    if torch.equal(zero, once) and torch.equal(other, once):
        return None
    size = max(float((zero - once).abs().max()), float((other - once).abs().max()), 1e-6 * float(once.abs().max()))
    return float((other - (4 * zero - 3 * once)).abs().max()) / size


def one_of_each(blocks: Sequence[ResidualBlock]) -> list[Branch]:
    """The first branch of each make: the others are the same program."""
    makes: dict[tuple[object, ...], Branch] = {}
    for block in blocks:
        for branch in block.branches:
            roles = tuple((factor.role, (factor.parameter or "")[len(block.name) :]) for factor in branch.factors)
            if branch.paths and not branch.site.startswith("param:"):
                makes.setdefault((branch.site[len(block.name) :], branch.kind, roles), branch)
    return list(makes.values())


def bends(result: Found, branch: Branch, role: str) -> bool:
    """Whether the output is not affine in a factor: up without a gate, latents (they make keys too), and the table."""
    name = result.member.name
    if role == "up" and (not is_gated(name, branch.site) or "per_layer" in branch.site):
        return True
    return role == "latent" or role in BENT.get(name, ())


def parameters_of(model: nn.Module, path: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a module."""
    return list(model.get_submodule(path).named_parameters())


def is_gated(name: str, site: str) -> bool:
    """Whether the MLP at a site has a gate: by the survey's flags, or by the list above."""
    if name not in survey.entries():
        return name in GATED
    for pattern in survey.entries()[name]["blocks"]:
        if any(site.startswith(f"{pattern['list']}.{index}.") for index in pattern["indices"]):
            return not {"gated (separate)", "fused gate_up"}.isdisjoint(pattern["mlp_flags"])
    raise KeyError(site)


@pytest.mark.parametrize("name", PROBED)
def test_the_branch_is_affine_in_its_factors_and_in_nothing_else(name: str, found: Search) -> None:
    """Affine in value and output, in down always, in up iff the MLP is gated; bent by queries, keys, gates, routers."""
    result = found(name)
    for branch in one_of_each(result.blocks):
        once = branch_output(result, branch)
        claimed = claims(result, branch)
        for role, masks in claimed.items():
            straight = not bends(result, branch, role.split("+")[0])
            bent = bend(result, branch, masks, once)
            assert bent is not None, (branch.site, role)
            assert (bent < 1e-4) if straight else (bent > 1e-2), (branch.site, role, bent)
        known: dict[str, Tensor] = {}
        for masks in claimed.values():
            for parameter, mask in masks.items():
                known[parameter] = known.get(parameter, torch.zeros_like(mask)) | mask
        gains = {factor.parameter for path in branch.paths for factor in path.factors if factor.size is not None}
        block = next(block for block in result.blocks if branch in block.branches)
        inside = ((name, *item) for name in block.name.split(" + ") for item in parameters_of(result.model, name))
        for name, path, parameter in inside:
            full = f"{name}.{path}" if name else path
            rest = ~known.get(full, torch.zeros(parameter.shape, dtype=torch.bool))
            known_otherwise = full in gains or path in PATTERN.get(result.member.name, ())
            if parameter.ndim >= 2 and not known_otherwise and "bias" not in path and rest.any():
                bent = bend(result, branch, {full: rest}, once)
                assert bent is None or bent > 1e-3, (branch.site, full, bent)


@pytest.mark.parametrize(
    "name", [name for name in survey.entries() if example(name).norm_scheme not in ("sandwich", "branchpost")]
)
def test_the_factors_of_the_mlp_are_those_of_the_survey(name: str, found: Search) -> None:
    """What the survey saw the output affine in is claimed, in full or in the half that it names."""
    result = found(name)
    for block_name, parameters in survey.entries()[name].get("mlp_affine", {}).items():
        block = next(block for block in result.blocks if block.name == block_name)
        assert block.mlp is not None
        masks = {path: mask for role in claims(result, block.mlp).values() for path, mask in role.items()}
        for path, affine in parameters.items():
            full = f"{block_name}.{path}"
            if path.endswith("bias"):
                continue
            if affine is True:
                assert masks[full].all(), path
            elif isinstance(affine, str):
                dimension = int(affine.split("dim ")[1].rstrip(")"))
                first, second = masks[full].chunk(2, dim=dimension)
                assert second.all(), path
                assert not first.any(), path
            else:
                ups = [factor.parameter for factor in block.mlp.factors if factor.role == "up"]
                assert full not in masks or full in ups, path


@pytest.mark.parametrize("name", [member.name for member in examples() if member.matrices])
def test_the_product_of_the_factors_is_the_known_matrix(name: str, found: Search) -> None:
    """W_o · W_v and W_down · W_up, of every block and every expert."""
    result = found(name)
    assert result.member.matrices is not None
    blocks = {block.name: block for block in result.blocks}
    known = result.member.matrices(result.model)
    assert set(known) == set(blocks)
    for block_name, branches in known.items():
        for kind, matrices in branches.items():
            branch = getattr(blocks[block_name], kind)
            assert len(branch.paths) == len(matrices)
            for path, matrix in zip(branch.paths, matrices, strict=True):
                bare = Path(tuple(factor for factor in path.factors if factor.role in MATRICES))
                product = linearize(ModelWeights(result.model), bare, "circuit").operator.dense()
                torch.testing.assert_close(product, matrix.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["experts_looped", "mixtral", "experts_modules", "gpt_oss", "dbrx"])
def test_experts_are_numbered(name: str, found: Search) -> None:
    """Every expert once, those that no token reached included."""
    for block in found(name).blocks:
        assert block.mlp is not None
        assert [path.expert for path in block.mlp.paths] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["experts_modules_shared", "experts_modules_idle", "deepseek_v3", "qwen2_moe"])
def test_an_expert_that_always_runs_is_called_shared(name: str, found: Search) -> None:
    """It stands behind the routed ones."""
    last = found(name).blocks[-1]
    assert last.mlp is not None
    assert [path.expert for path in last.mlp.paths] == [0, 1, 2, 3, "shared"]


def test_a_dense_branch_has_one_path_and_no_expert(found: Search) -> None:
    """The MLP of a GPT is no mixture."""
    for block in found("nanogpt").blocks:
        assert [[path.expert for path in branch.paths] for branch in block.branches] == [[None], [None]]


def test_factors_read_from_the_site_back_to_the_stream(found: Search) -> None:
    """Scale, norm behind, matrices, norm before: the order of the matrix product."""

    def roles(name: str) -> tuple[list[str], list[str]]:
        block = found(name).blocks[0]
        assert block.attention is not None
        assert block.mlp is not None
        return [factor.role for factor in block.attention.factors], [factor.role for factor in block.mlp.factors]

    assert roles("nanogpt") == (["output", "value", "pre_norm"], ["down", "up", "pre_norm"])
    assert roles("gemma2") == (
        ["post_norm", "output", "value", "pre_norm"],
        ["post_norm", "down", "up", "pre_norm"],
    )
    assert roles("olmo2") == (["post_norm", "output", "value"], ["post_norm", "down", "up"])
    assert roles("plain_layer_scale") == (
        ["scale", "output", "value", "pre_norm"],
        ["scale", "down", "up", "pre_norm"],
    )
    assert roles("plain_two_alphas") == (["scale", "output", "value"], ["scale", "down", "up"])
    assert roles("deepseek_v3")[0] == ["output", "value", "inner_norm", "latent", "pre_norm"]
    assert roles("bitnet")[1] == ["down", "inner_norm", "up", "pre_norm"]
    assert roles("bert") == (["output", "value"], ["down", "up"])


def test_gains_are_read_as_they_act(found: Search) -> None:
    """1 + w where a family stores it so; no parameter where a norm has none; the constant of a residual multiplier."""

    def first(name: str, role: str) -> Factor:
        attention = found(name).blocks[0].attention
        assert attention is not None
        return next(factor for factor in attention.factors if factor.role == role)

    for name in ("gemma", "gemma2", "nemotron", "qwen3_next", "vaultgemma"):
        result = found(name)
        gain = next(
            factor
            for block in result.blocks
            for branch in block.branches
            for factor in branch.factors
            if factor.role == "pre_norm"
        )
        assert gain.layout == (("add", 1.0),)
    for name in ("llama", "gemma4_text", "gpt2"):
        assert first(name, "pre_norm").layout == ()
    for name in ("olmo", "nanochat", "plain_functional_norm"):
        assert first(name, "pre_norm") == Factor("pre_norm", None, size=32)
    assert math.isclose(first("granite", "scale").constant, found("granite").model.config.residual_multiplier)


class RootMeanSquare(nn.Module):
    """A norm written out, with a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class PostNorm(Block):
    """The norm stands on the stream, behind the add."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = RootMeanSquare(), RootMeanSquare()

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class Unnormed(nn.Module):
    """No norm at all; what leaves the block is halved."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.attn, self.mlp, self.factor = CausalSelfAttention(), MLP(), factor

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return (x + self.mlp(x)) * self.factor


class Multiplied(Block):
    """The branches are multiplied in every way that a constant or a parameter can multiply."""

    WAYS: ClassVar[dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], float]]] = {
        "alpha": (lambda block, x, y: torch.add(x, y, alpha=0.25), 0.25),
        "alpha in place": (lambda block, x, y: (x + 0).add_(y, alpha=-0.25), 0.25),
        "alpha of a difference": (lambda block, x, y: torch.sub(x, y, alpha=0.25), 0.25),
        "minus": (lambda block, x, y: x - 4 * y, 4.0),
        "divided by a number": (lambda block, x, y: x + y / 4, 0.25),
        "divided by a constant": (lambda block, x, y: x + y / torch.tensor(4.0), 0.25),
        "times a constant": (lambda block, x, y: torch.tensor(4.0) * y + x, 4.0),
        "divided by a parameter": (lambda block, x, y: x + y / block.four, 0.25),
        "times a parameter": (lambda block, x, y: x + y.mul(block.four), 4.0),
        "times a function of a parameter": (lambda block, x, y: x + y * (block.four / 8).tanh(), math.tanh(0.5)),
        "divided by a gain": (lambda block, x, y: x + y / block.fours, 0.25),
        "times a constant vector": (lambda block, x, y: x + y * torch.full((32,), 4.0), 4.0),
        "twice": (lambda block, x, y: torch.add(x, (y * 3) / block.four, alpha=2), 1.5),
        "interpolated": (lambda block, x, y: torch.lerp(x, y, 0.25), 0.25),
        "interpolated from the branch": (lambda block, x, y: torch.lerp(y, x, 0.25), 0.75),
        "interpolated in place": (lambda block, x, y: (x + 0).lerp_(y, 0.25), 0.25),
        "interpolated by a parameter": (lambda block, x, y: torch.lerp(x, y, block.four), 4.0),
        "fused with a gain": (lambda block, x, y: torch.addcmul(x, y, block.fours, value=0.5), 2.0),
        "fused with a gain in place": (lambda block, x, y: (x + 0).addcmul_(block.fours, y), 4.0),
        "fused with a divisor": (lambda block, x, y: torch.addcdiv(x, y, block.fours, value=2), 0.5),
    }

    def __init__(self, way: str = "minus") -> None:
        super().__init__()
        self.way = way
        self.four, self.fours = nn.Parameter(torch.tensor(4.0)), nn.Parameter(torch.full((32,), 4.0))

    def forward(self, x: Tensor) -> Tensor:
        add = self.WAYS[self.way][0]
        x = add(self, x, self.attn(self.ln_1(x)))
        return add(self, x, self.mlp(self.ln_2(x)))


@pytest.mark.parametrize("way", Multiplied.WAYS)
def test_every_multiplier_of_a_branch_is_a_factor(way: str) -> None:
    """The norm is that of the matrices times the size of what multiplies the branch."""
    model = NanoGPT(lambda: Multiplied(way), layers=2).eval()
    for block in find_blocks(model):
        assert block.verified, block.evidence
        for branch in block.branches:
            bare = Path(tuple(factor for factor in branch.paths[0].factors if factor.role != "scale"))
            with_scale, without = (
                torch.linalg.matrix_norm(linearize(ModelWeights(model), path, "circuit").operator.dense(), 2)
                for path in (branch.paths[0], bare)
            )
            assert float(with_scale / without) == pytest.approx(Multiplied.WAYS[way][1], rel=1e-6)


class Multiplier(nn.Module):
    """A linear layer that multiplies its product while it adds the bias."""

    WAYS: ClassVar[dict[str, tuple[Callable[[Any, Tensor], Tensor], float]]] = {
        "alpha of a sum": (lambda layer, x: torch.add(layer.bias, x @ layer.weight.T, alpha=0.25), 0.25),
        "alpha of a difference": (lambda layer, x: torch.sub(layer.bias, x @ layer.weight.T, alpha=0.25), 0.25),
        "with itself": (lambda layer, x: torch.add(y := x @ layer.weight.T, y, alpha=0.5), 1.5),
        "alpha of a product": (
            lambda layer, x: torch.addmm(layer.bias, x.flatten(0, 1), layer.weight.T, alpha=0.25).view_as(x),
            0.25,
        ),
        "beta of a product": (
            lambda layer, x: torch.addmm(layer.bias, x.flatten(0, 1), layer.weight.T, beta=0.25).view_as(x),
            1.0,
        ),
    }

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.weight, self.bias = way, nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.WAYS[self.way][0](self, x)


@pytest.mark.parametrize("way", Multiplier.WAYS)
def test_what_multiplies_a_product_inside_a_branch_is_a_factor(way: str) -> None:
    """Fused additions have factors of their own."""
    model = NanoGPT(layers=1).double().eval()
    attention = model.transformer["h"][0].attn
    attention.c_proj = Multiplier(way).double()
    factors = find_blocks(model)[0].branches[0].factors
    values = next(factor for factor in factors if factor.role == "value")
    product = linearize(
        ModelWeights(model), Path(tuple(factor for factor in factors if factor.role != "pre_norm")), "circuit"
    )
    assert values.rows == (range(64, 96),)
    torch.testing.assert_close(
        product.operator.dense().abs(),
        (Multiplier.WAYS[way][1] * attention.c_proj.weight @ attention.c_attn.weight[64:]).detach().abs(),
    )


def test_a_multiplier_that_nobody_owns_is_a_reason() -> None:
    """A vector made in the forward cannot be read again later: no norm rather than a wrong one."""

    class Ramp(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x)) * torch.linspace(0.5, 2.0, 32)

    for block in find_blocks(NanoGPT(Ramp).eval()):
        assert block.mlp is not None
        assert block.mlp.reason == "it is multiplied by a tensor that belongs to no parameter and no buffer"


class ScaledEmbedding(NanoGPT):
    """The stream starts eight times as large as the embedding."""

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer["wte"](idx) * 8.0
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(x)


@pytest.mark.parametrize(
    "model",
    [NanoGPT(PostNorm), NanoGPT(Unnormed), ScaledEmbedding(lambda: Unnormed(1.0)), ScaledEmbedding(PostNorm)],
    ids=["post-norm written out", "halved stream", "scaled embedding", "both"],
)
def test_what_multiplies_the_stream_is_no_factor_of_a_branch(model: nn.Module) -> None:
    """A gain behind the last add, or a constant on the stream, multiplies the skip as well: it is not the branch's."""
    for block in find_blocks(model.eval()):
        roles = [[factor.role for factor in branch.factors] for branch in block.branches]
        assert roles == [["output", "value"], ["down", "up"]]
