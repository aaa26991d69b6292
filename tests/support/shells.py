"""One model, the same data and the same optimizer in every kind of loop that can be watched."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from tiny_run import SaveAt, TinyGPT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from lightning_spectral import SpectralMonitor, Watch
from lightning_spectral.hugging_face import SpectralCallback

BATCH, BATCHES = 4, 4
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # processes, which all see the same batches


class GPT(TinyGPT):
    """Returns its loss where it gets labels, as models of transformers do."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(ids)
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Tokens(Dataset[dict[str, Tensor]]):
    """Always the same random tokens; every batch several times, for loops that deal batches out to processes."""

    def __init__(self, copies: int = 1) -> None:
        ids = torch.randint(32, (BATCHES, BATCH, 9), generator=torch.Generator().manual_seed(1))
        self.ids = ids.repeat_interleave(copies, 0).flatten(0, 1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"ids": self.ids[number, :-1], "labels": self.ids[number, 1:]}


@dataclass
class Run:
    """One run of one loop.

    Attributes:
        folder: Where it writes.
        steps: Optimizer steps in all.
        options: Of the shell, or a callback of transformers; ``None`` for a run that nobody watches.
        model: The model, changed by the run.
        save: Where to save a checkpoint at ``save_at``.
        resume: The checkpoint to go on from.
        arguments: More arguments for the Trainer of transformers.
        between: Called behind every step with the number of the step.
    """

    folder: Path
    steps: int = 6
    options: Any = field(default_factory=lambda: {"every_n_steps": 2})
    model: nn.Module = field(default_factory=lambda: built())
    save_at: int | None = None
    resume: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    between: Callable[[int], None] = lambda step: None

    @property
    def journal(self) -> Path:
        (found,) = self.folder.rglob("*spectral.jsonl")
        return found


def built(seed: int = 0) -> GPT:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)


def loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Tokens(), batch_size=BATCH)


class _Module(LightningModule):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model, self.run = run.model, run

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)

    def on_train_batch_end(self, *args: Any) -> None:
        self.run.between(self.trainer.global_step)


def lightning(run: Run) -> Any:
    monitor = None if run.options is None else SpectralMonitor(**run.options)
    callbacks = [] if monitor is None else [monitor]
    if run.save_at is not None:
        callbacks.append(SaveAt(run.folder / "saved.ckpt", run.save_at))
    trainer = Trainer(
        max_steps=run.steps,
        accelerator="cpu",
        devices=WORLD,
        strategy="auto" if WORLD == 1 else DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        logger=CSVLogger(run.folder, name="", version=""),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(_Module(run), loader(), ckpt_path=None if run.resume is None else str(run.resume / "saved.ckpt"))
    return monitor


def loop(run: Run, model: Any, optimizer: Any, batches: Any, backward: Callable[[Tensor], None]) -> Any:
    if run.options is None:
        watch = None
        _train(run, model, optimizer, batches, backward, _Nobody(), step=0)
    else:
        with Watch(run.model, run.folder, optimizers=optimizer, **run.options) as watch:
            step = 0 if run.resume is None else _load(run, optimizer, watch, run.resume / "saved.pt")
            _train(run, model, optimizer, batches, backward, watch, step=step)
    return watch


def _train(
    run: Run,
    model: Any,
    optimizer: Any,
    batches: Any,
    backward: Callable[[Tensor], None],
    watch: Any,
    *,
    step: int,
) -> None:
    last = run.save_at or run.steps
    while step < last and not watch.should_stop:
        for batch in islice(batches, step % BATCHES, None):
            watch.before_step(batch)
            backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            watch.step(step)
            run.between(step)
            if step == last or watch.should_stop:
                break
    if run.save_at is not None:
        state = {"model": run.model, "optimizer": optimizer, "watch": watch}
        torch.save({name: item.state_dict() for name, item in state.items()} | {"step": step}, run.folder / "saved.pt")


def _load(run: Run, optimizer: Any, watch: Watch, path: Path) -> int:
    saved = torch.load(path, weights_only=True)
    for name, item in (("model", run.model), ("optimizer", optimizer), ("watch", watch)):
        item.load_state_dict(saved[name])
    return int(saved["step"])


class _Nobody:
    """Watches nothing."""

    should_stop = False

    def before_step(self, batch: Any) -> None:
        pass

    def step(self, step: int) -> None:
        pass


def plain(run: Run) -> Any:
    run.folder.mkdir(parents=True, exist_ok=True)
    _attach_early(run)
    model = run.model if WORLD == 1 else DistributedDataParallel(run.model)
    return loop(run, model, optimizer_of(run.model), loader(), lambda loss: loss.backward())


def fabric(run: Run) -> Any:
    run.folder.mkdir(parents=True, exist_ok=True)
    _attach_early(run)
    launched = Fabric(accelerator="cpu", devices=WORLD, strategy="auto" if WORLD == 1 else "ddp")
    launched.launch()
    model, optimizer = launched.setup(run.model, optimizer_of(run.model))
    return loop(
        run, model, optimizer, launched.setup_dataloaders(loader(), use_distributed_sampler=False), launched.backward
    )


def _attach_early(run: Run) -> None:
    """Attach scales that learn before the optimizer is made, as a user has to."""
    from lightning_spectral import attach_scales

    law = (run.options or {}).get("auto_rescale", False)
    if getattr(law, "learnable", False):
        attach_scales(run.model)


def transformers(run: Run, prepare: Callable[[Any], None] = lambda trainer: None) -> Any:
    from transformers import Trainer as HuggingFaceTrainer
    from transformers import TrainerCallback, TrainingArguments

    class InOrder(HuggingFaceTrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def create_optimizer(self, *args: Any) -> Any:
            self.optimizer = optimizer_of(self.model)
            return self.optimizer

    class Between(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            run.between(state.global_step)

    made = run.options if isinstance(run.options, SpectralCallback) else None
    callback = made or (None if run.options is None else SpectralCallback(**run.options))
    settings: dict[str, Any] = {
        "output_dir": str(run.folder),
        "max_steps": run.steps,
        "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "ddp_backend": None if WORLD == 1 else "gloo",
        "report_to": [],
        "save_strategy": "no" if run.save_at is None else "steps",
        "save_steps": run.save_at or 500,
        "logging_steps": 1000,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    arguments = TrainingArguments(**settings | dict(run.arguments))
    trainer = InOrder(
        model=run.model,
        args=arguments,
        train_dataset=Tokens(WORLD),
        callbacks=[*([] if callback is None else [callback]), Between()],
    )
    resume = None if run.resume is None else str(next(run.resume.glob("checkpoint-*")))
    if run.save_at is not None:
        stop = run.save_at

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                control.should_training_stop = state.global_step >= stop

        trainer.add_callback(Stop())
    prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return callback


SHELLS: Mapping[str, Callable[[Run], Any]] = {
    "lightning": lightning,
    "plain": plain,
    "fabric": fabric,
    "transformers": transformers,
}
