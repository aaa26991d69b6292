"""Norms of language models against products of their weights that are written out by hand."""

from __future__ import annotations

import pytest
import torch
from zoo import example
from zoo.language import members

from lightning_spectral import BlocksNotFoundError, ExactSVD, find_blocks, measure


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training in float64"])
@pytest.mark.parametrize("name", [member.name for member in members() if member.operators])
def test_the_norms_are_those_of_the_operators_by_hand(name: str, training: bool) -> None:
    """Every gain and multiplier counts, and the branches of a kind are added up; in both modes and precisions."""
    member = example(name)
    model = member.build()
    if training:
        model.double().train()
    args, kwargs = member.inputs(model)
    assert member.operators is not None
    known = member.operators(model)
    measured = measure(model, find_blocks(model, *args, **kwargs), solver=ExactSVD()).layers
    assert [layer.name for layer in measured] == list(known)
    for layer in measured:
        norms = {kind: float(torch.linalg.matrix_norm(known[layer.name][kind], 2)) for kind in ("attention", "mlp")}
        assert layer.attention_norm == pytest.approx(norms["attention"], rel=1e-5)
        assert layer.mlp_norm == pytest.approx(norms["mlp"], rel=1e-5)


@pytest.mark.parametrize("name", ["refused_highway", "refused_gtrxl"])
def test_a_gate_on_the_stream_is_named(name: str) -> None:
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    with pytest.raises(BlocksNotFoundError, match="multiplies its stream by a gate of data"):
        find_blocks(model, *args, **kwargs)
