"""Run a script in several processes of one process group, and collect what each of them wrote."""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SUPPORT = Path(__file__).parent
# Where a process finds the package of this tree and what tests share.
PYTHONPATH = os.pathsep.join((str(SUPPORT), str(SUPPORT.parents[1])))


def run(script: str, count: int, folder: Path, *arguments: str, timeout: float) -> list[dict[str, Any]]:
    """Start ``SCRIPT FOLDER ARGUMENTS``, a script of this folder; return what each process wrote to ``<rank>.json``."""
    environment = os.environ | {
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / script), str(folder), *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(printed)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def join(folder: Path) -> None:
    """Become one of the processes that :func:`run` has started, in a script of theirs."""
    count, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    store = torch.distributed.FileStore(str(folder / "store"), count)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=datetime.timedelta(seconds=60)
    )


def leave() -> None:
    """End a script of :func:`run` past Python's own way out, in which threads of gloo abort the process at times."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def whole(tensor: Tensor) -> Tensor:
    """Return a parameter in one piece, or as one vector where it was flattened. For small ones."""
    flattened, tensor = getattr(tensor, "_fsdp_flattened", False), tensor.detach()
    if flattened:
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, tensor.clone())
        return torch.cat(parts)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
