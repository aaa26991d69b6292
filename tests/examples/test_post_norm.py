"""The experiment on post-norm models: tiny runs of its arms, its table where the answer is known, and the page."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import post_norm  # noqa: E402

TINY = post_norm.Recipe(3, 16, 2, 8, 4, 6, 8)


@pytest.fixture(scope="module")
def texts() -> post_norm.Texts:
    return post_norm.read_texts(TINY)


@pytest.mark.parametrize(
    ("arm", "sizes"),
    [
        ("plain", lambda mlp, attention: (mlp, attention)),
        ("both × 0.5", lambda mlp, attention: (mlp / 2, attention / 2)),
        ("attention × 0.5", lambda mlp, attention: (mlp, attention / 2)),
        ("target 4", lambda mlp, attention: (2 * math.sqrt(mlp * attention), math.sqrt(mlp * attention) / 2)),
        ("target 1, gain 3", lambda mlp, attention: (3 / math.sqrt(6),) * 2),
    ],
)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_every_arm_starts_as_it_says(norm: str, arm: str, sizes: Any) -> None:
    """The sizes of both branches in every block."""
    plain, other = (
        post_norm.norms(*post_norm.start(post_norm.Run(norm, name, 1e-3, 0), TINY)) for name in ("plain", arm)
    )
    for mlp, attention, *found in zip(plain["mlp"], plain["attention"], other["mlp"], other["attention"], strict=True):
        assert found == pytest.approx(sizes(mlp, attention), rel=1e-3)


def test_a_run_is_a_function_of_its_settings_and_the_law_keeps_its_branches_down(texts: post_norm.Texts) -> None:
    """Two runs alike; the law ends near its ceiling, the plain run where it began."""
    first, second, law = (
        post_norm.train(post_norm.Run("post", arm, 1e-3, 0), TINY, texts) for arm in ("plain", "plain", "law")
    )
    assert first | {"seconds": 0} == second | {"seconds": 0}
    assert first["start"] == law["start"]
    ceiling = 3 / math.sqrt(2 * TINY.blocks)
    assert min(first["end"]["mlp"]) > 1.1 * ceiling
    assert max(law["end"]["mlp"]) < 1.1 * ceiling
    assert json.loads(json.dumps(first)) == first


def test_differences_are_paired_by_seed_and_a_diverged_run_is_worse_than_any() -> None:
    """A row with its mean, range and count; no row where a pair is missing."""
    sizes = {"mlp": [1.0, 3.0], "attention": [0.5, 0.5]}
    results = {
        post_norm.Run("post", arm, 2e-3, seed): {"validation": loss + seed, "start": sizes, "end": sizes}
        for seed in post_norm.SEEDS
        for arm, loss in (("plain", 2.0), ("target 2", 1.9 - 0.1 * seed), ("law", 2.1))
    }
    results[post_norm.Run("post", "law", 2e-3, 3)]["validation"] = None
    del results[post_norm.Run("post", "target 2", 2e-3, 3)]
    results[post_norm.Run("post", "target 2", 2e-3, 3)] = {"validation": 5.1, "start": sizes, "end": sizes}
    table = post_norm.tables(results)
    assert "| post | 0.002 | plain | 2.00, 0.50 | 2.00, 0.50 | 3.500 |  |  |" in table
    assert "| post | 0.002 | target 2 | 2.00, 0.50 | 2.00, 0.50 | 3.375 | −0.125 (−0.300 to +0.100) | 3 of 4 |" in table
    assert "| post | 0.002 | law | 2.00, 0.50 | 2.00, 0.50 | inf | +inf (+0.100 to +inf) | 0 of 4 |" in table
    assert "target 4" not in table


def test_the_page_has_the_table_of_the_results() -> None:
    """As the script prints it."""
    assert f"{post_norm.BEGIN}\n{post_norm.tables(post_norm.read())}\n{post_norm.END}" in post_norm.PAGE.read_text()
