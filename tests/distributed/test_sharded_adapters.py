"""Sharded models with low-rank adapters, in two real processes, against the same models in one piece."""

from __future__ import annotations

from typing import Any

import pytest
from processes import run

pytestmark = pytest.mark.slow  # ten seconds to start, few to run
SCRIPT = "sharded_adapters.py"
CASES = ("trained", "base", "delta", "starting", "flattened", "flattened_delta", "tensor_parallel", "paper")

Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of two processes saw."""
    return run(SCRIPT, 2, tmp_path_factory.mktemp("adapters"), timeout=240)


@pytest.mark.parametrize("name", CASES)
def test_shards_with_adapters_are_measured_as_the_model_in_one_piece(seen: Seen, name: str):
    one, other = (rank[name] for rank in seen)
    assert "error" not in one, one
    assert one["sharded"] == other["sharded"]  # the same bits on both
    for plain, sharded in zip(one["plain"], one["sharded"], strict=True):
        for whole, parts in zip(plain["layers"], sharded["layers"], strict=True):
            assert whole["reason"] == parts["reason"]
            for key in ("mlp_norm", "attention_norm", "error_bound"):
                assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_what_travels_are_blocks_of_vectors_and_norm_gains(seen: Seen, name: str):
    for rank in seen:
        traffic = rank[name]["sharded_traffic"]
        assert {operation for operation, _ in traffic} <= {"all_reduce", "all_gather_into_tensor"}
        assert max((size for operation, size in traffic if operation != "all_reduce"), default=0) < 160


def test_adapters_that_are_zero_have_no_delta_on_any_process(seen: Seen):
    for rank in seen:
        cold, *rest = rank["starting"]["sharded"]
        assert all(layer["mlp_norm"] > 0 for layer in cold["layers"])
        for layer in (layer for measurement in rest for layer in measurement["layers"]):
            assert (layer["mlp_norm"], layer["attention_norm"], layer["ratio"]) == (0.0, 0.0, None)
            assert layer["reason"] == "mlp: its norm is zero; attention: its norm is zero"
