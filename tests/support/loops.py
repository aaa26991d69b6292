"""Run by ``test_loops.py`` in two processes: one run in each kind of loop, and what this process saw of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import shells
from processes import join, leave, whole
from shells import SHELLS, Run, built
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_spectral import History, attach_scales
from lightning_spectral.control import GainCeiling

RANK = int(os.environ.get("RANK", "0"))


def strong() -> nn.Module:
    model = built()
    for block in model.blocks:
        block.mlp[2].weight.data *= 30
    return model


def sharded(run: Run) -> object:
    """Train as the plain loop does, with weights that are cut by hand."""
    run.folder.mkdir(parents=True, exist_ok=True)
    attach_scales(run.model, learnable=False)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for part in (*run.model.blocks, run.model):
        fully_shard(part, mesh=mesh)
    return shells.loop(run, run.model, shells.optimizer_of(run.model), shells.loader(), lambda loss: loss.backward())


def accelerated(run: Run) -> object:
    """Train with the Trainer of transformers, whose weights accelerate cuts, which it does on accelerators only."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    def cut(trainer: Any) -> None:
        state, block = trainer.accelerator.state, type(run.model.blocks[0]).__name__
        settings = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": [block]}
        state._shared_state["distributed_type"] = DistributedType.FSDP
        state.distributed_type, trainer.is_fsdp_enabled = DistributedType.FSDP, True
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **settings)

    return shells.transformers(run, cut)


ALL = SHELLS | {"sharded": sharded, "accelerated": accelerated}


def seen(shell: str, folder: Path) -> dict[str, object]:
    """Train with one shell, and return what the law did to this process's scales and what the first process wrote."""
    run = Run(folder / shell, options={"every_n_steps": 2, "auto_rescale": GainCeiling()}, model=strong())
    ALL[shell](run)
    if distributed.is_initialized():
        distributed.barrier()
    history = History.read(run.journal)
    return {
        "scales": {name: float(whole(item)) for name, item in run.model.named_parameters() if "log_scale" in name},
        "cut": all(isinstance(item, DTensor) for item in run.model.parameters()),
        "steps": history.steps,
        "ratios": history.values("ratio").tolist(),
        "tokens": history.values("token_residual").tolist(),
        "moves": [[action["step"], action["block"], action["mlp_log_change"]] for action in history.actions],
    }


if __name__ == "__main__":
    target, *names = sys.argv[1:]
    join(Path(target))  # before Trainers do, which use the group that is there
    found = {shell: seen(shell, Path(target)) for shell in names}
    Path(target, f"{RANK}.json").write_text(json.dumps(found))
    leave()
