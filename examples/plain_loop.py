"""Watch and steer a training loop without any Trainer: a Transformer encoder learns to reverse digits.

    python examples/plain_loop.py

Three lines are about watching: the one that makes the watch, and one before and one after every step.
"""

from __future__ import annotations

import torch
from torch import nn

from lightning_spectral import Watch

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(64), enable_nested_tensor=False)
model = nn.Sequential(nn.Linear(20, 64), encoder, nn.Linear(64, 10))  # one-hot digits and positions in, digits out
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

with Watch(model, "runs/plain", every_n_steps=20, auto_rescale=True, optimizers=optimizer) as watch:
    for step in range(1, 201):
        digits = torch.randint(10, (32, 10))
        inputs = torch.cat([nn.functional.one_hot(digits, 10).float(), torch.eye(10).expand(32, 10, 10)], dim=-1)
        watch.before_step(inputs)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), digits.flip(1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if values := watch.step(step):
            print(
                f"step {watch.measured_step:>3}   loss {loss.item():.3f}   ratio {values['spectral/ratio_median']:.2f}"
            )
