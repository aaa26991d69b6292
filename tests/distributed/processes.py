"""Run a script in several processes of one process group, and collect what each of them wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def run(script: Path, count: int, folder: Path, *, timeout: float) -> list[dict[str, Any]]:
    """Start ``script FOLDER`` in ``count`` processes and return what each one wrote to ``FOLDER/<rank>.json``."""
    environment = os.environ | {
        "PYTHONPATH": str(TESTS),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": str(count),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env=environment | {"RANK": str(rank)},
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
