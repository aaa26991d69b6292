"""The balance penalty: the value of measuring, the gradient of dense decompositions, and nothing is disturbed."""

from __future__ import annotations

import copy
import functools
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any, Literal

import pytest
import torch
from found import search
from tiny_run import LitGPT, TinyGPT, fit
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import example

from lightning_spectral import ExactSVD, RandomizedSVD, ResidualBlock, find_blocks, measure
from lightning_spectral.balance import penalty as room
from lightning_spectral.balance.penalty import balance_penalty
from lightning_spectral.errors import ConfigurationError, ExampleInputError
from lightning_spectral.records import Branch, Factor, Path, alternatives
from lightning_spectral.scales.attach import attach_scales

Kind = Literal["circuit", "paper"]
NARROW = (0.99, 1.01)  # a zone that no random block hits
NAMES = {
    "pre-norm": "nanogpt",
    "grouped queries": "llama",
    "grouped queries, wide heads": "qwen3",
    "grouped queries, tiled": "qkv_grouped_tiled",
    "fused, per head": "qkv_per_head",
    "fused, per channel": "qkv_per_channel",
    "gated": "gated_separate",
    "gated, interleaved": "gate_up_interleaved",
    "experts": "mixtral",
    "experts, transposed": "experts_in_out",
    "experts, shared": "experts_modules_shared",
    "LayerScale": "plain_layer_scale",
    "ReZero": "plain_two_alphas",
    "constant multiplier": "granite",
    "post-norm, 1 + w": "gemma2",
    "post-norm": "olmo2",
    "norm inside": "latent_attention_norm",
    "Conv1D": "gpt2",
    "two MLPs": "macaron",
    "two MLPs, and a norm behind": "conformer",
    "parallel": "plain_parallel",
    "parallel, one norm": "plain_parallel_one_norm",
    "weight_norm": "weight_norm_weights",
    "spectral_norm": "spectral_norm_weights",
}
EVERY = pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))


def built(name: str) -> tuple[nn.Module, tuple[ResidualBlock, ...]]:
    """A fresh copy of a member of the zoo in float64; the blocks were found on another one."""
    return example(name).build().double(), search(name).blocks


# --- The twin: dense matrices, decomposed -----------------------------------------------------------------------------


def weight_of(model: nn.Module, factor: Factor) -> Tensor:
    assert factor.parameter is not None
    owner, _, name = factor.parameter.rpartition(".")
    tensor = getattr(model.get_submodule(owner), name)
    for step, *arguments in factor.layout:
        tensor = getattr(tensor, step)(*arguments)
    return tensor if factor.rows is None else torch.cat([tensor[list(run)] for run in factor.rows])


def unit(matrix: Tensor) -> Tensor:
    """What a norm makes of the expected size of its input: mean square one per channel."""
    return matrix * math.sqrt(len(matrix)) / torch.linalg.matrix_norm(matrix)


def circuit(model: nn.Module, path: Path) -> Tensor:
    """The product of all factors, from right to left, dense and differentiable."""
    product: Tensor | None = None
    waiting: list[Tensor] = []  # gains in front of the first matrix
    for factor in reversed(path.factors):
        if factor.role in ("scale", "pre_norm") or factor.role.endswith("_norm"):
            if factor.role in ("post_norm", "inner_norm") and product is not None:
                product = unit(product)
            value = torch.tensor(factor.constant) if factor.parameter is None else weight_of(model, factor)
            if product is None:
                waiting.append(value)
            else:
                product = value.reshape(-1, 1) * product
            continue
        weight = weight_of(model, factor)
        for gain in waiting:
            weight = weight * gain
        waiting.clear()
        product = weight if product is None else weight @ product
    assert product is not None
    return product


def paper(model: nn.Module, path: Path) -> Tensor:
    """W_down · W_up; W_o, or W_o W_oᵀ; and every residual multiplier."""
    matrices = [weight_of(model, item) for item in path.factors if item.role in ("output", "down", "up")]
    product = functools.reduce(torch.matmul, matrices)
    if product.shape[0] != product.shape[1]:
        product = product @ product.T
    for factor in path.factors:
        if factor.role == "scale":
            value = torch.tensor(factor.constant) if factor.parameter is None else weight_of(model, factor)
            product = value.reshape(-1, 1) * product
    return product


def twin(
    model: nn.Module, blocks: Sequence[ResidualBlock], zone: tuple[float, float], linearization: Kind = "circuit"
) -> Tensor:
    """The penalty by dense decompositions, which autograd differentiates."""
    rule = circuit if linearization == "circuit" else paper
    low, high = map(math.log, zone)

    def log_norm(kind: Sequence[Branch]) -> Tensor:
        sums = [torch.stack([rule(model, path) for path in item.paths]).sum(0) for item in alternatives(kind)]
        norms = [torch.linalg.matrix_norm(matrix, ord=2) for matrix in sums]
        return max(norms, key=lambda norm: float(norm.detach())).log()

    ratios = torch.stack([log_norm(block.mlp_branches) - log_norm(block.attention_branches) for block in blocks])
    return torch.maximum(low - ratios, ratios - high).clamp(min=0).square().mean()


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """By every parameter that requires one, zeros where there is none."""
    named = {name: item for name, item in model.named_parameters() if item.requires_grad}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(item) if grad is None else grad
        for (name, item), grad in zip(named.items(), found, strict=True)
    }


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the whole gradient."""
    assert actual.keys() == expected.keys()
    error = sum(float((actual[name].double() - expected[name].double()).square().sum()) for name in actual)
    return math.sqrt(error / sum(float(value.double().square().sum()) for value in expected.values()))


# --- Value and gradient -----------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("linearization", ["circuit", "paper"])
def test_the_value_is_the_one_of_measuring(name: str, linearization: Kind) -> None:
    """The mean of hinge(ln ρ)² over the ratios that exact measuring finds."""
    model, blocks = built(name)
    logs = [layer.log_ratio for layer in measure(model, blocks, linearization=linearization, solver=ExactSVD())]
    low, high = map(math.log, NARROW)
    expected = sum(max(low - value, value - high, 0.0) ** 2 for value in logs if value is not None) / len(logs)
    value = balance_penalty(model, blocks, safe_zone=NARROW, linearization=linearization)
    assert value.dtype == torch.float64
    assert value.ndim == 0
    assert float(value.detach()) == pytest.approx(expected, rel=1e-9)


@EVERY
@pytest.mark.parametrize("linearization", ["circuit", "paper"])
def test_the_gradient_is_that_of_dense_decompositions(name: str, linearization: Kind) -> None:
    """By every parameter: matrices, gains, multipliers, the originals of parametrized weights; 0 by the others."""
    model, blocks = built(name)
    actual = gradients(model, balance_penalty(model, blocks, safe_zone=NARROW, linearization=linearization))
    expected = gradients(model, twin(model, blocks, NARROW, linearization))
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 0
    for parameter, value in expected.items():
        torch.testing.assert_close(
            actual[parameter], value, rtol=1e-5, atol=1e-8 * scale, msg=lambda text, p=parameter: f"{p}: {text}"
        )


def test_the_twin_itself_against_a_product_written_out() -> None:
    """The MLP of a pre-norm block: W_down · W_up · diag(γ)."""
    model, blocks = built("nanogpt")
    block = model.get_submodule("transformer.h.1")
    expected = block.mlp.c_proj.weight @ block.mlp.c_fc.weight @ block.ln_2.weight.diag()
    assert blocks[1].mlp is not None
    torch.testing.assert_close(circuit(model, blocks[1].mlp.paths[0]), expected)


def test_only_the_largest_expert_has_a_gradient() -> None:
    """A subgradient of the largest norm."""
    model, blocks = built("mixtral")
    down = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    with torch.no_grad():
        down[2] *= 10
    grad = gradients(model, balance_penalty(model, blocks))["model.layers.0.mlp.experts.down_proj"]
    assert grad.flatten(1).any(1).tolist() == [False, False, True, False]


def test_residual_scales_are_factors_like_others() -> None:
    """The derivative by the logarithm of a scale is 2 · hinge / n, or its negative."""
    model, blocks = built("nanogpt")
    before = balance_penalty(model, blocks, safe_zone=NARROW)
    attach_scales(model, blocks)
    value = balance_penalty(model, blocks, safe_zone=NARROW)
    torch.testing.assert_close(value, before)
    found = {name: grad for name, grad in gradients(model, value).items() if name.endswith("residual_scale.log_scale")}
    assert len(found) == 2 * len(blocks)
    hinges = [
        max(math.log(NARROW[0]) - log, log - math.log(NARROW[1])) * math.copysign(1, log)
        for layer in measure(model, blocks, solver=ExactSVD())
        if (log := layer.log_ratio) is not None
    ]
    for block, hinge in zip(blocks, hinges, strict=True):
        for branch, sign in ((block.mlp, 1), (block.attention, -1)):
            assert branch is not None
            grad = found[f"{branch.site}.residual_scale.log_scale"]
            assert float(grad) == pytest.approx(sign * 2 * hinge / len(blocks), rel=1e-6)


# --- The iterative solver ---------------------------------------------------------------------------------------------


def encoder(width: int = 128, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Wide enough for the solver to iterate, and of random weights, whose spectra have no gap."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, 4, 3 * width, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(dtype)


def test_the_gradient_of_the_default_solver() -> None:
    """What the docstring promises: 1e-3 cold, and also after steps of training from a warm start."""
    model = encoder()
    blocks = find_blocks(model)
    for _ in range(4):
        reference = copy.deepcopy(model).double()
        actual = gradients(model, balance_penalty(model, blocks, safe_zone=NARROW))
        assert relative_error(actual, gradients(reference, twin(reference, blocks, NARROW))) < 1e-3
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


def test_a_warm_call_agrees_with_a_cold_one() -> None:
    """The second call starts from the singular vectors of the first."""
    model = encoder(dtype=torch.float64)
    blocks = find_blocks(model)
    cold = balance_penalty(model, blocks, safe_zone=NARROW)
    warm = balance_penalty(model, blocks, safe_zone=NARROW)
    assert float(warm.detach()) == pytest.approx(float(cold.detach()), rel=1e-6)
    assert relative_error(gradients(model, warm), gradients(model, cold)) < 1e-3


class Written(nn.Module):
    """One block of parameters without a forward: its blocks are written down."""

    def __init__(self, width: int, value: int, inner: int, *, post: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(shape[-1]))

        self.output, self.value = weight(width, value), weight(value, width)
        self.down, self.up = nn.Parameter(8 * weight(width, inner).data), weight(inner, width)
        self.gain = nn.Parameter(torch.rand(width, generator=generator) + 0.5)
        self.post = nn.Parameter(torch.rand(width, generator=generator) + 0.5) if post else None

    def blocks(self) -> list[ResidualBlock]:
        front = () if self.post is None else (Factor("post_norm", "post", size=len(self.post)),)
        behind = Factor("pre_norm", "gain", size=len(self.gain))
        attention = Path((*front, Factor("output", "output"), Factor("value", "value"), behind))
        mlp = Path((Factor("down", "down"), Factor("up", "up"), behind))
        return [
            ResidualBlock(
                0,
                "",
                (
                    Branch("attention", "param:output", paths=(attention,)),
                    Branch("mlp", "param:down", paths=(mlp,)),
                ),
            )
        ]


@pytest.mark.parametrize(("width", "error", "of_gradient"), [(300, 1e-3, 1e-3), (600, 0.05, 0.25)])
def test_a_wide_norm_behind_a_matrix_is_estimated(width: int, error: float, of_gradient: float) -> None:
    """Exact up to a width of 512, by 128 probes above, and reproducibly so."""
    model = Written(width, 64, 96, post=True)
    blocks = model.blocks()
    value = balance_penalty(model, blocks, safe_zone=NARROW)
    reference = copy.deepcopy(model).double()
    expected = twin(reference, blocks, NARROW)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=error)
    assert relative_error(gradients(model, value), gradients(reference, expected)) < of_gradient
    assert torch.equal(balance_penalty(copy.deepcopy(model), blocks, safe_zone=NARROW), value)


# --- The shape of the penalty -----------------------------------------------------------------------------------------


def test_circuit_is_blind_to_a_gauge_and_so_is_its_gradient() -> None:
    """W_v times c and W_o over c: the value stays, and the derivative along that direction is zero."""
    model, blocks = built("llama")
    before = balance_penalty(model, blocks, safe_zone=NARROW)
    grads = gradients(model, before)
    for layer in range(len(blocks)):
        attention = f"model.layers.{layer}.self_attn"
        value, output = f"{attention}.v_proj.weight", f"{attention}.o_proj.weight"
        one = float((grads[value] * model.get_parameter(value).detach()).sum())
        other = float((grads[output] * model.get_parameter(output).detach()).sum())
        assert abs(one) > 1e-6
        assert abs(one - other) < 1e-8 * abs(one)
        model.get_parameter(value).data.mul_(10)
        model.get_parameter(output).data.div_(10)
    after = balance_penalty(model, blocks, safe_zone=NARROW)
    assert float(after.detach()) == pytest.approx(float(before.detach()), rel=1e-10)


def test_inside_the_zone_there_is_neither_penalty_nor_gradient() -> None:
    """Exactly zero, alone or added to a loss."""
    model, blocks = built("nanogpt")
    value = balance_penalty(model, blocks, safe_zone=(1e-6, 1e6))
    assert value.item() == 0
    assert not any(grad.any() for grad in gradients(model, value).values())
    value.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss = sum(parameter.square().sum() for parameter in model.parameters())
    (loss + balance_penalty(model, blocks, safe_zone=(1e-6, 1e6))).backward()
    assert all(torch.equal(parameter.grad, 2 * parameter.detach()) for parameter in model.parameters())


@pytest.mark.parametrize("side", [1, -1])
def test_the_hinge_grows_as_a_square_on_its_side_only(side: int) -> None:
    """e beyond an edge costs e²; the other edge does not matter."""
    model, blocks = built("nanogpt")
    block = blocks[0]
    layer = measure(model, [block], solver=ExactSVD()).layers[0]
    assert layer.log_ratio is not None
    down = model.get_parameter(f"{block.name}.mlp.c_proj.weight").data
    down.mul_(math.exp(-layer.log_ratio))  # ρ = 1
    start = down.clone()
    for excess, other in ((-0.1, 3.0), (0.1, 3.0), (0.2, 9.0), (0.4, 3.0)):
        edges = (0.5, math.exp(other)) if side < 0 else (math.exp(-other), 2.0)
        down.copy_(start * math.exp(side * (math.log(2) + excess)))
        value = balance_penalty(model, [block], safe_zone=edges)
        assert value.item() == pytest.approx(max(excess, 0.0) ** 2, rel=1e-8, abs=1e-30)
        if excess > 0:
            grad = gradients(model, value)[f"{block.name}.mlp.c_proj.weight"]
            assert float((grad * down).sum()) == pytest.approx(side * 2 * excess, rel=1e-8)


def test_descent_on_the_penalty_alone_leads_into_the_zone() -> None:
    """From eight times off, above in one block and below in another."""
    torch.manual_seed(0)
    model = TinyGPT()
    blocks = find_blocks(model)
    with torch.no_grad():
        for block, factor in zip(blocks, (8.0, 1 / 8, 1.0), strict=True):
            model.get_parameter(f"{block.name}.mlp.2.weight").mul_(factor / measure(model, [block]).layers[0].ratio)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = []
    for _ in range(300):
        value = balance_penalty(model, blocks)
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert values[0] > 0.5
    assert values[-1] < 1e-3
    for layer in measure(model, blocks):
        assert layer.ratio is not None
        assert 0.49 < layer.ratio < 2.05
        assert layer.index != 2 or layer.ratio == pytest.approx(1.0, rel=0.01)


# --- In training ------------------------------------------------------------------------------------------------------


def trained(model: nn.Module, **settings: Any) -> Tensor:
    """A penalty whose backward pass has run."""
    value = balance_penalty(model, safe_zone=NARROW, **settings)
    value.backward()
    return value.detach()


@pytest.mark.parametrize("name", ["nanogpt", "gemma2"])
def test_backward_in_every_precision(name: str) -> None:
    """float32, weights in bfloat16, and float32 under autocast, whose gradient is the same bit by bit."""
    model = example(name).build()
    blocks = find_blocks(model)
    exact = gradients(model, balance_penalty(model, blocks, safe_zone=NARROW))
    model = example(name).build()
    with torch.autocast("cpu", torch.bfloat16):
        value = balance_penalty(model, blocks, safe_zone=NARROW)
        assert value.dtype == torch.float32
        found = gradients(model, value)
    assert all(torch.equal(found[parameter], grad) for parameter, grad in exact.items())
    model, far = model.bfloat16(), (20.0, 21.0)
    reference = copy.deepcopy(model).double()
    found = gradients(model, balance_penalty(model, blocks, safe_zone=far))
    assert {grad.dtype for grad in found.values()} == {torch.bfloat16}
    # A gain of 1 + w is rounded to bfloat16 where it is read.
    error = 0.03 if name == "gemma2" else 5e-3
    assert relative_error(found, gradients(reference, twin(reference, blocks, far))) < error


def test_in_a_training_step_of_a_trainer(tmp_path: FilePath) -> None:
    """In mixed precision, with validation, which runs in inference mode; every ratio falls."""

    class Balanced(LitGPT):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + balance_penalty(self)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("penalty", balance_penalty(self))

    torch.manual_seed(0)
    module = Balanced()
    for block in module.model.blocks:
        block.mlp[2].weight.data.mul_(30)
    before = [layer.ratio for layer in measure(module)]
    trainer = fit(tmp_path, [], module=module, validate=True, precision="bf16-mixed")
    assert trainer.callback_metrics["penalty"] > 0
    assert all(new.ratio < old for new, old in zip(measure(module), before, strict=True))


def test_a_call_without_gradients_leaves_a_memory_that_training_can_use() -> None:
    """Under no_grad and in inference mode there is a value and no graph; the next call has one."""
    for context in (torch.no_grad, torch.inference_mode):
        model = example("gemma2").build().train()
        with context():
            value = balance_penalty(model, safe_zone=NARROW)
        assert not value.requires_grad
        assert torch.is_grad_enabled()
        assert torch.equal(trained(model), value)
        with context():
            assert not balance_penalty(model, safe_zone=(1e-6, 1e6)).requires_grad
    model.requires_grad_(False)
    assert not balance_penalty(model, safe_zone=NARROW).requires_grad


@pytest.mark.parametrize("name", ["spectral_norm_weights", "gemma2", "plain_dropout"])
def test_nothing_is_disturbed(name: str) -> None:
    """Random streams, buffers (the power iteration of spectral_norm among them), flags, in training mode."""
    model = example(name).build().train()
    next(model.children()).eval()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    before = [(text, tensor.detach().clone(), tensor._version) for text, tensor in tensors]
    flags, stream = [module.training for module in model.modules()], torch.get_rng_state()
    for _ in range(2):
        trained(model)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), stream)
    for (text, old, version), (_, new) in zip(before, tensors, strict=True):
        assert torch.equal(old, new), text
        assert new._version == version or not isinstance(new, nn.Parameter), text


class Sizes(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_product_of_matrices_is_ever_formed(dtype: torch.dtype) -> None:
    """Width 512: the largest tensor of a cold call, a warm call and their backward passes is a weight's gradient."""
    model = Written(512, 192, 320).to(dtype)
    blocks = model.blocks()
    for _ in range(2):
        with Sizes() as sizes:
            balance_penalty(model, blocks).backward()
        assert 512 * 320 <= sizes.largest < 512 * 512
    assert model.down.grad is not None
    assert model.down.grad.any()


def test_a_weight_that_changes_before_the_backward_pass_is_noticed() -> None:
    """Autograd refuses, as it does for every other operation."""
    model, blocks = built("nanogpt")
    value = balance_penalty(model, blocks, safe_zone=NARROW)
    with torch.no_grad():
        next(iter(model.get_submodule("transformer.h").parameters())).mul_(2)
        for parameter in model.parameters():
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# --- What is kept between calls ---------------------------------------------------------------------------------------


def test_blocks_are_found_once() -> None:
    """Another linearization or solver does not run the model again."""
    model = example("nanogpt").build()
    balance_penalty(model)
    searched = memory_of(model).found
    assert searched
    for settings in ({}, {"linearization": "paper"}, {"solver": ExactSVD()}, {"safe_zone": NARROW}):
        balance_penalty(model, **settings)  # type: ignore[arg-type]
        assert memory_of(model).found is searched


def memory_of(model: nn.Module) -> room._Memory:
    return room._MEMORIES[model]


@pytest.mark.parametrize(
    "change",
    [
        lambda blocks: {"linearization": "paper"},
        lambda blocks: {"solver": RandomizedSVD(seed=1)},
        lambda blocks: {"blocks": blocks[1:]},
    ],
    ids=["linearization", "solver", "blocks"],
)
def test_the_warm_start_is_dropped_when_settings_change(change: Callable[..., dict[str, Any]]) -> None:
    """The value is then that of a model never seen before; equal settings keep the vectors."""
    model = encoder()
    blocks = find_blocks(model)
    balance_penalty(model, blocks)
    state = memory_of(model).state
    settings = {"blocks": blocks, "safe_zone": NARROW} | change(blocks)
    fresh = balance_penalty(copy.deepcopy(model), **settings)
    assert torch.equal(balance_penalty(model, **settings), fresh)
    assert memory_of(model).state is not state
    again = balance_penalty(copy.deepcopy(model), **settings)
    assert torch.equal(again, fresh)


def test_a_copy_shares_nothing_and_a_dead_model_leaves_nothing() -> None:
    """The memory belongs to the object, weakly."""
    model = encoder()
    trained(model)
    clone = copy.deepcopy(model)
    assert clone not in room._MEMORIES
    trained(clone)
    gc.collect()
    assert memory_of(clone).state is not memory_of(model).state
    assert all(
        one.data_ptr() != other.data_ptr()
        for one, other in zip(memory_of(clone).state.subspaces, memory_of(model).state.subspaces, strict=True)
    )
    known, alive = len(room._MEMORIES), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert len(room._MEMORIES) == known - 1


def test_scales_attached_later_are_seen() -> None:
    """Without another search."""
    model = encoder()
    before = balance_penalty(model, safe_zone=NARROW).item()
    scales, searched = attach_scales(model), memory_of(model).found
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (name.endswith("log_scale") and "linear2" in name) or "dropout2" in name:
                parameter += 3.0
    assert scales is not None
    assert balance_penalty(model, safe_zone=NARROW).item() > before + 1
    assert memory_of(model).found is searched


def test_an_example_batch_helps_where_no_input_can_be_guessed() -> None:
    """As in measuring: a tensor, a tuple or a dict, needed once."""

    class Picky(TinyGPT):
        def forward(self, ids: Any) -> Tensor:  # type: ignore[override]
            return super().forward(ids["ids"] - 1000)

    inputs = {"ids": torch.arange(8).repeat(2, 1) + 1000}
    model = Picky()
    with pytest.raises(ExampleInputError, match="batch=example_input"):
        balance_penalty(model)
    value = balance_penalty(model, safe_zone=NARROW, batch=(inputs,))
    assert torch.equal(balance_penalty(model, safe_zone=NARROW), value)
    other = copy.deepcopy(model)
    torch.testing.assert_close(balance_penalty(other, safe_zone=NARROW, batch={"ids": inputs}), value)


# --- What cannot be balanced ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"safe_zone": (2.0, 0.5)}, r"safe_zone=\(2.0, 0.5\): expected two ratios, 0 < low < high"),
        ({"safe_zone": 3}, "safe_zone=3: expected two ratios"),
        ({"linearization": "jacobian"}, "expected 'circuit' or 'paper' here; Jacobians are measured once"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    model, blocks = built("nanogpt")
    with pytest.raises(ConfigurationError, match=message):
        balance_penalty(model, blocks, **settings)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 0.0])
def test_a_block_that_cannot_be_measured_is_left_out(poison: float) -> None:
    """The mean is over the others, and nothing that is not finite enters the gradient."""
    model, blocks = built("nanogpt")
    expected = balance_penalty(copy.deepcopy(model), blocks[1:], safe_zone=NARROW).item()
    down = model.get_parameter(f"{blocks[0].name}.mlp.c_proj.weight")
    down.data.fill_(poison)
    value = balance_penalty(model, blocks, safe_zone=NARROW)
    assert value.item() == expected
    assert all(grad.isfinite().all() for grad in gradients(model, value).values())
    assert not gradients(model, balance_penalty(model, blocks, safe_zone=NARROW))[
        f"{blocks[0].name}.mlp.c_fc.weight"
    ].any()


@pytest.mark.parametrize(("poison", "reason"), [(math.nan, "weights are not finite"), (0.0, "the branch is zero")])
def test_where_nothing_can_be_measured_the_error_says_why(poison: float, reason: str) -> None:
    model, blocks = built("nanogpt")
    for block in blocks:
        model.get_parameter(f"{block.name}.mlp.c_proj.weight").data.fill_(poison)
    message = rf"ratio to balance \({blocks[0].name} mlp: {reason}.*print\(measure\(model\)\)"
    with pytest.raises(ConfigurationError, match=message):
        balance_penalty(model, blocks)


def test_a_dead_expert_does_not_matter() -> None:
    """A norm of zero is not the largest."""
    model, blocks = built("mixtral")
    with torch.no_grad():
        for block in blocks:
            model.get_parameter(f"{block.name}.mlp.experts.down_proj")[1] = 0
    value = balance_penalty(model, blocks, safe_zone=NARROW)
    assert value.item() == pytest.approx(twin(model, blocks, NARROW).item(), rel=1e-9)


def test_blocks_without_a_pair_of_branches_are_no_blocks_to_balance() -> None:
    """Layers of one branch, a mixer that no weights describe, and no blocks at all."""
    for name in ("mlp_only", "mamba"):
        model, blocks = built(name)
        with pytest.raises(ConfigurationError, match="the block has no such branch"):
            balance_penalty(model, blocks)
    with pytest.raises(ConfigurationError, match="blocks is empty"):
        balance_penalty(model, [])


def test_a_huge_branch_has_a_gradient() -> None:
    """Squares beyond the range of float32 are no reason to leave a block out."""
    model = example("nanogpt").build()
    blocks = search("nanogpt").blocks
    for block in blocks:
        model.get_parameter(f"{block.name}.mlp.c_proj.weight").data.mul_(1e25)
    reference = copy.deepcopy(model).double()
    found = gradients(model, balance_penalty(model, blocks))
    assert relative_error(found, gradients(reference, twin(reference, blocks, (0.5, 2.0)))) < 1e-4


def test_parametrized_weights_may_be_cached() -> None:
    """Inside ``parametrize.cached`` the model goes on to train on the weight that the penalty read."""
    model = example("weight_norm_weights").build()
    blocks = search("weight_norm_weights").blocks
    with parametrize.cached():
        value = balance_penalty(model, blocks, safe_zone=NARROW)
        assert model.get_submodule(blocks[0].name).mlp.c_fc.weight.requires_grad
    assert any(grad.any() for grad in gradients(model, value).values())
