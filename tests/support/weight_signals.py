"""Run by ``test_weight_signals.py`` in two processes: signals of shares, and copies among sharded blocks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from processes import join, leave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_spectral import ResidualBlock, find_blocks
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.measuring.signals import SIGNALS
from lightning_spectral.watch.fingerprint import fingerprint
from lightning_spectral.watch.moved import copied_blocks, with_moved
from lightning_spectral.watch.peers import Peers
from lightning_spectral.weights.model import ModelWeights

WIDTH, DEPTH = 64, 5
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def built() -> tuple[nn.TransformerEncoder, Sequence[ResidualBlock]]:
    """Blocks that begin as clones of one, as in every ``nn.TransformerEncoder``."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
    return model, find_blocks(model, batch=torch.zeros(1, 4, WIDTH))


def shares() -> list[Any]:
    """Two measurements, each of what the processes have measured of it together."""
    model, blocks = built()
    weights = ModelWeights(model)
    meter, first, found = Meter(weights, blocks, signals=SIGNALS), fingerprint(weights, blocks), []
    for _ in range(2):
        share = with_moved(meter.measure(0, (RANK, WORLD)), blocks, first, fingerprint(weights, blocks))
        combined, _ = Peers(RANK, WORLD, model).combined(share)
        found.append([asdict(layer.weights) for layer in combined if layer.weights is not None])
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return found


def copies() -> list[Any]:
    """The copies among blocks that are sharded, before and after the last process has moved an entry of one."""
    model, blocks = built()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    before = copied_blocks(ModelWeights(model), blocks)
    if RANK == WORLD - 1:
        with torch.no_grad():
            model.layers[3].linear2.weight.to_local()[0, 0] += 1
    return [before, copied_blocks(ModelWeights(model), blocks)]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    join(folder)
    folder.joinpath(f"{RANK}.json").write_text(json.dumps({"shares": shares(), "copies": copies()}))
    leave()
