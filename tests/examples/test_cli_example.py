"""The configuration file of the command line's example: complete, obeyed, overridden, resumed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from journals import read_journal

from lightning_spectral import GainCeiling, SpectralMonitor

FILE = Path(__file__).parents[2] / "examples" / "cli" / "config.yaml"
SMALL = ["--model.depth=2", "--model.width=32", "--model.heads=2", "--model.context=32", "--data.context=32"]
SHORT = ["--data.batch_size=4", "--trainer.val_check_interval=5", "--trainer.limit_val_batches=2"]
OPTIONS = [f"--config={FILE}", *SMALL, *SHORT]


def arguments(of: str) -> dict[str, Any]:
    """Return what the file says about the monitor or its controller, with pairs as tuples."""
    monitor = yaml.safe_load(FILE.read_text())["trainer"]["callbacks"][-1]["init_args"]
    given = monitor if of == "monitor" else monitor["auto_rescale"]["init_args"]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def test_the_file_has_every_argument_and_says_where_it_is_not_the_default():
    parameters = inspect.signature(SpectralMonitor).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    rescaler = {field.name: field.default for field in dataclasses.fields(GainCeiling)}
    for of, known, changed in (
        ("monitor", defaults, {"every_n_steps", "solver", "auto_rescale"}),
        ("rescaler", rescaler, {"dry_run"}),
    ):
        given = arguments(of)
        assert set(given) == set(known)
        assert {name for name in known if given[name] != known[name]} == changed
    lines = {line.split(":")[0].strip(): line for line in FILE.read_text().splitlines()}
    silent = [name for name in (*defaults, *rescaler) if " # " not in lines[name]]
    assert silent == []
    assert all("default" in lines[name] for name in ("every_n_steps", "auto_rescale", "dry_run"))


@pytest.mark.slow
def test_it_fits_resumes_with_other_settings_and_validates(run: Callable[..., str], tmp_path: Path):
    printed = run("cli/train.py", "fit", *OPTIONS, "--trainer.max_steps=10")
    first = tmp_path / "runs" / "cli" / "version_0"
    assert "step 10, safe zone (0.5, 2)" in printed
    assert (first / "spectral.png").read_bytes().startswith(b"\x89PNG")
    header, records = read_journal(first / "spectral.jsonl")
    assert [record["step"] for record in records] == [0, 10]
    assert header["rescaler"] == {"law": "GainCeiling"} | arguments("rescaler")
    assert all(layer["token_residual"] > 0 for layer in records[0]["layers"])

    last = first / "checkpoints" / "last.ckpt"
    more = ["--trainer.max_steps=20", "--trainer.callbacks.every_n_steps=5", "--trainer.callbacks.auto_rescale=false"]
    printed = run("cli/train.py", "fit", *OPTIONS, f"--ckpt_path={last}", *more)
    assert f"Restored all states from the checkpoint at {last}" in printed
    header, records = read_journal(tmp_path / "runs" / "cli" / "version_1" / "spectral.jsonl")
    assert header["rescaler"] is None
    assert [record["step"] for record in records] == [10, 15, 20]

    printed = run("cli/train.py", "validate", *OPTIONS, f"--ckpt_path={last}")
    assert "val/loss" in printed
