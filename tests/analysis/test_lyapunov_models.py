"""Lyapunov exponents and covariance trajectories of whole models, against dense Jacobians and matrices by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from zoo import example
from zoo.example import HIDDEN, tokens
from zoo.gpt import MLP, CausalSelfAttention

from lightning_spectral import ResidualBlock, attach_scales, find_blocks
from lightning_spectral.analysis.lyapunov import empirical_exponents, lyapunov_exponents
from lightning_spectral.analysis.zero_data import CovarianceTrajectory, covariance_trajectory
from lightning_spectral.errors import ConfigurationError, ExampleInputError

SMALL = tokens(1, 4)


def built(name: str) -> nn.Module:
    return example(name).build().double()


def as_batch(model: nn.Module) -> Any:
    return {"input_ids": SMALL} if hasattr(model, "config") else SMALL


def whole_stack(model: nn.Module, first: str, last: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the last stream as a function of the first one, by running all of the model, and the first stream."""
    batch = as_batch(model)
    seen: dict[str, Tensor] = {}

    def run(x: Tensor | None) -> Tensor:
        entered: list[bool] = []

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if entered:
                return None
            entered.append(True)
            seen["first"] = args[0].detach()
            return None if x is None else (x, *args[1:])

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            seen["last"] = output if isinstance(output, Tensor) else output[0]

        handles = [
            model.get_submodule(first).register_forward_pre_hook(enter),
            model.get_submodule(last).register_forward_hook(leave),
        ]
        try:
            model(**batch) if isinstance(batch, dict) else model(batch)
        finally:
            for handle in handles:
                handle.remove()
        return seen["last"]

    run(None)
    return run, seen["first"]


def dense(model: nn.Module, first: str, last: str) -> Tensor:
    run, x = whole_stack(model, first, last)
    return torch.autograd.functional.jacobian(run, x, vectorize=True).reshape(x.numel(), x.numel())


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("gpt2", 3),
        ("llama", 3),
        ("gemma2", 3),
        ("gpt_neox", 3),
        ("torch_encoder_pre", 3),
        ("torch_encoder_post", 3),
        ("plain_post_norm", 3),
        ("shared_block", 4),
    ],
)
def test_exponents_are_those_of_the_dense_jacobian_of_the_whole_stack(name: str, depth: int):
    model = built(name)
    blocks = find_blocks(model, batch=as_batch(model)) if hasattr(model, "config") else find_blocks(model, batch=SMALL)
    J = dense(model, blocks[0].name, blocks[-1].name)
    exact = torch.linalg.svdvals(J).log()[:3] / depth
    swept = lyapunov_exponents(model, batch=as_batch(model), k=3, sweeps=24)
    assert swept.growth.shape == (depth, 3)
    torch.testing.assert_close(swept.exponents, exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(swept.growth.mean(0), swept.exponents)
    default = lyapunov_exponents(model, batch=as_batch(model), k=3)
    assert (default.exponents <= exact + 1e-9).all()
    assert (default.exponents > exact - 0.2).all()


def test_blocks_may_be_some_of_those_that_follow_each_other():
    model = built("llama")
    blocks = find_blocks(model, batch=as_batch(model))
    J = dense(model, blocks[1].name, blocks[2].name)
    exact = torch.linalg.svdvals(J).log()[:2] / 2
    swept = lyapunov_exponents(model, batch=as_batch(model), blocks=blocks[1:], k=2, sweeps=30)
    torch.testing.assert_close(swept.exponents, exact, rtol=0, atol=1e-6)
    with pytest.raises(ConfigurationError, match=r"'model.layers.2' does not read the stream that block 'model.layers"):
        lyapunov_exponents(model, batch=as_batch(model), blocks=[blocks[0], blocks[2]])


def test_precision_of_the_model_is_enough():
    wide = lyapunov_exponents(built("gpt2"), batch=as_batch(built("gpt2")), k=3)
    narrow = lyapunov_exponents(built("gpt2").float(), batch=as_batch(built("gpt2")), k=3)
    torch.testing.assert_close(narrow.exponents, wide.exponents, rtol=0, atol=1e-4)


class Stack(nn.Sequential):
    """Square maps one after the other, whose Jacobians are known."""

    def __init__(self, *matrices: Tensor) -> None:
        super().__init__(*(nn.Linear(len(A), len(A), bias=False, dtype=torch.float64) for A in matrices))
        for layer, A in zip(self, matrices, strict=True):
            layer.weight = nn.Parameter(A)


def named_blocks(model: nn.Module, *names: str) -> list[ResidualBlock]:
    names = names or tuple(name for name, _ in model.named_children())
    return [ResidualBlock(index, name, ()) for index, name in enumerate(names)]


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def test_known_stacks_have_known_exponents(generator: torch.Generator):
    model = Stack(*(gain * orthogonal(6, generator) for gain in (2.0, 0.5, 8.0)))
    x = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    arguments = {"blocks": named_blocks(model)}
    spectrum = lyapunov_exponents(model, batch=x, k=2, **arguments)
    torch.testing.assert_close(spectrum.growth, torch.tensor([[2.0, 0.5, 8.0]] * 2).double().log().T)
    both = empirical_exponents(model, batch=x, **arguments)
    assert both.gradient == pytest.approx(2 * math.log(8.0) / 3)
    assert both.angle == pytest.approx(0, abs=1e-6)
    assert both.depth == 3


def test_angles_and_gradients_are_those_of_the_dense_jacobian():
    model = built("gpt2")
    J = dense(model, "transformer.h.0", "transformer.h.2")
    run, x = whole_stack(model, "transformer.h.0", "transformer.h.2")
    both = empirical_exponents(model, batch=as_batch(model), seed=3)
    generator = torch.Generator().manual_seed(3)
    step, functional = (torch.randn(x.shape, generator=generator, dtype=torch.float64).flatten() for _ in range(2))

    def angle(at: Tensor, direction: Tensor) -> float:
        """1 − cos of two vectors that are about to be equal."""
        at = at.detach().flatten()
        across = direction - at * (at @ direction) / (at @ at)
        return float((across @ across) / (at @ at) / 2)

    assert both.angle == pytest.approx(math.log(angle(run(x), J @ step) / angle(x, step)) / 3, abs=2e-3)
    squares = float((J.mT @ functional).square().sum() / functional.square().sum())
    assert both.gradient == pytest.approx(math.log(squares) / 3, abs=1e-9)
    assert empirical_exponents(model, batch=as_batch(model), seed=3) == both
    assert empirical_exponents(model, batch=as_batch(model), seed=4) != both


def test_without_a_batch_one_is_guessed_and_the_seed_decides():
    model = example("gpt2").build()
    one, other = lyapunov_exponents(model, k=2), lyapunov_exponents(model, k=2)
    assert torch.equal(one.growth, other.growth)
    assert not torch.equal(one.growth, lyapunov_exponents(model, k=2, seed=1).growth)


@pytest.mark.parametrize("name", ["gpt2", "torch_encoder_pre", "plain_dropout"])
@pytest.mark.parametrize("measurement", [lyapunov_exponents, empirical_exponents])
def test_a_model_in_training_is_left_as_it_was(name: str, measurement: Callable[..., Any]):
    model = example(name).build().train()
    next(iter(model.children())).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.register_buffer("extra", torch.zeros(1))
    model.register_forward_pre_hook(lambda module, args: module.extra.add_(1) and None)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    streams, batch = torch.get_rng_state(), as_batch(model)
    given = copy.deepcopy(batch)
    measurement(model, batch=batch)
    assert torch.equal(torch.get_rng_state(), streams)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(batch, given, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all((parameter.grad == 1).all() and parameter.requires_grad for parameter in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_dropout_is_off_and_the_surroundings_do_not_matter():
    model = example("plain_dropout").build()
    expected = lyapunov_exponents(model, batch=SMALL, k=2).growth
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = lyapunov_exponents(model.train(), batch=SMALL, k=2).growth
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_batch_that_the_model_writes_to_is_left_as_it_was():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    batch = -torch.ones(2, 4)
    lyapunov_exponents(model, batch=batch, blocks=named_blocks(model, "1"), k=1)
    assert (batch == -1).all()


def test_a_padded_batch_does_not_take_the_fast_path_through_nested_tensors():
    layer = nn.TransformerEncoderLayer(HIDDEN, 4, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).requires_grad_(False).eval()
    stream = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    batch = {"src": stream, "src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}
    found = lyapunov_exponents(model, batch=batch, blocks=named_blocks(model, "layers.0", "layers.1"), k=2)
    assert found.growth.shape == (2, 2)
    assert found.growth.isfinite().all()


class Changing(nn.Linear):
    """Returns something else every time."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * super().forward(x)


class Refusing(nn.Linear):
    """Can be called once."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise ValueError("once only")
        return super().forward(x)


class Making(nn.Linear):
    """Makes the stream instead of continuing it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., None]


class Lying(torch.autograd.Function):
    """Doubles, and says that it does not."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Misleading(nn.Linear):
    """Has a derivative backward that is not the derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return Lying.apply(super().forward(x))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            Changing(4, 4),
            "block '1' cannot be called alone on the stream that it read: called again, it returns another",
        ),
        (Refusing(4, 4), "block '1' cannot be called alone on the stream that it read: ValueError: once only"),
        (Misleading(4, 4), "block '1' cannot be called alone .* its derivatives forward and backward are not the same"),
        (Making(4, 4), "block '1' cannot be called alone .* no argument has the shape of a result"),
    ],
)
def test_a_block_that_cannot_be_called_alone_is_named(block: nn.Module, message: str):
    model = nn.Sequential(nn.Linear(4, 4), block)
    with pytest.raises(ConfigurationError, match=message):
        lyapunov_exponents(model, batch=torch.ones(2, 4), blocks=named_blocks(model), k=1)


def test_stacks_and_containers_that_have_no_one_stream_are_refused_by_name():
    two = example("t5")
    model = two.build()
    with pytest.raises(
        ConfigurationError, match=r"'decoder.block.0' does not read .* block 'encoder.block.1' returned"
    ):
        lyapunov_exponents(model, batch=two.inputs(model)[1])
    listed = example("pairs_in_the_parent")
    model = listed.build()
    message = r"only modules that are called have a Jacobian, and this pass does not call 'body.layers.0', 'body"
    with pytest.raises(ConfigurationError, match=message):
        lyapunov_exponents(model, batch=listed.inputs(model)[0])
    with pytest.raises(ConfigurationError, match="this pass does not call any block"):
        lyapunov_exponents(nn.Linear(2, 2), batch=torch.ones(1, 2), blocks=[])


def test_a_model_that_cannot_be_run_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        ExampleInputError, match=r"the model could not be run; pass a `batch`. Tried:\n  .*RuntimeError"
    ):
        lyapunov_exponents(model, batch=torch.ones(1, 3), blocks=named_blocks(model))
    with pytest.raises(ConfigurationError, match="k=5: expected at most 4"):
        lyapunov_exponents(model, batch=torch.ones(1, 4), blocks=named_blocks(model), k=5)


def naive(matrices: list[Tensor]) -> dict[str, list[float]]:
    """The same numbers from the formed product, in float64."""
    P = torch.eye(HIDDEN, dtype=torch.float64)
    found: dict[str, list[float]] = {"effective_rank": [], "effective_rank_sigma": [], "log_condition": [], "gain": []}
    for A in matrices:
        P = A @ P
        sigma = torch.linalg.svdvals(P)
        for name, power in (("effective_rank", 2), ("effective_rank_sigma", 1)):
            p = sigma**power / (sigma**power).sum()
            found[name].append(float(torch.exp(-(p * p.log()).sum())))
        found["log_condition"].append(2 * float((sigma[0] / sigma[-1]).log()))
        found["gain"].append(float(torch.linalg.matrix_norm(A, ord=2)))
    return found


def assert_same(trajectory: CovarianceTrajectory, matrices: list[Tensor]) -> None:
    for name, values in naive(matrices).items():
        assert getattr(trajectory, name) == pytest.approx(values, rel=1e-6), name
    assert not any(trajectory.at_floor)
    assert not trajectory.skipped


def gpt2_paper(block: Any) -> Tensor:
    return (block.mlp.c_fc.weight @ block.mlp.c_proj.weight + block.attn.c_proj.weight).mT


def gpt2_circuit(block: Any) -> Tensor:
    mlp = block.ln_2.weight[:, None] * block.mlp.c_fc.weight @ block.mlp.c_proj.weight
    value = block.attn.c_attn.weight[:, 2 * HIDDEN :]
    return (mlp + block.ln_1.weight[:, None] * value @ block.attn.c_proj.weight).mT


def llama_paper(block: Any) -> Tensor:
    return block.mlp.down_proj.weight @ block.mlp.up_proj.weight + block.self_attn.o_proj.weight


def squared(block: Any) -> Tensor:
    output = block.self_attn.o_proj.weight
    return block.mlp.down_proj.weight @ block.mlp.up_proj.weight + output @ output.mT


@pytest.mark.parametrize(
    ("name", "layers", "linearization", "branches"),
    [
        ("gpt2", "transformer.h", "paper", gpt2_paper),
        ("gpt2", "transformer.h", "circuit", gpt2_circuit),
        ("llama", "model.layers", "paper", llama_paper),
    ],
)
def test_a_trajectory_is_that_of_the_matrices_by_hand(
    name: str, layers: str, linearization: Any, branches: Callable[[Any], Tensor]
):
    model = built(name)
    stack = model.get_submodule(layers)
    trajectory = covariance_trajectory(model, linearization=linearization)
    assert trajectory.names == tuple(f"{layers}.{index}" for index in range(3))
    assert trajectory.linearization == linearization
    assert_same(trajectory, [torch.eye(HIDDEN).double() + branches(block).detach() for block in stack])


def test_an_output_matrix_that_is_not_square_is_squared_as_in_the_paper():
    model = built("llama")
    for block in model.model.layers:
        generator = torch.Generator().manual_seed(0)
        block.self_attn.o_proj.weight = nn.Parameter(torch.randn(HIDDEN, 48, generator=generator).double() / 9)
    blocks = find_blocks(built("llama"))
    stack = model.model.layers
    matrices = [torch.eye(HIDDEN).double() + squared(block).detach() for block in stack]
    assert_same(covariance_trajectory(model, blocks, linearization="paper"), matrices)


def test_gauges_move_the_paper_and_not_the_circuit():
    model = built("llama")
    blocks = find_blocks(model)
    before = {rule: covariance_trajectory(model, blocks, linearization=rule) for rule in ("paper", "circuit")}
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight *= 10
            block.self_attn.v_proj.weight /= 10
    after = {rule: covariance_trajectory(model, blocks, linearization=rule) for rule in ("paper", "circuit")}
    assert after["circuit"].effective_rank == pytest.approx(before["circuit"].effective_rank, rel=1e-9)
    assert after["circuit"].gain == pytest.approx(before["circuit"].gain, rel=1e-9)
    assert after["paper"].gain[0] > 3 * before["paper"].gain[0]


class Layer(nn.Module):
    """A layer of one branch."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(HIDDEN), branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


def test_pairs_of_layers_of_one_branch_have_the_exponents_of_blocks_of_two():
    torch.manual_seed(0)
    layers = [Layer(kind()) for _ in range(2) for kind in (CausalSelfAttention, MLP)]
    flat = nn.Sequential(*layers).double()
    whole = nn.Sequential(nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])).double()
    x = torch.randn(1, 4, HIDDEN, dtype=torch.float64)
    assert [block.name for block in find_blocks(flat, batch=x)] == ["0 + 1", "2 + 3"]
    pairs, blocks = (lyapunov_exponents(model, batch=x, k=4, sweeps=8) for model in (flat, whole))
    assert (2 * pairs.exponents).tolist() == pytest.approx(blocks.exponents.tolist(), rel=1e-5)


def test_pairs_of_branches_that_no_module_adds_have_no_jacobian_alone():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([CausalSelfAttention(), MLP()])

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = x + part(x)
            return x

    x = torch.randn(1, 4, HIDDEN)
    with pytest.raises(
        ConfigurationError, match=r"block 'parts\.1' does not read the stream that block 'parts\.0' retu"
    ):
        lyapunov_exponents(Flat(), batch=x)


def test_blocks_of_another_model_are_refused():
    with pytest.raises(
        ConfigurationError, match=r"Linear has no module 'layers\.7': pass blocks that were found in it"
    ):
        lyapunov_exponents(nn.Linear(4, 4), batch=torch.randn(1, 4), blocks=[ResidualBlock(0, "layers.7", ())])


def test_scales_that_were_attached_since_the_blocks_were_found_count():
    model = built("gpt2")
    blocks = find_blocks(model)
    before = covariance_trajectory(model, blocks, linearization="paper")
    for scale in attach_scales(model, blocks).parameters():
        nn.init.constant_(scale, -20.0)  # ln of the scale
    after = covariance_trajectory(model, blocks, linearization="paper")
    assert before.gain[0] > 1.5
    assert after.gain == pytest.approx([1.0] * 3, abs=1e-6)
    assert after.effective_rank == pytest.approx([float(HIDDEN)] * 3, abs=1e-6)


def test_a_norm_behind_the_branch_makes_its_scale_meaningless():
    model = built("gemma2")
    before = covariance_trajectory(model, linearization="circuit")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight *= 10
            block.mlp.down_proj.weight *= 10
    after = covariance_trajectory(model, linearization="circuit")
    assert after.effective_rank == pytest.approx(before.effective_rank, rel=1e-6)


def test_blocks_without_a_matrix_are_named_or_stand_as_the_identity():
    model = example("llama").build()
    blocks = find_blocks(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ConfigurationError, match="blocks without a weight linearization") as refused:
        covariance_trajectory(model, blocks, linearization="paper")
    assert str(refused.value) == (
        "blocks without a weight linearization (pass the other blocks as `blocks`, or missing='identity' to leave "
        "these out):\n  model.layers.1: mlp: weights are not finite (NaN or Inf)"
    )
    left = covariance_trajectory(model, blocks, linearization="paper", missing="identity")
    assert left.skipped == ("model.layers.1",)
    assert left.effective_rank[1] == pytest.approx(left.effective_rank[0], rel=1e-9)
    assert left.gain[1] == 1
    others = covariance_trajectory(model, [blocks[0], blocks[2]], linearization="paper")
    assert left.effective_rank[2] == pytest.approx(others.effective_rank[1], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mixtral",
            r"\(all of them\):\n  model.layers.0: mlp: 4 experts, whose sum is no single matrix\n  model",
        ),
        (
            "mamba",
            r"\(all of them\):\n  backbone.layers.0: attention: a token mixer that is not attention has no weight",
        ),
    ],
)
def test_a_model_without_any_matrix_is_refused(name: str, message: str):
    model = example(name).build()
    for missing in ("raise", "identity"):
        with pytest.raises(ConfigurationError, match="blocks without a weight linearization " + message):
            covariance_trajectory(model, batch=example(name).inputs(model)[1], missing=missing)  # type: ignore[arg-type]


def test_other_arguments_that_cannot_be_used_are_refused():
    model = example("gpt2").build()
    with pytest.raises(ConfigurationError, match="linearization='jacobian': expected 'circuit' or 'paper'"):
        covariance_trajectory(model, linearization="jacobian")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="missing='skip': expected 'raise' or 'identity'"):
        covariance_trajectory(model, missing="skip")  # type: ignore[arg-type]
    pyramid = example("pyramid")
    model = pyramid.build()
    with pytest.raises(ConfigurationError, match=r"one width, got stages.0.blocks.0 16, .* 32: pass `blocks` of one"):
        covariance_trajectory(model, batch=pyramid.inputs(model)[0])
