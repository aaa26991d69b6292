"""Both linearizations of every surveyed architecture, against the same products taken by hand from named parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from found import search
from torch import Tensor, nn
from zoo import survey
from zoo.example import HEADS

from lightning_spectral import ResidualBlock
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.measuring.linearize import linearize, linearize_kind
from lightning_spectral.records import Branch, Factor, Path
from lightning_spectral.weights.model import ModelWeights

Fused = Literal["no", "last", "per head"]


@dataclass(frozen=True)
class Names:
    """Where an architecture keeps its factors, relative to the block; ``.weight`` is added where it is a module.

    ``fused``: the value rows of ``v`` are all rows, the last ones, or the last third of each head's rows. ``v`` may be
    two modules whose heads stand one behind the other, ``"first|second"``.
    """

    o: str = "self_attn.o_proj"
    v: str = "self_attn.v_proj"
    fused: Fused = "no"
    down: str = "mlp.down_proj"
    up: str = "mlp.up_proj"
    second_half: bool = False
    experts: str = "mlp.experts"
    n1: str | None = "input_layernorm"
    n2: str | None = "post_attention_layernorm"
    post: tuple[str, str] | None = None
    scale: tuple[str, str] | float | None = None
    one_plus: bool = False
    transposed: bool = False


LLAMA = Names()
GEMMA2 = replace(
    LLAMA,
    n2="pre_feedforward_layernorm",
    post=("post_attention_layernorm", "post_feedforward_layernorm"),
    one_plus=True,
)
OLMO2 = replace(GEMMA2, n1=None, n2=None, one_plus=False)
NEOX = Names("attention.dense", "attention.query_key_value", "per head", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h")
NANO = Names("attn.c_proj", "attn.c_attn", "last", "mlp.c_proj", "mlp.c_fc", n1="ln_1", n2="ln_2")
OPT = Names(
    "self_attn.out_proj", "self_attn.v_proj", "no", "fc2", "fc1", n1="self_attn_layer_norm", n2="final_layer_norm"
)
BERT = Names(
    "attention.output.dense", "attention.self.value", "no", "output.dense", "intermediate.dense", n1=None, n2=None
)
VIT = Names(
    "attention.o_proj", "attention.v_proj", "no", "mlp.fc2", "mlp.fc1", n1="layernorm_before", n2="layernorm_after"
)
TORCH = Names("self_attn.out_proj", "self_attn.in_proj_weight", "last", "linear2", "linear1", n1="norm1", n2="norm2")
FALCON = replace(NEOX, o="self_attention.dense", v="self_attention.query_key_value")

ARCHITECTURES: dict[str, Names] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3", "ernie4_5", "helium", "diffllama", "doge"), LLAMA
    ),
    **dict.fromkeys(("arcee", "bitnet", "stablelm", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss"), LLAMA),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), LLAMA),
    **dict.fromkeys(("gemma", "nemotron", "qwen3_next", "qwen3_5_text"), replace(LLAMA, one_plus=True)),
    **dict.fromkeys(("olmo", "hrm_text"), replace(LLAMA, n1=None, n2=None)),
    **dict.fromkeys(("cohere", "cohere2", "stablelm_parallel"), replace(LLAMA, n2="input_layernorm")),
    "starcoder2": replace(LLAMA, down="mlp.c_proj", up="mlp.c_fc"),
    "apertus": replace(LLAMA, n1="attention_layernorm", n2="feedforward_layernorm"),
    "nanochat": replace(LLAMA, down="mlp.fc2", up="mlp.fc1", n1=None, n2=None),
    "phi": replace(LLAMA, o="self_attn.dense", down="mlp.fc2", up="mlp.fc1", n2="input_layernorm"),
    "granite": replace(LLAMA, scale=0.22),
    "granitemoe": replace(LLAMA, scale=0.22, experts="block_sparse_moe.experts"),
    # The residual is taken behind the norm: its gain is the stream's, not the branch's.
    "minimax": replace(LLAMA, scale=1.25, n1=None, n2=None),
    "glm": replace(LLAMA, up="mlp.gate_up_proj", second_half=True),
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gemma4_text": replace(GEMMA2, one_plus=False),
    "vaultgemma": replace(GEMMA2, post=None),
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "persimmon": replace(NEOX, o="self_attn.dense", v="self_attn.query_key_value"),
    "llama4_text": replace(
        LLAMA, down="feed_forward.down_proj", up="feed_forward.up_proj", experts="feed_forward.experts"
    ),
    "jamba": replace(
        LLAMA,
        down="feed_forward.down_proj",
        up="feed_forward.up_proj",
        experts="feed_forward.experts",
        n2="pre_ff_layernorm",
    ),
    "bamba": replace(LLAMA, down="feed_forward.down_proj", up="feed_forward.up_proj", n2="pre_ff_layernorm"),
    "lfm2": replace(OPT, down="feed_forward.w2", up="feed_forward.w3", n1="operator_norm", n2="ffn_norm"),
    "gpt_neox": NEOX,
    "gpt_neox_seq": NEOX,
    "falcon_7b": replace(FALCON, fused="last", n2="input_layernorm"),
    "falcon_rw": FALCON,
    "gpt2": replace(NANO, transposed=True),
    "openai-gpt": replace(NANO, transposed=True, n1=None, n2=None),
    "gpt_bigcode": NANO,
    "gpt_bigcode_mha": replace(NANO, fused="per head"),
    "gpt_neo": replace(NANO, o="attn.attention.out_proj", v="attn.attention.v_proj", fused="no"),
    "gptj": Names("attn.out_proj", "attn.v_proj", "no", "mlp.fc_out", "mlp.fc_in", n1="ln_1", n2="ln_1"),
    "mpt": Names("attn.out_proj", "attn.Wqkv", "last", "ffn.down_proj", "ffn.up_proj", n1="norm_1", n2="norm_2"),
    "dbrx": Names(
        "norm_attn_norm.attn.out_proj",
        "norm_attn_norm.attn.Wqkv",
        "last",
        experts="ffn.experts.mlp",
        n1="norm_attn_norm.norm_1",
        n2="norm_attn_norm.norm_2",
    ),
    "opt": OPT,
    "biogpt": OPT,
    "opt_350m_style": replace(OPT, n1=None, n2=None),
    "bart": replace(OPT, n1=None, n2=None),
    "clip_text": replace(OPT, down="mlp.fc2", up="mlp.fc1", n1="layer_norm1", n2="layer_norm2"),
    **dict.fromkeys(("bert", "roberta", "electra", "fnet"), BERT),
    "distilbert": replace(BERT, o="attention.out_lin", v="attention.v_lin", down="ffn.lin2", up="ffn.lin1"),
    "albert": replace(BERT, o="attention.dense", v="attention.value", down="ffn_output", up="ffn"),
    "modernbert": Names(
        "attn.Wo", "attn.Wqkv", "last", "mlp.Wo", "mlp.Wi", second_half=True, n1="attn_norm", n2="mlp_norm"
    ),
    "t5": Names(
        "layer.0.SelfAttention.o",
        "layer.0.SelfAttention.v",
        "no",
        "layer.-1.DenseReluDense.wo",
        "layer.-1.DenseReluDense.wi",
        n1="layer.0.layer_norm",
        n2="layer.-1.layer_norm",
    ),
    "vit": VIT,
    "deit": VIT,
    "beit_no_ls": VIT,
    "beit": replace(VIT, scale=("lambda_1", "lambda_2")),
    "dinov2": replace(VIT, n1="norm1", n2="norm2", scale=("layer_scale1.lambda1", "layer_scale2.lambda1")),
    "dinov3_vit": replace(
        VIT,
        down="mlp.down_proj",
        up="mlp.up_proj",
        n1="norm1",
        n2="norm2",
        scale=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    ),
    "torch_encoder_pre": TORCH,
    "torch_encoder_post": replace(TORCH, n1=None, n2=None),
    "torch_decoder_pre": replace(TORCH, n2="norm3"),
    "torch_decoder_post": replace(TORCH, n1=None, n2=None),
    "nanogpt": NANO,
    "plain_rezero": replace(NANO, n1=None, n2=None, scale=("alpha", "alpha")),
    "nanogpt_fused_residual": Names("out", "qkv", "last", "down", "up", n1="n1", n2="n2"),
    "mha_custom_block": Names("sa.out_proj", "sa.in_proj_weight", "last", "ff.2", "ff.0", n1="n1", n2="n2"),
    "ctrl": Names(
        "multi_head_attention.dense",
        "multi_head_attention.Wv",
        "no",
        "ffn.2",
        "ffn.0",
        n1="layernorm1",
        n2="layernorm2",
    ),
    "rwkv": Names(down="feed_forward.value", up="feed_forward.key", n2="ln2"),
    "xlstm": Names(down="ffn.proj_down", up="ffn.proj_up", n2="norm_ffn"),
    "recurrent_gemma": Names(
        "temporal_block.o_proj",
        "temporal_block.v_proj",
        down="mlp_block.down_proj",
        up="mlp_block.up_proj",
        n1="temporal_pre_norm",
        n2="channel_pre_norm",
        one_plus=True,
    ),
    "zaya": replace(
        LLAMA,
        v="self_attn.qkv_proj.v_proj_current|self_attn.qkv_proj.v_proj_delayed",
        scale=("post_attention_residual_scale.hidden_states_scale", "post_mlp_residual_scale.hidden_states_scale"),
    ),
}
# State spaces have neither branch; raw parameters and einsum are compared in the tests of discovery.
WITHOUT = ("mamba", "mamba2", "plain_functional_params")


def searched(name: str) -> tuple[nn.Module, tuple[ResidualBlock, ...]]:
    found = search(name)
    return found.model, found.blocks


def fetch(block: nn.Module, path: str, transposed: bool = False) -> Tensor:
    """A weight of a block in float64; ``layer.-1`` is the last entry of a list."""
    value: object = block
    for part in path.split("."):
        value = value[-1] if part == "-1" else getattr(value, part)  # type: ignore[index]
    weight = value.weight if isinstance(value, nn.Module) else value
    assert isinstance(weight, Tensor)
    return weight.detach().double().T if transposed else weight.detach().double()


def repeated(values: Tensor, wanted: int) -> Tensor:
    """The value heads, each repeated for its group of query heads."""
    channels = wanted // HEADS
    return values.unflatten(0, (-1, channels)).repeat_interleave(wanted // len(values), dim=0).flatten(0, 1)


def output_and_values(block: nn.Module, names: Names) -> tuple[Tensor, list[Tensor]]:
    """W_o, and what stands right of it: W_v with its heads repeated, or the two matrices of a latent."""
    output = fetch(block, names.o, names.transposed)
    if hasattr(getattr(block, "self_attn", None), "kv_b_proj"):
        compress = fetch(block, "self_attn.kv_a_proj_with_mqa")
        expand = fetch(block, "self_attn.kv_b_proj").unflatten(0, (HEADS, -1))
        rank, width = expand.shape[-1], output.shape[1] // HEADS
        gain = fetch(block, "self_attn.kv_a_layernorm")
        return output, [expand[:, -width:].flatten(0, 1) * gain, compress[:rank]]
    values = torch.cat([fetch(block, name, names.transposed) for name in names.v.split("|")])
    if names.fused == "per head":
        values = values.unflatten(0, (HEADS, 3, -1))[:, 2].flatten(0, 1)
    elif names.fused == "last":
        queries = output.shape[1]  # rows of q | k | v, with as many rows for k as for v
        values = values[queries + (len(values) - queries) // 2 :]
    return output, [repeated(values, output.shape[1])]


def downs_and_ups(block: nn.Module, names: Names) -> Iterator[tuple[Tensor, Tensor]]:
    """W_down and W_up of the MLP, or of each expert, the shared one last."""
    parent = block
    for part in names.experts.split("."):
        parent = getattr(parent, part, None)  # type: ignore[assignment]
    if parent is None:
        down, up = fetch(block, names.down, names.transposed), fetch(block, names.up, names.transposed)
        yield down, up[len(up) // 2 :] if names.second_half else up
        return
    if hasattr(parent, "w2"):
        shape = (4, -1, 32)
        yield from zip(fetch(parent, "w2").view(shape).mT, fetch(parent, "v1").view(shape), strict=True)
        return
    down, fused = fetch(parent, "down_proj"), fetch(parent, "gate_up_proj")
    if down.shape[-1] == 32:  # stored (experts, in, out)
        down, fused = down.mT, fused.mT
        interleaved = hasattr(parent, "gate_up_proj_bias")
        up = fused[:, 1::2] if interleaved else fused[:, fused.shape[1] // 2 :]
    else:
        up = fused[:, fused.shape[1] // 2 :]
    yield from zip(down, up, strict=True)
    owner = block.get_submodule(names.experts.rpartition(".")[0])
    for name in ("shared_expert", "shared_experts"):
        if hasattr(owner, name):
            yield fetch(owner, f"{name}.down_proj"), fetch(owner, f"{name}.up_proj")


def gain(block: nn.Module, path: str | None, one_plus: bool) -> Tensor | float:
    """A diagonal, 1 where there is none (an Identity stands in for the first norm of modernbert)."""
    if path is None or isinstance(getattr(block, path.split(".")[0]), nn.Identity):
        return 1.0
    return fetch(block, path) + one_plus


def scale(block: nn.Module, names: Names, which: int) -> Tensor | float:
    """The residual multiplier, as what multiplies the rows."""
    if names.scale is None or isinstance(names.scale, float):
        return 1.0 if names.scale is None else names.scale
    return fetch(block, names.scale[which]).view(-1, 1)


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def unit(matrix: Tensor) -> Tensor:
    """What a norm makes of the expected size of its input: mean square one per channel."""
    return matrix * math.sqrt(len(matrix)) / torch.linalg.matrix_norm(matrix)


def circuit_by_hand(block: nn.Module, names: Names, kind: str) -> list[float]:
    """s · G_post · W · W · diag(γ), a norm on the way divides by the expected size of what enters it."""
    which = ("attention", "mlp").index(kind)
    before = gain(block, (names.n1, names.n2)[which], names.one_plus)
    result = []
    chains = [output_and_values(block, names)] if kind == "attention" else downs_and_ups(block, names)
    for left, right in chains:
        rights = right if isinstance(right, list) else [right]
        product = rights[-1] * before
        if len(rights) > 1:
            product = rights[0] @ unit(product)
        if kind == "attention" and hasattr(getattr(block, "self_attn", None), "v_norm"):  # of each head by itself
            product = torch.cat([unit(head) for head in product.split(block.self_attn.head_dim)])  # type: ignore[union-attr, arg-type]
        inner = f"{('self_attn.attn', 'mlp.ffn')[which]}_sub_norm"
        if hasattr(getattr(block, inner.split(".")[0], None), inner.split(".")[1]):
            product = fetch(block, inner).view(-1, 1) * unit(product)
        product = left @ product
        if names.post is not None:
            product = gain(block, names.post[which], names.one_plus).view(-1, 1) * unit(product)  # type: ignore[union-attr]
        result.append(norm(scale(block, names, which) * product))
    return result


def paper_by_hand(block: nn.Module, names: Names, kind: str) -> list[float]:
    """s · W_down W_up; s · W_o, or s · W_o W_oᵀ where W_o is not square."""
    if kind == "mlp":
        return [norm(scale(block, names, 1) * (down @ up)) for down, up in downs_and_ups(block, names)]
    output, _ = output_and_values(block, names)
    square = output.shape[0] == output.shape[1]
    return [norm(scale(block, names, 0) * (output if square else output @ output.T))]


def measured(model: nn.Module, branch: Branch, linearization: Literal["circuit", "paper"]) -> list[float]:
    """The norm of every expert, or of the branch, from dense matrices."""
    values = []
    built = linearize_kind(ModelWeights(model), [branch], linearization)
    assert not isinstance(built, str), built
    for _, linear in built:
        value = norm(linear.operator.dense())
        if linear.normalized is not None:
            right = linear.normalized.dense()
            value *= math.sqrt(len(right)) / float(torch.linalg.matrix_norm(right))
        values.append(value)
    return values


def test_every_surveyed_architecture_is_compared() -> None:
    """The table of names is complete."""
    assert set(ARCHITECTURES) | set(WITHOUT) == set(survey.entries())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_circuit_is_the_product_taken_by_hand(name: str) -> None:
    """Every block, both branches, every expert: s · G_post · W_o · W_v↑ · diag(γ) and its like with W_down · W_up."""
    model, blocks = searched(name)
    compared = 0
    for block in blocks:
        module = model.get_submodule(block.name)
        for kind, branch in (("attention", block.attention), ("mlp", block.mlp)):
            if branch is not None and branch.reason is None:
                expected = circuit_by_hand(module, ARCHITECTURES[name], kind)
                assert measured(model, branch, "circuit") == pytest.approx(expected, rel=1e-5), branch.site
                compared += 1
    assert compared >= len(blocks)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_paper_is_the_definition_of_the_paper(name: str) -> None:
    """Number for number, the squaring of an output projection that is not square included."""
    model, blocks = searched(name)
    for block in blocks:
        module = model.get_submodule(block.name)
        for kind, branch in (("attention", block.attention), ("mlp", block.mlp)):
            if branch is not None and branch.reason is None:
                expected = paper_by_hand(module, ARCHITECTURES[name], kind)
                assert measured(model, branch, "paper") == pytest.approx(expected, rel=1e-5), branch.site


def test_paper_squares_exactly_where_the_output_projection_is_not_square() -> None:
    """Four heads of 16 on a stream of 32, against four heads of 8: grouped queries alone do not square."""
    for name, squared in (("gemma", True), ("qwen3", True), ("deepseek_v3", True), ("llama", False), ("phi", False)):
        model, blocks = searched(name)
        assert blocks[0].attention is not None
        weight = fetch(model.get_submodule(blocks[0].name), ARCHITECTURES[name].o)
        assert measured(model, blocks[0].attention, "paper") == pytest.approx(
            [norm(weight) ** 2 if squared else norm(weight)], rel=1e-6
        )


class Bare(nn.Module):
    """Parameters without a forward: a path can be linearized without any model around it."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def chain(model: nn.Module, *factors: Factor, paper: bool = False) -> Tensor:
    """The dense operator of a chain of factors, divided as a norm divides it."""
    linear = linearize(ModelWeights(model), Path(factors), "paper" if paper else "circuit")
    dense = linear.operator.dense()
    if linear.normalized is None:
        return dense
    right = linear.normalized.dense()
    return dense * math.sqrt(len(right)) / torch.linalg.matrix_norm(right)


@pytest.fixture
def bare() -> Bare:
    generator = torch.Generator().manual_seed(0)
    shapes = {"down": (6, 10), "up": (10, 6), "gain": (6,), "wide": (10,), "s": (), "one": (1,), "fused": (30, 6)}
    return Bare(
        **{name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    )


DOWN, UP = Factor("down", "down"), Factor("up", "up")


def test_scalars_and_diagonals_multiply(bare: Bare) -> None:
    """Constants, parameters of one element in either shape, LayerScale, a gain of 1 + w."""
    product = bare.down @ bare.up
    for factor, expected in (
        (Factor("scale", None, constant=0.3), 0.3 * product),
        (Factor("scale", "s"), bare.s * product),
        (Factor("scale", "one"), bare.one * product),
        (Factor("scale", "gain", size=6), bare.gain.diag() @ product),
        (Factor("scale", "s", layout=(("tanh",),)), bare.s.tanh() * product),
    ):
        torch.testing.assert_close(chain(bare, factor, DOWN, UP), expected)
        torch.testing.assert_close(chain(bare, factor, DOWN, UP, paper=True), expected)
    plus = Factor("pre_norm", "gain", layout=(("add", 1.0),), size=6)
    torch.testing.assert_close(chain(bare, DOWN, UP, plus), product * (1 + bare.gain))
    torch.testing.assert_close(chain(bare, DOWN, UP, plus, paper=True), product)


@pytest.mark.parametrize(
    "rows",
    [
        (range(20, 30),),
        (range(2, 30, 3),),
        (range(5), range(10, 15)),
        (range(3, 8), range(3, 8)),
        (range(20, 25), range(10, 15)),
        (range(2), range(3, 6), range(11, 16)),
        tuple(range(start, start + 1) for start in (9, 2, 9, 4, 0, 29, 17, 3, 8, 21)),
        (range(4, 6), range(4, 6), range(14, 16), range(14, 16), range(24, 26)),
    ],
)
def test_rows_are_taken_in_the_order_given(bare: Bare, rows: tuple[range, ...]) -> None:
    """Slices, strides, heads at one distance, repeated heads, and any other order."""
    expected = bare.fused[[row for run in rows for row in run]]
    torch.testing.assert_close(chain(bare, Factor("up", "fused", rows=rows)), expected)
    torch.testing.assert_close(chain(bare, DOWN, Factor("up", "fused", rows=rows)), bare.down @ expected)


def test_a_norm_behind_a_matrix_divides_by_the_size_of_what_enters_it(bare: Bare) -> None:
    """The leftmost norm counts: a scalar or a size right of it divides out again."""
    post, inner = Factor("post_norm", "gain", size=6), Factor("inner_norm", "wide", size=10)
    product = bare.down @ bare.up
    expected = bare.gain.diag() @ unit(product)
    torch.testing.assert_close(chain(bare, post, DOWN, UP), expected)
    torch.testing.assert_close(chain(bare, post, Factor("scale", None, constant=7.0), DOWN, UP), expected)
    torch.testing.assert_close(chain(bare, post, DOWN, Factor("scale", "s"), UP), expected * bare.s.sign())
    torch.testing.assert_close(chain(bare, Factor("scale", None, constant=7.0), post, DOWN, UP), 7 * expected)
    layer_scale = Factor("scale", "gain", size=6)
    torch.testing.assert_close(
        chain(bare, post, layer_scale, DOWN, UP), bare.gain.diag() @ unit(bare.gain.diag() @ product)
    )
    torch.testing.assert_close(chain(bare, DOWN, inner, UP), bare.down @ bare.wide.diag() @ unit(bare.up))
    both = bare.gain.diag() @ unit(bare.down @ bare.wide.diag() @ bare.up)
    torch.testing.assert_close(chain(bare, post, DOWN, inner, UP), both)
    torch.testing.assert_close(chain(bare, Factor("post_norm", None, size=6), DOWN, UP), unit(product))


def test_nothing_is_copied(bare: Bare) -> None:
    """The operators look at the parameters: a later change of a weight is a change of the operator."""
    linear = linearize(
        ModelWeights(bare), Path((DOWN, Factor("up", "fused", rows=(range(5), range(10, 15))))), "circuit"
    ).operator
    bare.fused.mul_(2)
    bare.down.mul_(3)
    torch.testing.assert_close(linear.dense(), bare.down @ bare.fused[[*range(5), *range(10, 15)]])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(10, 6, device="meta"), "meta"),
        (torch.ones(10, 6, dtype=torch.int8), "int8"),
        (torch.ones(10, 3, dtype=torch.uint8), "uint8"),
        (torch.ones(10, 6, dtype=torch.complex64), "complex64"),
    ],
)
@pytest.mark.parametrize("linearization", ["circuit", "paper"])
def test_weights_without_numbers_are_refused(
    bare: Bare, weight: Tensor, message: str, linearization: Literal["circuit", "paper"]
) -> None:
    """Meta, integer, packed and complex weights."""
    bare.up = weight
    with pytest.raises(ConfigurationError, match=message):
        linearize(ModelWeights(bare), Path((DOWN, UP)), linearization)
