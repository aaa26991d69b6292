"""What the bits of the weights say: which branches have moved in a run, and which blocks are copies of each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_spectral.linalg.sharding.flattened import FlatShard
from lightning_spectral.linalg.sharding.presence import is_dtensor
from lightning_spectral.linalg.sharding.sharded import Share, added, is_sharded
from lightning_spectral.records import Branch, Measurement, ResidualBlock, WeightSignals
from lightning_spectral.watch.fingerprint import bits, fingerprint, held
from lightning_spectral.weights.names import parameters_of
from lightning_spectral.weights.protocol import Weights

__all__ = ["copied_blocks", "told_of_copies", "trained_names", "with_moved"]

Fingerprint = Mapping[str, tuple[bool, int]]


def with_moved(
    measurement: Measurement, blocks: Sequence[ResidualBlock], first: Fingerprint, now: Fingerprint
) -> Measurement:
    """Say of each branch whether one of its parameters is another than at the first measurement of the run.

    Only parameters that a measurement reads are compared: those on the path of the values, and residual scales. A
    change that leaves the sum of the bit patterns as it was is not seen.

    Args:
        measurement: A measurement, with one layer for each block.
        blocks: The blocks, with the residual scales among their factors.
        first: Fingerprint of the weights at the first measurement, from
            :func:`~lightning_spectral.watch.fingerprint.fingerprint`.
        now: Fingerprint of the weights that were measured.
    """
    layers = []
    for layer, block in zip(measurement, blocks, strict=True):
        mlp, attention = (_moved(kind, first, now) for kind in (block.mlp_branches, block.attention_branches))
        weights = replace(layer.weights or WeightSignals(), mlp_moved=mlp, attention_moved=attention)
        layers.append(replace(layer, weights=None if weights == WeightSignals() else weights))
    return replace(measurement, layers=tuple(layers))


def _moved(branches: Iterable[Branch], first: Fingerprint, now: Fingerprint) -> bool | None:
    """Whether some branches have moved; ``None`` where none of their parameters can be compared."""
    names = {factor.parameter for branch in branches for factor in branch.factors if factor.parameter is not None}
    pairs = [(first[name], now[name]) for name in names if name in first and name in now]
    verdicts = [old != new for old, new in pairs if old[0] is new[0]]
    return any(verdicts) if verdicts else None


def copied_blocks(weights: Weights, blocks: Sequence[ResidualBlock]) -> tuple[tuple[int, ...], ...] | None:
    """Return the groups of blocks whose weights are equal bit for bit, such as the clones of ``nn.TransformerEncoder``.

    The weights are those that a measurement reads. Blocks whose sums of bit patterns are equal are compared entry by
    entry. A block of which a weight cannot be read or is not finite, or which has no weights of its own, is a copy of
    none.

    Args:
        weights: Those of the model. All processes of a sharded one call this together.
        blocks: Its blocks.

    Returns:
        The indices of the blocks, group by group; empty where all blocks differ. ``None`` where shards cannot be
        compared, because a process holds another part of one block than of the other.
    """
    sums = fingerprint(weights, blocks)
    names = [list(parameters_of([block])) for block in blocks]
    pairs = [
        (one, other)
        for one, other in combinations(range(len(blocks)), 2)
        if names[one] and len(names[one]) == len(names[other]) and sums.keys() >= {*names[one], *names[other]}
    ]
    found = [_equal(weights, zip(names[one], names[other], strict=True), sums) for one, other in pairs]
    # Along a pair: 1 for different, and 1 for not comparable, in any of the processes.
    doubts = torch.tensor([[same is False, same is None] for same in found], dtype=torch.float64, device="cpu").view(
        -1, 2
    )
    mesh = _mesh(weights, [name for block in names for name in block if name in sums])
    if mesh is not None and pairs:
        (doubts,) = added([Share(doubts, mesh, tuple(range(mesh.ndim)))])
    different, unknown = (doubts > 0).T.tolist()
    if any(doubt and not apart for apart, doubt in zip(different, unknown, strict=True)):
        return None
    groups: dict[int, list[int]] = {}  # by the first block of the group
    first = {place: place for place in range(len(blocks))}
    for (one, other), apart in zip(pairs, different, strict=True):
        if not apart and first[one] == one and first[other] == other:
            first[other] = one
            groups.setdefault(one, [one]).append(other)
    return tuple(tuple(blocks[place].index for place in group) for group in groups.values())


def told_of_copies(indices: Sequence[int]) -> str:
    """Say which blocks begin as copies: ``nn.TransformerEncoder`` copies the one layer that it is given."""
    named = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    return (
        f"blocks {named} begin as copies: their weights are equal, bit for bit, as nn.TransformerEncoder makes them. "
        "Initialize each of them by itself, unless that is meant"
    )


def trained_names(model: nn.Module, blocks: Sequence[ResidualBlock], trained: Sequence[Tensor]) -> frozenset[str]:
    """Return the paths of the parameters of blocks that a run trains."""
    ids = set(map(id, trained))
    held = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in ids}
    # A weight that is computed from others is trained with them, and to read it would compute it.
    sources = {name.partition(".parametrizations.")[::2] for name in held if ".parametrizations." in name}
    computed = {f"{owner}.{rest.partition('.')[0]}" for owner, rest in sources}
    return frozenset(name for name in parameters_of(blocks) if name in held or name in computed)


def _equal(weights: Weights, pairs: Iterable[tuple[str, str]], sums: Fingerprint) -> bool | None:
    """Whether two blocks are equal in what this process holds; ``None`` where it holds other parts of them."""
    known = True
    for one, other in pairs:
        whole = sums[one][0] and sums[other][0]
        if whole and sums[one] != sums[other]:
            return False
        with torch.no_grad(), weights.read(one) as A, weights.read(other) as B:
            if A.shape != B.shape or held(A).dtype != held(B).dtype:
                return False
            if not _alike(A, B):
                known = False
            elif sums[one] != sums[other] or not torch.equal(bits(held(A)), bits(held(B)).to(held(A).device)):
                return False
            elif held(A).is_floating_point() and not held(A).float().isfinite().all():
                return False  # weights that have broken are equal, whatever they began as
    return True if known else None


def _alike(A: Tensor | FlatShard, B: Tensor | FlatShard) -> bool:
    """Whether this process holds the same entries of two weights of one shape."""
    if isinstance(A, FlatShard) and isinstance(B, FlatShard):
        return (A.start, len(A.entries), A.mesh) == (B.start, len(B.entries), B.mesh)
    if is_dtensor(A) and is_dtensor(B):
        return (A.placements, A.device_mesh) == (B.placements, B.device_mesh)
    return not is_sharded(A) and not is_sharded(B)


def _mesh(weights: Weights, names: Iterable[str]) -> DeviceMesh | None:
    """Return the largest mesh that a weight is spread over, ``None`` where every process has all of them."""
    meshes = []
    for name in names:
        with weights.read(name) as weight:
            if is_sharded(weight):
                meshes.append(weight.mesh if isinstance(weight, FlatShard) else weight.device_mesh)
    return max(meshes, key=lambda mesh: mesh.size(), default=None)
