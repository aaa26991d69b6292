"""The same GPT inside what people put around a model: Lightning, the compiler, data parallelism, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from .example import BATCH, TOKENS, Example, ExpectedBlock, Inputs, blocks_of, seeded, token_inputs, tokens
from .gpt import ATTENTION_SITES, BLOCKS, MLP_SITES, NanoGPT, block_matrices


class TrainingOnly(LightningModule):
    """No ``forward``: only a training step that calls the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = NanoGPT()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        idx, targets = batch
        return F.cross_entropy(self.model(idx).flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters())


class WithForward(TrainingOnly):
    """A ``forward`` that calls the model."""

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids to logits."""
        return self.model(idx)


class WithExample(WithForward):
    """A ``forward`` and an example input."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = tokens(BATCH, TOKENS)


class ItsOwnModel(LightningModule):
    """The layers stand on the LightningModule itself."""

    def __init__(self) -> None:
        super().__init__()
        gpt = NanoGPT()
        self.transformer = gpt.transformer
        self.lm_head = gpt.lm_head

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids to logits."""
        return NanoGPT.forward(self, idx)  # type: ignore[arg-type]


class Checkpointed(NanoGPT):
    """Activations of every block are recomputed in the backward pass."""

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids to logits."""
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(idx.shape[1]))
        for block in self.transformer["h"]:
            x = checkpoint(block, x, use_reentrant=False)
        return self.lm_head(self.transformer["ln_f"](x))


class DictModel(nn.Module):
    """Takes a dictionary, returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = NanoGPT()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Ids to logits, by name."""
        logits = self.gpt(batch["ids"])
        return {"logits": logits, "best": logits.argmax(-1)}


def dict_inputs(model: nn.Module) -> Inputs:
    """One dictionary."""
    return ({"ids": tokens(BATCH, TOKENS)},), {}


def compiled() -> nn.Module:
    """The whole model compiled, without code generation."""
    return torch.compile(NanoGPT(layers=2), backend="eager")


def compiled_in_place() -> nn.Module:
    """Compiled by its own method: the paths stay as they are."""
    model = NanoGPT(layers=2)
    model.compile(backend="eager")
    return model


def compiled_blocks() -> nn.Module:
    """Every block replaced by its compiled self."""
    model = NanoGPT(layers=2)
    blocks = model.transformer["h"]
    for i, block in enumerate(blocks):
        blocks[i] = torch.compile(block, backend="eager")
    return model


def data_parallel() -> nn.Module:
    """Data parallelism; the process group is the caller's business."""
    return DistributedDataParallel(NanoGPT())


def _blocks(prefix: str = "", inside: str = "", layers: int = 3) -> tuple[ExpectedBlock, ...]:
    return blocks_of(
        prefix + BLOCKS,
        range(layers),
        tuple(inside + site for site in ATTENTION_SITES),
        tuple(inside + site for site in MLP_SITES),
    )


def _member(name: str, build: Callable[[], nn.Module], prefix: str = "", **flags: Any) -> Example:
    settings: dict[str, Any] = {
        "inputs": token_inputs,
        "blocks": _blocks(prefix),
        "matrices": lambda model: block_matrices(model, prefix + BLOCKS),
    }
    return Example(name, seeded(build), **(settings | flags))


def members() -> list[Example]:
    """Every model of this module."""
    return [
        _member(
            "lightning_training_only",
            TrainingOnly,
            "model.",
            callable=False,
            note="no forward: only `training_step` and the inner model can run",
        ),
        _member("lightning_forward", WithForward, "model."),
        _member("lightning_example_input", WithExample, "model.", note="has `example_input_array`"),
        _member("lightning_itself", ItsOwnModel),
        _member("checkpointed", Checkpointed, note="activation checkpointing around every block"),
        _member("dictionary_batch", DictModel, "gpt.", inputs=dict_inputs),
        _member("compiled", compiled, "_orig_mod.", blocks=_blocks("_orig_mod.", layers=2), compiled=True),
        _member("compiled_in_place", compiled_in_place, blocks=_blocks(layers=2), compiled=True),
        _member("compiled_blocks", compiled_blocks, blocks=_blocks(inside="_orig_mod.", layers=2), compiled=True),
        _member("data_parallel", data_parallel, "module.", needs_process_group=True),
    ]
