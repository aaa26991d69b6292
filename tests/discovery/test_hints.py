"""The escape hatch: hints for models that discovery does not understand, and what is said about wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import example

from lightning_spectral import ExactSVD, ResidualBlock, find_blocks, measure
from lightning_spectral.errors import BlocksNotFoundError, ConfigurationError

WIDTH = 16


class Opaque(nn.Module):
    """A stack that raises on any input: discovery cannot see anything of it."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(WIDTH),
                    "qkv": nn.Linear(WIDTH, 3 * WIDTH),
                    "out": nn.Linear(WIDTH, WIDTH),
                    "up": nn.Linear(WIDTH, 24),
                    "down": nn.Linear(24, WIDTH),
                }
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("only on the mainframe")


FULL = {
    "layers.*": {
        "attention": {
            "site": "out",
            "output": "out.weight",
            "value": {"parameter": "qkv.weight", "rows": [[2 * WIDTH, 3 * WIDTH]]},
            "pre_norm": "norm.weight",
        },
        "mlp": {"site": "down", "down": "down.weight", "up": "up.weight", "scale": 0.5},
    }
}


@pytest.fixture
def opaque() -> Opaque:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Opaque()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return model


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach().double(), 2))


def test_a_full_hint_measures_a_model_that_cannot_run(opaque: Opaque) -> None:
    """Sites and factors by hand: as good as found ones, but said to be hinted and unverified."""
    blocks = find_blocks(opaque, hints=FULL)
    assert [block.name for block in blocks] == ["layers.0", "layers.1", "layers.2"]
    assert [block.index for block in blocks] == [0, 1, 2]
    assert {(block.evidence, block.verified) for block in blocks} == {("hints", False)}
    assert [branch.site for branch in blocks[1].branches] == ["layers.1.out", "layers.1.down"]
    for layer, measured in zip(opaque.layers, measure(opaque, blocks, solver=ExactSVD()), strict=True):
        value = layer["qkv"].weight[2 * WIDTH :] * layer["norm"].weight
        assert measured.attention_norm == pytest.approx(norm(layer["out"].weight @ value), rel=1e-6)
        assert measured.mlp_norm == pytest.approx(0.5 * norm(layer["down"].weight @ layer["up"].weight), rel=1e-6)


def test_factors_are_put_in_the_order_of_the_product(opaque: Opaque) -> None:
    """However the hint lists them; an inner norm stands between the two matrices."""
    value = {"parameter": "qkv.weight", "rows": [[2 * WIDTH, 3 * WIDTH]]}
    attention = {"pre_norm": "norm.weight", "value": value, "scale": 2, "site": "out", "output": "out.weight"}
    mlp = {"site": "down", "up": "up.weight", "inner_norm": "up.bias", "down": "down.weight", "post_norm": "norm.bias"}
    block = find_blocks(opaque, hints={"layers.0": {"attention": attention, "mlp": mlp}})[0]
    roles = [[factor.role for factor in branch.factors] for branch in block.branches]
    assert roles == [["scale", "output", "value", "pre_norm"], ["post_norm", "down", "inner_norm", "up"]]
    assert [factor.size for factor in block.branches[1].factors] == [WIDTH, None, 24, None]


def test_layouts_and_rows_are_applied(opaque: Opaque) -> None:
    """A transposed weight, and every third row twice."""
    mlp = {
        "site": "down",
        "down": {"parameter": "up.weight", "layout": ["t"]},
        "up": {"parameter": "qkv.weight", "rows": [[0, 48, 4], [0, 48, 4]], "layout": [["mul", 2.0]]},
    }
    measured = measure(opaque, find_blocks(opaque, hints={"layers.2": {"mlp": mlp}}), solver=ExactSVD()).layers[0]
    layer = opaque.layers[2]
    up = 2 * layer["qkv"].weight[::4]
    assert measured.mlp_norm == pytest.approx(norm(layer["up"].weight.T @ torch.cat([up, up])), rel=1e-6)
    assert measured.attention_norm is None


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("layers.*", ["layers.0", "layers.1", "layers.2"]),
        ("layers.1", ["layers.1"]),
        ("*.2", ["layers.2"]),
        ("layers", ["layers"]),
        ("layers.*.qkv", ["layers.0.qkv", "layers.1.qkv", "layers.2.qkv"]),
    ],
)
def test_a_star_stands_for_one_component(opaque: Opaque, pattern: str, names: list[str]) -> None:
    hint = {pattern: {"mlp": {"site": ""}}}
    with pytest.raises(ConfigurationError, match="the model has no") as caught:
        find_blocks(opaque, hints=hint)
    assert names[0] in str(caught.value)


def test_nothing_but_a_star_is_a_wildcard(opaque: Opaque) -> None:
    with pytest.raises(ConfigurationError, match=r"'layer\?\.1' matches no module"):
        find_blocks(opaque, hints={"layer?.1": {"mlp": {"site": ""}}})


def found_and_hinted(name: str, hints: dict[str, Any]) -> tuple[tuple[ResidualBlock, ...], tuple[ResidualBlock, ...]]:
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    return find_blocks(model, batch=args or kwargs), find_blocks(model, batch=args or kwargs, hints=hints)


def test_a_partial_hint_overrides_only_what_it_names() -> None:
    """Another site for one branch of one block; its factors, the other branch and the other blocks are as found."""
    found, hinted = found_and_hinted("nanogpt", {"transformer.h.1": {"mlp": "mlp.c_proj"}})
    assert [hinted[0], hinted[2]] == [found[0], found[2]]
    assert hinted[1].attention == found[1].attention
    assert hinted[1].mlp is not None
    assert found[1].mlp is not None
    assert hinted[1].mlp.site == "transformer.h.1.mlp.c_proj"
    assert hinted[1].mlp.paths == found[1].mlp.paths
    assert (hinted[1].evidence, hinted[1].verified) == ("hints", False)


def test_factors_alone_keep_the_site_that_was_found() -> None:
    """The norm is left out on purpose: what a hint lists is the whole chain."""
    chain = {"down": "mlp.c_proj.weight", "up": "mlp.c_fc.weight"}
    found, hinted = found_and_hinted("nanogpt", {"transformer.h.*": {"mlp": chain}})
    for before, after in zip(found, hinted, strict=True):
        assert before.mlp is not None
        assert after.mlp is not None
        assert after.mlp.site == before.mlp.site
        assert [factor.role for factor in after.mlp.factors] == ["down", "up"]
        assert after.attention == before.attention


def test_a_hint_gives_factors_to_a_branch_that_has_a_reason() -> None:
    """The second of two attentions may be left out, if the user says so."""
    first = {"output": "self_attn.o_proj.weight", "value": "self_attn.v_proj.weight"}
    found, hinted = found_and_hinted("diffllama", {"model.layers.*": {"attention": first}})
    assert all(block.attention.reason for block in found)
    assert not any(branch.reason for block in hinted for branch in block.branches)


def test_a_hint_leaves_adapters_out() -> None:
    """They are no part of a chain that the user lists."""
    value = {"parameter": "attn.c_attn.base.weight", "rows": [[64, 96]]}
    base = {
        "attention": {"output": "attn.c_proj.base.weight", "value": value},
        "mlp": {"down": "mlp.c_proj.base.weight", "up": "mlp.c_fc.base.weight"},
    }
    found, hinted = found_and_hinted("low_rank_updates", {"transformer.h.*": base})
    for blocks, adapted in ((found, True), (hinted, False)):
        for branch in (branch for block in blocks for branch in block.branches):
            assert any(factor.adapters for factor in branch.factors) == adapted


def test_a_hint_for_one_branch_drops_no_other() -> None:
    """A block may have two branches of one kind: two half MLPs."""
    found, hinted = found_and_hinted("macaron", {"body.layers.0": {"attention": "self_attn.c_proj"}})
    assert [branch.site for branch in found[0].branches] == [
        f"body.layers.0.{site}" for site in ("ffn1", "self_attn", "ffn2")
    ]
    assert [branch.site for branch in hinted[0].branches] == [
        f"body.layers.0.{site}" for site in ("ffn1", "self_attn.c_proj", "ffn2")
    ]


def test_a_hint_forces_the_kind_of_a_branch() -> None:
    """The branch at the hinted site is that branch, whatever the trace took it for: it is not listed twice."""
    value = {"parameter": "attn.into.weight", "rows": [[32, 64]]}
    hint = {"attention": {"site": "attn", "output": "attn.out.weight", "value": value}}
    _, hinted = found_and_hinted("hybrid", {"body.layers.2": hint})
    assert [(branch.kind, branch.site) for branch in hinted[2].branches] == [
        ("attention", "body.layers.2.attn"),
        ("mlp", "body.layers.2.mlp"),
    ]


def test_a_partial_hint_keeps_the_order_of_execution() -> None:
    """Also where the modules are registered in another order."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = example("alternating_sequential").build().body, nn.Sequential()
            self.first = example("residual_wrappers").build().body

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    model, x = Backwards().eval(), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    found = [block.name for block in find_blocks(model, batch=x)]
    hinted = find_blocks(model, batch=x, hints={"last.1": {"mlp": "fn.c_proj"}})
    assert [block.name for block in hinted] == found
    assert [block.index for block in hinted] == list(range(len(found)))
    assert found[0] == "first.0"


def test_a_site_without_factors_is_a_branch_with_a_reason(opaque: Opaque) -> None:
    """It can be scaled, but not measured."""
    block = find_blocks(opaque, hints={"layers.0": {"attention": "out"}})[0]
    assert block.attention is not None
    assert block.attention.reason == "the hint names a site but no factors, and the trace found none"
    layer = measure(opaque, [block]).layers[0]
    assert layer.attention_norm is None
    assert layer.reason == f"mlp: the block has none; attention: {block.attention.reason}"


def test_the_element_of_an_output_may_be_named() -> None:
    """``output_index`` goes into the branch."""
    _, hinted = found_and_hinted("nanogpt", {"transformer.h.0": {"attention": {"site": "attn", "output_index": 0}}})
    assert hinted[0].attention is not None
    assert hinted[0].attention.output_index == 0


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (
            {"blocks.*": {"mlp": "down"}},
            r"'blocks\.\*' matches no module; expected the path of a block such as 'layers",
        ),
        (
            {"layers.*": {"ffn": "down"}},
            r"'ffn' is not a kind of branch; expected one of attention, cross_attention, m",
        ),
        ({"layers.*": {"mlp": "c_proj"}}, r"the model has no 'layers\.0\.c_proj' \(paths are relative to the block\)"),
        ({"layers.*": {"mlp": {"down": "down.weight"}}}, r"layers\.0\.mlp needs a 'site', the module whose output is"),
        (
            {"layers.*": {"mlp": {"site": "down", "gate": "up.weight"}}},
            r"'gate' is not a role of a factor; expected one of scale, post_norm, output",
        ),
        (
            {"layers.*": {"mlp": {"site": "down", "down": "down.wait"}}},
            r"the model has no 'layers\.0\.down\.wait'",
        ),
        (
            {"layers.*": {"mlp": {"site": "down", "down": {"name": "down.weight"}}}},
            r"layers\.0\.down came with \['name'\]; expected a parameter path, or a mapping with 'parameter'",
        ),
        (
            {"layers.*": {"mlp": {"site": "down", "down": {"parameter": "down.weight", "columns": [[0, 2]]}}}},
            r"came with \['columns', 'parameter'\]",
        ),
        ({"layers.*": {"mlp": {"site": "down", "down": 3.0, "up": "up.weight"}}}, r"down.*3\.0"),
        ({"layers.*": "attention"}, r"'layers\.0' came with 'attention'; expected a dict from kinds of branches to"),
        ({"layers.*": {"mlp": ["down"]}}, r"layers\.0\.mlp came with \['down'\]; expected the path of its site, or"),
        ({"layers.*": {"mlp": "down.weight"}}, r"'layers\.0\.down\.weight' is a Parameter; expected a module"),
        (
            {"layers.*": {"mlp": {"site": "down", "down": "down", "up": "up.weight"}}},
            r"'layers\.0\.down' is a Linear and no parameter; did you mean 'layers\.0\.down\.weight'\?",
        ),
        (
            {"layers.*": {"mlp": {"site": "down", "down": "down.weight", "pre_norm": "norm"}}},
            r"'layers\.0\.norm' is a LayerNorm and no parameter; did you mean 'layers\.0\.norm\.weight'\?",
        ),
        (
            {"layers.*": {"mlp": {"site": "down", "down": ["down.weight"]}}},
            r"layers\.0\.down came with \['down\.weight'\]; expected a parameter path",
        ),
        (
            {"layers.*": {"attention": {"site": "out", "output": "out.weight", "value": "qkv.weight"}}},
            r"qkv\.weight has 48 rows, and layers\.0\.out\.weight takes 16; name the rows .*'rows': \[\[32, 48\]\]",
        ),
        (
            {"layers.*": {"mlp": {"site": "down", "down": {"parameter": "down.weight", "rows": [0, 8]}}}},
            r"down\.weight came with rows=\[0, 8\]; expected pairs of the first row and the row behind the last",
        ),
        (
            {"layers.*": {"mlp": {"site": "down", "down": {"parameter": "down.weight", "layout": ["spin"]}}}},
            r"down\.weight came with the layout \['spin'\]; \('spin',\) begins with none of abs, add, ",
        ),
    ],
)
def test_a_hint_that_does_not_fit_is_refused_with_what_was_expected(
    opaque: Opaque, hints: dict[str, Any], message: str
) -> None:
    """What came, what was expected, and what to type next."""
    with pytest.raises(ConfigurationError, match=message):
        find_blocks(opaque, hints=hints)


def test_hints_that_hint_at_nothing_find_nothing() -> None:
    """An empty mapping is no way around the refusal."""
    member = example("refused_mlp")
    model = member.build()
    with pytest.raises(BlocksNotFoundError, match="no residual block was found in Sequential"):
        find_blocks(model, batch=member.inputs(model)[0], hints={})


def test_the_hint_in_the_refusal_has_the_form_that_hints_take(opaque: Opaque) -> None:
    """What the message shows can be typed: its keys are kinds and roles."""
    member = example("refused_mlp")
    model = member.build()
    with pytest.raises(BlocksNotFoundError, match="hints=") as caught:
        find_blocks(model, batch=member.inputs(model)[0])
    shown = str(caught.value).partition("find_blocks(model, hints=")[2].rpartition(")")[0]
    mapping = eval(shown)
    assert set(mapping) == {"layers.*"}
    with pytest.raises(ConfigurationError, match=r"the model has no 'layers\.0\.attn\.out'"):
        find_blocks(opaque, hints=mapping)
