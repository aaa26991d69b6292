"""The comparison of residual designs is run as a user runs it, only smaller; its designs are compared with formulas."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_spectral import ExactSVD, find_blocks, measure

ROOT = Path(__file__).parents[2]
MODEL = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "16", "--batch-size", "4"]
RUN = ["--steps", "20", "--seeds", "5", "--exponents", "3"]
NAMES = ["pre-norm", "post-norm", "sandwich norm", "parallel", "ReZero", "LayerScale", "DeepNorm", "1/√L"]
RATIOS = ["circuit", "paper", "jacobian", "frobenius", "update"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Run it once; return the runs of the JSON file by design, what was printed, and the folder."""
    folder = tmp_path_factory.mktemp("compare")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, str(ROOT / "examples" / "compare_residual_designs.py"), *MODEL, *RUN]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = folder / "runs" / "residual-designs"
    document = json.loads((folder / "residual_designs.json").read_text())
    assert [run["design"] for run in document["runs"]] == NAMES
    assert document["settings"]["seeds"] == [5]
    return {run["design"]: run for run in document["runs"]}, done.stdout, folder


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """Import the script as its neighbours import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("compare_residual_designs")


@pytest.mark.slow
def test_every_design_is_verified_measured_and_learns(done: tuple[dict[str, Any], str, Path]):
    runs, printed, folder = done
    rows = re.findall(r"^(.+), (initial|trained) +(?:-|\d)", printed, re.M)
    assert rows == [(name, state) for name in NAMES for state in ("initial", "trained")]
    assert "every block was verified" in printed
    assert (folder / "residual_designs.png").read_bytes().startswith(b"\x89PNG")
    for run in runs.values():
        assert run["verified"]
        assert run["trained"]["loss"] < run["initial"]["loss"] - 0.2
        for state in (run["initial"], run["trained"]):
            assert [*state["ratios"]] == RATIOS
            assert all(len(values) == 2 for values in state["ratios"].values())
            assert len(state["residuals"]) == 3
            assert all(0 < residual < 1 for residual in state["residuals"])
            assert state["exponents"] == sorted(state["exponents"], reverse=True)
            assert len(state["exponents"]) == 3


@pytest.mark.slow
def test_only_rezero_has_no_ratio_and_only_at_first(done: tuple[dict[str, Any], str, Path]):
    runs, printed, _ = done
    missing = [
        (name, state, ratio)
        for name in NAMES
        for state in ("initial", "trained")
        for ratio in RATIOS
        if runs[name][state]["ratios"][ratio] == [None, None]
    ]
    assert missing == [("ReZero", "initial", ratio) for ratio in RATIOS]
    values = [value for run in runs.values() for values in run["trained"]["ratios"].values() for value in values]
    assert all(0 < value < 1e4 for value in values)
    assert re.search(r"^ReZero, initial +- +- +- +- +- +0\.\d+ +0\.000 ", printed, re.M)
    reason = "2 of 2 blocks: mlp: its norm is zero; attention: its norm is zero"
    assert runs["ReZero"]["initial"]["reasons"] == dict.fromkeys(RATIOS, reason)
    assert f"-  ReZero, initial: {reason} (ρ circuit, ρ paper, ρ Jacobian, ρ F, update)" in printed
    assert printed.count("\n-  ") == 1


@pytest.mark.slow
def test_rezero_begins_as_the_identity(done: tuple[dict[str, Any], str, Path]):
    first = done[0]["ReZero"]["initial"]
    assert first["residuals"] == [first["residuals"][0]] * 3
    assert first["exponents"] == pytest.approx([0.0] * 3, abs=1e-6)
    assert len(set(done[0]["ReZero"]["trained"]["residuals"])) == 3


@pytest.mark.slow
def test_one_seed_gives_every_design_the_same_branches(done: tuple[dict[str, Any], str, Path]):
    first = {name: run["initial"] for name, run in done[0].items()}
    assert len({state["residuals"][0] for state in first.values()}) == 1
    circuit, paper = (first["pre-norm"]["ratios"][rule] for rule in ("circuit", "paper"))
    assert first["parallel"]["ratios"]["circuit"] == circuit  # the same factors
    for name in ("post-norm", "1/√L", "LayerScale", "DeepNorm"):  # gains that are 1; both branches weaker by one factor
        assert first[name]["ratios"]["circuit"] == pytest.approx(circuit, rel=1e-5)
    for name in ("post-norm", "parallel", "sandwich norm", "1/√L", "LayerScale"):
        assert first[name]["ratios"]["paper"] == pytest.approx(paper, rel=1e-5)
    beta = (8 * 2) ** -0.25  # twice in the numerator of this rule, once in its denominator
    assert first["DeepNorm"]["ratios"]["paper"] == pytest.approx([beta * value for value in paper], rel=1e-5)
    normed = first["sandwich norm"]["ratios"]["circuit"]
    assert all(abs(math.log(a / b)) > 0.1 for a, b in zip(normed, circuit, strict=True))


@pytest.mark.slow
def test_weak_branches_expand_less(done: tuple[dict[str, Any], str, Path]):
    exponent = {name: run["initial"]["exponents"][0] for name, run in done[0].items()}
    assert exponent["ReZero"] < exponent["LayerScale"] < exponent["1/√L"] < exponent["pre-norm"]


def altered(script: ModuleType, name: str, layers: int = 2) -> nn.Module:
    """Return a design with gains and multipliers that are no longer 1, so that one that is left out shows."""
    torch.manual_seed(0)
    model = script.build(script.DESIGNS[name], script.Config(layers, 16, 2, 8)).model
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() < 2 and "bias" not in key:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


@torch.no_grad()
def by_hand(name: str, block: nn.Module, layers: int) -> float:
    """Return ρ of the circuit from dense matrices."""
    A = block.attention.proj.weight @ block.attention.qkv.weight.chunk(3)[2]
    M = block.mlp.down.weight @ block.mlp.up.weight
    if name not in ("post-norm", "DeepNorm", "ReZero"):
        A, M = A * block.norm1.weight, M * block.norm2.weight
    if name == "ReZero":
        A, M = block.alpha1 * A, block.alpha2 * M
    if name == "LayerScale":
        A, M = block.gain1[:, None] * A, block.gain2[:, None] * M
    if name == "sandwich norm":
        A, M = (normed(norm, W) for norm, W in ((block.behind1, A), (block.behind2, M)))
    if name == "1/√L":
        A, M = A / math.sqrt(layers), M / math.sqrt(layers)
    return float(torch.linalg.matrix_norm(M, 2) / torch.linalg.matrix_norm(A, 2))


def normed(norm: nn.LayerNorm, W: Tensor) -> Tensor:
    return norm.weight[:, None] * W / (W.norm() / math.sqrt(len(W)))


@pytest.mark.parametrize("name", NAMES)
def test_gains_and_multipliers_of_every_design_enter_the_ratio(script: ModuleType, name: str):
    model = altered(script, name)
    ids = torch.arange(8)[None]
    blocks = find_blocks(model, batch=ids)
    assert [block.name for block in blocks] == ["blocks.0", "blocks.1"]
    assert all(block.verified for block in blocks)
    measured = [layer.ratio for layer in measure(model, blocks, solver=ExactSVD())]
    assert measured == pytest.approx([by_hand(name, block, 2) for block in model.blocks], rel=1e-5)


def test_designs_become_one_another_where_their_constants_vanish(script: ModuleType):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    plain, scaled = altered(script, "pre-norm", layers=1), altered(script, "LayerScale", layers=1)
    scaled.load_state_dict(plain.state_dict(), strict=False)
    nn.init.ones_(scaled.blocks[0].gain1)
    nn.init.ones_(scaled.blocks[0].gain2)
    expected = plain.blocks[0](x)
    assert torch.equal(scaled.blocks[0](x), expected)
    assert torch.equal(altered(script, "1/√L", layers=1).blocks[0](x), expected)
    deep, post = altered(script, "DeepNorm", layers=1), altered(script, "post-norm", layers=1)
    deep.load_state_dict(post.state_dict())
    assert deep.blocks[0].alpha == 2**0.25
    assert not torch.allclose(deep.blocks[0](x), post.blocks[0](x))
    deep.blocks[0].alpha = 1.0
    assert torch.equal(deep.blocks[0](x), post.blocks[0](x))


def test_deepnorm_weakens_values_outputs_and_mlps_only(script: ModuleType):
    weak, full = (altered(script, name).blocks[1] for name in ("DeepNorm", "post-norm"))
    beta = 16**-0.25
    q, k, v = weak.attention.qkv.weight.chunk(3)
    old_q, old_k, old_v = full.attention.qkv.weight.chunk(3)
    assert torch.equal(q, old_q)
    assert torch.equal(k, old_k)
    for weight, expected in (
        (v, old_v),
        (weak.attention.proj.weight, full.attention.proj.weight),
        (weak.mlp.up.weight, full.mlp.up.weight),
        (weak.mlp.down.weight, full.mlp.down.weight),
    ):
        torch.testing.assert_close(weight, beta * expected)
