"""Which branches have moved since the first measurement, and which blocks are copies of each other."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import CONTEXT, VOCABULARY, TinyGPT
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from lightning_spectral import History, ResidualBlock, Watch, find_blocks, measure
from lightning_spectral.linalg.sharding.flattened import FlatShard
from lightning_spectral.records import WeightSignals
from lightning_spectral.watch.fingerprint import fingerprint
from lightning_spectral.watch.moved import copied_blocks, with_moved
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.names import parameters_of

WIDTH, DEPTH = 16, 4


def encoder() -> tuple[nn.Module, Sequence[ResidualBlock]]:
    """Whose layers are clones of one."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, norm_first=True)
    with torch.no_grad():
        for weight in layer.parameters():
            weight += torch.rand(weight.shape)
    model = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
    return model, find_blocks(model, batch=torch.zeros(1, 4, WIDTH))


def last_weight(model: nn.Module, block: ResidualBlock) -> torch.Tensor:
    return model.get_parameter(list(parameters_of([block]))[-1]).data


def slowly(model: nn.Module, blocks: Sequence[ResidualBlock]) -> tuple[tuple[int, ...], ...]:
    """The groups of blocks whose weights are the same bytes."""
    groups: dict[bytes, list[int]] = {}
    for block in blocks:
        weights = [model.get_parameter(name).detach().numpy().tobytes() for name in parameters_of([block])]
        groups.setdefault(b"".join(weights), []).append(block.index)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def test_a_branch_has_moved_when_one_of_its_weights_has():
    model = TinyGPT()
    blocks = find_blocks(model)
    first = fingerprint(ModelWeights(model), blocks)
    with torch.no_grad():
        model.blocks[1].mlp[2].weight[0, 0] += 1e-6
        model.blocks[2].norm1.weight[3] += 1e-6
    moved = with_moved(measure(model, blocks), blocks, first, fingerprint(ModelWeights(model), blocks))
    told = [(layer.weights.mlp_moved, layer.weights.attention_moved) for layer in moved]
    assert told == [(False, False), (True, False), (False, True)]


def test_other_signals_stay_and_what_cannot_be_compared_is_not_known():
    model = TinyGPT()
    blocks = find_blocks(model)
    measurement = measure(model, blocks, signals=("stable_rank",))
    now = fingerprint(ModelWeights(model), blocks)
    shards = {name: (False, total) for name, (_, total) in now.items()}
    assert with_moved(measurement, blocks, shards, now) == measurement
    assert with_moved(measurement, blocks, {}, now) == measurement
    assert with_moved(measure(model, blocks), blocks, {}, now).layers[0].weights is None
    known = with_moved(measurement, blocks, now, now).layers[0].weights
    assert known == replace(measurement.layers[0].weights, mlp_moved=False, attention_moved=False)


def test_a_run_tells_of_a_branch_that_is_frozen(tmp_path: Path):
    model = TinyGPT()
    model.blocks[1].attention.requires_grad_(False)
    model.blocks[1].norm1.requires_grad_(False)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad])
    ids = torch.randint(VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    with Watch(model, tmp_path, every_n_steps=1) as watch:
        for step in (1, 2):
            watch.before_step(ids)
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.step(step)
    first, *later = History.read(tmp_path / "spectral.jsonl").measurements
    known = [WeightSignals(mlp_moved=False, attention_moved=trained) for trained in (False, None, False)]
    assert [layer.weights for layer in first] == known
    for measurement in later:
        assert [layer.weights.mlp_moved for layer in measurement] == [True] * 3
        assert [layer.weights.attention_moved for layer in measurement] == [True, None, True]


def test_clones_are_copies_until_one_of_them_moves():
    model, blocks = encoder()
    weights = ModelWeights(model)
    assert copied_blocks(weights, blocks) == slowly(model, blocks) == ((0, 1, 2, 3),)
    last_weight(model, blocks[1]).flatten()[0] += 1e-6
    assert copied_blocks(weights, blocks) == slowly(model, blocks) == ((0, 2, 3),)
    last_weight(model, blocks[2]).copy_(last_weight(model, blocks[1]))
    assert copied_blocks(weights, blocks) == slowly(model, blocks) == ((0, 3), (1, 2))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_have_broken_are_no_copies(number: float):
    """A model whose blocks are found behind the first batch may have become NaN by then, and NaN equals NaN in bits."""
    model, blocks = encoder()
    for block in blocks[:3]:
        last_weight(model, block).fill_(number)
    assert slowly(model, blocks) == ((0, 1, 2),)
    assert copied_blocks(ModelWeights(model), blocks) == ()


def test_equal_sums_are_no_proof():
    """Two entries change places: the sum of the bits stays."""
    model, blocks = encoder()
    entries = last_weight(model, blocks[3]).flatten()
    entries[0], entries[2] = entries[2].clone(), entries[0].clone()
    assert copied_blocks(ModelWeights(model), blocks) == slowly(model, blocks) == ((0, 1, 2),)


def test_blocks_of_a_fresh_model_and_without_weights_are_no_copies():
    model = TinyGPT()
    assert copied_blocks(ModelWeights(model), find_blocks(model)) == ()
    assert copied_blocks(ModelWeights(model), [ResidualBlock(i, str(i), ()) for i in range(3)]) == ()
    assert copied_blocks(ModelWeights(model), []) == ()


@pytest.fixture
def mesh(process_group: None) -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


def spread(model: nn.Module, name: str, mesh: DeviceMesh, placement: Shard | Replicate) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(
        module, attribute, nn.Parameter(distribute_tensor(module.get_parameter(attribute).detach(), mesh, [placement]))
    )


def test_shards_are_compared_where_they_lie(mesh: DeviceMesh):
    model, blocks = encoder()
    last_weight(model, blocks[1]).flatten()[0] += 1e-6
    for name in parameters_of(blocks):
        if model.get_parameter(name).ndim == 2:
            spread(model, name, mesh, Shard(0))
    assert copied_blocks(ModelWeights(model), blocks) == ((0, 2, 3),)


def test_shards_that_lie_otherwise_cannot_be_compared(mesh: DeviceMesh):
    model, blocks = encoder()
    matrices = [name for name in parameters_of(blocks) if model.get_parameter(name).ndim == 2]
    for place, name in enumerate(matrices):
        spread(model, name, mesh, Shard(0 if place < len(matrices) // 2 else 1))
    assert copied_blocks(ModelWeights(model), blocks) is None
    for block in blocks:  # what differs anyway need not be compared
        name = next(name for name in parameters_of([block]) if name not in matrices)
        model.get_parameter(name).data += block.index
    assert copied_blocks(ModelWeights(model), blocks) == ()


def test_ranges_of_flattened_weights_are_compared_where_they_are_the_same(mesh: DeviceMesh):
    model, blocks = encoder()
    plain = ModelWeights(model)
    whole = {name: model.get_parameter(name).detach() for name in parameters_of(blocks)}
    small = {name: FlatShard(item.flatten()[3:9], item.shape, 3, mesh) for name, item in whole.items()}
    assert copied_blocks(replace(plain, small=small), blocks) == ((0, 1, 2, 3),)
    name = next(iter(parameters_of([blocks[2]])))
    small[name] = FlatShard(whole[name].flatten()[4:10], whole[name].shape, 4, mesh)
    assert copied_blocks(replace(plain, small=small), blocks) is None


def test_a_teacher_that_begins_as_a_copy_is_meant_to_be_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "lightning_spectral")
    student, batch = TinyGPT(), torch.zeros(2, CONTEXT, dtype=torch.long)
    pair = nn.ModuleDict({"teacher": copy.deepcopy(student), "student": student})
    pair.forward = lambda ids: pair["student"](ids) - pair["teacher"](ids)  # type: ignore[method-assign]
    blocks = find_blocks(pair, batch=batch)
    assert copied_blocks(ModelWeights(pair), blocks) == ((0, 3), (1, 4), (2, 5))
    for trained in (student, pair):
        caplog.clear()
        optimizer = torch.optim.SGD(trained.parameters())
        with Watch(pair, tmp_path, optimizers=optimizer, blocks=blocks, every_n_steps=1) as watch:
            watch.before_step(batch)
        assert ("begin as copies" in caplog.text) is (trained is pair)
