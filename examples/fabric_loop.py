"""Watch and steer a loop of Lightning Fabric: that of `plain_loop.py`, on any device, in any number of processes.

    python examples/fabric_loop.py
    fabric run examples/fabric_loop.py --devices 2 --accelerator cpu

The watch gets the model before Fabric wraps it, and the optimizer that Fabric returns.
"""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_spectral import Watch

fabric = Fabric()
fabric.launch()
fabric.seed_everything(fabric.global_rank, verbose=False)  # every process has digits of its own
layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(64), enable_nested_tensor=False)
model = nn.Sequential(nn.Linear(20, 64), encoder, nn.Linear(64, 10))
wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

with Watch(model, "runs/fabric", every_n_steps=20, auto_rescale=True, optimizers=optimizer) as watch:
    for step in range(1, 201):
        digits = torch.randint(10, (32, 10), device=fabric.device)
        places = torch.eye(10, device=fabric.device).expand(32, 10, 10)
        inputs = torch.cat([nn.functional.one_hot(digits, 10).float(), places], dim=-1)
        watch.before_step(inputs)
        loss = nn.functional.cross_entropy(wrapped(inputs).flatten(0, 1), digits.flip(1).flatten())
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if values := watch.step(step):
            fabric.print(
                f"step {watch.measured_step:>3}   loss {loss.item():.3f}   ratio {values['spectral/ratio_median']:.2f}"
            )
