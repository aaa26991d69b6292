"""What balanced initialization and the ceiling law do to a post-norm model.

    python benchmarks/post_norm.py            # runs what is missing, and prints the table
    python benchmarks/post_norm.py --paste    # also puts the table into docs/evidence.md

Every finished run is a line of `results/post_norm.jsonl`; a run that stands there is not run again.

The plan, written before the runs
---------------------------------
Model: a causal `nn.TransformerEncoder` over bytes, 8 blocks × 48, 4 heads, GELU, no dropout, matrices of the encoder
drawn anew by `xavier_uniform_` as in `examples/transformer_encoder.py`. Post-norm (`norm_first=False`), and its
pre-norm twin with a final norm. Text: the standard library, read as in `examples/train_gpt.py`, context 32, batch 16.
AdamW with weight decay 0.1, 10 % linear warm-up and a cosine to zero, gradients clipped at 1, 300 steps. One thread.
Outcome: validation loss on 256 windows of held-out files at the end, nats per byte.

Arms of both norms: plain; `balance_init_` with target 1; with target 1 and gain 3 (both branches of every block at the
ceiling of the default law). Of post-norm also: target 2; target 4; the last matrix of attention × 0.5; the last
matrices of both branches × 0.5 (one ratio); the law with κ = 3, a measurement every 5 steps.

Rates: 1e-3 and 2e-3, seeds 0 to 3, every arm. Before them the plain arm with seed 100 at 5e-4, 1e-3, 2e-3, 4e-3 and
8e-3, to see where these two rates stand.

Changed after this trial and 14 runs with seed 0: the trial's best rate is 2e-3 for post-norm, which seed 0 does not
bear out (1e-3 is better there), and 8e-3 for pre-norm. So pre-norm is run at 2e-3 and 8e-3, not at 1e-3. Post-norm at
4e-3, where the plain model of the trial learned badly, comes last; arms that are not finished are not in the table.

Questions, in this order. Differences are arm minus plain, paired by seed: the mean, the range, the pairs that are
better. A difference counts as seen where all four seeds agree in sign at a rate; 4 of 4 by luck has a chance of 1/8,
so among 25 comparisons three of these are expected from luck alone, and the size of a difference beside the range of
the seeds is what to look at.

1. Does the ratio alone do anything to post-norm: target 1 against plain? Expected: nothing.
2. Is it the size of the branches: are "both × 0.5" and "attention × 0.5" better than plain, and is gain 3, which sets
   the size, as good? Expected: the smaller, the better.
3. Target 2 and 4 make attention smaller and the MLP larger. Expected: better, less than both × 0.5.
4. Does the law do as much at run time as the start does? Expected: no; trials found it of no help to post-norm.
5. Best rate of an arm against the best rate of plain, by the means over the seeds.
6. Is any of it the same in the pre-norm twin?

A run whose validation loss is not finite counts as diverged and as worse than any other.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import LightningModule
from quiet import fit
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral import GainCeiling, ResidualBlock, SpectralMonitor, balance_init_, find_blocks, measure

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import machine
from train_gpt import Windows, read_standard_library

RESULTS = Path(__file__).parent / "results" / "post_norm.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
BEGIN, END = "<!-- begin: post-norm -->", "<!-- end: post-norm -->"

BALANCED: dict[str, dict[str, float]] = {
    "target 1": {"target": 1.0},
    "target 2": {"target": 2.0},
    "target 4": {"target": 4.0},
    "target 1, gain 3": {"target": 1.0, "gain": 3.0},
}
HALVED = {"attention × 0.5": ("self_attn.out_proj",), "both × 0.5": ("self_attn.out_proj", "linear2")}
ARMS = {
    "post": ("plain", "target 1", "target 2", "target 4", *HALVED, "target 1, gain 3", "law"),
    "pre": ("plain", "target 1", "target 1, gain 3"),
}
PLAN = (("post", 2e-3), ("post", 1e-3), ("pre", 2e-3), ("pre", 8e-3), ("post", 4e-3))
SEEDS, TRIAL_SEED = (0, 1, 2, 3), 100
TRIAL_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all runs have in common."""

    blocks: int = 8
    width: int = 48
    heads: int = 4
    context: int = 32
    batch_size: int = 16
    steps: int = 300
    held_out: int = 256


@dataclass(frozen=True, slots=True)
class Run:
    """One run: the place of the norms, what is done to the start or by the law, the largest rate, the seed."""

    norm: str
    arm: str
    rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class Texts:
    """Windows of the text, ``(windows, context + 1)``, bytes."""

    training: Windows
    held_out: Tensor


class LitEncoder(LightningModule):
    """A causal encoder that predicts the next byte."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        super().__init__()
        self.rate, self.steps, self.losses = run.rate, recipe.steps, list[float]()
        self.tokens = nn.Embedding(256, recipe.width)
        self.positions = nn.Embedding(recipe.context, recipe.width)
        pre, width = run.norm == "pre", recipe.width
        layer = nn.TransformerEncoderLayer(
            width, recipe.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=pre
        )
        final = nn.LayerNorm(width) if pre else None  # post-norm ends with a norm anyway
        self.encoder = nn.TransformerEncoder(layer, recipe.blocks, final, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        for parameter in self.encoder.parameters():  # the layers are copies of one: draw each anew
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        """Predict the next byte at each position: (batch, time) integers to (batch, time, 256) logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.encoder(x, mask, is_causal=True))

    def loss(self, windows: Tensor) -> Tensor:
        """Return the mean loss per byte, in nats."""
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss, and note it."""
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict:
        """AdamW, 10 % linear warm-up, cosine to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate_at(self, step: int) -> float:
        warmup = max(self.steps // 10, 1)
        left = (step - warmup) / max(self.steps - warmup, 1)
        return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))


def read_texts(recipe: Recipe) -> Texts:
    """Read the standard library's source; the held-out windows are spread evenly over the held-out files."""
    training, held_out = (Windows(text, recipe.context) for text in read_standard_library())
    places = torch.linspace(0, len(held_out) - 1, recipe.held_out).long()
    return Texts(training, held_out.windows[places].long())


def start(run: Run, recipe: Recipe) -> tuple[LitEncoder, Sequence[ResidualBlock]]:
    """Return the model as the arm starts it, and its blocks."""
    torch.manual_seed(run.seed)
    module = LitEncoder(run, recipe)
    blocks = find_blocks(module, batch=torch.zeros(1, recipe.context, dtype=torch.long))
    if run.arm in BALANCED:
        balance_init_(module, blocks, **BALANCED[run.arm])
    for name, parameter in module.named_parameters():
        if name.endswith(tuple(f"{end}.{kind}" for end in HALVED.get(run.arm, ()) for kind in ("weight", "bias"))):
            parameter.data.mul_(0.5)
    return module, blocks


def train(run: Run, recipe: Recipe, texts: Texts) -> dict[str, Any]:
    """Train once; everything but the time is a function of the run, the recipe and the text."""
    began = time.process_time()
    module, blocks = start(run, recipe)
    at_start = norms(module, blocks)
    law = (
        [SpectralMonitor(5, GainCeiling(ceiling=3.0, margin=0.2), blocks=blocks, on_error="raise")]
        if run.arm == "law"
        else []
    )
    fit(module, law, texts.training, batch_size=recipe.batch_size, steps=recipe.steps, seed=run.seed)
    with torch.no_grad():  # in training mode, which has no dropout here: the fused kernel of `eval` calls no hooks
        validation = module.loss(texts.held_out).item()
    return {
        **asdict(run),
        "validation": validation if math.isfinite(validation) else None,
        "largest_training": max(module.losses),
        "start": at_start,
        "end": norms(module, blocks),
        "seconds": time.process_time() - began,
    }


def norms(module: LitEncoder, blocks: Sequence[ResidualBlock]) -> dict[str, list[float | None]]:
    """Return the spectral norms of both branches, one number per block."""
    pairs = [(layer.mlp_norm, layer.attention_norm) for layer in measure(module, blocks)]
    return {
        kind: [None if norm is None else round(norm, 4) for norm in values]
        for kind, values in zip(("mlp", "attention"), zip(*pairs, strict=True), strict=True)
    }


def planned() -> Iterator[Run]:
    """Yield the trial of rates, then the plan, seed by seed."""
    yield from (Run(norm, "plain", rate, TRIAL_SEED) for norm in ARMS for rate in TRIAL_RATES)
    yield from (Run(norm, arm, rate, seed) for norm, rate in PLAN for seed in SEEDS for arm in ARMS[norm])


def read(path: Path = RESULTS) -> dict[Run, dict[str, Any]]:
    """Return the finished runs."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = map(json.loads, lines)
    return {Run(*(values[name] for name in ("norm", "arm", "rate", "seed"))): values for values in found}


def tables(results: dict[Run, dict[str, Any]]) -> str:
    """Return the trial of rates, and the differences from plain by norm, rate and arm."""
    trial = ["| norm | " + " | ".join(f"{rate:g}" for rate in TRIAL_RATES) + " |", "|---" * 6 + "|"]
    for norm in ARMS:
        losses = [_loss(results.get(Run(norm, "plain", rate, TRIAL_SEED))) for rate in TRIAL_RATES]
        trial.append(f"| {norm} | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |")
    rows = [
        "| norm | rate | arm | ‖MLP‖, ‖attention‖, start | end | validation loss | arm − plain (range) | better |",
        "|---" * 8 + "|",
    ]
    for norm, rate in sorted(PLAN):
        rows += [row for arm in ARMS[norm] if (row := _row(results, norm, arm, rate)) is not None]
    return "\n".join([*trial, "", *rows])


def _row(results: dict[Run, dict[str, Any]], norm: str, arm: str, rate: float) -> str | None:
    pairs = [(results.get(Run(norm, arm, rate, seed)), results.get(Run(norm, "plain", rate, seed))) for seed in SEEDS]
    if not all(one and other for one, other in pairs):
        return None
    differences = [_loss(one) - _loss(other) for one, other in pairs]
    change = f"{mean(differences):+.3f} ({min(differences):+.3f} to {max(differences):+.3f})".replace("-", "−")
    change, better = ("", "") if arm == "plain" else (change, f"{sum(d < 0 for d in differences)} of {len(pairs)}")
    sizes = [
        ", ".join(f"{mean(mean(one[when][kind]) for one, _ in pairs if one):.2f}" for kind in ("mlp", "attention"))
        for when in ("start", "end")
    ]
    loss = mean(_loss(one) for one, _ in pairs)
    return f"| {norm} | {rate:g} | {arm} | {sizes[0]} | {sizes[1]} | {loss:.3f} | {change} | {better} |"


def _loss(values: dict[str, Any] | None) -> float:
    """Return the validation loss: infinite where the run diverged, NaN where it was not run."""
    if values is None:
        return math.nan
    return math.inf if values["validation"] is None else values["validation"]


def paste(table: str, page: Path = PAGE) -> None:
    """Put the table between its markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paste", action="store_true", help="put the table into docs/evidence.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe, results = Recipe(), read()
    texts = read_texts(recipe)
    for run in planned():
        if run in results:
            continue
        results[run] = train(run, recipe, texts)
        with RESULTS.open("a") as file:
            file.write(json.dumps(results[run]) + "\n")
        print(f"{run}: {_loss(results[run]):.4f}, {results[run]['seconds']:.1f} s", flush=True)
    print(f"{machine.describe()}\n\n{tables(results)}")
    if args.paste:
        paste(tables(results))


if __name__ == "__main__":
    main()
