"""Weights that are spread over processes: each process multiplies its part, and the products are added up.

Let W be the sum of the parts W_r that the processes r of a mesh hold, each padded with zeros to the size of W. Then
WX = Σ W_r X and WᵀY = Σ W_rᵀ Y. A sum of ``(m, k)`` blocks travels between the processes, never a weight.

Every process of the mesh has to take part in every product, in the same order. So all processes have to make the same
decisions. An all-reduce leaves the same bits on all of them, but replicated parameters, such as norm gains beside a
tensor-parallel matrix, drift apart in training by rounding errors. Decisions are therefore taken from the numbers of
the first process (:func:`agreed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, final

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.operators import (
    LinearOperator,
    balanced_by_largest,
    check_weight,
    dense_by_columns,
    sum_dtype,
    vector_dtype,
)
from lightning_spectral.linalg.sharding.flattened import FlatShard, boxes
from lightning_spectral.linalg.sharding.presence import is_dtensor
from lightning_spectral.linalg.sharding.tiles import Cut, held, places, stand_in, tiles

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "Sharded",
    "Share",
    "added",
    "agreed",
    "balanced",
    "in_one_piece",
    "is_sharded",
    "replicated",
]


class Share(NamedTuple):
    """The contribution of one process to a sum over the processes of a mesh.

    Attributes:
        block: The contribution, of one shape on all processes.
        mesh: The processes.
        dims: The dimensions of the mesh to sum over. Along the other dimensions all contributions are equal.
    """

    block: Tensor
    mesh: DeviceMesh
    dims: tuple[int, ...]


@final
class Sharded(LinearOperator):
    """A weight of which this process holds a part, read like a :class:`~lightning_spectral.linalg.matrix.Matrix`.

    Args:
        weight: A DTensor with the placements ``Shard`` and ``Replicate``, from ``fully_shard`` or tensor parallelism;
            or the part of a weight under ``FullyShardedDataParallel``. Shards may be uneven or empty.
        view: The matrix, ``(m, n)`` or ``(groups, rows, n)``, as a view of the weight's
            :func:`~lightning_spectral.linalg.sharding.tiles.stand_in`. By default the weight itself.

    Raises:
        ConfigurationError: The weight has no numbers to multiply with, or another placement; this process is not part
            of its mesh; or the matrix is no view of the weight. All processes raise together, except where one is
            not part of the mesh.
    """

    def __init__(self, weight: DTensor | FlatShard, view: Tensor | None = None) -> None:
        self.mesh: DeviceMesh
        self._dims: tuple[int, ...]
        if isinstance(weight, FlatShard):
            # A tensor of the whole shape, so that all processes raise together, also those with an empty part.
            check_weight(weight.entries.new_empty(1).expand(weight.shape), "weight", dims=(len(weight.shape),))
            self.mesh, self._dims, local = weight.mesh, (0,), weight.entries
            parts = list(boxes(weight.entries, weight.shape, weight.start))
        else:
            check_weight(weight, "weight", dims=(weight.ndim,))
            self.mesh, self._dims, local = weight.device_mesh, _sharded_dims(weight), weight.to_local().detach()
            parts = [(local, _held(weight))]
        view = stand_in(weight.shape) if view is None else view
        if view.ndim not in (2, 3) or view.numel() == 0:
            raise ConfigurationError(f"weight must be read in 2 or 3 dimensions, got shape {tuple(view.shape)}.")
        self._weight, self._view = weight, view
        self.shape, self.dtype = (view.shape[:-1].numel(), view.shape[-1]), vector_dtype(local)
        self.device = local.device
        # Tiles are views of the local part: optimizer steps in place are seen, and nothing is copied.
        self._tiles = [tile for part, indices in parts for tile in tiles(part, weight.shape, indices, view)]

    def owners(self, mesh_dim: int, *, rows: bool) -> Tensor | None:
        """Return which process along a dimension of the mesh holds each row, or column; the same on all processes.

        Args:
            mesh_dim: The dimension of the mesh.
            rows: Whether rows are meant.

        Returns:
            ``(m,)`` or ``(n,)``, places along the dimension; ``None`` where none holds whole rows, or all of them.
        """
        if isinstance(self._weight, FlatShard) or mesh_dim not in self._dims:
            return None
        dim = self._weight.placements[mesh_dim].dim  # type: ignore[attr-defined]
        found = places(self._view, self._weight.shape)[0 if rows else 1][dim]
        return None if found is None else _owners(self._weight, mesh_dim, dim)[found]

    def share(self, X: Tensor, *, transposed: bool) -> Share:
        """Return the contribution of this process to ``W @ X``, or to ``Wᵀ @ X``."""
        # Zeros stand for the rows of other processes. A process without a tile still takes part in the sum.
        total = X.new_zeros(self.shape[1 if transposed else 0], X.shape[1])
        for matrix, rows, columns in self._tiles:
            if transposed:
                total[columns] += matrix.adjoint(X[rows])
            else:
                total[rows] += matrix.matmat(X[columns])
        return self._share(total)

    def matmat(self, X: Tensor) -> Tensor:
        """Multiply, together with the other processes: ``(n, k) -> (m, k)``."""
        return added([self.share(X, transposed=False)])[0]

    def adjoint(self, Y: Tensor) -> Tensor:
        """Multiply by the transpose, together with the other processes: ``(m, k) -> (n, k)``."""
        return added([self.share(Y, transposed=True)])[0]

    def dense(self) -> Tensor:
        """Multiply by every unit vector: the matrix is gathered column by column. For small operators."""
        return dense_by_columns(self)

    def balanced(self) -> tuple[LinearOperator, int] | None:
        """Take out the power of two of the largest entry of all processes."""
        largest = torch.zeros((), dtype=self.dtype, device=self.device)
        for matrix, _, _ in self._tiles:
            low, high = matrix.weight.aminmax()
            largest = torch.maximum(largest, torch.maximum(-low, high).to(self.dtype))
        # Backends differ in the maximum of a number and NaN, and agree in the maximum of a number and infinity.
        largest = torch.where(largest.isnan(), torch.inf, largest)
        return balanced_by_largest(self, float(added([self._share(largest)], "max")[0]))

    def weighted_norm(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Return √Σ (rowsᵢ · weightᵢⱼ · columnsⱼ)²; see :meth:`Matrix.weighted_norm`."""
        total = torch.zeros((), dtype=sum_dtype(self.device), device=self.device)
        for matrix, r, c in self._tiles:
            left, right = (None if rows is None else rows[r]), (None if columns is None else columns[c])
            total = total + matrix.weighted_norm(left, right).square()
        return added([self._share(total)])[0].sqrt()

    def _share(self, block: Tensor) -> Share:
        return Share(block, self.mesh, self._dims)


def is_sharded(tensor: Tensor | FlatShard) -> TypeGuard[DTensor | FlatShard]:
    """Whether a tensor is spread over processes, so that no process holds all of it."""
    if isinstance(tensor, FlatShard):
        return True
    return is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements)


def replicated(tensor: Tensor | FlatShard) -> Tensor:
    """Return a tensor in one piece, gathered from all processes. For vectors and numbers only."""
    return in_one_piece([tensor])[0]


def in_one_piece(tensors: Sequence[Tensor | FlatShard]) -> list[Tensor]:
    """Return tensors in one piece, with one collective for each mesh. For small tensors only."""
    shares = {i: _padded(tensor) for i, tensor in enumerate(tensors) if is_sharded(tensor)}
    whole = dict(zip(shares, added(list(shares.values())), strict=True))
    return [whole[i] if i in whole else _local(tensor) for i, tensor in enumerate(tensors)]


def _padded(tensor: DTensor | FlatShard) -> Share:
    """Return the part of a tensor that this process holds, padded with zeros to the whole shape."""
    if isinstance(tensor, FlatShard):
        flat = tensor.entries.new_zeros(tensor.shape.numel())
        flat[tensor.start : tensor.start + len(tensor.entries)] = tensor.entries
        return Share(flat.view(tensor.shape), tensor.mesh, (0,))
    local = tensor.to_local().detach()
    padded = local.new_zeros(tensor.shape)
    padded[torch.meshgrid(*_held(tensor), indexing="ij")] = local
    return Share(padded, tensor.device_mesh, _sharded_dims(tensor))


def _local(tensor: Tensor | FlatShard) -> Tensor:
    """Return a tensor that every process has whole, as a plain tensor."""
    assert isinstance(tensor, Tensor)
    return tensor.to_local() if is_dtensor(tensor) else tensor


def added(shares: Sequence[Share], operation: str = "sum") -> list[Tensor]:
    """Add up the contributions of all processes, with one collective for all shares of one mesh.

    Args:
        shares: The contributions of this process, in the same order on all processes.
        operation: ``"sum"``, or another reduction such as ``"max"``.

    Returns:
        The sums, the same bits on every process.
    """
    groups: dict[tuple[DeviceMesh, tuple[int, ...], torch.dtype], list[int]] = {}
    for i, share in enumerate(shares):
        groups.setdefault((share.mesh, share.dims, share.block.dtype), []).append(i)
    sums: list[Tensor] = [share.block for share in shares]
    for (mesh, dims, _), members in groups.items():
        blocks = [shares[i].block for i in members]
        from torch.distributed.tensor import DTensor, Partial, Replicate

        placements = [Partial(operation) if dim in dims else Replicate() for dim in range(mesh.ndim)]
        flat = DTensor.from_local(torch.cat([block.flatten() for block in blocks]), mesh, placements, run_check=False)
        total = flat.redistribute(placements=[Replicate()] * mesh.ndim).to_local()
        for i, block, part in zip(
            members, blocks, torch.split(total, [block.numel() for block in blocks]), strict=True
        ):
            sums[i] = part.to(block.device).view(block.shape)
    return sums


def agreed(tensors: Sequence[Tensor], meshes: Sequence[DeviceMesh | None]) -> list[Tensor]:
    """Return, for every tensor, the numbers of the first process of its mesh; a tensor without a mesh unchanged."""
    shares = []
    for tensor, mesh in zip(tensors, meshes, strict=True):
        if mesh is not None:
            first = not any(mesh.get_coordinate() or ())
            shares.append(Share(tensor if first else torch.zeros_like(tensor), mesh, tuple(range(mesh.ndim))))
    sums = iter(added(shares))
    return [tensor if mesh is None else next(sums) for tensor, mesh in zip(tensors, meshes, strict=True)]


def balanced(operator: LinearOperator) -> tuple[LinearOperator, int] | None:
    """Take out a power of two as :meth:`LinearOperator.balanced` does. ``None`` on all processes if ``None`` on one."""
    result = operator.balanced()
    if operator.mesh is not None:
        missing = torch.tensor(float(result is None), device=operator.device)
        if added([Share(missing, operator.mesh, tuple(range(operator.mesh.ndim)))])[0] > 0:
            return None
    return result


def _sharded_dims(weight: DTensor) -> tuple[int, ...]:
    """Return the dimensions of the mesh along which the processes hold different parts."""
    dims = []
    for dim, placement in enumerate(weight.placements):
        if placement.is_partial():
            raise ConfigurationError(
                "the weight is a sum that has not been taken yet (placement Partial): redistribute it first"
            )
        if placement.is_shard() or hasattr(placement, "split_factor"):
            dims.append(dim)
        elif not placement.is_replicate():
            raise ConfigurationError(
                f"the placement {placement} of the weight is not known: expected Shard or Replicate"
            )
    if weight.device_mesh.get_coordinate() is None:
        raise ConfigurationError("the weight is spread over processes of which this one is none")
    return tuple(dims)


def _owners(weight: DTensor, mesh_dim: int, dim: int) -> Tensor:
    """Return the place along a dimension of the mesh of the process that holds each index of a weight's dimension."""
    owners = torch.empty(weight.shape[dim], dtype=torch.long, device="cpu")
    cutting = [i for i, item in enumerate(weight.placements) if getattr(item, "dim", None) == dim]
    for coordinate in product(*(range(weight.device_mesh.size(i)) for i in cutting)):
        cuts = [_cut(weight, i, place) for i, place in zip(cutting, coordinate, strict=True)]
        owners[held(len(owners), cuts)] = coordinate[cutting.index(mesh_dim)]
    return owners


def _cut(weight: DTensor, mesh_dim: int, place: int) -> Cut:
    """Return the cut of a weight along a dimension of the mesh, at a place along it."""
    pieces = getattr(weight.placements[mesh_dim], "split_factor", 1)
    return Cut(weight.device_mesh.size(mesh_dim), place, pieces)


def _held(weight: DTensor) -> list[Tensor]:
    """Return the indices that this process holds, for every dimension of a weight."""
    coordinate = weight.device_mesh.get_coordinate()
    assert coordinate is not None
    cuts: list[list[Cut]] = [[] for _ in weight.shape]
    for mesh_dim, placement in enumerate(weight.placements):
        if not placement.is_replicate():
            cuts[placement.dim].append(_cut(weight, mesh_dim, coordinate[mesh_dim]))  # type: ignore[attr-defined]
    return [held(size, several) for size, several in zip(weight.shape, cuts, strict=True)]
