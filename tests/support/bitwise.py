"""Whatever a run leaves behind, and whether two runs left the same bits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import seed_everything
from tiny_run import LitGPT, fit

MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "accumulation": {"accumulate_grad_batches": 2, "max_epochs": 3, "max_steps": -1},
    "validation": {"validate": True, "val_check_interval": 2, "num_sanity_val_steps": 1},
    "clipping": {"gradient_clip_val": 0.1},
}


def everything(module: LitGPT, trainer) -> dict[str, Any]:
    """Return whatever a run leaves behind."""
    return {
        "losses": module.losses,
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "modes": [part.training for part in module.modules()],
        "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor | np.ndarray):
        assert left.dtype == right.dtype
        assert bool((left == right).all())
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def run(folder: Path, callbacks: list[Any], **flags: Any) -> dict[str, Any]:
    seed_everything(0)
    module = LitGPT(dropout=0.2)
    trainer = fit(folder, callbacks, module=module, shuffle=True, **flags)
    return everything(module, trainer)
