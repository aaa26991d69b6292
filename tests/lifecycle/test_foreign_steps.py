"""Training steps that call a model more than once: real decoding with a cache, and two models with two optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_spectral import History, SpectralMonitor


class Decoding(LightningModule):
    """Samples with Hugging Face's cache before or after the loss is computed."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 50, "n_positions": 64}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))
        self.first, self.seen = first, list[Tensor]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = None if self.first else self.model(batch, labels=batch).loss
        self.seen.append(self.model.generate(batch[:, :4], max_new_tokens=6, do_sample=True, pad_token_id=0))
        return self.model(batch, labels=batch).loss if loss is None else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randint(0, 50, (32, 20)), batch_size=4)


class Adversaries(LightningModule):
    """A generator and a critic, each with an optimizer; the critic runs three times in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = (self.encoder(layers) for layers in (2, 3))
        self.seen = list[Tensor]()

    @staticmethod
    def encoder(layers: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        fake, (for_generator, for_critic) = self.generator(torch.randn_like(batch)), self.optimizers()
        loss = self.critic(fake.detach()).mean().square() - self.critic(batch).mean()
        for optimizer, objective in ((for_critic, loss), (for_generator, None)):
            optimizer.zero_grad()
            self.manual_backward(self.critic(fake).mean().square() if objective is None else objective)
            optimizer.step()
        self.seen.append(fake.detach())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), 1e-4) for part in (self.generator, self.critic)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(32, 10, 32), batch_size=8)


CASES = {
    "decoding before the loss": lambda: Decoding(True),
    "decoding after the loss": lambda: Decoding(False),
    "two models": Adversaries,
}


def trained(folder: Path, case: str, callbacks: list[Any]) -> LightningModule:
    seed_everything(0)
    module = CASES[case]()
    flags = {"accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_steps=6, logger=CSVLogger(folder, "", ""), callbacks=callbacks, **flags).fit(module)
    return module


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_same_and_every_block_has_tokens(tmp_path: Path, case: str):
    alone = trained(tmp_path / "alone", case, [])
    watched = trained(tmp_path / "watched", case, [SpectralMonitor(2, on_error="raise")])
    for one, other in zip(alone.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(alone.seen, watched.seen, strict=True):
        assert torch.equal(one, other)
    history = History.read(tmp_path / "watched" / "spectral.jsonl")
    for measurement in history.measurements[:-1]:  # no pass uses the last weights
        assert all(layer.token_residual is not None and layer.token_residual > 0.5 for layer in measurement)
    assert {event.level for event in history.events} <= {"note"}
