"""The formulas of ``benchmarks/scaling.py`` against what measurements read, compute and send in two processes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from processes import run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STARTS = ("cold", "warm", "again")  # of the three measurements of every case
CUT = ("fully sharded", "tensor parallel", "flattened")

Seen = list[dict[str, Any]]


def load(path: Path) -> ModuleType:
    """Import a script that has the name of another one."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


formulas = load(ROOT / "benchmarks" / "scaling.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of two processes counted."""
    return run("scaling.py", 2, tmp_path_factory.mktemp("scaling"), timeout=300)


@pytest.fixture(params=["512", "768"])
def size(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=STARTS)
def start(request: pytest.FixtureRequest) -> str:
    return request.param


def shape(seen: Seen, size: str) -> Any:
    """Return the size of a model as the formulas take it."""
    width, heads, groups, hidden, layers = seen[0]["sizes"][size]
    return formulas.Shape(layers, width, hidden, groups * width // heads)


def solved(counted: dict[str, Any], start: str) -> list[int]:
    """Return the iterations that the solver reports, of operators that all began alike."""
    starts, iterations = zip(*counted["solved"], strict=True)
    assert set(starts) == {start}
    return list(iterations)


def expected(items: list[Any], start: str, iterations: list[int]) -> tuple[float, float, float]:
    """Return the bytes that are read, and the operations of products and of projections."""
    each = [formulas.flops(item, start, t) for item, t in zip(items, iterations, strict=True)]
    read = sum(formulas.bytes_read(item, start, t) for item, t in zip(items, iterations, strict=True))
    return read, sum(item.products for item in each), sum(item.projections for item in each)


def all_reduces(counted: dict[str, Any]) -> list[tuple[int, int]]:
    return [(elements, size) for name, _, elements, size in counted["collectives"] if name == "all_reduce"]


def test_one_process_reads_and_computes_what_the_formulas_say(seen: Seen, size: str, start: str):
    counted = seen[0][f"{size} whole"][STARTS.index(start)]
    items = formulas.operators(shape(seen, size))
    read, products, projections = expected(items, start, solved(counted, start))
    assert counted["read"] == read
    assert counted["flops"] == pytest.approx(products + projections, rel=0.05)
    assert counted["collectives"] == []


def test_processes_with_all_weights_measure_disjoint_shares_without_a_word(seen: Seen, size: str, start: str):
    for rank in range(2):
        counted = seen[rank][f"{size} shared out"][STARTS.index(start)]
        model = shape(seen, size)
        items = formulas.operators(model)[: 2 * len(range(rank, model.layers, 2))]
        read, products, projections = expected(items, start, solved(counted, start))
        assert counted["read"] == read
        assert counted["flops"] == pytest.approx(products + projections, rel=0.05)
        assert counted["collectives"] == []


@pytest.mark.parametrize("layout", CUT)
def test_products_are_divided_among_processes_and_projections_are_not(seen: Seen, size: str, start: str, layout: str):
    both = [process[f"{size} {layout}"][STARTS.index(start)] for process in seen]
    iterations = solved(both[0], start)
    assert solved(both[1], start) == iterations
    read, products, projections = expected(formulas.operators(shape(seen, size)), start, iterations)
    assert sum(counted["read"] for counted in both) == read
    assert sum(counted["flops"] for counted in both) == pytest.approx(products + 2 * projections, rel=0.05)


@pytest.mark.parametrize("layout", CUT)
def test_processes_that_hold_shards_send_what_the_formulas_say(seen: Seen, size: str, start: str, layout: str):
    for process in seen:
        counted = process[f"{size} {layout}"][STARTS.index(start)]
        iterations, model = solved(counted, start), shape(seen, size)
        # Queries, keys and values are one matrix here, whose cut puts all values on the last process.
        stays = ("mlp",) if layout == "tensor parallel" else ()
        told = formulas.messages(model, start, iterations, stays)
        gains = model.width * len(iterations)
        blocks = [size for elements, size in all_reduces(counted) if elements > model.width and elements != gains]
        assert sum(blocks) == told.summed
        cut = layout != "tensor parallel"  # then gains are gathered before all take them from the first process
        assert [elements for elements, _ in all_reduces(counted)].count(gains) == 1 + cut
        sent, most = sum(size for _, size in all_reduces(counted)), told.summed + told.agreed + told.gathered * cut
        assert sent == pytest.approx(most, rel=0.05)
        assert sent <= most
        batches = [iterations[i : i + 8] for i in range(0, len(iterations), 8)]
        longest = [max(batch) for batch in batches]
        assert len(blocks) == sum(formulas.block_sums(start, batch, stays) for batch in batches)
        # Every batch looks at least once, and at most after every step.
        most = told.sums - (not cut)
        assert most - sum(longest) + len(longest) <= len(all_reduces(counted)) <= most
        assert {name for name, *_ in counted["collectives"]} == {"all_reduce"}


@pytest.mark.parametrize("layers", [3, 4])
def test_a_run_exchanges_one_vector_and_three_decisions_per_measurement(seen: Seen, layers: int):
    """Whether all have measured; whether all still see those weights when they are used; whether all have written."""
    decision = ["allreduce", "torch.int64", 1, 8]
    length = formulas.vector_length(layers, 2)
    for process in seen:
        trained = process[f"{layers} trained"]
        at = [i for i, (_, dtype, *_) in enumerate(trained) if dtype == "torch.float64"]
        assert len(at) == 3  # before the first step, after it and after the second
        for i in at:
            assert trained[i - 1 : i + 1] == [decision, ["allgather", "torch.float64", length, 8 * length]]
        between = [item for item in trained[at[1] + 1 : at[2]] if item[1] == "torch.int64" and item[0] != "broadcast"]
        assert between == 3 * [decision]


def test_the_documentation_quotes_the_tables(capsys: pytest.CaptureFixture[str]):
    formulas.print_costs()
    assert f"```text\n{capsys.readouterr().out}```\n" in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
