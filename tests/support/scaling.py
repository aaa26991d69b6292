"""Run by ``test_scaling.py`` in two processes: what measurements read, compute and send, counted by this process.

Weights are held in one piece, cut by ``fully_shard``, flattened and cut (FSDP1), or cut by tensor parallelism. The
first measurement is cold, the second warm after a step like an optimizer's, the third after a change that no bound is
carried over.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import join, leave
from sharded import GPT, Block, flat, in_blocks, tensor_parallel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_spectral import RandomizedSVD, SpectralMonitor, find_blocks
from lightning_spectral.linalg import LinearOperator, SolverState, SpectralNorm
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.weights.model import ModelWeights

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
# Width, heads, key/value heads, hidden channels, blocks: grouped queries, and batches of 8 and of 2 operators; plain.
SIZES = {"512": (512, 8, 2, 1536, 5), "768": (768, 12, 12, 2048, 2)}
RUNS = (3, 4)  # blocks of the models that are trained


class Counted(TorchDispatchMode):
    """Notes every collective, and adds up the bytes of the weights that are multiplied or converted.

    Args:
        weights: The weights; of a sharded one, what this process holds.
    """

    def __init__(self, weights: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.storages = {weight.untyped_storage().data_ptr() for weight in weights}
        self.read = 0
        self.collectives: list[tuple[str, str, int, int]] = []  # name, dtype, elements and bytes contributed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note it."""
        name = func._opname.rstrip("_")
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            given = args[1] if name == "allgather" else args[0]  # whose first argument is where to put the result
            while not isinstance(given, Tensor):
                given = given[0]
            self.collectives.append((name, str(given.dtype), given.numel(), given.nbytes))
        if name in ("mm", "addmm", "_to_copy"):
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            self.read += sum(item.nbytes for item in tensors if item.untyped_storage().data_ptr() in self.storages)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Noted:
    """The default solver, which notes how each operator was solved."""

    solver: RandomizedSVD = field(default_factory=RandomizedSVD)
    seen: list[tuple[str, int]] = field(default_factory=list)

    def init(self, operators: Sequence[LinearOperator]) -> SolverState:
        """Begin anew."""
        return self.solver.init(operators)

    def compute(
        self, operators: Sequence[LinearOperator], state: SolverState
    ) -> tuple[tuple[SpectralNorm, ...], SolverState]:
        """Solve, and note the start and the iterations of every operator."""
        norms, new = self.solver.compute(operators, state)
        self.seen.clear()
        for norm, old, memory in zip(norms, state.memories, new.memories, strict=True):
            assert memory is not None
            start = "cold" if old is None else "warm" if memory.upper == old.upper else "again"
            self.seen.append((start, norm.iterations))
        return norms, new


@torch.no_grad()
def change(model: nn.Module, size: float) -> None:
    """Change every weight by this share of its size."""
    for parameter in model.parameters():
        parameter.add_(size * torch.sin(97.0 * parameter) * parameter)


def measured(model: nn.Module, meter: Meter, solver: Noted, share: tuple[int, int] = (0, 1)) -> list[dict[str, Any]]:
    """Measure three times and return what was counted."""
    results = []
    for size in (0.0, 1e-4, 0.5):
        change(model, size)
        held = [getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters()]
        with FlopCounterMode(display=False) as flops, Counted(held) as counted:
            meter.measure(share=share)
        result = {"solved": list(solver.seen), "flops": flops.get_total_flops(), "read": counted.read}
        results.append(result | {"collectives": counted.collectives})
    return results


def counts(size: tuple[int, ...], shard: Callable[[nn.Module], Any] | None, **settings: Any) -> list[dict[str, Any]]:
    """Measure a model in one piece or in shards."""
    width, heads, groups, hidden, layers = size
    solver = Noted()
    model: nn.Module = GPT(width, heads, groups, hidden, layers)
    blocks = find_blocks(model)
    if shard is not None:
        model = shard(model) or model
    return measured(model, Meter(ModelWeights(model), blocks, solver=solver), solver, **settings)


class LitGPT(LightningModule):
    """A tiny run."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.model: nn.Module = GPT(32, 4, 4, 64, layers)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Predict the next token."""
        return F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Descend."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trained(layers: int, folder: Path) -> list[tuple[str, str, int, int]]:
    """Train for two steps in all processes, measuring at each, and return the collectives."""
    ids = torch.randint(61, (8, 9), generator=torch.Generator().manual_seed(RANK))
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_steps=2,
        callbacks=[SpectralMonitor(every_n_steps=1, geometry=False)],
        default_root_dir=folder,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with Counted() as counted:
        trainer.fit(LitGPT(layers), DataLoader(ids, batch_size=4))
    return counted.collectives


def main() -> None:
    """Count everything and write it."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    join(folder)
    mesh = init_device_mesh("cpu", (WORLD,))
    results: dict[str, Any] = {"sizes": SIZES}
    for name, size in SIZES.items():
        results[f"{name} whole"] = counts(size, None)
        results[f"{name} shared out"] = counts(size, None, share=(RANK, WORLD))
        results[f"{name} fully sharded"] = counts(size, in_blocks(mesh))
        results[f"{name} flattened"] = counts(size, flat(mesh, Block))
        results[f"{name} tensor parallel"] = counts(size, tensor_parallel(mesh))
    for layers in RUNS:
        results[f"{layers} trained"] = trained(layers, folder)
    (folder / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    leave()
