"""What measuring a sharded model needs: the memory of each process beyond its shards, and the bytes that travel.

    python benchmarks/sharded.py

Two processes on this machine share the model (``fully_shard`` of every block), and each of them measures it twice.
Beside them stands one process that has the whole model. The peak of memory is read where the operating system keeps it;
on a machine without /proc the script says so and stops.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe
from memory import MEBI, RESET, resident
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_spectral import find_blocks
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.weights.model import ModelWeights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Config

CASES = ((8, 512), (12, 1024), (6, 2048))  # blocks, width


class Traffic(TorchDispatchMode):
    """Adds up the bytes that this process hands to collectives, and keeps the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note it."""
        if func.namespace == "_c10d_functional" and func._opname in ("all_reduce", "all_gather_into_tensor"):
            size = args[0].numel() * args[0].element_size()
            self.calls, self.bytes, self.largest = self.calls + 1, self.bytes + size, max(self.largest, size)
        return func(*args, **(kwargs or {}))


def measure_one(layers: int, width: int, store: str) -> None:
    """Print what one process saw, as one line."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, world), rank=rank, world_size=world
    )
    mesh = init_device_mesh("cpu", (world,))
    for size, depth in ((64, 1), (width, layers)):  # first a tiny model: what torch loads on first use is not ours
        torch.manual_seed(0)
        model = GPT(Config(depth, size, heads=8))
        blocks = find_blocks(model)
        if world > 1:
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
        meter = Meter(ModelWeights(model), blocks)
        result = [_measured(meter) for _ in range(2)]
    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.blocks.parameters()]
    whole = sum(p.numel() * p.element_size() for p in model.blocks.parameters())
    print(json.dumps({"whole": whole, "held": sum(p.numel() * p.element_size() for p in held), "seen": result}))
    torch.distributed.destroy_process_group()


def _measured(meter: Meter) -> dict[str, int]:
    # What was freed before goes back to the system and the peak begins anew, so that nothing is reused unseen.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    RESET.write_text("5")
    before = resident("VmRSS")
    with Traffic() as traffic:
        meter.measure()
    extra = resident("VmHWM") - before
    return {"extra": extra, "calls": traffic.calls, "bytes": traffic.bytes, "largest": traffic.largest}


def run(layers: int, width: int, world: int) -> list[dict[str, Any]]:
    """Return what each process saw."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--case", str(layers), str(width), str(Path(folder) / "store")]
        environment = os.environ | {"WORLD_SIZE": str(world)}
        processes = [
            subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        printed = [process.communicate(timeout=600)[0] for process in processes]
    return [json.loads(text.splitlines()[-1]) for text in printed]


def main() -> None:
    """Print one line per case and measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=3, metavar=("BLOCKS", "WIDTH", "STORE"), help="one process of one case")
    args = parser.parse_args()
    if args.case:
        measure_one(int(args.case[0]), int(args.case[1]), args.case[2])
        return
    if not RESET.exists():
        raise SystemExit("the peak of memory is read from /proc, which this machine does not have")
    print(describe(), "\n")
    print("Extra memory of a process, over the weights of all blocks; of two processes the one that needed more.\n")
    print("blocks  width  weights   start  one process      two: extra       collectives  bytes sent       largest")
    for layers, width in CASES:
        (alone,), pair = run(layers, width, 1), run(layers, width, 2)
        whole = alone["whole"]
        for i, start in enumerate(("cold", "warm")):
            one, two = alone["seen"][i], max((item["seen"][i] for item in pair), key=lambda seen: seen["extra"])
            cells = [f"{size / MEBI:>6.1f} MiB ({size / whole:>5.1%})" for size in (one["extra"], two["extra"])]
            sent = f"{two['bytes'] / MEBI:>6.1f} MiB ({two['bytes'] / whole:>5.1%})"
            print(
                f"{layers:>6}  {width:>5}  {whole / MEBI:>3.0f} MiB   {start}  {cells[0]}  {cells[1]}  "
                f"{two['calls']:>11}  {sent}  {two['largest'] / MEBI:>5.2f} MiB"
            )


if __name__ == "__main__":
    main()
