"""Start the example's GPT with one kind of branch far too strong, and let the residual scales bring it back.

    python examples/rescale_gpt.py
    python examples/rescale_gpt.py --layers 8 --width 176 --heads 8 --steps 400 --seed 1

Two wrong initializations, the last matrix of every MLP or of every attention branch times `--factor`, are trained twice
each, from the same seed on the same batches: watched only, and with `SpectralMonitor(auto_rescale=True)`, all settings
of the law by default. Then the model as it is, at five learning rates, watched and steered. A table and a figure show
what steering did to the ratios, and what it did to the loss.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from train_gpt import Config, LitGPT, Windows, read_standard_library

from lightning_spectral import History, SpectralMonitor

ZONE = (0.5, 2.0)
BRANCHES = {"mlp": "MLP", "attention": "attention"}
RATES = (1 / 4, 1 / 2, 1, 2, 4)  # times --rate
# Of the Okabe-Ito palette, which stays apart under every common colour blindness.
OFF, ON, MLP, ATTENTION = "#7f7f7f", "#0072b2", "#d55e00", "#009e73"
INK = "#222222"


@dataclass(frozen=True)
class Run:
    """What one training run left behind.

    Attributes:
        branch: The branches that started too strong, ``"none"`` for a model as it is.
        rate: Largest learning rate of the cycle.
        steered: Whether the scales were attached and moved.
        losses: Training loss of every step.
        validation: Steps and validation losses.
        history: What was measured, and what the controller did.
    """

    branch: str
    rate: float
    steered: bool
    losses: list[float]
    validation: list[tuple[int, float]]
    history: History

    @property
    def steps(self) -> list[int]:
        """The measured steps."""
        return list(self.history.steps)

    @property
    def inside(self) -> list[float]:
        """Fraction of the blocks inside the safe zone at every measured step."""
        return [
            sum(ZONE[0] < ratio < ZONE[1] for ratio in ratios) / len(ratios)
            for ratios in self.history.values("ratio").T
        ]

    @property
    def arrival(self) -> int | None:
        """The first measured step at which every block is inside the safe zone, ``None`` where there is none."""
        return next((step for step, share in zip(self.steps, self.inside, strict=True) if share == 1), None)

    @property
    def settled(self) -> int | None:
        """The first measured step from which every block is inside the safe zone to the end, ``None`` for none."""
        outside = [place for place, share in enumerate(self.inside) if share < 1]
        later = self.steps[outside[-1] + 1 :] if outside else self.steps
        return later[0] if later else None

    @property
    def spike(self) -> float:
        """The largest training loss after the tenth step, over the smallest one before it."""
        lowest, worst = min(self.losses[:10]), 0.0
        for loss in self.losses[10:]:
            worst, lowest = max(worst, loss / lowest), min(lowest, loss)
        return worst


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 6, "width": 64, "heads": 4, "context": 64, "batch-size": 8}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--factor", type=float, default=8.0, help="how much too strong the branches start")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate; the model as it is has five around it")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--every-n-steps", type=int, default=5, help="optimizer steps between two measurements")
    parser.add_argument("--out", default="runs", help="folder for everything that is written")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def start(args: argparse.Namespace, branch: str, rate: float) -> LitGPT:
    """Return the example's model with one kind of branch too strong."""
    module = LitGPT(Config(args.layers, args.width, args.heads, args.context), rate)
    with torch.no_grad():
        for block in module.model.blocks if branch in BRANCHES else ():
            last = block.mlp.down if branch == "mlp" else block.attention.proj
            last.weight.mul_(args.factor)
    return module


def train(args: argparse.Namespace, branch: str, rate: float, *, steered: bool, texts: tuple[bytes, bytes]) -> Run:
    """Train once; the seed decides the weights and the batches, whether the run is steered or not."""
    seed_everything(args.seed, verbose=False)
    order = torch.Generator().manual_seed(args.seed)
    loaders = (
        DataLoader(Windows(texts[0], args.context), args.batch_size, shuffle=True, drop_last=True, generator=order),
        DataLoader(Windows(texts[1], args.context), 4 * args.batch_size),
    )
    name = f"{branch}-{rate:g}-{'on' if steered else 'off'}"
    print(f"training {name}: {args.steps} steps", flush=True)
    table = CSVLogger(args.out, name=f"rescale-seed{args.seed}", version=name)
    trainer = Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        logger=table,
        callbacks=[SpectralMonitor(args.every_n_steps, auto_rescale=steered)],
        log_every_n_steps=1,
        val_check_interval=max(args.steps // 10, 1),
        limit_val_batches=10,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(start(args, branch, rate), *loaders)
    return read_run(Path(table.log_dir), branch, rate, steered=steered)


def read_run(folder: Path, branch: str, rate: float, *, steered: bool) -> Run:
    """Read back what a run has written."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    validation = [(int(row["step"]) + 1, float(row["val/loss"])) for row in rows if row.get("val/loss")]
    journal = folder / "spectral.jsonl"
    return Run(branch, rate, steered, losses, validation, History.read(journal))


def report(runs: list[Run], factor: float) -> None:
    """Print one line per run. The losses are nats per byte."""
    print(
        f"\n{'too strong':<15} {'rate':>6}  {'rescale':<8} {'all inside':>10} {'to the end':>10} {'actions':>8} "
        f"{'max loss':>9} {'spike':>6} {'train':>6} {'val':>6} {'scales':>15}"
    )
    for run in runs:
        scales = [getattr(layer, f"{name}_scale") for layer in run.history.measurements[-1] for name in BRANCHES]
        last = run.losses[-20:]
        first, final = ("never" if step is None else f"step {step}" for step in (run.arrival, run.settled))
        what = f"{BRANCHES[run.branch]}, {factor:g}x" if run.branch in BRANCHES else "as it is"
        print(
            f"{what:<15} {run.rate:>6g}  {'on' if run.steered else 'off':<8} {first:>10} "
            f"{final:>10} {len(run.history.actions):>8} {max(run.losses):>9.3f} {run.spike:>6.3f} "
            f"{sum(last) / len(last):>6.3f} {run.validation[-1][1]:>6.3f} "
            f"{f'{min(scales):.3f} to {max(scales):.3f}':>15}"
        )
    print(
        "\nall inside: first measurement with every block inside the safe zone; to the end: with all of them from "
        "then on\n"
        "spike: largest training loss after step 10 over the smallest one before it\n"
        "train, val: mean loss of the last 20 steps, loss at the last validation, in nats per byte\n"
        "scales: smallest and largest residual scale at the end"
    )


def draw(runs: list[Run], factor: float) -> Figure:
    """Draw a column per wrong start: ratios, blocks inside, losses, scales; below them, losses over rates."""
    figure = Figure(figsize=(9.0, 12.0), dpi=100, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 1.2))
    grid = upper.subplots(4, 2, sharex=True, sharey="row")
    for column, branch in enumerate(BRANCHES):
        axes = grid[:, column]
        axes[0].set_title(f"{BRANCHES[branch]} branches start {factor:g}× too strong", color=INK, weight="bold")
        for run in (run for run in runs if run.branch == branch):
            draw_ratio(axes[0], run)
            draw_inside(axes[1], run)
            draw_loss(axes[2], run)
            if run.steered:
                draw_scales(axes[3], run)
        axes[3].set_xlabel("optimizer step", color=INK)
    labels = (
        "spectral ratio ρ\n(range over the blocks)",
        "blocks inside\nthe safe zone",
        "loss, nats per byte",
        "scales",
    )
    for row, label in zip(grid, labels, strict=True):
        row[0].set_ylabel(label, color=INK)
    draw_rates(lower.subplots(), [run for run in runs if run.branch not in BRANCHES])
    places = ("upper right", "center right", "upper right", "best", "best")
    for axes, place in zip(figure.axes, [place for place in places for _ in BRANCHES], strict=False):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(color="#999999", labelcolor=INK, labelsize=9)
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none", loc=place)  # over lines, readable
    return figure


def draw_rates(axes: Axes, runs: list[Run]) -> None:
    """Draw the validation loss at the end over the learning rate, of the model as it is."""
    for steered in (False, True):
        found = sorted((run.rate, run.validation[-1][1]) for run in runs if run.steered is steered)
        one = next(run for run in runs if run.steered is steered)
        axes.plot(*zip(*found, strict=True), marker="o" if steered else "s", label=name_of(one), **look(one))
    axes.set_title("The model as it is, at five learning rates", color=INK, weight="bold")
    rates = sorted({run.rate for run in runs})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("learning rate", color=INK)
    axes.set_ylabel("validation loss,\nnats per byte", color=INK)


def look(run: Run) -> dict[str, Any]:
    """Return how the lines of a run look: dashed as well as grey where it is only watched."""
    return (
        {"color": ON, "linewidth": 1.8} if run.steered else {"color": OFF, "linewidth": 1.5, "linestyle": (0, (4, 2))}
    )


def name_of(run: Run) -> str:
    """Return what the legends call a run."""
    return "auto_rescale on" if run.steered else "off"


def draw_ratio(axes: Axes, run: Run) -> None:
    """Draw the band of the ratios of all blocks, over the safe zone."""
    ratios = run.history.values("ratio").T
    low, high = [min(row) for row in ratios], [max(row) for row in ratios]
    middle = [math.exp(sum(map(math.log, row)) / len(row)) for row in ratios]
    if not run.steered:  # once per panel
        axes.axhspan(*ZONE, color="#f0e442", alpha=0.35, linewidth=0, label="safe zone")
    axes.fill_between(run.steps, low, high, color=look(run)["color"], alpha=0.25, linewidth=0)
    axes.plot(run.steps, middle, label=name_of(run), **look(run))
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")


def draw_inside(axes: Axes, run: Run) -> None:
    """Draw the fraction of the blocks inside the safe zone."""
    axes.plot(run.steps, run.inside, label=name_of(run), **look(run))
    axes.set_ylim(-0.05, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def draw_loss(axes: Axes, run: Run) -> None:
    """Draw the training loss of every step, thin, and the validation loss."""
    axes.plot(range(1, len(run.losses) + 1), run.losses, color=look(run)["color"], linewidth=0.6, alpha=0.7)
    steps, losses = zip(*run.validation, strict=True)
    ending = (
        f"validation {losses[-1]:.3f} at the end,\nlargest training loss {max(run.losses):.2f}, spike {run.spike:.2f}×"
    )
    marker = "o" if run.steered else "s"
    axes.plot(steps, losses, marker=marker, markersize=3.5, label=f"{name_of(run)}: {ending}", **look(run))


def draw_scales(axes: Axes, run: Run) -> None:
    """Draw the scale of every branch, and when the controller last moved one."""
    for name, colour, dashes in (("mlp", MLP, "-"), ("attention", ATTENTION, "-.")):
        for index, scales in enumerate(run.history.values(f"{name}_scale")):
            label = f"{BRANCHES[name]}, each block" if index == 0 else None
            axes.plot(run.steps, scales, color=colour, linewidth=1.1, linestyle=dashes, alpha=0.8, label=label)
    if run.history.actions:
        axes.axvline(run.history.actions[-1]["step"], color=INK, linewidth=0.8, linestyle=":", label="last action")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")


def main() -> None:
    """Train, then report."""
    args = parse()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    texts = read_standard_library()
    kinds = [(branch, args.rate) for branch in BRANCHES] + [("none", times * args.rate) for times in RATES]
    runs = [train(args, *kind, steered=steered, texts=texts) for kind in kinds for steered in (False, True)]
    report(runs, args.factor)
    path = Path(args.out) / f"rescale-seed{args.seed}" / "rescale.png"
    draw(runs, args.factor).savefig(path)
    print(f"\nfigure          {path}\nmeasurements    {path.parent}/*/spectral.jsonl")


if __name__ == "__main__":
    main()
