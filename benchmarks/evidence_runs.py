"""One training run of `evidence_steering.py`: a small GPT from some start, trained in some way, and what came out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from evidence_training import spike
from lightning.pytorch import Callback, Trainer
from quiet import fit
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_spectral import GainCeiling, ResidualRescaler, SpectralMonitor, attach_scales, balance_init_, find_blocks
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.weights.model import ModelWeights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import Config, LitGPT, Windows, read_standard_library

WORST = math.log(256)  # nats per byte: guessing
ZONE = math.log(2.0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all runs have in common.

    Attributes:
        width: Width of the residual stream.
        heads: Attention heads.
        context: Bytes that the model sees.
        batch_size: Windows per optimizer step.
        every_n_steps: Optimizer steps between two measurements of a law.
        watched_every: Optimizer steps between two measurements of the experiment, of every arm.
        settled: The step from which on ratios are expected inside the safe zone.
        held_out: Windows of held-out text.
    """

    width: int = 48
    heads: int = 4
    context: int = 32
    batch_size: int = 8
    every_n_steps: int = 5
    watched_every: int = 10
    settled: int = 100
    held_out: int = 512


@dataclass(frozen=True, slots=True)
class Arm:
    """What is done in training.

    Attributes:
        law: A law that steers residual scales.
        scales: Whether the model has residual scales that only the optimizer moves.
        placebo: Whether it has residual scales that follow a schedule.
        strength: κ of `balance_init_(target=1, gain=κ)` before training, ``None`` for none.
        decay: Weight decay.
        layer_scale: Start of a learned gain for each channel of each branch (LayerScale, 2103.17239).
        depth_rate: Whether blocks have the learning rate over √layers (depth-μP, 2310.02244).
        sigma: Whether the matrices in blocks are γ W / ‖W‖₂ with a learned γ (σReparam, 2303.06296).
    """

    law: GainCeiling | ResidualRescaler | None = None
    scales: bool = False
    placebo: bool = False
    strength: float | None = None
    decay: float = 0.1
    layer_scale: float | None = None
    depth_rate: bool = False
    sigma: bool = False


DEFAULT = "ceiling 1"
ARMS = {
    "off": Arm(),
    "scales": Arm(scales=True),
    "band": Arm(ResidualRescaler()),
    **{f"ceiling {k:g}": Arm(GainCeiling(ceiling=k)) for k in (0.3, 1, 3, 10)},
    "ceiling 1, learned": Arm(GainCeiling(learnable=True)),
    "ceiling 1 without zone": Arm(GainCeiling(floor=1.0)),
    "placebo": Arm(placebo=True),
    "start 1": Arm(strength=1.0),
    "decay 0.5": Arm(decay=0.5),
    "decay 1": Arm(decay=1.0),
    "LayerScale 0.1": Arm(layer_scale=0.1),
    "depth-scaled rate": Arm(depth_rate=True),
    "σReparam": Arm(sigma=True),
}


@dataclass(frozen=True, slots=True)
class Start:
    """How a model is initialized.

    Attributes:
        fan_in: Whether the matrices in blocks have entries of variance 1 / fan-in, or a standard deviation of 0.02.
        mlp: Factor on the last matrix of every MLP.
        attention: The same for attention.
        norms: Whether the blocks have norms.
        muon: Whether Muon trains the matrices in blocks, in place of AdamW.
    """

    fan_in: bool = True
    mlp: float = 1.0
    attention: float = 1.0
    norms: bool = True
    muon: bool = False


STARTS = {
    "healthy": Start(),
    "MLP 8×": Start(mlp=8.0),
    "attention 8×": Start(attention=8.0),
    "small": Start(fan_in=False),
}
# In which others saw training fail: deep models without norms (2602.22988), and Muon at high rates (2602.01734).
REGIMES = {"no norms": Start(norms=False), "Muon": Start(muon=True)}


@dataclass(frozen=True, slots=True)
class Job:
    """One run.

    Attributes:
        arm: What is done, a key of ``ARMS``.
        start: Where it starts, a key of ``STARTS`` or of ``REGIMES``.
        layers: Residual blocks.
        steps: Optimizer steps.
        rate: Largest learning rate of the cycle.
        seed: Decides the weights and the order of the batches.
    """

    arm: str
    start: str
    layers: int
    steps: int
    rate: float
    seed: int


class Tuned(LitGPT):
    """The example's recipe with the weight decay and the rates of an arm."""

    def __init__(self, config: Config, rate: float, arm: Arm, *, muon: bool = False) -> None:
        super().__init__(config, rate)
        self.arm, self.muon = arm, muon

    def configure_optimizers(self) -> dict:
        """AdamW, warmed up and annealed."""
        found = super().configure_optimizers()
        cycle, steps = found["lr_scheduler"]["scheduler"], self.trainer.estimated_stepping_batches
        inside = {id(parameter) for parameter in self.model.blocks.parameters()} if self.arm.depth_rate else set()
        groups = [[p for p in self.parameters() if (id(p) in inside) is blockwise] for blockwise in (False, True)]
        rates = (self.learning_rate, self.learning_rate / math.sqrt(len(self.model.blocks)))
        pairs = [(group, rate) for group, rate in zip(groups, rates, strict=True) if group]
        optimizer = torch.optim.AdamW([{"params": group} for group, _ in pairs], weight_decay=self.arm.decay)
        if self.muon:
            matrices = [item for item in self.model.blocks.parameters() if item.ndim == 2]
            others = [item for item in self.parameters() if all(item is not matrix for matrix in matrices)]
            options = {"weight_decay": self.arm.decay}
            muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
            optimizer = Both(muon, torch.optim.AdamW(others, **options))
            pairs = [(group["params"], self.learning_rate) for group in optimizer.param_groups]
        warmup = 0.1 if steps > 10 else 0.0
        settings = {"total_steps": steps, "pct_start": warmup, "cycle_momentum": not self.muon}
        cycle = type(cycle)(optimizer, [rate for _, rate in pairs], **settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class Both(torch.optim.Optimizer):
    """Two optimizers as one. They share their groups, so that a schedule reaches both."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        """Make a step of each."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


class LayerScale(nn.Module):
    """A branch times a learned gain for each channel."""

    def __init__(self, branch: nn.Module, width: int, start: float) -> None:
        super().__init__()
        self.branch, self.gain = branch, nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the output: (batch, time, width) to the same shape."""
        return self.gain * self.branch(x)


class SigmaReparam(nn.Module):
    """γ W / σ(W), σ by one step of power iteration for each forward pass in training; γ starts at 1."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("u", torch.nn.functional.normalize(torch.randn(W.shape[0]), dim=0))
        self.register_buffer("v", torch.nn.functional.normalize(W.detach().T @ self.u, dim=0))

    def forward(self, W: Tensor) -> Tensor:
        """Return the weight in use."""
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.u = torch.nn.functional.normalize(W @ self.v, dim=0)
                self.v = torch.nn.functional.normalize(W.T @ self.u, dim=0)
        return self.gain * W / (self.u @ W @ self.v)


class Watcher(Callback):
    """Notes the training loss of every step, and now and then the ratios and scales of all blocks."""

    def __init__(self, meter: Meter, every_n_steps: int) -> None:
        self.meter, self.every_n_steps = meter, every_n_steps
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.log_ratios: list[list[float | None]] = []
        self.log_scales: list[list[float]] = []  # mean over the blocks, of MLP and attention

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the loss that Lightning hands over, and measure."""
        self.losses.append(outputs["loss"].item())
        if trainer.global_step % self.every_n_steps == 0:
            layers = self.meter.measure(trainer.global_step).layers
            self.steps.append(trainer.global_step)
            self.log_ratios.append([layer.log_ratio for layer in layers])
            scales = ([layer.mlp_scale for layer in layers], [layer.attention_scale for layer in layers])
            self.log_scales.append([fmean(map(math.log, kind)) for kind in scales])


class Schedule(Callback):
    """Moves residual scales along a schedule: steps, and logarithms of the scales of MLP and attention."""

    def __init__(self, scales: Sequence[tuple[nn.Parameter, int]], steps: Sequence[int], values: Any) -> None:
        self.scales, self.steps, self.values = scales, [0, *steps], torch.tensor([[0.0, 0.0], *values])

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        """Set the scales for the coming step, by the last entry before it."""
        place = sum(step <= trainer.global_step for step in self.steps) - 1
        for scale, kind in self.scales:
            scale.fill_(self.values[place, kind])


def initialize(job: Job, recipe: Recipe) -> Tuned:
    """Return the model at its start."""
    torch.manual_seed(job.seed)
    arm, start = ARMS[job.arm], (STARTS | REGIMES)[job.start]
    module = Tuned(Config(job.layers, recipe.width, recipe.heads, recipe.context), job.rate, arm, muon=start.muon)
    for block in module.model.blocks:
        matrices = [item for item in block.modules() if isinstance(item, nn.Linear)]
        with torch.no_grad():
            for linear in matrices if start.fan_in else ():
                linear.weight.normal_(std=linear.in_features**-0.5)
            if not start.norms:
                block.norm1, block.norm2 = nn.Identity(), nn.Identity()
            block.mlp.down.weight.mul_(start.mlp)
            block.attention.proj.weight.mul_(start.attention)
        for linear in matrices if arm.sigma else ():
            parametrize.register_parametrization(linear, "weight", SigmaReparam(linear.weight))
        if arm.layer_scale is not None:
            block.attention = LayerScale(block.attention, recipe.width, arm.layer_scale)
            block.mlp = LayerScale(block.mlp, recipe.width, arm.layer_scale)
    return module


def train(job: Job, recipe: Recipe, texts: tuple[Windows, Tensor], schedule: Mapping[str, Any] | None) -> dict:
    """Train once. Everything but the time is a function of the job, the recipe, the text and the schedule."""
    began, arm, module = time.process_time(), ARMS[job.arm], initialize(job, recipe)
    blocks, callbacks = find_blocks(module), []
    if arm.strength is not None:
        balance_init_(module, blocks, gain=arm.strength)
    if arm.scales or arm.placebo or arm.law is not None:
        learnable = arm.scales if arm.law is None else arm.law.learnable
        scales = attach_scales(module, blocks, learnable=learnable)
        blocks = scales.blocks
        if schedule is not None:
            kinds = [(parameter, int("attention" in site)) for site, parameter in scales.named_parameters()]
            callbacks = [Schedule(kinds, schedule["measured"], schedule["log_scales"])]
    if arm.law is not None:
        law = SpectralMonitor(recipe.every_n_steps, arm.law, blocks=blocks, geometry=False, on_error="raise")
        callbacks = [law]
    watcher = Watcher(Meter(ModelWeights(module), blocks), recipe.watched_every)
    fit(
        module,
        [*callbacks, watcher],
        texts[0],
        batch_size=recipe.batch_size,
        steps=job.steps,
        seed=job.seed,
    )
    return asdict(job) | outcome(watcher, module, recipe, texts[1]) | {"seconds": time.process_time() - began}


@torch.no_grad()
def outcome(watcher: Watcher, module: Tuned, recipe: Recipe, held_out: Tensor) -> dict[str, Any]:
    """Return what came out, as plain values."""
    module.eval()
    logits = module(held_out[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, held_out[:, 1:].flatten()).item()
    settled = [row for step, row in zip(watcher.steps, watcher.log_ratios, strict=True) if step >= recipe.settled]
    inside = [value is not None and abs(value) < ZONE for row in settled for value in row]
    return {
        "validation": loss if math.isfinite(loss) else None,
        "spike": spike(watcher.losses) if all(map(math.isfinite, watcher.losses)) else None,
        "inside": fmean(inside) if inside else None,
        "worst": max((abs(value) for row in settled for value in row if value is not None), default=None),
        "last_log_ratios": watcher.log_ratios[-1] if watcher.log_ratios else [],
        "measured": watcher.steps,
        "log_scales": watcher.log_scales,
    }


def read_texts(recipe: Recipe) -> tuple[Windows, Tensor]:
    """Read the standard library's source; the held-out windows are spread evenly over the held-out files."""
    training, held_out = (Windows(text, recipe.context) for text in read_standard_library())
    places = torch.linspace(0, len(held_out) - 1, recipe.held_out).long()
    return training, held_out.windows[places].long()
