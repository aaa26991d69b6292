"""When alarms come: on runs driven into collapse, and on healthy ones, where none should.

    python benchmarks/alarms.py
    python benchmarks/alarms.py --seeds 0 --healthy-steps 100

The collapsing model is the example's GPT with 16 blocks whose attention starts 64 times too strong; the healthy ones
are the example at its default settings and the same 16 blocks as they are. For each run: the step of the alarm, with
its forecast of collapse, the step at which the token residual of the last block falls below the threshold of collapse,
its smallest value, and how many warnings came. One run is one line, printed as it ends.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from machine import describe
from overhead import Config, Windows, read_standard_library
from torch.utils.data import DataLoader
from train_gpt import LitGPT

from lightning_spectral import History, SpectralMonitor
from lightning_spectral.alarms.rules import COLLAPSED


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--gain", type=float, default=64.0, help="how much too strong attention starts")
    parser.add_argument("--deep", type=int, default=16, help="blocks of the deep models")
    parser.add_argument("--deep-steps", type=int, default=50, help="steps of the deep runs, of a schedule of 400")
    parser.add_argument("--deep-every", type=int, default=2, help="steps between two measurements of the deep runs")
    parser.add_argument("--healthy-steps", type=int, default=400, help="steps of the example's run, of 400")
    return parser.parse_args()


class StopAt(Callback):
    """Ends a run early, with the learning rates of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop at the step."""
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


def run(layers: int, gain: float, seed: int, steps: int, every_n_steps: int) -> Path:
    """Train the example's GPT as the example does, and return the journal."""
    seed_everything(seed, verbose=False)
    config, (text, _) = Config(layers), read_standard_library()
    module = LitGPT(config)
    with torch.no_grad():
        for block in module.model.blocks:
            block.attention.proj.weight.mul_(gain)
    logger = CSVLogger(tempfile.mkdtemp(), name="run")
    trainer = Trainer(
        max_steps=400,
        accelerator="cpu",
        logger=logger,
        callbacks=[SpectralMonitor(every_n_steps, geometry=True), StopAt(steps)],
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(Windows(text, config.context), 16, shuffle=True, drop_last=True))
    return Path(logger.log_dir) / "spectral.jsonl"


def described(journal: Path) -> str:
    """Return one run as one line."""
    history = History.read(journal)
    residuals = {
        measurement.step: measurement.layers[-1].typical_token_residual
        for measurement in history.measurements
        if measurement.layers[-1].typical_token_residual is not None
    }
    alarm = next((event for event in history.events if event.level == "alarm"), None)
    reached = next((step for step, value in residuals.items() if value < COLLAPSED), None)
    forecast = "" if alarm is None or alarm.forecast is None else f"{alarm.forecast.at:.0f}"
    return (
        f"{'-' if alarm is None else alarm.step:>6}{forecast or '-':>10}{'-' if reached is None else reached:>9}"
        f"{f'{min(residuals.values()):.3f}' if residuals else '-':>10}"
        f"{sum(event.level == 'warning' for event in history.events):>10}"
    )


def main() -> None:
    """Print one line per run."""
    args = parse()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(describe())
    print(f"collapse: token residual of the last block below {COLLAPSED:g}\n")
    print(f"{'run':<44}{'seed':>5}{'alarm':>7}{'forecast':>10}{'reached':>9}{'smallest':>10}{'warnings':>10}")
    deep = (args.deep_steps, args.deep_every)
    runs = {
        f"{args.deep} blocks, attention × {args.gain:g}": (args.deep, args.gain, *deep),
        f"{args.deep} blocks": (args.deep, 1.0, *deep),
        "the example, tokens measured": (8, 1.0, args.healthy_steps, 10),
    }
    for name, (layers, gain, steps, every) in runs.items():
        for seed in args.seeds:
            journal = run(layers, gain, seed, steps, every)
            print(f"{name:<44}{seed:>5} {described(journal)}", flush=True)


if __name__ == "__main__":
    main()
