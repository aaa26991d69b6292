"""Run by ``test_sharded_adapters.py`` in two processes: models with low-rank adapters, in one piece and sharded."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import join, leave
from sharded import GPT, Block, compared, flat, in_blocks, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from zoo.adapters import Adapted

RANK = int(os.environ["RANK"])


def adapted() -> nn.Module:
    """Adapters on every projection of a frozen model."""
    model = GPT(groups=1).requires_grad_(False)
    for layer in model.layers:
        layer.attention.qkv, layer.attention.out = Adapted(layer.attention.qkv, 0.0), Adapted(layer.attention.out, 0.0)
        layer.up, layer.down = Adapted(layer.up, 0.0), Adapted(layer.down, 0.0)
    for part in model.modules():
        if isinstance(part, Adapted):
            nn.init.normal_(part.lora_B["default"].weight, std=0.1)
    return model


def parallel(model: nn.Module) -> None:
    """Cut the frozen weights of the MLP, as tensor parallelism does; the adapters stay whole on both processes."""
    for layer in model.layers:
        parallelize_module(layer, MESH, {"up.base_layer": ColwiseParallel(), "down.base_layer": RowwiseParallel()})


def starting(model: nn.Module) -> None:
    """Set the adapters to what they start with."""
    for part in model.modules():
        if isinstance(part, Adapted):
            nn.init.zeros_(part.lora_B["default"].weight)


CASES: dict[str, Callable[[], Any]] = {
    "trained": lambda: compared(adapted, in_blocks(MESH), change=train),
    "base": lambda: compared(adapted, in_blocks(MESH), adapters="base"),
    "delta": lambda: compared(adapted, in_blocks(MESH), adapters="delta"),
    "starting": lambda: compared(adapted, in_blocks(MESH), change=starting, adapters="delta"),
    "flattened": lambda: compared(adapted, flat(MESH, Block), change=train),
    "flattened_delta": lambda: compared(adapted, flat(MESH, Block), adapters="delta"),
    "tensor_parallel": lambda: compared(adapted, parallel),
    "paper": lambda: compared(adapted, in_blocks(MESH), linearization="paper"),
}

if __name__ == "__main__":
    join(Path(sys.argv[1]))
    MESH = init_device_mesh("cpu", (2,))
    seen = {}
    for name, run in CASES.items():
        try:
            seen[name] = run()
        except Exception:
            seen[name] = {"error": traceback.format_exc()}
    (Path(sys.argv[1]) / f"{RANK}.json").write_text(json.dumps(seen))
    leave()
