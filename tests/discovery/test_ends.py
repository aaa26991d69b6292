"""The parameters at the end of a branch: scaling them does what a factor at the site does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from found import Found, Search
from site_factors import scaled
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from zoo import example, examples

from lightning_spectral import find_blocks
from lightning_spectral.records import Branch, End

FACTOR = 1.5
WIDTH = 16
FOUND = [member.name for member in examples() if not member.expected_refusal]
RUNNING = [member.name for member in examples() if member.name in FOUND and member.callable]

# Every branch of the zoo without ends: (model, site in its block) and the reason.
WITHOUT = {
    ("fnet", "fourier.self"): r"no weight follows the operation '_fft_c2c' at its end",
    ("wav2vec2", ""): r"no weight follows the operation 'gelu' at its end",
    ("spectral_norm_weights", "attn"): r"its last weight is parametrized \(.*attn\.c_proj\.parametrizations.*\)",
    ("spectral_norm_weights", "mlp"): r"its last weight is parametrized \(.*mlp\.c_proj\.parametrizations.*\)",
    ("weight_norm_weights", "attn"): r"its last weight is parametrized \(.*attn\.c_proj\.parametrizations.*\)",
    ("weight_norm_weights", "mlp"): r"its last weight is parametrized \(.*mlp\.c_proj\.parametrizations.*\)",
}

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Compiled code would not notice that hooks come and go."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def ends_scaled(model: nn.Module, branches: Sequence[Branch], factor: float) -> Iterator[None]:
    """Multiply the ends of branches, each parameter once."""
    ends = {end for branch in branches for end in branch.ends}
    before = {end: model.get_parameter(end.parameter).detach().clone() for end in ends}
    try:
        for end, content in before.items():
            model.get_parameter(end.parameter).data.copy_(factor * (end.offset + content) - end.offset)
        yield
    finally:
        for end, content in before.items():
            model.get_parameter(end.parameter).data.copy_(content)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "values"):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


def in_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_double(item) for key, item in value.items()}
    return type(value)(in_double(item) for item in value) if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def output_of(model: nn.Module, inputs: Any) -> Tensor:
    """Every number that the model returns."""
    args, kwargs = inputs
    outputs = tensors(model(*args, **kwargs))
    return torch.cat([tensor.double().flatten() for tensor in outputs if tensor.is_floating_point()])


def runs_in_double(found: Found) -> tuple[nn.Module, Any]:
    """The model and its inputs in float64, or as they are where it insists on float32."""
    model, inputs = found.member.build(), found.member.inputs(found.model)
    try:
        double = in_double(inputs)
        output_of(model.double(), double)
    except RuntimeError:
        return found.member.build(), inputs
    return model, double


def with_ends(found: Found) -> list[Branch]:
    return [branch for block in found.blocks for branch in block.branches if branch.ends]


@pytest.mark.zoo
@pytest.mark.parametrize("name", RUNNING)
def test_scaling_the_ends_is_a_factor_at_the_site(name: str, found: Search) -> None:
    """The obvious twin: a hook that multiplies what the site returns, branch by branch."""
    result = found(name)
    model, inputs = runs_in_double(result)
    plain = output_of(model, inputs)
    for branch in with_ends(result):
        with scaled(model, {branch: FACTOR}):
            expected = output_of(model, inputs)
        with ends_scaled(model, [branch], FACTOR):
            actual = output_of(model, inputs)
        assert (actual - expected).norm() <= 1e-5 * expected.norm(), branch
        assert (actual - expected).norm() <= 1e-2 * (actual - plain).norm() != 0, branch


@pytest.mark.parametrize("name", FOUND)
def test_every_branch_has_ends_or_a_listed_reason(name: str, found: Search) -> None:
    """A new refusal fails here; so does a listed one that is no longer made."""
    result = found(name)
    refused = {}
    for block in result.blocks:
        for branch in block.branches:
            assert bool(branch.ends) != bool(branch.ends_reason)
            assert len({end.parameter for end in branch.ends}) == len(branch.ends)
            if branch.ends_reason is not None:
                refused[name, branch.site.removeprefix(block.name).removeprefix(".")] = branch.ends_reason
    assert refused.keys() == {key for key in WITHOUT if key[0] == name}
    for key, reason in refused.items():
        assert re.fullmatch(WITHOUT[key], reason), reason


def test_the_table_names_only_what_there_is() -> None:
    """No model of the table has left the zoo."""
    assert {name for name, _ in WITHOUT} <= set(FOUND)


@pytest.mark.parametrize(
    ("name", "site", "ends"),
    [
        ("nanogpt", "mlp", {"mlp.c_proj.weight": 0.0, "mlp.c_proj.bias": 0.0}),
        ("llama", "self_attn", {"self_attn.o_proj.weight": 0.0}),
        ("gemma2", "post_feedforward_layernorm", {"post_feedforward_layernorm.weight": 1.0}),
        ("olmo2", "post_attention_layernorm", {"post_attention_layernorm.weight": 0.0}),
        ("plain_branch_post_norm", "ln_2", {"ln_2.weight": 0.0, "ln_2.bias": 0.0}),
        ("plain_layer_scale", "ls2", {"mlp.c_proj.weight": 0.0, "mlp.c_proj.bias": 0.0}),
        ("plain_rezero", "attn", {"attn.c_proj.weight": 0.0, "attn.c_proj.bias": 0.0}),
        ("gpt_oss", "mlp", {"mlp.experts.down_proj": 0.0, "mlp.experts.down_proj_bias": 0.0}),
        (
            "llama4_text",
            "feed_forward",
            {"feed_forward.experts.down_proj": 0.0, "feed_forward.shared_expert.down_proj.weight": 0.0},
        ),
        ("mamba", "mixer", {"mixer.out_proj.weight": 0.0}),
        ("rwkv", "feed_forward", {"feed_forward.value.weight": 0.0}),
        (
            "experts_modules_idle",
            "feed_forward",
            {
                f"feed_forward.{e}.w2.weight": 0.0
                for e in ("experts.0", "experts.1", "experts.2", "experts.3", "shared")
            },
        ),
        ("low_rank_updates", "mlp", {f"mlp.c_proj.{p}": 0.0 for p in ("base.weight", "base.bias", "lora_b.weight")}),
        ("albert", "ffn_output", {"ffn_output.weight": 0.0, "ffn_output.bias": 0.0}),
    ],
)
def test_the_ends_are_these(name: str, site: str, ends: dict[str, float], found: Search) -> None:
    """Bias included, ``1 + w`` seen, the matrix preferred to a multiplier, every expert there."""
    matches = [
        {end.parameter.removeprefix(f"{block.name}."): end.offset for end in branch.ends}
        for block in found(name).blocks
        for branch in block.branches
        if branch.site == f"{block.name}.{site}"
    ]
    assert ends in matches


@pytest.mark.parametrize("name", ["nanogpt", "gemma2", "plain_layer_scale", "gpt_oss", "experts_modules_idle"])
def test_branches_that_start_at_zero_have_the_same_ends(name: str, found: Search) -> None:
    """What is zero is verified with noise in its place."""
    result = found(name)
    model = result.member.build()
    with torch.no_grad():
        for branch in with_ends(result):
            for end in branch.ends:
                model.get_parameter(end.parameter).zero_()
    args, kwargs = result.member.inputs(model)
    assert find_blocks(model, batch=args or kwargs) == result.blocks


@pytest.mark.parametrize("name", ["nanogpt", "gemma2", "mixtral", "llama"])
def test_weights_that_are_not_finite_change_no_ends(name: str, found: Search) -> None:
    """A diverged first block speaks neither for itself nor for the others."""
    result = found(name)
    model = result.member.build()
    first = result.blocks[0].mlp
    assert first is not None
    with torch.no_grad():
        for factor in first.factors:
            if factor.parameter is not None:
                model.get_parameter(factor.parameter).fill_(torch.nan)
    args, kwargs = result.member.inputs(model)
    again = find_blocks(model, batch=args or kwargs)
    assert [branch.ends for block in again for branch in block.branches] == [
        branch.ends for block in result.blocks for branch in block.branches
    ]


@pytest.mark.parametrize("name", ["nanogpt", "gemma2", "mixtral", "gpt_oss", "dinov2"])
def test_half_precision_has_the_same_ends(name: str, found: Search) -> None:
    """Replays run in float64."""
    result = found(name)
    model = result.member.build().bfloat16()
    args, kwargs = result.member.inputs(model)
    kwargs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in kwargs.items()}
    again = find_blocks(model, batch=args or kwargs)
    assert [set(branch.ends) for block in again for branch in block.branches] == [
        set(branch.ends) for block in result.blocks for branch in block.branches
    ]


def test_hundreds_of_experts_are_no_depth() -> None:
    """Each is added to the sum of those before it."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(mlp(bias=False) for _ in range(128))

        def forward(self, x: Tensor) -> Tensor:
            tokens, rows = x.flatten(0, 1), torch.arange(4)
            total = torch.zeros_like(tokens)
            for expert in self.experts:
                total.index_add_(0, rows, expert(tokens[rows]))
            return total.view_as(x)

    assert len(mlp_branch(Block(Experts())).ends) == 128


class Mixer(nn.Module):
    """Attention in one head."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(query, key, value))


class Block(nn.Module):
    """A pre-norm block whose MLP is given; ``behind`` stands between the MLP and the stream."""

    def __init__(self, mlp: nn.Module, behind: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Mixer(), mlp
        self.behind = nn.Identity() if behind is None else behind

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.behind(self.mlp(self.norm_2(x)))


class Scale(nn.Module):
    """A multiplier per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH, bias=bias))


def mlp_branch(*blocks: nn.Module) -> Branch:
    """The MLP branch of the last of some blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(2, 5, WIDTH)
    found = find_blocks(nn.Sequential(*blocks), batch=x)[-1].mlp
    assert found is not None
    return found


def test_a_tied_weight_is_refused() -> None:
    """The same matrix in another block, behind another site."""
    first, second = Block(mlp()), Block(mlp())
    second.mlp[2].weight = first.mlp[2].weight
    branch = mlp_branch(first, second)
    assert branch.ends == ()
    assert branch.ends_reason == "its last weight 0.mlp.2.weight is also used elsewhere"


def test_a_weight_that_also_made_the_stream_is_refused() -> None:
    """Its first use lies in front of the blocks."""
    stem, block = nn.Linear(2 * WIDTH, WIDTH), Block(mlp())
    block.mlp[2].weight = stem.weight
    assert mlp_branch(nn.Linear(WIDTH, 2 * WIDTH), stem, block).ends_reason == (
        "its last weight 1.weight is also used elsewhere"
    )


def test_a_weight_tied_inside_its_branch_is_refused() -> None:
    """The MLP reads with the matrix that it writes with."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x @ self.weight.T) @ self.weight

    assert mlp_branch(Block(Tied())).ends_reason == "it is not proportional to 0.mlp.weight"


def test_a_slice_of_a_fused_weight_is_refused() -> None:
    """The other slice makes the hidden channels."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x @ self.both[0]) @ self.both[1]

    assert mlp_branch(Block(Fused())).ends_reason == "it is not proportional to 0.mlp.both"


def test_a_weight_whose_result_is_also_used_elsewhere_is_refused() -> None:
    """The next block reads what the MLP returned, beside the stream."""

    class Leaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.side = Block(mlp()), Block(mlp()), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            seen: list[Tensor] = []
            with self.first.mlp[2].register_forward_hook(lambda *args: seen.append(args[2])):
                x = self.first(x)
            return self.second(x) + self.side(seen[0]).relu().mean()

    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    branch = next(block.mlp for block in find_blocks(Leaking(), batch=x) if block.name.startswith("first"))
    assert branch is not None
    assert branch.ends_reason == "its last weight first.mlp.2.weight is also used elsewhere"


def test_a_parametrized_weight_is_refused() -> None:
    """Its effective value does not follow what is stored."""
    block = Block(mlp())
    spectral_norm(block.mlp[2])
    reason = mlp_branch(block).ends_reason
    assert reason == "its last weight is parametrized (0.mlp.2.parametrizations.weight.original)"


def test_a_weight_that_is_computed_from_its_parameter_is_refused() -> None:
    """Rounded weights are not proportional to what is stored."""

    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, torch.tanh(self.weight), self.bias)

    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), Rounded(WIDTH, WIDTH))
    reason = mlp_branch(Block(module)).ends_reason
    assert reason == "its last weight is computed from 0.mlp.2.weight by the operation 'tanh'"


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
        lambda: nn.RMSNorm(WIDTH, elementwise_affine=False),
        lambda: Lambda(lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
    ],
)
def test_a_norm_without_weights_is_refused(norm: Callable[[], nn.Module]) -> None:
    """It cancels every scale in front of it, and has none of its own."""
    branch = mlp_branch(Block(mlp(), norm()))
    assert branch.ends == ()
    assert branch.ends_reason == "a norm without weights stands behind it"


def test_a_multiplier_is_an_end_where_there_is_nothing_else() -> None:
    """Behind a norm without weights; behind a matrix that serves others; not behind a matrix of its own."""
    gamma = (End("0.behind.1.gamma"),)
    assert mlp_branch(Block(mlp(), nn.Sequential(nn.RMSNorm(WIDTH, elementwise_affine=False), Scale()))).ends == gamma
    first = Block(mlp(), nn.Sequential(nn.Identity(), Scale()))
    first.attention.out = first.mlp[2] = nn.Linear(2 * WIDTH, WIDTH)
    first.attention.qkv = nn.Linear(WIDTH, 6 * WIDTH)
    assert mlp_branch(first).ends == gamma
    assert set(mlp_branch(Block(mlp(), Scale())).ends) == {End("0.mlp.2.weight"), End("0.mlp.2.bias")}


def test_a_multiplier_as_large_as_the_data_is_no_end() -> None:
    """One token, and the multiplier written first."""

    class First(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return self.gamma * x

    x = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    branches = find_blocks(nn.Sequential(Block(mlp(), First())), batch=x)[0].branches
    assert {End("0.mlp.2.weight"), End("0.mlp.2.bias")} in [set(branch.ends) for branch in branches]


def test_a_constant_that_is_added_is_refused() -> None:
    """Nothing scales it."""
    reason = mlp_branch(Block(nn.Sequential(*mlp(), Lambda(lambda x: x + 0.5)))).ends_reason
    assert reason == "a constant is added to it"


def test_a_residual_scale_at_the_site_is_passed_over() -> None:
    """A learnable factor that a hook multiplies at the site leaves the ends as they are."""
    model, x = nn.Sequential(Block(mlp())), torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    before = find_blocks(model, batch=x)[0].attention
    site = model[0].attention
    site.residual_scale = nn.ParameterDict({"log_scale": nn.Parameter(torch.tensor(0.3))})
    site.register_forward_hook(lambda module, args, output: output * module.residual_scale["log_scale"].exp())
    after = find_blocks(model, batch=x)[0].attention
    assert before is not None
    assert after is not None
    assert (after.site, after.ends) == (before.site, before.ends)
    assert after.factors[0].parameter == "0.attention.residual_scale.log_scale"


def test_the_offset_of_a_gain_is_found() -> None:
    """``1 + w``, written in three ways."""

    class Gain(nn.Module):
        def __init__(self, gain: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.w, self.gain = nn.Parameter(torch.zeros(WIDTH)), gain

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain(self.w)

    for gain in (lambda w: 1 + w, lambda w: w + 1.0, lambda w: (1.0 + w.float()).unsqueeze(0)):
        assert mlp_branch(Block(mlp(), Gain(gain))).ends == (End("0.behind.w", 1.0),)


class Opaque(nn.Module):
    """A stack that discovery cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(*mlp(), nn.LayerNorm(WIDTH, bias=False))])

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("only on the mainframe")


@pytest.mark.parametrize(
    ("hint", "ends"),
    [
        ({"site": "2", "down": "2.weight", "up": "0.weight"}, {"2.weight": 0.0, "2.bias": 0.0}),
        ({"site": "3", "post_norm": "3.weight", "down": "2.weight", "up": "0.weight"}, {"3.weight": 0.0}),
        (
            {"site": "3", "post_norm": {"parameter": "3.weight", "layout": [["add", 1.0]]}, "down": "2.weight"},
            {"3.weight": 1.0},
        ),
        ({"site": "2", "down": {"parameter": "2.weight", "rows": [[0, 2]]}}, {}),
        ({"site": "2"}, {}),
    ],
)
def test_hints_bring_the_ends_that_they_name(hint: dict[str, Any], ends: dict[str, float]) -> None:
    """The norm behind the branch, or the first matrix, with the bias beside it."""
    branch = find_blocks(Opaque(), hints={"layers.*": {"mlp": hint}})[0].mlp
    assert branch is not None
    assert {end.parameter.removeprefix("layers.0."): end.offset for end in branch.ends} == ends
    assert (branch.ends_reason is None) == bool(ends)


def test_hints_keep_the_traced_ends_of_a_site() -> None:
    """Factors may differ; the site decides."""
    member = example("nanogpt")
    model = member.build()
    args, kwargs = member.inputs(model)
    traced = find_blocks(model, batch=args or kwargs)
    hints = {"transformer.h.*": {"mlp": {"site": "mlp", "down": "mlp.c_proj.weight", "up": "mlp.c_fc.weight"}}}
    hinted = find_blocks(model, batch=args or kwargs, hints=hints)
    assert [block.mlp and block.mlp.ends for block in hinted] == [block.mlp and block.mlp.ends for block in traced]
    moved = find_blocks(model, batch=args or kwargs, hints={"transformer.h.*": {"mlp": "mlp.c_proj"}})
    assert moved[0].mlp is not None
    assert {end.parameter for end in moved[0].mlp.ends} == {
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.0.mlp.c_proj.bias",
    }
