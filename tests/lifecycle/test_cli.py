"""Lightning's command line: every argument from a YAML file, and what a wrong one says."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from answers import HEARD, answer
from journals import read_events, read_journal
from lightning.pytorch.cli import LightningCLI
from tiny_run import LitGPT, loader

from lightning_spectral import ExactSVD, GainCeiling, RandomizedSVD, ResidualRescaler, SpectralMonitor

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:LightningCLI's args parameter is intended to run from within Python",
)


@pytest.fixture(autouse=True)
def what_lightning_uses_and_jsonargparse_deprecates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


RESCALER = {
    "gain": 0.3, "max_step": 0.2, "patience": 1, "smoothing": 0.1, "margin": 0.05, "inner_zone": [0.9, 1.1],
    "mode": "mlp", "sides": "high", "bounds": [0.5, 2.5], "guard": False, "warmup_steps": 1, "dry_run": False,
    "learnable": False,
}  # fmt: skip
MONITOR = {
    "every_n_steps": 2,
    "auto_rescale": {"class_path": "lightning_spectral.ResidualRescaler", "init_args": RESCALER},
    "linearization": "paper",
    "safe_zone": [0.8, 1.25],
    "blocks": {"model.blocks.*": {"attention": "attention", "mlp": "mlp"}},
    "solver": {"class_path": "lightning_spectral.RandomizedSVD", "init_args": {"n_components": 4, "seed": 3}},
    "geometry": True,
    "signals": ["change", "stable_rank"],
    "per_layer": True,
    "on_alarm": "answers.answer",
    "on_error": "raise",
    "prefix": "mine",
    "verbose": True,
    "progress_bar": False,
}


class Lit(LitGPT):
    """Brings its own data. A collapsed one knows one token only, and learns nothing."""

    def __init__(self, collapsed: bool = False) -> None:
        super().__init__(learning_rate=0.0 if collapsed else 1e-2)
        torch.manual_seed(0)
        if collapsed:
            self.model.tokens.weight.data[:] = self.model.tokens.weight.data[:1].clone()
        for block in self.model.blocks:
            block.mlp[2].weight.data.mul_(8)

    def train_dataloader(self) -> Any:
        return loader()


def command(folder: Path, *arguments: str, run: bool = False) -> LightningCLI:
    trainer = ["max_steps=6", "accelerator=cpu", "enable_progress_bar=false", "enable_model_summary=false"]
    trainer += ["enable_checkpointing=false", f"default_root_dir={folder}", "log_every_n_steps=1"]
    options = [f"--trainer.{setting}" for setting in trainer]
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}"]
    return LightningCLI(
        Lit, run=run, seed_everything_default=0, args=[*(["fit"] if run else []), *options, *logger, *arguments]
    )


def configuration(folder: Path, monitor: dict[str, Any]) -> str:
    callback = {"class_path": "lightning_spectral.SpectralMonitor", "init_args": monitor}
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return f"--config={path}"


def monitor_of(cli: LightningCLI) -> SpectralMonitor:
    (found,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, SpectralMonitor)]
    return found


def test_a_file_names_every_argument_and_the_run_obeys(tmp_path: Path):
    assert list(MONITOR) == list(inspect.signature(SpectralMonitor).parameters)
    assert list(RESCALER) == [field.name for field in dataclasses.fields(ResidualRescaler)]
    cli = command(tmp_path, configuration(tmp_path, MONITOR), run=True)
    monitor = monitor_of(cli)
    pairs = {name: tuple(value) if isinstance(value, list) else value for name, value in RESCALER.items()}
    assert monitor.auto_rescale == ResidualRescaler(**pairs)
    assert monitor.solver == RandomizedSVD(n_components=4, seed=3)
    assert monitor.on_alarm is answer
    assert monitor.signals == ("change", "stable_rank")
    plain = ("every_n_steps", "linearization", "blocks", "geometry", "per_layer", "on_error", "prefix")
    assert {name: getattr(monitor, name) for name in plain} == {name: MONITOR[name] for name in plain}
    folder = Path(cli.trainer.log_dir)
    header, records = read_journal(folder / "mine.jsonl")
    assert header["rescaler"]["gain"] == 0.3
    assert [record["step"] for record in records] == [0, 2, 4, 6]
    assert records[-1]["layers"][0]["mlp_scale"] < 1.0 == records[-1]["layers"][0]["attention_scale"]
    # What Lightning saves beside the run makes the same monitor again.
    again = LightningCLI(
        Lit, run=False, seed_everything_default=0, args=[f"--config={without_seed(folder / 'config.yaml')}"]
    )
    assert again.trainer.callbacks
    twin = monitor_of(again)
    assert (twin.auto_rescale, twin.solver, twin.on_alarm) == (monitor.auto_rescale, monitor.solver, answer)


def without_seed(path: Path) -> Path:
    """Return what a command line without subcommands takes of a saved configuration."""
    saved = yaml.safe_load(path.read_text())
    kept = {name: saved[name] for name in ("trainer", "model")}
    path.write_text(yaml.safe_dump(kept))
    return path


@pytest.mark.filterwarnings("ignore:SpectralMonitor, FAILURE")
def test_a_failure_calls_the_function_that_a_file_names(tmp_path: Path):
    HEARD.clear()
    given = configuration(tmp_path, {"every_n_steps": 1, "on_alarm": "answers.answer"})
    command(tmp_path, given, "--model.collapsed=true", run=True)
    # At the end of the batch behind the second measurement the tokens are told to be one, later that nothing moves.
    assert HEARD == [(2, "failure"), (4, "failure")]
    (journal,) = tmp_path.rglob("spectral.jsonl")
    names = [event["name"] for event in read_events(journal) if event["level"] == "failure"]
    assert names == ["tokens_collapsed", "nothing_moves"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["every_n_steps=20"], {"every_n_steps": 20, "auto_rescale": False, "geometry": True}),
        (["auto_rescale=true", "on_alarm=stop"], {"auto_rescale": True, "on_alarm": "stop", "geometry": True}),
        (["auto_rescale.gain=0.3"], {"auto_rescale": ResidualRescaler(gain=0.3)}),
        (["auto_rescale.ceiling=3"], {"auto_rescale": GainCeiling(ceiling=3.0)}),
        (["safe_zone=[0.25,4]"], {"safe_zone": (0.25, 4.0)}),
        (["solver=lightning_spectral.ExactSVD"], {"solver": ExactSVD()}),
        (["on_alarm=answers.answer"], {"on_alarm": answer, "geometry": True}),
    ],
)
def test_a_line_without_a_file_will_do(tmp_path: Path, arguments: list[str], expected: dict[str, Any]):
    options = [f"--trainer.callbacks.{argument}" for argument in arguments]
    monitor = monitor_of(command(tmp_path, "--trainer.callbacks+=SpectralMonitor", *options))
    assert {name: getattr(monitor, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ({"every_n_steps": "often"}, "every_n_steps"),
        ({"every_n_steps": 0}, "every_n_steps=0: expected an integer of at least 1"),
        ({"linearization": "jacobian"}, "jacobian"),
        ({"on_alarm": "no.such.function"}, "no.such.function"),
        ({"auto_rescale": {"gain": 2.0}}, "gain=2.0: expected a number above 0 and at most 1"),
        ({"auto_rescale": {"gian": 0.5}}, "gian"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(
    tmp_path: Path, monitor: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
):
    # The parser ends the program with 2, and the monitor says it.
    with pytest.raises((SystemExit, ValueError), match=rf"^2$|{re.escape(message)}") as refusal:
        command(tmp_path, configuration(tmp_path, monitor))
    assert message in f"{refusal.value} {capsys.readouterr().err}"


def test_the_help_is_the_documentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match=r"^0$"):
        command(tmp_path, "--trainer.callbacks.help=SpectralMonitor")
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"--trainer.callbacks.{name}" in shown for name in MONITOR)
    assert "Optimizer steps between two measurements." in shown


def test_the_command_line_of_the_other_name_takes_the_monitor_too(tmp_path: Path):
    """Where both names of the framework are in use, a monitor is a callback of both."""
    given = configuration(tmp_path, {"every_n_steps": 1, "on_error": "raise"})
    (tmp_path / "script.py").write_text(f"""
import pytorch_lightning, torch
from pytorch_lightning.cli import LightningCLI
from lightning_spectral import SpectralMonitor

class Lit(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.example_input_array = torch.randn(2, 4, 16)
    def forward(self, x): return self.model(x)
    def training_step(self, batch, batch_idx): return self(batch).mean()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)
    def train_dataloader(self): return torch.utils.data.DataLoader(torch.randn(4, 4, 16), batch_size=2)

quiet = {{"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "max_steps": 2}}
cli = LightningCLI(Lit, trainer_defaults=quiet, save_config_callback=None, args=["fit", {given!r}])
assert "spectral/ratio_max" in cli.trainer.callback_metrics
""")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
