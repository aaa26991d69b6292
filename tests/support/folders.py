"""Run by ``test_folders.py`` in two processes: short runs whose checkpoints are folders, and their final weights."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from processes import leave
from training import RANK, STEPS, fit, monitor_of, whole

LAYOUTS = ("fsdp2 root", "fsdp2 blocks", "tensor parallel")


class SaveLast(Callback):
    """Saves a checkpoint after the last step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS:
            trainer.save_checkpoint(self.path)


def main(folder: Path) -> None:
    """Train, steered, and write the final weights in one piece beside the folder that the Trainer wrote."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    for layout in LAYOUTS:
        place = folder / layout.replace(" ", "-")
        last = SaveLast(place.with_suffix(".ckpt"))
        module, _ = fit(layout, place, "32-true", steer=True, monitor=monitor_of(steer=True), others=[last])
        state = {name: whole(value) for name, value in module.state_dict().items()}
        if RANK == 0:
            torch.save(state, place.with_suffix(".pt"))
    (folder / f"{RANK}.json").write_text(json.dumps(LAYOUTS))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
