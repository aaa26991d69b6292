"""Train one small GPT in eight residual designs, and measure each before and after.

    python examples/compare_residual_designs.py
    python examples/compare_residual_designs.py --layers 12 --steps 1000 --seeds 0 1 2 3 4

The designs differ only in how the branches meet the residual stream. One seed gives all of them the same branches and
the same batches. A table and a figure show, at initialization and after training: the spectral ratio under every
linearization, the token residual over depth, the leading Lyapunov exponents and the validation loss.

A few hundred steps of a model of a million parameters rank no designs. They show what the numbers look like.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import lightning
import torch
from lightning.pytorch import Trainer, seed_everything
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from train_gpt import Block, Config, LitGPT, Windows, read_standard_library

from lightning_spectral import ResidualBlock, find_blocks, measure
from lightning_spectral.analysis import lyapunov_exponents
from lightning_spectral.tokens import token_residual

# Of the Okabe-Ito palette, which stays apart under every common colour blindness.
STATES = {"initial": ("#7f7f7f", "s"), "trained": ("#0072b2", "o")}
INK = "#222222"
# What the table shows of a model: the names of the JSON file and the heads of the columns.
RATIOS = {"circuit": "ρ circuit", "paper": "ρ paper", "jacobian": "ρ Jacobian", "frobenius": "ρ F", "update": "update"}
COLUMNS = RATIOS | {"residual": "residual", "exponent": "exponent", "loss": "loss"}


class Design(nn.Module):
    """A residual block around the branches of the example's block; the base of all designs, and pre-norm itself."""

    def __init__(self, block: Block, layers: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = block.norm1, block.attention, block.norm2, block.mlp

    def forward(self, x: Tensor) -> Tensor:
        """Norms in front of the branches: (batch, time, width) to the same shape, as in all designs."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PostNorm(Design):
    """Norms behind the adds, on the stream itself, as in the first Transformer (arXiv:1706.03762)."""

    def forward(self, x: Tensor) -> Tensor:
        """Add, then normalize."""
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class Sandwich(Design):
    """Norms in front of the branches and behind them, before the adds, as in CogView (arXiv:2105.13290)."""

    def __init__(self, block: Block, layers: int) -> None:
        super().__init__(block, layers)
        width = self.norm1.normalized_shape
        self.behind1, self.behind2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, branch, normalize, add."""
        x = x + self.behind1(self.attention(self.norm1(x)))
        return x + self.behind2(self.mlp(self.norm2(x)))


class Parallel(Design):
    """Both branches read the same stream, each through its own norm, as in GPT-NeoX (arXiv:2204.06745)."""

    def forward(self, x: Tensor) -> Tensor:
        """Add both at once."""
        return x + self.attention(self.norm1(x)) + self.mlp(self.norm2(x))


class ReZero(Design):
    """A learned scalar on every branch that starts at 0, and no norms (arXiv:2003.04887).

    There one scalar serves both branches of a layer; here each has its own.
    """

    def __init__(self, block: Block, layers: int) -> None:
        super().__init__(block, layers)
        del self.norm1, self.norm2
        self.alpha1, self.alpha2 = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Scale, then add."""
        x = x + self.alpha1 * self.attention(x)
        return x + self.alpha2 * self.mlp(x)


class LayerScale(Design):
    """A learned gain for every channel of a branch, 0.1 at first: the value for up to 18 layers (arXiv:2103.17239)."""

    def __init__(self, block: Block, layers: int) -> None:
        super().__init__(block, layers)
        width = self.norm1.normalized_shape
        self.gain1, self.gain2 = nn.Parameter(torch.full(width, 0.1)), nn.Parameter(torch.full(width, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Scale channels, then add."""
        x = x + self.gain1 * self.attention(self.norm1(x))
        return x + self.gain2 * self.mlp(self.norm2(x))


class DeepNorm(Design):
    """Post-norm with a stronger skip and weaker branches, for decoders of L layers (arXiv:2203.00555).

    LN(αx + F(x)) with α = (2L)^¼, and β = (8L)^-¼ on the initial W_v, W_o, W_up and W_down. β multiplies this example's
    initialization, which is not the paper's.
    """

    def __init__(self, block: Block, layers: int) -> None:
        super().__init__(block, layers)
        self.alpha, beta = (2 * layers) ** 0.25, (8 * layers) ** -0.25
        value = self.attention.qkv.weight.chunk(3)[2]
        with torch.no_grad():
            for weight in (value, self.attention.proj.weight, self.mlp.up.weight, self.mlp.down.weight):
                weight.mul_(beta)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the skip, add, then normalize."""
        x = self.norm1(self.alpha * x + self.attention(x))
        return self.norm2(self.alpha * x + self.mlp(x))


class RootDepth(Design):
    """Every branch times 1/√L, as in depth-μP (arXiv:2310.02244), whose learning rates are not used here."""

    def __init__(self, block: Block, layers: int) -> None:
        super().__init__(block, layers)
        self.scale = layers**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Scale, then add."""
        x = x + self.scale * self.attention(self.norm1(x))
        return x + self.scale * self.mlp(self.norm2(x))


DESIGNS: dict[str, type[Design]] = {
    "pre-norm": Design,
    "post-norm": PostNorm,
    "sandwich norm": Sandwich,
    "parallel": Parallel,
    "ReZero": ReZero,
    "LayerScale": LayerScale,
    "DeepNorm": DeepNorm,
    "1/√L": RootDepth,
}


@dataclass(frozen=True, slots=True)
class Observation:
    """One model at one moment.

    Attributes:
        ratios: By the name of the ratio, one value per block; ``None`` where it does not exist.
        reasons: By the name of the ratio, why values are missing.
        residuals: Token residual in front of the first block and behind every block.
        exponents: The leading Lyapunov exponents, in nats per block.
        loss: Validation loss, in nats per byte.
    """

    ratios: dict[str, list[float | None]]
    reasons: dict[str, str]
    residuals: list[float]
    exponents: list[float]
    loss: float

    def value(self, column: str) -> float | None:
        """Return what the table shows: of ratios the median over the blocks, of the others the last or the first."""
        if column in RATIOS:
            logs = [math.log(ratio) for ratio in self.ratios[column] if ratio is not None]
            return math.exp(median(logs)) if logs else None
        return {"residual": self.residuals[-1], "exponent": self.exponents[0], "loss": self.loss}[column]


@dataclass(frozen=True, slots=True)
class Run:
    """One design trained from one seed.

    Attributes:
        design: Name of the design.
        seed: Seed of weights and batches.
        verified: Whether the package found every block and verified it.
        initial: The model before training.
        trained: The model after it.
    """

    design: str
    seed: int
    verified: bool
    initial: Observation
    trained: Observation


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 96), ("heads", 4), ("context", 64), ("batch-size", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--designs", nargs="+", default=[*DESIGNS], choices=[*DESIGNS], metavar="DESIGN")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="its peak, after a tenth of the steps")
    parser.add_argument("--sequences", type=int, default=2, help="held-out sequences to measure on")
    parser.add_argument("--exponents", type=int, default=8, help="leading Lyapunov exponents")
    parser.add_argument("--out", default="runs", help="folder for everything that is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


def build(design: type[Design], config: Config, learning_rate: float = 2e-3) -> LitGPT:
    """Return the example's model with its blocks rewired."""
    module = LitGPT(config, learning_rate)
    module.model.blocks = nn.ModuleList(design(block, config.layers) for block in module.model.blocks)
    return module


def train(args: argparse.Namespace, name: str, seed: int, texts: tuple[bytes, bytes]) -> Run:
    """Train one design once and look at it before and after; the seed decides the weights and the batches."""
    print(f"training {name}, seed {seed}: {args.steps} steps", flush=True)
    seed_everything(seed, verbose=False)
    config = Config(args.layers, args.width, args.heads, args.context)
    module = build(DESIGNS[name], config, args.learning_rate)
    order = torch.Generator().manual_seed(seed)
    batches = DataLoader(
        Windows(texts[0], args.context), args.batch_size, shuffle=True, drop_last=True, generator=order
    )
    held_out = Windows(texts[1], args.context)
    validation = DataLoader(held_out, args.batch_size)
    ids = held_out.windows[:: len(held_out) // args.sequences][: args.sequences, :-1].long()
    blocks = find_blocks(module.model, batch=ids)
    trainer = Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        logger=False,
        limit_val_batches=40,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )

    def look() -> Observation:
        loss = trainer.validate(module, validation, verbose=False)[0]["val/loss"]
        return observe(module, blocks, ids, args.exponents, loss)

    initial = look()
    trainer.fit(module, batches, validation)
    verified = len(blocks) == args.layers and all(block.verified for block in blocks)
    return Run(name, seed, verified, initial, look())


def observe(module: LitGPT, blocks: tuple[ResidualBlock, ...], ids: Tensor, k: int, loss: float) -> Observation:
    """Measure the ratios, the geometry of the tokens and the exponents on a few held-out sequences."""
    circuit, paper, jacobian = (
        measure(module.model, blocks, linearization=rule, batch=ids) for rule in ("circuit", "paper", "jacobian")
    )
    functional = [layer.functional for layer in jacobian]
    ratios = {rule.linearization: [layer.ratio for layer in rule] for rule in (circuit, paper, jacobian)}
    ratios["frobenius"] = [item and item.frobenius_ratio for item in functional]
    ratios["update"] = [item and item.update_ratio for item in functional]
    reasons = {}
    for name, values in ratios.items():
        layers = {"circuit": circuit, "paper": paper}.get(name, jacobian)
        missing = [str(layer.reason) for layer, value in zip(layers, values, strict=True) if value is None]
        if missing:
            reasons[name] = f"{len(missing)} of {len(values)} blocks: " + "; ".join(dict.fromkeys(missing))
    exponents = lyapunov_exponents(module.model, batch=ids, blocks=blocks, k=k).exponents.tolist()
    return Observation(ratios, reasons, residuals(module, ids), exponents, loss)


@torch.no_grad()
def residuals(module: LitGPT, ids: Tensor) -> list[float]:
    """Return the token residual in front of the first block and behind every block, mean over the sequences."""
    model = module.model
    streams = [model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))]
    for block in model.blocks:
        streams.append(block(streams[-1]))
    return [float(token_residual(stream).mean()) for stream in streams]


def report(runs: list[Run]) -> None:
    """Print two lines per design and state: the median over the seeds, and the range under it."""
    print(f"\n{'':<23}" + "".join(f"{head:>14}" for head in COLUMNS.values()))
    notes: dict[str, list[str]] = {}
    for name in dict.fromkeys(run.design for run in runs):
        for state in STATES:
            seen = [getattr(run, state) for run in runs if run.design == name]
            cells = [spread([item.value(column) for item in seen]) for column in COLUMNS]
            print(f"{name + ', ' + state:<23}" + "".join(f"{middle:>14}" for middle, _ in cells))
            print(f"{'':<23}" + "".join(f"{extent:>14}" for _, extent in cells))
            for column in RATIOS:
                for reason in dict.fromkeys(item.reasons[column] for item in seen if column in item.reasons):
                    notes.setdefault(f"{name}, {state}: {reason}", []).append(RATIOS[column])
    print(
        "\nmedian over the seeds, and from the smallest to the largest; ratios are MLP over attention, median over the "
        "blocks\n"
        "ρ F: Frobenius norms of the Jacobians; update: sizes of what is added to the stream\n"
        "residual: token residual behind the last block; exponent: the leading one, nats per block; loss: validation, "
        "nats per byte"
    )
    for note, columns in notes.items():
        print(f"-  {note} ({', '.join(columns)})")
    unverified = sorted({run.design for run in runs if not run.verified})
    print("not every block was verified: " + ", ".join(unverified) if unverified else "every block was verified")


def spread(values: list[float | None]) -> tuple[str, str]:
    """Return the median and the range of the values that exist, ``-`` where none does."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-", ""
    low, middle, high = map(rounded, (min(numbers), median(numbers), max(numbers)))
    return middle, f"{low}..{high}"


def rounded(value: float) -> str:
    """Return three digits, but no more than three decimals, and no sign before a zero."""
    return f"{value:.3g}" if abs(value) >= 0.1 else f"{round(value, 3) + 0.0:.3f}"


def save(runs: list[Run], args: argparse.Namespace, path: Path) -> None:
    """Write everything that was measured, with the settings and the versions it was measured with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}
    document = {
        "settings": vars(args),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(document, indent=1, allow_nan=False))


def draw(runs: list[Run]) -> Figure:
    """Draw a row per design: token residual over depth, leading exponents, and the ratio of every block twice."""
    names = [*dict.fromkeys(run.design for run in runs)]
    figure = Figure(figsize=(10.0, 1.0 + 1.5 * len(names)), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)
    grid = figure.subplots(len(names), 4, sharex="col", sharey="col", squeeze=False)
    for row, name in zip(grid, names, strict=True):
        seen = [run for run in runs if run.design == name]
        for state in STATES:
            looks = [getattr(run, state) for run in seen]
            draw_lines(row[0], [look.residuals for look in looks], state, first=0)
            draw_lines(row[1], [look.exponents for look in looks], state, first=1)
            draw_lines(row[2], [look.ratios["circuit"] for look in looks], state, first=0)
            draw_lines(row[3], [look.ratios["jacobian"] for look in looks], state, first=0)
        before, after = (spread([getattr(run, state).loss for run in seen])[0] for state in STATES)
        row[0].set_ylabel(f"{name}\nloss {before} → {after}", color=INK)
        row[1].axhline(0, color="#999999", linewidth=0.6)
        row[2].axhspan(0.5, 2.0, color="#f0e442", alpha=0.35, linewidth=0, label="safe zone")
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(color="#999999", labelcolor=INK, labelsize=8)
            axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in grid[:, 2:].flat:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
    titles = ("token residual", "Lyapunov exponent,\nnats per block", "ρ, circuit", "ρ, Jacobian")
    bottoms = ("blocks passed", "number of the exponent", "block", "block")
    for axes, title, last, bottom in zip(grid[0], titles, grid[-1], bottoms, strict=True):
        axes.set_title(title, color=INK, fontsize=10, weight="bold")
        last.set_xlabel(bottom, color=INK, fontsize=9)
    grid[0, 0].set_ylim(0, 1.05)
    handles, labels = grid[0, 2].get_legend_handles_labels()
    title = "median over the seeds, and their range; loss: validation, nats per byte"
    place = "outside upper center"
    figure.legend(handles, labels, title=title, loc=place, ncols=3, fontsize=9, title_fontsize=9, frameon=False)
    return figure


def draw_lines(axes: Axes, rows: list[list[float | None]], state: str, first: int) -> None:
    """Draw the median over the seeds and the band of their range, where the values exist."""
    colour, marker = STATES[state]
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    places = [place for place, column in enumerate(columns, first) if column]
    if not places:
        axes.text(0.5, 0.1, f"{state}: does not exist", transform=axes.transAxes, ha="center", fontsize=8, color=colour)
        return
    columns = [column for column in columns if column]
    axes.fill_between(places, [*map(min, columns)], [*map(max, columns)], color=colour, alpha=0.25, linewidth=0)
    axes.plot(places, [*map(median, columns)], color=colour, marker=marker, markersize=3, linewidth=1.2, label=state)


def main() -> None:
    """Train every design from every seed, then report."""
    args = parse()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    texts = read_standard_library()
    runs = [train(args, name, seed, texts) for seed in args.seeds for name in args.designs]
    report(runs)
    folder = Path(args.out) / "residual-designs"
    folder.mkdir(parents=True, exist_ok=True)
    save(runs, args, folder / "residual_designs.json")
    draw(runs).savefig(folder / "residual_designs.png")
    print(f"\nfigure          {folder / 'residual_designs.png'}\nmeasurements    {folder / 'residual_designs.json'}")


if __name__ == "__main__":
    main()
