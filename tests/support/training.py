"""Run by ``test_training.py`` in two processes under one strategy: whole training runs, and what this process saw.

A cell is a precision, watched or steered, trained in one go or resumed in the middle. Each is compared by the tests
with the same run in one process, and across the processes.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from journals import read_actions, read_journal
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from processes import leave, whole
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_spectral import Measurement, ResidualRescaler, SpectralMonitor, attach_scales
from lightning_spectral.measuring.meter import Meter

VOCABULARY, WIDTH, HEADS, BLOCKS, CONTEXT, STEPS, STOP = 32, 32, 4, 4, 8, 8, 4
# "full", or a precision, as `make test-distributed` sets it; the other tests run a part of the matrix. Four processes
# take two cores a minute to start, so they are in the full matrix only.
MATRIX = os.environ.get("SPECTRAL_MATRIX")
STRATEGIES = ("single", "ddp", "fsdp2 root")
STRATEGIES += ("fsdp1", "fsdp2 blocks", "tensor parallel") if MATRIX else ()
STRATEGIES += ("fsdp2 over tensor parallel",) if MATRIX == "full" else ()
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true") if MATRIX == "full" else (MATRIX or "32-true",)
RANK, WORLD = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEERED = {"gain": 0.5, "patience": 1, "smoothing": 0.0}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        # As many heads as this process has under tensor parallelism.
        q, k, v = (part(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        with torch.no_grad():  # two blocks out of balance, each in its own direction
            self.blocks[1].down.weight.mul_(6)
            self.blocks[2].attention.o.weight.mul_(6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class LitGPT(LightningModule):
    """Next-token prediction; sharded, if at all, in ``configure_model``."""

    def __init__(self, layout: str, *, steer: bool) -> None:
        super().__init__()
        self.layout, self.steer = layout, steer
        seed_everything(3, verbose=False)
        self.done = layout in ("single", "ddp") or (layout == "fsdp1" and steer)
        if layout != "fsdp1" or steer:
            self.model: nn.Module = GPT()

    def configure_model(self) -> None:
        if self.done:
            return
        self.done = True
        if self.layout == "fsdp1":  # built late, and cut by the strategy afterwards
            seed_everything(3, verbose=False)
            self.model = GPT()
            return
        assert self.device_mesh is not None
        if "tensor parallel" in self.layout:
            columns, rows = ColwiseParallel(), RowwiseParallel()
            plan = {"attention.q": columns, "attention.k": columns, "attention.v": columns, "attention.o": rows}
            for block in self.model.blocks:  # type: ignore[union-attr]
                parallelize_module(block, self.device_mesh["tensor_parallel"], plan | {"up": columns, "down": rows})
        if self.steer and self.layout != "fsdp2 root":  # there the callback attaches them before
            attach_scales(self)
        if self.layout == "tensor parallel":
            return
        mesh = self.device_mesh["data_parallel"]
        for part in (*self.model.blocks, self.model.tokens, self.model.head):  # type: ignore[misc]
            fully_shard(part, mesh=mesh)
        if self.layout == "fsdp2 root":
            fully_shard(self.model, mesh=mesh)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Witness(Callback):
    """Notes after every batch what the residual scales of this process are."""

    def __init__(self) -> None:
        self.scales: list[list[float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        found = [whole(p) for name, p in pl_module.named_parameters() if name.endswith("log_scale")]
        self.scales.append([float(scale) for scale in found])


class SaveAt(Callback):
    """Saves a checkpoint in the middle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STOP:
            trainer.save_checkpoint(self.path)


class OnCPU(FSDPStrategy):
    """FSDP1 on the CPU, which Lightning does not offer: it knows GPUs by their index only."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        self.kwargs["device_id"] = torch.device("cpu")
        settings = {"mixed_precision": self.mixed_precision_config, "sharding_strategy": self.sharding_strategy}
        return FullyShardedDataParallel(model, **settings, **self.kwargs)


def strategy_of(layout: str, *, one_file: bool) -> Any:
    limit: dict[str, Any] = {"process_group_backend": "gloo", "timeout": timedelta(seconds=60)}
    if layout == "single":
        return "auto"
    if layout == "ddp":
        return DDPStrategy(**limit)
    if layout == "fsdp1":
        # Saved in one file, torch crashes on a CPU, with or without a monitor.
        return OnCPU(auto_wrap_policy=ModuleWrapPolicy({Block}), state_dict_type="sharded", **limit)
    tensor = 2 if "tensor parallel" in layout else 1
    limit |= {"data_parallel_size": WORLD // tensor, "tensor_parallel_size": tensor}
    return ModelParallelStrategy(save_distributed_checkpoint=not one_file, **limit)


def batches(layout: str) -> DataLoader[Any]:
    """Equal batches under every strategy: what one process sees as one batch of four, two see as two of two.

    One batch an epoch: Lightning begins an interrupted epoch anew, and here anew is the same.
    """
    tokens = torch.randint(VOCABULARY, (4, CONTEXT), generator=torch.Generator().manual_seed(7))
    if layout in ("single", "tensor parallel"):
        return DataLoader(tokens, batch_size=4)
    half = 2 * (RANK * 2 // WORLD)  # of four processes, two neighbours see the same
    return DataLoader(tokens[half : half + 2], batch_size=2)


def fit(
    layout: str,
    folder: Path,
    precision: str,
    *,
    steer: bool,
    monitor: SpectralMonitor | None,
    others: list[Callback] | None = None,
    ckpt_path: Path | None = None,
    kind: type[LitGPT] | None = None,
    one_file: bool = False,
) -> tuple[LitGPT, Witness]:
    """Train and return the module and what was noted."""
    seed_everything(1, verbose=False)
    module, witness = (kind or LitGPT)(layout, steer=steer), Witness()
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy_of(layout, one_file=one_file),
        precision=precision,  # type: ignore[arg-type]
        max_steps=STEPS,
        logger=CSVLogger(folder.parent, name="", version=folder.name),
        callbacks=[*([] if monitor is None else [monitor]), witness, *(others or [])],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, batches(layout), ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return module, witness


def monitor_of(*, steer: bool, **settings: Any) -> SpectralMonitor:
    return SpectralMonitor(2, auto_rescale=ResidualRescaler(**STEERED) if steer else False, geometry=True, **settings)


def parameters(module: LitGPT) -> list[float]:
    """Return a few numbers of every parameter: enough to see a difference."""
    named = sorted(module.named_parameters())
    return [float(part) for _, p in named for part in (whole(p).double().sum(), whole(p).double().square().sum())]


def journal(folder: Path) -> dict[str, Any]:
    """Return what the process that writes has written; the others write nothing."""
    path = folder / "spectral.jsonl"
    if RANK:
        return {}
    return {"records": read_journal(path)[1], "actions": read_actions(path)}


def cell(
    layout: str, folder: Path, precision: str, *, steer: bool, resume: bool, one_file: bool = False
) -> dict[str, Any]:
    """Run one cell of the matrix."""
    monitor = monitor_of(steer=steer)
    if not resume:
        module, witness = fit(layout, folder, precision, steer=steer, monitor=monitor)
        return {"parameters": parameters(module), "scales": witness.scales, **journal(folder)}
    saved = folder.with_suffix(".ckpt")
    how: dict[str, Any] = {"steer": steer, "one_file": one_file}
    straight, _ = fit(layout, folder, precision, monitor=monitor, others=[SaveAt(saved)], **how)
    resumed = folder.with_name(folder.name + "-resumed")
    module, witness = fit(layout, resumed, precision, monitor=monitor_of(steer=steer), ckpt_path=saved, **how)
    assert one_file == saved.is_file() or layout in ("single", "ddp")
    return {
        "straight": parameters(straight),
        "parameters": parameters(module),
        "scales": witness.scales,
        "before": journal(folder),
        **journal(resumed),
    }


def neutral(layout: str, folder: Path) -> dict[str, Any]:
    """Train with and without a monitor that only watches."""
    alone, _ = fit(layout, folder / "alone", "32-true", steer=False, monitor=None)
    watched, _ = fit(layout, folder / "watched", "32-true", steer=False, monitor=monitor_of(steer=False))
    return {"alone": parameters(alone), "watched": parameters(watched)}


class Noisy(Meter):
    """Measures something else in the second process."""

    def measure(self, step: int = 0, share: tuple[int, int] = (0, 1)) -> Measurement:
        found = super().measure(step, share)
        layers = (replace(layer, mlp_norm=RANK + (layer.mlp_norm or 0.0), token_residual=0.5) for layer in found)
        return replace(found, layers=tuple(layers))


class Failing(Meter):
    """Fails in the second process, as often as told."""

    times: ClassVar[list[None]] = []  # as many as are left; shared by the copies that a run makes of its meter

    def measure(self, step: int = 0, share: tuple[int, int] = (0, 1)) -> Measurement:
        found = super().measure(step, share)  # first, since other processes may wait in it
        if RANK and self.times:
            self.times.pop()
            raise ArithmeticError("only here")
        return found


class Replacing(Callback):
    """Gives the monitor another meter, after its first measurement."""

    def __init__(self, kind: type[Meter], **settings: Any) -> None:
        self.kind, self.settings = kind, settings

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (monitor,) = (callback for callback in trainer.callbacks if isinstance(callback, SpectralMonitor))
        session = monitor._session
        assert session is not None
        assert session.meter is not None
        session.meter = self.kind(session.meter.weights, session.meter.blocks)
        vars(session.meter).update(self.settings)


def noisy(layout: str, folder: Path) -> dict[str, Any]:
    """Steer while one process measures something else."""
    monitor, others = monitor_of(steer=True), [Replacing(Noisy)]
    module, witness = fit(layout, folder, "32-true", steer=True, monitor=monitor, others=others)
    return {"parameters": parameters(module), "scales": witness.scales}


def failing(layout: str, folder: Path, times: int) -> dict[str, Any]:
    """Let measurements fail in one process."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        others: list[Callback] = [Replacing(Failing, times=[None] * times)]
        module, _ = fit(layout, folder, "32-true", steer=False, monitor=SpectralMonitor(2), others=others)
    said = [str(warning.message) for warning in told if "SpectralMonitor" in str(warning.message)]
    return {"parameters": parameters(module), "told": said, **journal(folder)}


def raising(layout: str, folder: Path) -> dict[str, Any]:
    """Let a measurement fail in one process where that is to be raised."""
    monitor, others = SpectralMonitor(2, on_error="raise"), [Replacing(Failing, times=[None])]
    try:
        fit(layout, folder, "32-true", steer=False, monitor=monitor, others=others)
    except Exception as error:
        return {"told": f"{type(error).__name__}: {error}"}
    return {"told": "nothing"}


class Nowhere(Logger):
    """Has a folder in which nothing can be written."""

    name, version, log_dir = "nowhere", 0, f"{os.devnull}/folder"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise TimeoutError("no answer")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Evicting(Callback):
    """Gives the first process another logger."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if RANK == 0:
            trainer.loggers = [Nowhere()]


def evicted(layout: str, folder: Path) -> dict[str, Any]:
    """Let the process that writes have no place to write to."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        monitor = monitor_of(steer=True, on_error="raise")
        module, witness = fit(layout, folder, "32-true", steer=True, monitor=monitor, others=[Evicting()])
    said = [str(warning.message) for warning in told if "SpectralMonitor" in str(warning.message)]
    return {"parameters": parameters(module), "scales": witness.scales, "told": said}


class Tampering(Callback):
    """Changes a scale in one process behind everybody's back."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if RANK and trainer.global_step == 3:
            scale = next(p for name, p in pl_module.named_parameters() if name.endswith("log_scale"))
            scale.data.add_(0.01)


def tampered(layout: str, folder: Path) -> dict[str, Any]:
    """Let the scales come apart."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(layout, folder, "32-true", steer=True, monitor=monitor_of(steer=True), others=[Tampering()])
    said = [str(warning.message) for warning in told if "differ between processes" in str(warning.message)]
    return {"told": said, **journal(folder)}


class ScalesFirst(LitGPT):
    """Attaches the scales before the layers are made parallel."""

    def configure_model(self) -> None:
        if not self.done:
            attach_scales(self)
        super().configure_model()


def scales_first(layout: str, folder: Path) -> dict[str, Any]:
    """Do it in the wrong order."""
    try:
        fit(layout, folder, "32-true", steer=False, monitor=monitor_of(steer=True), kind=ScalesFirst)
    except AttributeError as error:
        return {"told": str(error)}
    return {"told": "nothing"}


def cases(layout: str, folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what is run under a strategy."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for precision in PRECISIONS:
        for steer in (False, True):
            for resume in (False, True):
                name = f"{precision}, {'steer' if steer else 'watch'}, {'resume' if resume else 'fit'}"
                place = folder / name.replace(", ", "-")
                found[name] = lambda place=place, precision=precision, steer=steer, resume=resume: cell(
                    layout, place, precision, steer=steer, resume=resume
                )
    if layout in ("ddp", "fsdp1", "fsdp2 root"):
        found["fails once"] = lambda: failing(layout, folder / "fails-once", 1)
    if layout == "fsdp2 root":
        place = folder / "one-file"
        found["one file"] = lambda: cell(layout, place, "32-true", steer=True, resume=True, one_file=True)
    found["neutral"] = lambda: neutral(layout, folder / "neutral")
    if layout == "tensor parallel":
        found["scales first"] = lambda: scales_first(layout, folder / "scales-first")
    if layout == "ddp":
        found["noisy"] = lambda: noisy(layout, folder / "noisy")
        found["fails for good"] = lambda: failing(layout, folder / "fails-for-good", 99)
        found["tampered"] = lambda: tampered(layout, folder / "tampered")
        found["evicted"] = lambda: evicted(layout, folder / "evicted")
        found["raises"] = lambda: raising(layout, folder / "raises")
    return found


def main(layout: str, folder: Path) -> None:
    """Run every case and write what this process saw."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    results = {}
    for name, case in cases(layout, folder).items():
        try:
            results[name] = case()
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    (folder / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[2], Path(sys.argv[1]))
    leave()
