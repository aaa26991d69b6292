"""Run by ``test_sharded.py`` in two and in four processes: every case, and what this process saw.

A case measures a model in one piece, shards it, and measures it again with the blocks that were found before.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from processes import join, leave, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import example

from lightning_spectral import (
    ExactSVD,
    ResidualBlock,
    attach_scales,
    balance_init_,
    balance_penalty,
    find_blocks,
    measure,
)
from lightning_spectral.linalg import Adjoint, Diagonal, Matrix, Product, Sharded, frobenius_norm
from lightning_spectral.linalg.sharding.flattened import is_flattened
from lightning_spectral.linalg.sharding.tiles import stand_in
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.weights.model import ModelWeights

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
CASES: dict[int, dict[str, Callable[[DeviceMesh], Any]]] = {2: {}, 4: {}}
Case = Callable[[DeviceMesh], Any]

LAYOUTS = (
    "qkv_per_head",
    "qkv_per_channel",
    "qkv_grouped_interleaved",
    "qkv_grouped_tiled",
    "qkv_conv1d_columns",
    "latent_attention_norm",
    "gate_up",
    "gate_up_interleaved",
    "experts_out_in",
    "experts_in_out",
    "experts_modules_shared",
    "llama",
    "gemma2",
    "mixtral",
)


def case(*worlds: int) -> Callable[[Case], Case]:
    """Register a case for these numbers of processes."""

    def register(function: Case) -> Case:
        for world in worlds:
            CASES[world][function.__name__] = function
        return function

    return register


class Attention(nn.Module):
    """Causal self-attention with one fused projection and fewer key/value heads than query heads."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * groups) * self.size)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        split = [self.heads * self.size, self.groups * self.size, self.groups * self.size]
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in self.qkv(x).split(split, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups != self.heads)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, groups)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small language model; the head shares its weight with the embedding."""

    def __init__(self, width: int = 160, heads: int = 5, groups: int = 5, hidden: int = 320, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(61, width)
        self.layers = nn.ModuleList(Block(width, heads, groups, hidden) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 61, bias=False)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            for norm in (module for module in self.modules() if isinstance(module, nn.LayerNorm)):
                norm.weight.add_(0.3 * torch.randn(width))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids to logits."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Traffic(TorchDispatchMode):
    """Notes the collectives that run: their name and the elements that each process contributes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note it."""
        local = ("wait_tensor", "_wrap_tensor_autograd")
        if func.namespace in ("c10d", "_c10d_functional") and func._opname not in local:
            self.seen.append((func._opname, args[0].numel()))
        return func(*args, **(kwargs or {}))


def numbers(measurement: Any) -> dict[str, Any]:
    """Return what a measurement says, without the time that it took."""
    return {key: value for key, value in measurement.to_dict().items() if key != "seconds"}


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Change every weight a little, the same in one piece and in shards."""
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.sin(97.0 * parameter) * parameter)


def compared(
    build: Callable[[], nn.Module],
    shard: Callable[[nn.Module], Any],
    find: Callable[[nn.Module], tuple[ResidualBlock, ...]] = find_blocks,
    change: Callable[[nn.Module], None] = move,
    **settings: Any,
) -> dict[str, Any]:
    """Measure cold, after a change of the weights and once more: a model in one piece, and one that is sharded."""
    plain, model = build(), build()
    blocks = find(plain)
    model = shard(model) or model
    assert is_flattened(model) or any(isinstance(parameter, DTensor) for parameter in model.parameters())
    result: dict[str, Any] = {}
    for name, item in (("plain", plain), ("sharded", model)):
        meter = Meter(ModelWeights(item), blocks, **settings)
        cold = meter.measure()
        change(item)
        with Traffic() as traffic:
            warm = meter.measure(1)
        result[name] = [numbers(cold), numbers(warm), numbers(meter.measure(2))]
        result[f"{name}_traffic"] = traffic.seen
    names = {factor.parameter for block in blocks for branch in block.branches for factor in branch.factors}
    factors = [parameter for name, parameter in plain.named_parameters() if name in names]
    weights = [parameter.numel() for parameter in factors if parameter.ndim > 1]
    return result | {"smallest_weight": min(weights)}


def in_blocks(mesh: DeviceMesh, *, root: bool = True, **settings: Any) -> Callable[[nn.Module], Any]:
    """Shard every layer by itself, and the model around them."""

    def shard(model: nn.Module) -> None:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, **settings)
        if root:
            fully_shard(model, mesh=mesh, **settings)

    return shard


def tensor_parallel(mesh: DeviceMesh, *names: str) -> Callable[[nn.Module], Any]:
    """Cut the heads and the hidden channels, or the layers of these names only."""
    plan = {
        "attention.qkv": ColwiseParallel(),
        "attention.out": RowwiseParallel(),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
    }

    def shard(model: nn.Module) -> None:
        for layer in model.layers:
            parallelize_module(layer, mesh, {name: plan[name] for name in names or plan})

    return shard


def flat(mesh: DeviceMesh, *units: type[nn.Module], **settings: Any) -> Callable[[nn.Module], nn.Module]:
    """Flatten every unit of these kinds, and what is left, as FSDP1 does."""
    where = {"device_mesh": mesh, "device_id": torch.device("cpu"), "use_orig_params": True} | settings
    return lambda model: FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy(set(units)), **where)


def drifted(model: nn.Module) -> None:
    """Move what the second process has for itself, as rounding errors do in training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if RANK and not isinstance(parameter, DTensor):
                parameter.mul_(1 - 1e-6)


def with_scales() -> nn.Module:
    """Return a model with residual scales, all of them different."""
    model = GPT()
    attach_scales(model)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("log_scale"):
                parameter.fill_(0.01 * (i % 40))
    return model


def broken() -> nn.Module:
    """Return a model with numbers that are not finite, in places that only the last process holds."""
    model = GPT()
    with torch.no_grad():
        model.layers[0].up.weight[-1, 3] = torch.nan
        model.layers[1].attention.out.weight[-1, -1] = -torch.inf
    return model


def sound_blocks(model: nn.Module) -> tuple[ResidualBlock, ...]:
    """Return the blocks of a model like :func:`broken`."""
    return find_blocks(GPT())


def by_columns(parameter: nn.Parameter) -> Shard:
    """Cut matrices along their last dimension."""
    return Shard(parameter.ndim - 1)


def train(model: nn.Module) -> None:
    """Take three steps, the same on every process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@case(2)
def blocks_without_root(mesh: DeviceMesh) -> Any:
    """Each block is its own root."""
    return compared(GPT, in_blocks(mesh, root=False))


@case(2)
def blocks_and_root_trained(mesh: DeviceMesh) -> Any:
    """With a root around them, and weights that are trained between the measurements."""
    return compared(GPT, in_blocks(mesh), change=train)


@case(2)
def uneven(mesh: DeviceMesh) -> Any:
    """No dimension divides by two; grouped queries."""
    return compared(lambda: GPT(85, 5, 1, 171), in_blocks(mesh))


@case(2)
def flat_trained(mesh: DeviceMesh) -> Any:
    """Each block flattened for itself, with weights that are trained between the measurements."""
    return compared(GPT, flat(mesh, Block), change=train)


@case(2)
def flat_uneven(mesh: DeviceMesh) -> Any:
    """Everything in one vector, that is cut somewhere in the middle of a row; of most weights a process has nothing."""
    return compared(lambda: GPT(85, 5, 1, 171), flat(mesh))


@case(2)
def flat_half_precision(mesh: DeviceMesh) -> Any:
    """Weights of 16 bits, under the other linearization; linear layers as units."""
    return compared(lambda: GPT().bfloat16(), flat(mesh, nn.Linear), linearization="paper")


@case(2)
def flat_scaled(mesh: DeviceMesh) -> Any:
    """With residual scales, each of which one process owns."""
    return compared(with_scales, flat(mesh, Block))


@case(2)
def flat_layouts(mesh: DeviceMesh) -> Any:
    """Fused, grouped, transposed and stacked weights of the zoo."""
    results = {}
    for name in LAYOUTS:
        member = example(name)
        model = member.build()
        args, kwargs = member.inputs(model)
        blocks = find_blocks(model, batch=args or kwargs)
        results[name] = compared(member.build, flat(mesh), lambda model, blocks=blocks: blocks)  # type: ignore[misc]
    return results


@case(2)
def flat_wide(mesh: DeviceMesh) -> Any:
    """A width at which a block of vectors is smaller than any weight."""
    return compared(lambda: GPT(384, 4, 4, 768, layers=1), flat(mesh))


@case(4)
def flat_groups(mesh: DeviceMesh) -> Any:
    """Two groups of processes that hold the same."""
    return compared(
        lambda: GPT(85, 5, 1, 171, 2), flat(mesh, Block, sharding_strategy=ShardingStrategy.HYBRID_SHARD), change=train
    )


@case(2)
def columns(mesh: DeviceMesh) -> Any:
    """Cut along the inputs."""
    return compared(lambda: GPT(84, 7, 7, 172), in_blocks(mesh, shard_placement_fn=by_columns))


@case(2)
def tensor_parallel_trained(mesh: DeviceMesh) -> Any:
    """Colwise and rowwise."""
    return compared(lambda: GPT(160, 4, 4, 320), tensor_parallel(mesh))


@case(2)
def drifting_apart(mesh: DeviceMesh) -> Any:
    """Attention in one piece, which is not quite the same on all processes; gains at a power of two."""

    def build(width: int) -> nn.Module:
        model = GPT(width, 4, 4, 2 * width)
        with torch.no_grad():
            for layer in model.layers:
                layer.norm1.weight.fill_(1.0)
                layer.norm2.weight.fill_(1.0)
            model.layers[1].up.weight.mul_(1e30)
        return model

    def shard(model: nn.Module) -> None:
        tensor_parallel(mesh, "up", "down")(model)
        drifted(model)

    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for layer in model.layers:
                layer.down.weight.mul_(1.01)

    return {str(width): compared(lambda width=width: build(width), shard, change=change) for width in (32, 160)}


@case(2)
def half_precision(mesh: DeviceMesh) -> Any:
    """Weights of 16 bits."""
    return compared(lambda: GPT().bfloat16(), in_blocks(mesh))


@case(2)
def paper(mesh: DeviceMesh) -> Any:
    """The other linearization."""
    return compared(lambda: GPT(groups=1), in_blocks(mesh), linearization="paper")


@case(2)
def exact(mesh: DeviceMesh) -> Any:
    """The dense solver."""
    return compared(lambda: GPT(80, layers=1), in_blocks(mesh), solver=ExactSVD())


@case(2)
def huge_and_tiny(mesh: DeviceMesh) -> Any:
    """Products out of the range of a float, of which a power of two is taken."""

    def build() -> nn.Module:
        model = GPT()
        with torch.no_grad():
            model.layers[0].up.weight.mul_(1e18)
            model.layers[0].down.weight.mul_(1e18)
            model.layers[1].up.weight.mul_(1e-20)
        return model

    return compared(build, in_blocks(mesh))


@case(2)
def not_finite(mesh: DeviceMesh) -> Any:
    """A number that only the last process holds."""
    return compared(broken, in_blocks(mesh), sound_blocks)


@case(2)
def flat_not_finite(mesh: DeviceMesh) -> Any:
    """The same in flattened weights."""
    return compared(broken, flat(mesh, nn.Linear), sound_blocks)


@case(2)
def scaled(mesh: DeviceMesh) -> Any:
    """With residual scales, each of which one process owns."""
    return compared(with_scales, in_blocks(mesh))


@case(2)
def inference(mesh: DeviceMesh) -> Any:
    """In inference mode, where ``Trainer.validate`` runs."""
    model = GPT()
    attach_scales(model)
    blocks = find_blocks(model)
    plain = measure(model, blocks)
    in_blocks(mesh)(model)
    with torch.inference_mode():
        sharded = measure(model, blocks)
    traffic = {"plain_traffic": [], "sharded_traffic": []}
    return {"plain": [numbers(plain)], "sharded": [numbers(sharded)]} | traffic


@torch.no_grad()
def fresh() -> nn.Module:
    """Return a model as nobody has trained it, out of balance."""
    model = GPT(160, 4, 4, 320)
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        norm.weight.fill_(1.0)
    model.layers[1].down.weight.mul_(3.0)
    return model


@case(2)
def balanced(mesh: DeviceMesh) -> Any:
    """Balanced initialization after sharding, and the parameters that it leaves."""
    results: dict[str, Any] = {}
    kinds = {"fsdp2": in_blocks(mesh), "tensor parallel": tensor_parallel(mesh), "fsdp1": flat(mesh, Block)}
    for name, shard in kinds.items():
        plain, model = fresh(), fresh()
        blocks = find_blocks(plain)
        model = shard(model) or model
        found = {
            kind: [numbers(balance_init_(item, blocks, **how)) for how in ({"target": 1.5}, {"gain": 2.0})]
            for kind, item in (("plain", plain), ("sharded", model))
        }
        pairs = zip(plain.parameters(), model.parameters(), strict=True)
        apart = [float((one - whole(two).view_as(one)).norm() / one.norm().clip(1e-9)) for one, two in pairs]
        traffic = {"plain_traffic": [], "sharded_traffic": []}
        results[name] = found | traffic | {"apart": max(apart)}
    return results


@case(2)
def layouts(mesh: DeviceMesh) -> Any:
    """Fused, grouped, transposed and stacked weights of the zoo, cut along both dimensions."""
    results = {}
    for name in LAYOUTS:
        member = example(name)
        model = member.build()
        args, kwargs = member.inputs(model)
        blocks = find_blocks(model, batch=args or kwargs)
        for word, settings in (("", {}), (" by columns", {"shard_placement_fn": by_columns})):
            results[name + word] = compared(
                member.build,
                lambda model, settings=settings: fully_shard(model, mesh=mesh, **settings),  # type: ignore[misc]
                lambda model, blocks=blocks: blocks,  # type: ignore[misc]
            )
    return results


@case(2)
def wide(mesh: DeviceMesh) -> Any:
    """A width at which a block of vectors is smaller than any weight."""
    return compared(lambda: GPT(384, 4, 4, 768, layers=1), in_blocks(mesh))


@case(2)
def wide_and_tensor_parallel(mesh: DeviceMesh) -> Any:
    """The same with heads and channels cut."""
    return compared(lambda: GPT(384, 4, 4, 768, layers=1), tensor_parallel(mesh))


def own_matrices(mesh: DeviceMesh) -> Callable[[nn.Module], Any]:
    """Cut the heads and the hidden channels of Hugging Face layers, whose projections are matrices of their own."""
    first = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    last = ("self_attn.o_proj", "mlp.down_proj")
    plan = {name: ColwiseParallel() for name in first} | {name: RowwiseParallel() for name in last}

    def shard(model: nn.Module) -> None:
        for layer in model.model.layers:
            parallelize_module(layer, mesh, plan)

    return shard


def own_model(kind: str) -> nn.Module:
    """Build two blocks whose heads and hidden channels are no multiples of the width."""
    settings = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings, **heads, pad_token_id=0, eos_token_id=1)
    return AutoModelForCausalLM.from_config(config)


@case(2)
def hidden_blocks_stay(mesh: DeviceMesh) -> Any:
    """No process reads what another one has computed, but for the sum behind each branch."""
    return {name: compared(partial(own_model, name), own_matrices(mesh)) for name in ("llama", "gemma2")}


@case(4)
def hidden_blocks_stay_in_their_row(mesh: DeviceMesh) -> Any:
    """The same inside of sharding, which cuts the rows of both matrices."""

    def shard(model: nn.Module) -> None:
        own_matrices(mesh["tp"])(model)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["dp"])

    return {name: compared(partial(own_model, name), shard) for name in ("llama", "gemma2")}


@case(4)
def both(mesh: DeviceMesh) -> Any:
    """Tensor parallelism inside, sharding around it."""

    def shard(model: nn.Module) -> None:
        tensor_parallel(mesh["tp"])(model)
        in_blocks(mesh["dp"])(model)

    return compared(lambda: GPT(160, 4, 4, 320, 2), shard)


@case(4)
def both_uneven(mesh: DeviceMesh) -> Any:
    """The same where nothing divides, and some processes hold nothing of the output projection's bias."""

    def shard(model: nn.Module) -> None:
        tensor_parallel(mesh["tp"])(model)
        in_blocks(mesh["dp"], root=False)(model)

    return compared(lambda: GPT(85, 5, 1, 171, 2), shard)


@case(4)
def replicated_groups(mesh: DeviceMesh) -> Any:
    """Two groups of processes that hold the same."""
    return compared(lambda: GPT(85, 5, 5, 171, 2), in_blocks(mesh))


def refused(call: Callable[[], Any]) -> str:
    """Return the message of the error that a call ends in."""
    try:
        return f"no error, but {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@case(2)
def outside(mesh: DeviceMesh) -> str:
    """A weight that belongs to the first process alone."""
    weight = distribute_tensor(torch.ones(4, 6), DeviceMesh("cpu", [0]), [Shard(0)])
    return refused(lambda: Sharded(weight).matmat(torch.ones(6, 1)).flatten().tolist())


@case(2)
def found(mesh: DeviceMesh) -> dict[str, bool]:
    """Whether a model that is sharded already has the blocks of a model in one piece, also after a pass."""
    shards = {
        "fully_shard": in_blocks(mesh),
        "fully_shard without root": in_blocks(mesh, root=False),
        "fully_shard on the meta device": in_blocks(mesh),
        "tensor parallel": tensor_parallel(mesh),
    }
    result = {}
    for name, shard in shards.items():
        model = GPT(80, 4, 4, layers=2)
        expected = find_blocks(model)
        hollow = "meta" in name
        shard(model.to("meta") if hollow else model)
        result[name] = find_blocks(model) == expected == find_blocks(model)
        if name != "tensor parallel" and not hollow:  # on a part of the heads, the attention of this model does not run
            model(torch.randint(0, 8, (2, 5), generator=torch.Generator().manual_seed(RANK)))
            result[f"{name}, after a pass"] = find_blocks(model) == expected
    return result


@case(2)
def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What cannot be done, in words, on every process."""
    model = GPT(80, layers=1)
    blocks = find_blocks(model)
    in_blocks(mesh, root=False)(model)
    parallel = GPT(80, 4, 4, layers=1)
    tensor_parallel(mesh)(parallel)
    together, nameless, computed = GPT(80, layers=1), GPT(80, layers=1), GPT(80, layers=1)
    parametrize.register_parametrization(computed.layers[0].up, "weight", nn.Identity())
    flattened, without_names = flat(mesh)(together), flat(mesh, use_orig_params=False)(nameless)
    whole = torch.ones(4, 6)
    spread = distribute_tensor(whole, mesh, [Shard(0)])
    unsummed = DTensor.from_local(whole, mesh, [Partial()], run_check=False)
    with_unsummed = GPT(80, layers=1)
    uneasy = GPT(80, layers=1)
    tensor_parallel(mesh, "up")(uneasy)
    with torch.no_grad():
        uneasy.layers[0].down.weight[0, 0] = torch.nan if RANK else 1.0
    weight = with_unsummed.layers[0].up.weight.detach()
    del with_unsummed.layers[0].up.weight
    with_unsummed.layers[0].up.weight = DTensor.from_local(weight, mesh, [Partial()], run_check=False)
    return {
        "jacobian": refused(lambda: measure(model, blocks, linearization="jacobian")),
        "penalty": refused(lambda: balance_penalty(model, blocks)),
        "trained": refused(lambda: balance_init_(model, blocks)),
        "trained_parallel": refused(lambda: balance_init_(parallel, blocks)),
        "trained_flattened": refused(lambda: balance_init_(flattened, blocks)),
        "find_flattened": refused(lambda: find_blocks(flattened)),
        "penalty_flattened": refused(lambda: balance_penalty(flattened, blocks)),
        "no_names": str(measure(without_names, blocks).layers[0].reason),
        "computed": str(measure(flat(mesh)(computed), blocks).layers[0].reason),
        "partial": refused(lambda: Sharded(unsummed)),
        "partial_branch": str(measure(with_unsummed, blocks).layers[0].reason),
        "nan_beside": str(measure(uneasy, blocks).layers[0].reason),
        "copied": refused(lambda: Sharded(spread, stand_in(spread.shape).transpose(0, 1).contiguous())),
        "mixed": refused(lambda: Sharded(spread, stand_in(spread.shape).view(3, 8))),
        "vector": refused(lambda: Sharded(spread, stand_in(spread.shape)[0])),
        "integer": refused(lambda: Sharded(distribute_tensor(whole.int(), mesh, [Shard(0)]))),
    }


def placements(mesh: DeviceMesh, ndim: int) -> Iterator[list[Placement]]:
    """Yield every way to spread a tensor over a mesh."""
    single: list[Placement] = [*(Shard(dim) for dim in range(ndim)), Replicate()]
    if mesh.ndim == 1:
        yield from ([item] for item in single)
    else:
        yield from ([first, second] for first in single for second in single)


VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "whole": ((7, 5), lambda w: w),
    "transposed": ((7, 5), lambda w: w.mT),
    "one row": ((1, 6), lambda w: w),
    "one column": ((6, 1), lambda w: w),
    "rows": ((9, 4), lambda w: w[2:7]),
    "every third row": ((11, 4), lambda w: w[1::3]),
    "columns": ((5, 9), lambda w: w[:, 3:8]),
    "transposed columns": ((5, 9), lambda w: w[:, 3:8].mT),
    "groups of rows": ((12, 5), lambda w: w.unflatten(0, (2, 3, 2))[:, 1]),
    "groups as rows": ((2, 3, 5), lambda w: w),
    "flattened rows": ((3, 4, 5), lambda w: w.flatten(0, 1)),
    "flattened columns": ((3, 4, 5), lambda w: w.flatten(1)),
    "expert": ((3, 4, 5), lambda w: w[2]),
    "transposed expert": ((3, 4, 5), lambda w: w[1].mT),
    "half an expert": ((3, 6, 5), lambda w: w[1][3:]),
    "repeated": ((1, 4, 5), lambda w: w.expand(3, 4, 5)),
}


@case(2, 4)
def operators(mesh: DeviceMesh) -> dict[str, float]:
    """Every view of every placement, against the operator on the whole weight: the largest relative error."""
    errors = {}
    generator = torch.Generator().manual_seed(0)
    for name, (shape, view) in VIEWS.items():
        weight = torch.randn(shape, generator=generator)
        twin = Matrix(view(weight))
        X = torch.randn(twin.shape[1], 3, generator=generator)
        Y = torch.randn(twin.shape[0], 3, generator=generator)
        gains = torch.rand(twin.shape[0], generator=generator), torch.rand(twin.shape[1], generator=generator)
        for spread in placements(mesh, weight.ndim):
            stored = distribute_tensor(weight, mesh, spread)
            operator = Sharded(stored, view(stand_in(stored.shape)))
            between = Product(Diagonal(gains[0]), operator, Diagonal(gains[1]))
            balanced = operator.balanced()
            assert balanced is not None
            assert balanced[1] == twin.balanced()[1]  # type: ignore[index]
            pairs = [
                (operator.matmat(X), twin.matmat(X)),
                (operator.adjoint(Y), twin.adjoint(Y)),
                (operator.matmat(X.double()), twin.dense() @ X.double()),
                (operator.dense(), twin.dense()),
                (Adjoint(operator).dense(), twin.dense().mT),
                (balanced[0].dense() * 2.0 ** balanced[1], twin.dense()),
                (
                    frobenius_norm(between, generator=generator, n_probes=1),
                    torch.linalg.matrix_norm(gains[0].double()[:, None] * twin.dense() * gains[1].double()),
                ),
            ]
            assert operator.shape == twin.shape
            error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
            errors[f"{name} {spread}"] = error
    return errors


def main() -> None:
    """Run every case and write what came of it."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    join(folder)
    mesh = init_device_mesh("cpu", (2,)) if WORLD == 2 else init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    results: dict[str, Any] = {}
    for name, function in CASES[WORLD].items():
        try:
            results[name] = function(mesh)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            break  # the others might wait for each other
    (folder / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    leave()
