"""Spectral norms of sharded models, in real process groups, against the same models in one piece."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from processes import run

pytestmark = pytest.mark.slow  # ten seconds to start, few to run
SCRIPT = "sharded.py"
OF_TWO = (
    "blocks_without_root",
    "blocks_and_root_trained",
    "uneven",
    "columns",
    "flat_trained",
    "flat_uneven",
    "flat_half_precision",
    "flat_scaled",
    "flat_not_finite",
    "flat_layouts",
    "flat_wide",
    "tensor_parallel_trained",
    "drifting_apart",
    "half_precision",
    "paper",
    "exact",
    "huge_and_tiny",
    "not_finite",
    "scaled",
    "inference",
    "balanced",
    "layouts",
    "wide",
    "wide_and_tensor_parallel",
    "hidden_blocks_stay",
)
OF_FOUR = ("hidden_blocks_stay_in_their_row", "both", "both_uneven", "replicated_groups", "flat_groups")
LABELS = {"index", "name", "mlp_expert", "mlp_reason", "attention_reason", "reason"}

Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of two processes saw."""
    return run(SCRIPT, 2, tmp_path_factory.mktemp("two"), timeout=240)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of four processes saw."""
    return run(SCRIPT, 4, tmp_path_factory.mktemp("four"), timeout=240)


PAIRS = [*(("two", name) for name in OF_TWO), *(("four", name) for name in OF_FOUR)]


@pytest.fixture(params=PAIRS, ids=lambda pair: pair[1])
def seen(request: pytest.FixtureRequest) -> Seen:
    """One case, as each process saw it."""
    world, name = request.param
    results = [rank.get(name, {"error": "it was not run"}) for rank in request.getfixturevalue(world)]
    assert not any("error" in result for result in results), results
    return results


def comparisons(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every comparison of a case."""
    yield from ([result] if "plain" in result else result.values())


def test_every_case_is_looked_at(two: Seen, four: Seen):
    assert all(rank.keys() == {*OF_TWO, "outside", "found", "refusals", "operators"} for rank in two)
    assert all(rank.keys() == {*OF_FOUR, "operators"} for rank in four)


def test_all_processes_measure_the_same_bits(seen: Seen):
    for other in seen[1:]:
        assert [item["sharded"] for item in comparisons(other)] == [item["sharded"] for item in comparisons(seen[0])]


def test_cold_and_warm_values_are_those_of_the_model_in_one_piece(seen: Seen):
    for item in comparisons(seen[0]):
        for plain, sharded in zip(item["plain"], item["sharded"], strict=True):
            for one, other in zip(plain["layers"], sharded["layers"], strict=True):
                assert {key: one[key] for key in LABELS} == {key: other[key] for key in LABELS}
                values = {key: value for key, value in one.items() if isinstance(value, float)}
                assert values.keys() >= {"mlp_norm", "attention_norm", "ratio"} or one["reason"]
                assert {key: other[key] for key in values} == pytest.approx(values, rel=1e-4)


def test_processes_add_up_and_gather_nothing(seen: Seen):
    for item in comparisons(seen[0]):
        assert item["plain_traffic"] == []
        assert {name for name, _ in item["sharded_traffic"]} <= {"all_reduce"}


@pytest.mark.parametrize("name", ["wide", "wide_and_tensor_parallel", "flat_wide"])
def test_what_travels_is_small_beside_the_smallest_weight(two: Seen, name: str):
    item = two[0][name]
    sizes = [size for operation, size in item["sharded_traffic"] if operation == "all_reduce"]
    # 14 columns times the channels between the factors of both branches, which travel together. With tensor
    # parallelism the channels of the MLP stay, and the second block of the MLP travels beside the first of attention.
    assert max(sizes) == 14 * (384 + (384 if name == "wide_and_tensor_parallel" else 768))
    assert max(sizes) < item["smallest_weight"] / 8


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_hidden_blocks_are_not_added_up_where_each_process_reads_its_own(two: Seen, four: Seen, name: str):
    width, operators = 96, 4
    item = two[0]["hidden_blocks_stay"][name]
    blocks = [size for _, size in item["sharded_traffic"] if size > operators * width]
    # Two sums for every product by AᵀA, all of blocks of the width of the stream.
    assert blocks
    assert all(size % width == 0 for size in blocks)
    assert max(blocks) == operators * (16 if name == "gemma2" else 14) * width
    # Where sharding cuts the rows too, the hidden blocks are added up along its processes.
    inside = four[0]["hidden_blocks_stay_in_their_row"][name]["sharded_traffic"]
    assert len(inside) > len(item["sharded_traffic"])


@pytest.mark.parametrize("name", ["not_finite", "flat_not_finite"])
def test_numbers_that_are_not_finite_are_seen_by_the_processes_that_do_not_hold_them(two: Seen, name: str):
    for rank in two:
        layers = rank[name]["sharded"][0]["layers"]
        assert [layer["mlp_reason"] for layer in layers] == ["weights are not finite (NaN or Inf)", None, None]
        assert [layer["attention_reason"] for layer in layers] == [None, "weights are not finite (NaN or Inf)", None]


@pytest.mark.parametrize("name", ["scaled", "flat_scaled"])
def test_scales_are_read_by_the_processes_that_do_not_own_them(two: Seen, name: str):
    layers = two[0][name]["sharded"][0]["layers"]
    scales = [layer[f"{branch}_scale"] for layer in layers for branch in ("mlp", "attention")]
    assert len(set(scales)) == len(scales)
    assert [math.isclose(scale, 1.0) for scale in scales].count(True) <= 1


@pytest.mark.parametrize("kind", ["fsdp2", "tensor parallel", "fsdp1"])
def test_a_sharded_model_is_balanced_as_one_in_one_piece(two: Seen, kind: str):
    for rank in two:
        item = rank["balanced"][kind]
        assert [layer["ratio"] for layer in item["sharded"][0]["layers"]] == pytest.approx([1.5] * 3, rel=1e-4)
        for norm in ("mlp_norm", "attention_norm"):
            assert [layer[norm] for layer in item["sharded"][1]["layers"]] == pytest.approx([2 / 6**0.5] * 3, rel=1e-4)
        assert item["apart"] < 1e-4


@pytest.mark.parametrize("world", ["two", "four"])
def test_every_view_of_every_placement_multiplies_as_the_whole_weight(request: pytest.FixtureRequest, world: str):
    for rank in request.getfixturevalue(world):
        errors = rank["operators"]
        assert len(errors) > 50
        assert {name: error for name, error in errors.items() if not error < 1e-6} == {}


def test_a_process_that_holds_nothing_of_a_weight_says_so_and_the_others_do_not_wait_for_it(two: Seen):
    assert two[0]["outside"] == "no error, but [6.0, 6.0, 6.0, 6.0]"
    assert two[1]["outside"].endswith("the weight is spread over processes of which this one is none")


def test_the_blocks_of_a_sharded_model_are_found(two: Seen):
    assert {name for rank in two for name, same in rank["found"].items() if not same} == set()
    assert len(two[0]["found"]) == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jacobian", r"ExampleInputError: .*GPT is sharded"),
        ("penalty", r"ConfigurationError: .*down.weight is sharded: no gradient goes through its spectral norm"),
        (
            "trained",
            r"ConfigurationError: the model looks trained: the norm gain layers.0.norm1.weight is not constant",
        ),
        (
            "trained_parallel",
            r"ConfigurationError: the model looks trained: the norm gain layers.0.norm1.weight is not",
        ),
        ("trained_flattened", r"ConfigurationError: the model looks trained: the norm gain layers.0.norm1.weight is"),
        ("find_flattened", r"ExampleInputError: FullyShardedDataParallel is sharded, and structure is read from one"),
        ("penalty_flattened", r"ConfigurationError: .*down.weight is sharded: no gradient goes through its spectral"),
        (
            "no_names",
            r"mlp: .* cannot be told from the others: expected FullyShardedDataParallel\(use_orig_params=True",
        ),
        ("computed", r"mlp: layers.0.up.weight is computed from other parameters, and those are flattened and cut"),
        ("partial", r"ConfigurationError: the weight is a sum that has not been taken yet \(placement Partial\)"),
        ("partial_branch", r"mlp: the weight is a sum that has not been taken yet \(placement Partial\)"),
        ("nan_beside", r"mlp: weights are not finite"),
        ("copied", r"ConfigurationError: the weight is sharded, and it is rearranged .* no view of it"),
        ("mixed", r"ConfigurationError: the weight is sharded, and it is rearranged .* no view of it"),
        ("vector", r"ConfigurationError: weight must be read in 2 or 3 dimensions, got shape \(6,\)"),
        ("integer", r"ConfigurationError: weight must be float16, .* got torch.int32"),
    ],
)
def test_what_cannot_be_done_is_said_alike_by_all_processes(two: Seen, name: str, message: str):
    said = {rank["refusals"][name] for rank in two}
    assert len(said) == 1
    assert re.match(message, said.pop())
