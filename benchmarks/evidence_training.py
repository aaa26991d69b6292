"""One training run of `evidence.py`: which branch starts how much too strong, what is done about it, what comes out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from quiet import fit
from torch import Tensor

from lightning_spectral import ResidualBlock, ResidualRescaler, SpectralMonitor, find_blocks, measure
from lightning_spectral.measuring.block_outputs import BlockOutputs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import Config, LitGPT, Windows, read_standard_library

# As in examples/rescale_gpt.py, but that the law alone moves the scales: a run that it leaves alone is bitwise the one
# without it, and a difference between two arms is the law's.
LAW: dict[str, Any] = {"margin": 0.2, "bounds": (1 / 8, 8.0), "learnable": False}
ARMS: dict[str, dict[str, Any] | None] = {
    "off": None,
    "both": {"guard": False},
    "low": {"guard": False, "sides": "low"},
    "mlp": {"guard": False, "mode": "mlp"},
    "guard": {"guard": True},
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all runs have in common.

    Attributes:
        width: Width of the residual stream.
        heads: Attention heads.
        context: Bytes that the model sees.
        batch_size: Windows per optimizer step.
        steps: Optimizer steps.
        early_step: The step at which the predictors are measured a second time.
        every_n_steps: Optimizer steps between two measurements of the law.
        held_out: Windows of held-out text that the validation loss and the token residual are means over.
        probe: Windows of them that Jacobians and updates are measured on.
    """

    width: int = 48
    heads: int = 4
    context: int = 64
    batch_size: int = 8
    steps: int = 200
    early_step: int = 50
    every_n_steps: int = 5
    held_out: int = 256
    probe: int = 2


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    Attributes:
        layers: Residual blocks.
        mlp_gain: Factor on the last matrix of every MLP at initialization.
        attention_gain: The same for attention.
        rate: Largest learning rate of the cycle.
        seed: Decides the weights and the order of the batches.
        arm: What is done about the ratios, a key of ``ARMS``.
    """

    layers: int
    mlp_gain: float
    attention_gain: float
    rate: float
    seed: int
    arm: str = "off"

    @property
    def key(self) -> str:
        """Name of the run in the file of results."""
        return " ".join(f"{name}={value:g}" if name != "arm" else value for name, value in asdict(self).items())


@dataclass(frozen=True, slots=True)
class Texts:
    """Windows of the text, ``(windows, context + 1)``, bytes."""

    training: Windows
    held_out: Tensor


def read_texts(recipe: Recipe) -> Texts:
    """Read the standard library's source; the held-out windows are spread evenly over the held-out files."""
    training, held_out = (Windows(text, recipe.context) for text in read_standard_library())
    places = torch.linspace(0, len(held_out) - 1, recipe.held_out).long()
    return Texts(training, held_out.windows[places].long())


class Recorder(Callback):
    """Notes the training loss of every step, and the predictors at the early one."""

    def __init__(self, early_step: int | None, blocks: Sequence[ResidualBlock], texts: Texts, probe: int) -> None:
        self.early_step, self.blocks, self.texts, self.probe = early_step, blocks, texts, probe
        self.losses: list[float] = []
        self.early: dict[str, list[float | None]] | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the loss that Lightning hands over."""
        self.losses.append(outputs["loss"].item())
        if trainer.global_step == self.early_step:
            self.early = predictors(pl_module, self.blocks, self.texts, self.probe)


def predictors(
    module: LitGPT, blocks: Sequence[ResidualBlock], texts: Texts, probe: int
) -> dict[str, list[float | None]]:
    """Measure what may predict: logarithms of ratios, and token residuals, one number per block each."""
    batch = texts.held_out[:: len(texts.held_out) // probe][:probe, :-1]
    circuit, paper, jacobian = (
        measure(module, blocks, linearization=rule, batch=batch).layers for rule in ("circuit", "paper", "jacobian")
    )
    functional = [layer.functional for layer in jacobian if layer.functional is not None]
    return {
        "circuit": [layer.log_ratio for layer in circuit],
        "paper": [layer.log_ratio for layer in paper],
        "jacobian": [layer.log_ratio for layer in jacobian],
        "frobenius": [_log(numbers.frobenius_ratio) for numbers in functional],
        "update": [_log(numbers.update_ratio) for numbers in functional],
        "token_residual": evaluate(module, blocks, texts)[1],
    }


def _log(ratio: float | None) -> float | None:
    return math.log(ratio) if ratio else None


@torch.no_grad()
def evaluate(module: LitGPT, blocks: Sequence[ResidualBlock], texts: Texts) -> tuple[float, list[float | None]]:
    """Return the loss on held-out text, in nats per byte, and the token residual of every block's output there."""
    outputs, training = BlockOutputs(module, blocks), module.training
    module.eval()
    outputs.start()
    logits = module(texts.held_out[:, :-1])
    outputs.stop()
    module.train(training)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts.held_out[:, 1:].flatten())
    residuals = outputs.values()
    return loss.item(), [residuals[block.index][0] for block in blocks]


def spike(losses: Sequence[float], begin: int = 10) -> float:
    """Return the largest rise of a loss above its smallest value so far, after the first steps, in nats."""
    lowest, rise = min(losses[:begin]), 0.0
    for loss in losses[begin:]:
        rise, lowest = max(rise, loss - lowest), min(lowest, loss)
    return rise


def start(run: Run, recipe: Recipe) -> LitGPT:
    """Return the model of the example, the branches of one kind scaled."""
    torch.manual_seed(run.seed)
    module = LitGPT(Config(run.layers, recipe.width, recipe.heads, recipe.context), run.rate)
    with torch.no_grad():
        for block in module.model.blocks:
            block.mlp.down.weight.mul_(run.mlp_gain)
            block.attention.proj.weight.mul_(run.attention_gain)
    return module


def train(run: Run, recipe: Recipe, texts: Texts) -> dict[str, Any]:
    """Train once. Everything but the time is a function of the run, the recipe and the text.

    Returns:
        Plain values: the run, its predictors where it is left alone, its losses and the token geometry at the end.
    """
    began, settings, module = time.process_time(), ARMS[run.arm], start(run, recipe)
    blocks = find_blocks(module)
    alone = settings is None
    initial = predictors(module, blocks, texts, recipe.probe) if alone else None
    recorder = Recorder(recipe.early_step if alone else None, blocks, texts, recipe.probe)
    callbacks: list[Callback] = [recorder]
    if settings is not None:
        law = ResidualRescaler(**LAW, **settings)
        callbacks.insert(0, SpectralMonitor(recipe.every_n_steps, law, blocks=blocks, on_error="raise"))
    fit(module, callbacks, texts.training, batch_size=recipe.batch_size, steps=recipe.steps, seed=run.seed)
    validation, residuals = evaluate(module, blocks, texts)
    scales = [abs(float(value)) for name, value in module.named_parameters() if name.endswith("log_scale")]
    return {
        **asdict(run),
        "validation": validation,
        "largest_training": max(recorder.losses),
        "spike": spike(recorder.losses),
        "token_residual": residuals,
        "log_ratio": [layer.log_ratio for layer in measure(module, blocks)],
        "largest_log_scale": max(scales, default=0.0),
        "initial": initial,
        "early": recorder.early,
        "seconds": time.process_time() - began,
    }
