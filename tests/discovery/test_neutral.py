"""Finding blocks changes nothing: weights, buffers, gradients, hooks, flags and random streams are as before."""

from __future__ import annotations

import copy
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import odd
import pytest
import restless
import torch
from lightning.fabric import Fabric
from odd import Cache, Odd
from pictures import assert_same_pictures, pictures
from restless import Restless, fresh
from tiny_run import LitGPT
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from zoo import examples

from lightning_spectral import attach_scales, balance_penalty, find_blocks, fuse_scales, measure
from lightning_spectral.analysis import lyapunov_exponents
from lightning_spectral.discovery.find import blocks_in_calls
from lightning_spectral.errors import BlocksNotFoundError, ConfigurationError, ExampleInputError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
# One of each way to build, wrap, train and write.
NEUTRAL = [
    member.name
    for member in examples()
    if not member.survey
    or member.name in ("gpt2", "falcon_7b", "mixtral", "qwen3_next", "gemma2", "deepseek_v3", "dbrx", "rwkv", "t5")
]


def random_streams() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a search could disturb, tensors as copies."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "names": [name for name, _ in model.named_modules(remove_duplicate=False)],
        "identities": [(name, id(tensor), tensor.data_ptr()) for name, tensor in tensors],
        "values": [tensor.detach().clone() for _, tensor in tensors],
        "gradients": [None if tensor.grad is None else tensor.grad.clone() for _, tensor in tensors],
        "requires_grad": [tensor.requires_grad for _, tensor in tensors],
        "training": [module.training for module in model.modules()],
        "hooks": [[len(getattr(module, hooks)) for hooks in HOOKS] for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return isinstance(after, Tensor) and before.dtype == after.dtype and torch.equal(before, after)
    if isinstance(before, list):
        return len(before) == len(after) and all(map(same, before, after))
    return bool(before == after)


def assert_untouched(model: nn.Module, search: Callable[[], Any]) -> None:
    before, streams = state(model), random_streams()
    search()
    after = state(model)
    for what in before:
        assert same(before[what], after[what]), what
    assert random_streams() == streams


@pytest.mark.zoo
@pytest.mark.parametrize("name", NEUTRAL)
def test_a_search_leaves_a_model_in_training_as_it_was(name: str) -> None:
    """In train mode, with gradients, with some modules in eval mode."""
    member = next(member for member in examples() if member.name == name)
    model = member.build().train()
    next(iter(model.children()), model).eval()
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    args, kwargs = member.inputs(model)
    given = copy.deepcopy([args, kwargs])

    def search() -> None:
        try:
            find_blocks(model, batch=args or kwargs)
        except BlocksNotFoundError:
            assert member.expected_refusal

    assert_untouched(model, search)
    for tensor, copied in zip(flat([args, kwargs]), flat(given), strict=True):
        assert torch.equal(tensor, copied)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in flat(item)]


class Counting(nn.Module):
    """A layer that writes into its buffers, its own parameter and the global random streams in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.BatchNorm1d(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(16),
            nn.Linear(16, 24),
            nn.Dropout(0.5),
            nn.GELU(),
            parametrizations.spectral_norm(nn.Linear(24, 16)),
        )
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(4, 16))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.cache[1:3].mul_(0.5).add_(x.detach().mean((0, 1)))
        self.cache[0] = torch.rand(16)
        self.scale.data.copy_(self.scale.data * 0.9)
        random.random()
        np.random.rand()
        h = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.scale * self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(x) * (1 + 0 * torch.randn(()))


@pytest.mark.parametrize("training", [True, False])
def test_what_a_forward_writes_is_undone(training: bool) -> None:
    """Counters, caches, running statistics, power iterations and even parameters that a forward changes."""
    torch.manual_seed(0)
    model = nn.Sequential(Counting(), Counting()).train(training)
    x = torch.randn(2, 5, 16)
    assert_untouched(model, lambda: find_blocks(model, batch=x))
    assert_untouched(model, lambda: find_blocks(model))
    assert [block.name for block in find_blocks(model, batch=x)] == ["0", "1"]


def test_a_batch_that_a_forward_adds_to_in_place_is_put_back() -> None:
    """The batch is the caller's: the next training step wants it as it was."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))

        def forward(self, x: Tensor) -> Tensor:
            x += self.mlp(x)
            return x

    model = nn.Sequential(InPlace(), InPlace())
    batch = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    before = batch.clone()
    assert [block.verified for block in find_blocks(model, batch=batch)] == [True, True]
    assert torch.equal(batch, before)


def test_a_search_that_fails_leaves_the_model_as_it_was() -> None:
    """Also when the forward raises in its middle."""

    class Failing(Counting):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("no way")

    model = nn.Sequential(Counting(), Failing()).train()

    def search() -> None:
        with pytest.raises(ExampleInputError, match="ValueError: no way"):
            find_blocks(model, batch=torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)))

    assert_untouched(model, search)


def test_a_search_does_not_depend_on_who_calls_it() -> None:
    """Under no_grad, inference mode and autocast, in train mode and in eval mode the answer is the same."""
    torch.manual_seed(0)
    model = nn.Sequential(Counting(), Counting())
    x = torch.randn(2, 5, 16)
    expected = find_blocks(model.eval(), batch=x)
    assert all(block.verified for block in expected)
    assert find_blocks(model.train(), batch=x) == expected
    with torch.no_grad():
        assert find_blocks(model, batch=x) == expected
    with torch.inference_mode():
        assert find_blocks(model, batch=x) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert find_blocks(model, batch=x) == expected


@pytest.mark.parametrize("name", ["plain_dropout", "spectral_norm_weights", "checkpointed", "experts_looped"])
def test_a_search_between_forward_and_backward_changes_no_gradient(name: str) -> None:
    """The graph of a training step that is under way survives."""
    member = next(member for member in examples() if member.name == name)
    args, _ = member.inputs(member.build())

    def gradients(searched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = member.build().train()
        loss = model(*args).square().mean()
        if searched:
            find_blocks(model, batch=args)
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    with torch.random.fork_rng(devices=[]):
        assert same(gradients(True), gradients(False))


def test_a_search_between_backward_and_step_changes_no_training() -> None:
    """Two runs, one of them searched after every backward: weights and random stream stay equal, bit by bit."""

    def trained(searched: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Counting(), Counting())
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 5, 16)).square().mean().backward()
            if searched:
                find_blocks(model)
            optimizer.step()
        return [tensor.detach() for tensor in model.state_dict().values()], torch.get_rng_state()

    with torch.random.fork_rng(devices=[]):
        watched, alone = trained(True), trained(False)
    assert same([*watched[0], watched[1]], [*alone[0], alone[1]])


IDS = torch.arange(16).view(2, 8)


def scaled_and_back(model: nn.Module) -> None:
    attach_scales(model)
    fuse_scales(model)


def exponents(model: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match="called again, it returns another stream"):
        lyapunov_exponents(model, batch=IDS)


FUNCTIONS: dict[str, Callable[[nn.Module], Any]] = {
    "find_blocks": find_blocks,
    "find_blocks on a batch": lambda model: find_blocks(model, batch=IDS),
    "blocks_in_calls": lambda model: blocks_in_calls(model, [(model, (IDS,), {})]),
    "measure": measure,
    "measure Jacobians": lambda model: measure(model, find_blocks(model)[:1], batch=IDS, linearization="jacobian"),
    "balance_penalty": balance_penalty,
    "attach_scales and fuse_scales": scaled_and_back,
    "lyapunov_exponents": exponents,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_whatever_python_keeps_is_as_before(name: str) -> None:
    """Generators, counters, memories, caches, closures, globals: in the middle of a step, whose graph survives."""
    model = fresh()
    loss = model.loss(torch.cat([IDS, IDS[:, :1]], 1))
    before, streams = pictures(model, *restless.outside()), random_streams()
    FUNCTIONS[name](model)
    assert_same_pictures(before, pictures(model, *restless.outside()))
    assert random_streams() == streams
    loss.backward()


def test_the_pictures_see_what_a_pass_does() -> None:
    """Else the tests above could not fail."""
    model = fresh()
    before = pictures(model, *restless.outside())
    model(IDS)
    after = pictures(model, *restless.outside())
    changed = [one != other for one, other in zip(before, after, strict=True)]
    assert all(changed)


def test_a_pass_that_fails_at_its_end_is_undone_too() -> None:
    class Failing(Restless):
        def forward(self, ids: Tensor) -> Tensor:
            super().forward(ids)
            raise ValueError("no way")

    model = fresh(Failing)
    before, streams = pictures(model, *restless.outside()), random_streams()
    with pytest.raises(ExampleInputError, match="ValueError: no way"):
        find_blocks(model, batch=IDS)
    assert_same_pictures(before, pictures(model, *restless.outside()))
    assert random_streams() == streams


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("training", [True, False])
def test_odd_places_are_put_back_and_so_are_the_arguments(training: bool) -> None:
    """Caches that are passed, arguments that are popped, layers that change their class, hooks on tensors."""
    torch.manual_seed(0)
    model, x, cache, batch = Odd().train(training), torch.randn(2, 5, 16), Cache(), {"shift": torch.ones(1)}
    before = pictures(model, x, cache, batch, *odd.outside())
    assert len(find_blocks(model, batch=(x, cache))) == 1
    assert_same_pictures(before, pictures(model, x, cache, batch, *odd.outside()))
    assert not odd.WRITTEN


def test_hooks_of_all_modules_run_and_are_undone() -> None:
    """Those that torch calls for every module there is."""
    seen: list[str] = []
    model = nn.Sequential(Counting())
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append("called"))
    try:
        find_blocks(model, batch=torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)))
        assert seen == []
        model(torch.zeros(2, 5, 16))
        assert seen
    finally:
        handle.remove()


def test_parametrizations_of_the_users_are_read_without_a_trace() -> None:
    """They count, draw and write whenever a weight is read."""

    class Noise(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.count, self.generator = 0, torch.Generator()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, weight: Tensor) -> Tensor:
            Noise.calls += 1
            self.count += 1
            self.seen += weight.detach().mean()
            return weight * (1 + 0.1 * torch.rand_like(weight) * torch.rand(weight.shape, generator=self.generator))

    model, x = nn.Sequential(Counting(), Counting()), torch.zeros(2, 5, 16)
    parametrize.register_parametrization(model[0].mlp[1], "weight", Noise())
    blocks = find_blocks(model, batch=x)
    before, streams, calls = pictures(model), random_streams(), Noise.calls
    assert all(layer.mlp_norm for layer in measure(model, blocks))
    assert_same_pictures(before, pictures(model))
    assert (random_streams(), Noise.calls) == (streams, calls)


def test_what_fabric_would_log_reaches_nobody() -> None:
    """A LightningModule that Fabric has set up logs through it, and through loggers that it holds itself."""

    class Logging(LitGPT):
        def forward(self, ids: Tensor) -> Tensor:
            logits = self.model(ids)
            self.log("size", logits.detach().mean())
            self.fabric.log_dict({"half": 0.5})
            return logits

    fabric, module = Fabric(accelerator="cpu", loggers=odd.Writer()), Logging()
    wrapped = fabric.setup_module(module)
    before = pictures(module)
    assert len(find_blocks(wrapped, batch=IDS)) == len(find_blocks(module, batch=IDS)) == 3
    assert_same_pictures(before, pictures(module))
    assert odd.WRITTEN == []
    wrapped(IDS)
    assert len(odd.WRITTEN) == 2
    odd.WRITTEN.clear()


class Drawing(nn.Module):
    """A block that draws random numbers that depend on its stream, also in evaluation mode."""

    def __init__(self, draw: Callable[[Tensor, torch.Generator], Tensor]) -> None:
        super().__init__()
        self.attention, self.mlp = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)
        self.draw, self.generator = draw, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.draw(x, self.generator) * self.mlp(x)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x, generator: torch.bernoulli(x[..., :1].sigmoid()),
        lambda x, generator: (x[..., :1] + torch.rand_like(x[..., :1])).sigmoid(),
        lambda x, generator: (0 * x[..., :1]).uniform_(),
        lambda x, generator: (0 * x[..., :1]).uniform_(generator=generator),
        lambda x, generator: torch.dropout(x[..., :1], 0.5, train=True),
    ],
    ids=["bernoulli", "rand_like", "uniform_", "uniform_ of its own generator", "dropout"],
)
def test_random_numbers_of_the_stream_are_not_drawn_from_the_run(draw: Callable[..., Tensor]) -> None:
    """Probes run the operations of a pass again, those that draw random numbers as well."""
    model = nn.Sequential(Drawing(draw), Drawing(draw))
    x = torch.randn(2, 7, 16)
    owned = [module.generator.get_state() for module in model]
    found = []
    assert_untouched(model, lambda: found.append(find_blocks(model, batch=x)))
    assert_untouched(model, lambda: measure(model, found[0], linearization="jacobian", batch=x))
    assert [module.generator.get_state().equal(before) for module, before in zip(model, owned, strict=True)] == [
        True
    ] * 2
    assert find_blocks(model, batch=x) == found[0]


def test_what_a_pass_imports_stays_imported() -> None:
    """Code of the user can hold ``sys.modules``; a module that is taken out of it would be imported a second time."""
    name = "imported_in_a_pass"

    class Importing(Drawing):
        def forward(self, x: Tensor) -> Tensor:
            loaded.setdefault(name, types.ModuleType(name))
            return super().forward(x)

    loaded = sys.modules
    model = nn.Sequential(*(Importing(lambda x, generator: x) for _ in range(2)))
    try:
        find_blocks(model, batch=torch.randn(2, 7, 16))
        assert name in sys.modules
    finally:
        sys.modules.pop(name, None)
