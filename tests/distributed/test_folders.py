"""Checkpoint folders of real runs in two processes are audited as the model that was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import LAYOUTS
from processes import run
from training import STEPS, LitGPT

from lightning_spectral import ExactSVD, attach_scales, audit, find_blocks, measure
from lightning_spectral.checkpoints.distributed import METADATA
from lightning_spectral.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folders")
    run("folders.py", 2, path, timeout=300)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_folder_of_a_sharded_run_is_measured_as_its_model(layout: str, folder: Path, capsys: Any):
    """By the blocks that the monitor has left in it, and by those of a model that nobody trained."""
    path = folder / layout.replace(" ", "-")
    module = LitGPT("single", steer=False)
    blocks = find_blocks(module)
    attach_scales(module, blocks)
    module.load_state_dict(torch.load(path.with_suffix(".pt")))
    expected = measure(module, blocks, solver=ExactSVD())
    saved = path.with_suffix(".ckpt")
    assert len(list(saved.glob("*.distcp"))) == 2
    for given in (None, blocks):
        found = audit(saved, given, solver=ExactSVD())
        assert found.step == STEPS
        for layer, true in zip(found, expected, strict=True):
            assert layer.name == true.name
            for name in ("mlp_norm", "attention_norm", "mlp_scale", "attention_scale"):
                assert math.isclose(getattr(layer, name), getattr(true, name), rel_tol=1e-5), (layer.name, name)
    assert any(layer.mlp_scale != 1.0 for layer in expected)
    assert main(["audit", str(saved), "--json", str(folder / "out.json")]) == 0
    assert capsys.readouterr().out.startswith("spectral ratio")
    written = json.loads((folder / "out.json").read_text())["layers"]
    assert [layer["name"] for layer in written] == [layer.name for layer in expected]


def test_the_command_line_refuses_a_damaged_folder(folder: Path, capsys: Any):
    saved = (folder / LAYOUTS[0].replace(" ", "-")).with_suffix(".ckpt")
    content = (saved / METADATA).read_bytes()
    (saved / METADATA).write_bytes(content[: len(content) // 2])
    assert main(["audit", str(saved)]) == 2
    err = capsys.readouterr().err
    (saved / METADATA).write_bytes(content)
    assert ".metadata: not readable as the index of a distributed checkpoint" in err
    assert err.count("\n") == 1
